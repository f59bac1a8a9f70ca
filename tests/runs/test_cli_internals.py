"""What the command line uses of LightningCLI's undocumented state: each test tells what a new version broke."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import TorchCheckpointIO

from spin_lightning.runs.lightning_internals import FlagsWin, made_for_trainer, parsers_of


class Sized(BoringModel):
    """A module with a setting."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.size = size


class Idle(LightningCLI):
    """A command line that makes everything and trains nothing."""

    def __init__(self, *args: str) -> None:
        super().__init__(
            Sized, save_config_callback=None, args=["fit", "--seed_everything=0", "--trainer.logger=false", *args]
        )

    def instantiate_trainer(self, **settings: Any) -> Any:
        self.made = {name: made_for_trainer(self, name) for name in ("plugins", "callbacks")}
        return super().instantiate_trainer(**settings)

    def fit(self, model: Any, **settings: Any) -> None:
        self.given = settings


class IdleOfFlags(FlagsWin, Idle):
    """The same, as ours is."""


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch):
    """LightningCLI warns where it is given arguments and the process has some too."""
    monkeypatch.setattr("sys.argv", ["spin-lightning"])


@pytest.fixture
def checkpoint(tmp_path):
    torch.save({"hyper_parameters": {"size": 5}}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_a_checkpoint_s_hyper_parameters_do_not_win_over_flags(checkpoint):
    flags = ["--model.size=3", f"--ckpt_path={checkpoint}"]
    assert Idle(*flags).model.size == 5  # Lightning's own; if this fails, FlagsWin is needed no more
    cli = IdleOfFlags(*flags)
    assert cli.model.size == 3 and cli.given["ckpt_path"] == str(checkpoint)


def test_the_file_of_a_checkpoint_is_not_even_read(tmp_path):
    (tmp_path / "no.ckpt").write_bytes(b"no checkpoint")
    assert IdleOfFlags(f"--ckpt_path={tmp_path / 'no.ckpt'}").model.size == 1


def test_every_subcommand_has_a_parser_with_its_defaults():
    parsers = parsers_of(Idle("--model.size=3"))
    assert set(parsers) == {"fit", "validate", "test", "predict"}
    assert parsers["fit"].get_defaults()["model"].size == 1
    assert parsers["fit"].get_defaults()["trainer"]["precision"] is None


def test_what_was_made_for_the_trainer_is_a_list_of_objects():
    assert Idle().made == {"plugins": [], "callbacks": []}
    cli = Idle("--trainer.plugins=lightning.pytorch.plugins.TorchCheckpointIO", "--trainer.callbacks=[ModelSummary]")
    assert [type(made) for made in cli.made["plugins"]] == [TorchCheckpointIO]
    assert [type(made) for made in cli.made["callbacks"]] == [ModelSummary]
