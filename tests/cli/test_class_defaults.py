"""Whatever class is chosen begins with its own defaults; what was set is kept."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_lightning import ResponseGenerator, SpinLoss, TransformersGenerator
from spin_lightning.cli.stage_cli import parse_settings

OPTIMIZERS = [
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]


class ShortGenerator(TransformersGenerator):
    """A plugin whose defaults are its own."""

    def __init__(self, max_new_tokens: int = 32, temperature: float = 0.5, batch_size: int = 2) -> None:
        super().__init__(max_new_tokens, temperature, batch_size=batch_size)


class PinnedLoss(SpinLoss):
    """The same for a loss."""

    def __init__(self, link: Any = "hinge", nll_weight: float = 0.7) -> None:
        super().__init__(link, nll_weight=nll_weight)


def parsed(stage: str, key: str, *flags: str) -> tuple[str, dict[str, Any]]:
    """Class and settings of one setting of the model or the data."""
    value: Any = parse_settings(stage, ["--model.model_name_or_path=a/b", "--data.train_data=c", *flags])
    for name in key.split("."):
        value = value[name]
    return value.class_path.rpartition(".")[2], vars(value.init_args)


def own(kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_its_own_defaults(name: str) -> None:
    expected = own(getattr(torch.optim, name))
    chosen, settings = parsed("fit", "model.optimizer", f"--model.optimizer=torch.optim.{name}")
    assert chosen == name
    for key in settings:
        assert settings[key] == pytest.approx(float(expected[key]) if key == "lr" else expected[key]), key
    assert "weight_decay" not in expected or settings["weight_decay"] == expected["weight_decay"]


@pytest.mark.parametrize(
    ("stage", "spelling"),
    [
        ("fit", "torch.optim.SGD"),
        ("sft", "SGD"),
        ("fit", '{"class_path": "torch.optim.SGD"}'),
        ("sft", "a file"),
        ("fit", "over a file of all settings"),
    ],
)
def test_sgd_has_no_weight_decay_however_it_is_chosen(stage: str, spelling: str, tmp_path: Path) -> None:
    flags = [f"--model.optimizer={spelling}"]
    file = tmp_path / "config.yaml"
    if "file" in spelling:
        settings = own(torch.optim.AdamW) if "over" in spelling else {}
        class_path = "torch.optim.AdamW" if settings else "torch.optim.SGD"
        optimizer = {"class_path": class_path, "init_args": settings} if settings else {"class_path": class_path}
        file.write_text(json.dumps({"model": {"optimizer": optimizer}}))
        flags = [f"--config={file}", *(["--model.optimizer=SGD"] if settings else [])]
    name, settings = parsed(stage, "model.optimizer", *flags)
    assert (name, settings["weight_decay"], settings["momentum"]) == ("SGD", 0.0, 0.0)
    name, settings = parsed(stage, "model.optimizer", *flags, "--model.optimizer.momentum=0.5")
    assert (name, settings["weight_decay"], settings["momentum"]) == ("SGD", 0.0, 0.5)


def test_the_default_optimizer_keeps_its_defaults() -> None:
    assert parsed("fit", "model.optimizer") == ("AdamW", own(torch.optim.AdamW))
    name, settings = parsed("fit", "model.optimizer", "--model.optimizer.weight_decay=0.5")
    assert (name, settings) == ("AdamW", {**own(torch.optim.AdamW), "weight_decay": 0.5})


def test_what_was_set_is_kept_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": 0.3, "betas": [0.8, 0.99]}}
    file.write_text(json.dumps({"model": {"optimizer": optimizer}}))
    name, settings = parsed("fit", "model.optimizer", f"--config={file}", "--model.optimizer=SGD")
    assert (name, settings["weight_decay"]) == ("SGD", 0.3)
    said = capsys.readouterr().out
    assert said.count("torch.optim.SGD keeps what was set for torch.optim.AdamW: weight_decay\n") == 1
    # the value of the default, given for the class that is chosen
    flags = ["--model.optimizer=SGD", "--model.optimizer.weight_decay=0.01"]
    assert parsed("fit", "model.optimizer", *flags)[1]["weight_decay"] == 0.01
    assert "keeps" not in capsys.readouterr().out


def test_generators_and_losses_have_their_own_defaults_too(tmp_path: Path) -> None:
    name, settings = parsed("fit", "data.generator", f"--data.generator={__name__}.ShortGenerator")
    assert (name, settings) == ("ShortGenerator", {"max_new_tokens": 32, "temperature": 0.5, "batch_size": 2})
    flags = ["--data.generator.max_new_tokens=7", f"--data.generator={__name__}.ShortGenerator"]
    assert parsed("sft", "data.generator", *flags)[1] == {"max_new_tokens": 7, "temperature": 0.5, "batch_size": 2}
    name, settings = parsed("fit", "model.loss", f"--model.loss={__name__}.PinnedLoss")
    assert (name, settings) == ("PinnedLoss", {"link": "hinge", "nll_weight": 0.7})
    assert issubclass(ShortGenerator, ResponseGenerator)
    name, settings = parsed("fit", "model.loss", "--model.loss=AlphaSpinLoss", "--model.loss.alpha=0.4")
    assert (name, settings["alpha"], settings["link"]) == ("AlphaSpinLoss", 0.4, "logistic")
