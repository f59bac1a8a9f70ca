"""Which weights of a training are exported: the last, the best, or a mean; the same after a stop anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from games import Do, DoLast, Stopped, read, weight_bits, without_seconds
from helpers import QUIET, load
from lightning import Trainer

from spin_lightning import (
    AtomicCheckpointIO,
    ExportPolicy,
    LoraAdapter,
    RowDataModule,
    RunCheckpoint,
    SftLightningModule,
    UserError,
    last_checkpoint,
)
from spin_lightning.stages.averaging import WeightAverage

Weights = dict[str, torch.Tensor]


class Sft:
    """A short training, with the raw weights and the held-out NLL of each measurement."""

    def __init__(self, model: str, rows: str, folder: Path, stop: Any = None, **settings: Any) -> None:
        self.folder, self.raw, self.nll = folder, {}, {}
        module = {"learning_rate": 3e-2, "lr_schedule": "constant", **settings.pop("module", {})}
        trainer = {"val_check_interval": 1, "max_epochs": 3, **settings.pop("trainer", {})}
        self.module = SftLightningModule(model, **module)
        self.data = RowDataModule(rows, batch_size=4, val_fraction=0.2, max_response_tokens=5)
        tell = DoLast(on_train_batch_end=self._note_weights, on_validation_epoch_end=self._note_nll)
        self.trainer = Trainer(
            **{**QUIET, "num_sanity_val_steps": -1, "plugins": [AtomicCheckpointIO()], **trainer},
            callbacks=[
                ExportPolicy(str(folder), **settings),
                RunCheckpoint(str(folder / "checkpoints"), every_n_steps=1),
                tell,
                *([stop] if stop else []),
            ],
        )
        self.trainer.fit(self.module, self.data, ckpt_path=last_checkpoint(folder))

    def _note_weights(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.raw[trainer.global_step] = {n: w.detach().clone() for n, w in module.policy.named_parameters()}

    def _note_nll(self, trainer: Trainer, module: Any) -> None:
        self.nll[trainer.global_step] = float(trainer.callback_metrics["val/nll"])

    @property
    def summary(self) -> dict[str, Any]:
        return without_seconds(read(self.folder / "summary.json"))

    @property
    def exported(self) -> Weights:
        return dict(load(self.folder / "policy").named_parameters())


def assert_same(found: Weights, expected: Weights, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, **(tolerance or {"rtol": 0, "atol": 0}))


def test_the_best_weights_are_exported_and_the_summary_says_which(model: str, rows: str, tmp_path: Path) -> None:
    fast = {"learning_rate": 0.3}
    plain = Sft(model, rows, tmp_path / "plain", module=dict(fast))
    kept = Sft(model, rows, tmp_path / "kept", keep="best", module=dict(fast))
    assert kept.nll == plain.nll and len(kept.nll) == 7  # training and what is measured are as without it
    best = min(kept.nll, key=lambda step: kept.nll[step])
    assert 0 < best < 6, kept.nll  # neither the start nor the end, or the test shows nothing
    assert_same(kept.exported, plain.raw[best])
    assert_same(plain.exported, plain.raw[6])
    assert {**kept.summary, "retention": 0} == {
        **{**plain.summary, "retention": 0},
        **{"best_step": best, "val_nll": kept.nll[best], "last_val_nll": plain.summary["val_nll"]},
    }
    assert plain.summary["trained_tokens"] == sum(
        3 * (len(prompt.prompt_ids) + len(prompt.real_ids)) for prompt in plain.data.prompts
    )


def test_where_training_only_harms_the_weights_of_the_start_are_exported(model: str, rows: str, tmp_path: Path) -> None:
    """And patience ends it after so many measurements, in the middle of an epoch."""
    run = Sft(model, rows, tmp_path, keep="best", patience=3, module={"learning_rate": 10.0})
    assert list(run.nll) == [0, 1, 2, 3] and min(run.nll, key=lambda step: run.nll[step]) == 0
    assert run.summary["best_step"] == 0 and run.summary["updates"] == 3
    assert run.summary["val_nll"] == run.nll[0] and run.summary["last_val_nll"] == run.nll[3]
    assert "retention" not in run.summary  # which was measured of other weights
    assert_same(run.exported, dict(load(model).named_parameters()))


def test_the_mean_of_the_weights_is_measured_and_exported_and_training_goes_on_without_it(
    model: str, rows: str, tmp_path: Path
) -> None:
    plain = Sft(model, rows, tmp_path / "plain")
    run = Sft(model, rows, tmp_path / "mean", average_weights=0.5)
    for step, weights in plain.raw.items():
        assert_same(run.raw[step], weights)
    shares = [0.5 ** (6 - k) * 0.5 / (1 - 0.5**6) for k in range(1, 7)]
    assert sum(shares) == pytest.approx(1)
    names = plain.raw[1]
    expected = {n: sum(share * plain.raw[k][n] for k, share in enumerate(shares, 1)) for n in names}
    assert_same(run.exported, expected, rtol=1e-5, atol=1e-6)
    assert run.summary["average_weights"] == 0.5 and "average_weights" not in plain.summary
    # the first mean is of one update
    assert run.nll[1] == plain.nll[1] and run.nll[2] != plain.nll[2]
    again = Trainer(**QUIET).validate(SftLightningModule(str(tmp_path / "mean" / "policy")), run.data, verbose=False)
    assert run.summary["val_nll"] == run.nll[6] == pytest.approx(again[0]["val/nll"], rel=1e-5)


def test_an_adapter_is_averaged_alone(model: str, rows: str, tmp_path: Path) -> None:
    run = Sft(model, rows, tmp_path, average_weights=0.9, keep="best", module={"adapter": LoraAdapter(r=2)})
    state = torch.load(last_checkpoint(tmp_path), weights_only=True)["callbacks"]["ExportPolicy"]
    kept = [*state["average"]["weights"], *state["best"]["weights"]]
    assert kept and all("lora_" in name for name in kept)
    again = Trainer(**QUIET).validate(SftLightningModule(str(tmp_path / "policy")), run.data, verbose=False)
    assert run.summary["val_nll"] == pytest.approx(again[0]["val/nll"], rel=1e-4)


@pytest.mark.no_cover
@pytest.mark.parametrize("interval", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_anywhere_it_exports_the_same(model: str, rows: str, tmp_path: Path, interval: int) -> None:
    """With checkpoints that were saved between an update and the measurement that follows it."""
    settings: dict[str, Any] = {"keep": "best", "average_weights": 0.5, "patience": 4}
    settings["trainer"] = {"val_check_interval": interval, "check_val_every_n_epoch": None, "max_epochs": 2}
    whole = Sft(model, rows, tmp_path / "whole", **settings)
    assert whole.summary["best_step"] == 4
    for step in range(1, whole.trainer.global_step + 1):
        for hook in ("on_train_batch_end", "on_validation_epoch_end"):

            def end(trainer: Trainer, *_: Any, step: int = step) -> None:
                if trainer.global_step == step:
                    raise Stopped

            folder = tmp_path / f"{hook}_{step}"
            kind = DoLast if "train" in hook else Do
            try:
                Sft(model, rows, folder, kind(**{hook: end}), **settings)
            except Stopped:
                run = Sft(model, rows, folder, **settings)
                assert run.summary == whole.summary, (hook, step)
                assert weight_bits(run.module.policy) == weight_bits(whole.module.policy), (hook, step)


def test_what_cannot_be_is_refused(model: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"export.keep must be last or best, got 'first'"):
        ExportPolicy(keep="first")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"goes with export.keep: best; got 2 with 'last'"):
        ExportPolicy(patience=2)
    with pytest.raises(UserError, match=r"export.average_weights must be between 0 and 1, got 1"):
        ExportPolicy(average_weights=1)
    data = RowDataModule(rows, val_fraction=0)
    trainer = Trainer(max_epochs=1, callbacks=[ExportPolicy(str(tmp_path), keep="best")], **QUIET)
    with pytest.raises(UserError, match=r"no row is held out. Give data.val_data or raise data.val_fraction"):
        trainer.fit(SftLightningModule(model), data)


def test_an_average_goes_on_where_it_was() -> None:
    one, other = WeightAverage(0.9), WeightAverage(0.9)
    for step in range(5):
        one.add({"w": torch.tensor([float(step) ** 2])})
    for step in range(5):
        other.add({"w": torch.tensor([float(step) ** 2])})
        state = other.state_dict()
        other = WeightAverage(0.9)
        other.load_state_dict(state)
    assert torch.equal(one.weights["w"], other.weights["w"])
