"""A run's record holds every setting that decides its results, wherever in a class's bases it is declared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from spin_lightning import (
    DpoLightningModule,
    ExportPolicy,
    RewardLightningModule,
    RowDataModule,
    SelfPlay,
    SftLightningModule,
    SpinLightningModule,
    SpinLoss,
    SyntheticDataModule,
    TransformersGenerator,
)
from spin_lightning.runs.settings import check_finished, parameters_of, settings_of
from spin_lightning.types import UserError

#: What decides how a policy is trained, whatever the stage.
OF_POLICY = """model_name_or_path learning_rate lr_schedule warmup_ratio dropout attn_implementation revision
 trust_remote_code kernels adapter""".split()
#: What decides which rows are trained on, and how.
OF_ROWS = """batch_size columns data_revision format max_prompt_tokens max_rows prompt_template seed split
 val_fraction""".split()
OF_GAME = "answers_per_prompt history keep_prompts_together".split()


class MyModule(SpinLightningModule):
    """A user's own, with one setting more."""

    def __init__(self, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = extra


class MyData(SyntheticDataModule):
    """The same for the data."""

    def __init__(self, *args: Any, shuffle: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shuffle = shuffle


class MyLoss(SpinLoss):
    """The same for a loss."""

    def __init__(self, tau: float = 0.3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tau = tau


def settings(module: Any, data: Any = None) -> dict[str, Any]:
    trainer = trainer_of(module)
    data = data or SyntheticDataModule("rows.jsonl")
    return settings_of(trainer, module, data, module.optimizer([torch.zeros(1, requires_grad=True)]))


def trainer_of(module: Any) -> L.Trainer:
    callbacks = [SelfPlay()] if isinstance(module, SpinLightningModule) else []
    return L.Trainer(accelerator="cpu", logger=False, callbacks=callbacks, max_epochs=6)


def of(section: str, found: dict[str, Any]) -> set[str]:
    return {key.removeprefix(f"{section}.") for key in found if key.startswith(f"{section}.")}


def test_every_setting_of_a_stage_is_recorded_wherever_it_is_declared(model: str) -> None:
    common = {"model": OF_POLICY, "data": [*OF_ROWS, *OF_GAME]}
    for module, own in (
        (SpinLightningModule(model), ["beta", "loss", "opponent"]),
        (RewardLightningModule(model), ["centring"]),
        (DpoLightningModule(model), ["beta", "loss"]),
        (SftLightningModule(model), ["average", "max_updates", "kl_to_start"]),
    ):
        found = settings(module)
        assert {key for key in of("model", found) if not key.startswith("optimizer.")} == {*common["model"], *own}
        assert {key for key in of("data", found) if not key.startswith("generator.")} == set(common["data"])
        assert of("data.generator", found) == {"generator", "max_new_tokens", "temperature", "top_p"}
    rows = settings(module, RowDataModule("rows.jsonl"))
    assert of("data", rows) == {*OF_ROWS, "max_response_tokens"}
    assert (found["model.learning_rate"], found["model.warmup_ratio"], found["data.val_fraction"]) == (2e-5, 0.1, 0.05)


def test_what_sft_exports_is_recorded(model: str) -> None:
    callback = ExportPolicy("runs/here", keep="best", average_weights=0.9)
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[callback], max_epochs=6)
    module = SftLightningModule(model)
    optimizer = module.optimizer([torch.zeros(1, requires_grad=True)])
    found = of("export", settings_of(trainer, module, RowDataModule("rows.jsonl"), optimizer))
    assert found == {"keep", "patience", "average_weights"}


def test_what_a_class_of_the_user_s_hands_on_is_recorded_too(model: str) -> None:
    plain = settings(SpinLightningModule(model, beta=0.5, warmup_ratio=0.25))
    mine = settings(
        MyModule(model_name_or_path=model, beta=0.5, warmup_ratio=0.25, extra=3), MyData("rows.jsonl", seed=7)
    )
    assert mine == {**plain, "model.extra": 3, "data.shuffle": True, "data.seed": 7}
    loss = settings(SpinLightningModule(model, loss=MyLoss(link="hinge")))["model.loss"]
    assert (loss["class"], loss[".tau"], loss[".link"]) == ("MyLoss", 0.3, "hinge")


def test_settings_are_read_down_to_the_base_that_hands_on_nothing() -> None:
    class Base:
        def __init__(self, a: int, b: int = 1) -> None: ...

    class Handing(Base):
        def __init__(self, c: int = 2, b: int = 5, **rest: int) -> None: ...

    class Silent(Handing): ...

    class Closed(Base):
        def __init__(self, d: int = 3) -> None: ...

    assert {name: p.default for name, p in parameters_of(Silent).items() if name != "a"} == {"c": 2, "b": 5}
    assert list(parameters_of(Silent)) == ["c", "b", "a"] and list(parameters_of(Closed)) == ["d"]
    assert list(parameters_of(type("Plain", (), {}))) == []


@pytest.fixture
def check(tmp_path: Path, model: str) -> Any:
    """Compares a module with a run that is over, whose record has the given settings."""

    def compare(module: Any, recorded: dict[str, Any], data: Any = None) -> None:
        path = tmp_path / "run.json"
        path.write_text(json.dumps({"settings": recorded, "changes": [], "versions": {}}))
        check_finished(trainer_of(module), module, data or SyntheticDataModule("rows.jsonl"), path, [])

    return compare


def test_a_changed_setting_is_refused_wherever_it_is_declared(model: str, check: Any) -> None:
    record = settings(MyModule(model_name_or_path=model))
    check(MyModule(model_name_or_path=model), record)
    for changes in ({"warmup_ratio": 0.5}, {"beta": 2.0}, {"extra": 2}):
        (name,) = changes
        with pytest.raises(UserError, match=rf"model\.{name}: .* -> {changes[name]}"):
            check(MyModule(model_name_or_path=model, **changes), record)
    with pytest.raises(UserError, match=r"data\.val_fraction: 0\.05 -> 0\.2"):
        check(MyModule(model_name_or_path=model), record, MyData("rows.jsonl", val_fraction=0.2))


def test_a_setting_that_is_newer_than_the_record_had_its_default(model: str, check: Any) -> None:
    record = settings(SpinLightningModule(model))
    del record["model.warmup_ratio"]
    check(SpinLightningModule(model), record)
    with pytest.raises(UserError, match=r"model\.warmup_ratio: 0\.1 -> 0\.5"):
        check(SpinLightningModule(model, warmup_ratio=0.5), record)


def test_a_record_that_holds_only_a_class_s_own_settings_goes_on(model: str, check: Any) -> None:
    """Earlier versions did not read what a class hands on to its base."""
    record = settings(MyModule(model_name_or_path=model, extra=3))
    record = {key: value for key, value in record.items() if not key.startswith("model.") or "optimizer" in key}
    record["model.extra"] = 3
    check(MyModule(model_name_or_path=model, extra=3, beta=0.5), record)
    with pytest.raises(UserError, match=r"model\.extra: 3 -> 4"):
        check(MyModule(model_name_or_path=model, extra=4, beta=0.5), record)
    record = settings(SpinLightningModule(model, loss=MyLoss(link="hinge")))
    record["model.loss"] = {"class": "MyLoss", ".tau": 0.3}
    check(SpinLightningModule(model, loss=MyLoss(link="hinge")), record)
    with pytest.raises(UserError, match=r"model\.loss: .*'\.tau': 0\.3.* -> .*'\.tau': 0\.4"):
        check(SpinLightningModule(model, loss=MyLoss(tau=0.4)), record)


def test_a_record_of_sft_with_a_sampler_goes_on_with_the_cap_it_had(model: str, check: Any) -> None:
    """Every stage had one once; of it SFT used the cap on responses alone."""
    module = SftLightningModule(model)
    record = settings(module, SyntheticDataModule("rows.jsonl", generator=TransformersGenerator(max_new_tokens=5)))
    assert record["data.generator.max_new_tokens"] == 5 and "data.max_response_tokens" not in record
    check(module, record, RowDataModule("rows.jsonl", max_response_tokens=5))
    with pytest.raises(UserError) as refusal:
        check(module, record, RowDataModule("rows.jsonl", max_response_tokens=6))
    (shown,) = [line for line in str(refusal.value).splitlines() if " -> " in line]
    assert shown == "  data.max_response_tokens: 5 -> 6"
    check(module, settings(module, RowDataModule("rows.jsonl")), RowDataModule("rows.jsonl"))
    with pytest.raises(UserError, match=r"data\.answers_per_prompt: 1 -> 2"):
        check(
            SpinLightningModule(model),
            settings(SpinLightningModule(model)),
            SyntheticDataModule("a", answers_per_prompt=2),
        )
