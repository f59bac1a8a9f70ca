"""What tests play with, unless a file has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from games import Do, Game
from helpers import save_tiny_model, write_rows
from lightning.pytorch.loggers import CSVLogger
from several import Forked

from spin_lightning.cli import children
from spin_lightning.cli.commands import main

collect_ignore = ["plugin_example"]  # a package of its own, which test_plugin_example.py installs

torch.set_num_threads(1)  # sums are added up in the same order on every machine
torch.set_warn_always(True)  # not only the first time of a process: each test is told of what it does itself


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model of a few thousand weights, with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten short sums."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 10)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], str]:
    """What the command line prints to stderr as it ends with exit code 2."""

    def run(args: Sequence[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(args)
        printed = capsys.readouterr().err
        assert stop.value.code == 2, printed
        assert "Traceback" not in printed
        return printed

    return run


@pytest.fixture(scope="module")
def plain(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Game:
    """One ordinary game, played once, for the tests that only look at what it left behind."""
    folder = tmp_path_factory.mktemp("plain")
    hooks: list[tuple[Any, ...]] = []
    names = (
        "on_iteration_start",
        "on_generation_end",
        "on_train_epoch_start",
        "on_validation_end",
        "on_iteration_end",
        "on_fit_end",
    )
    tell = Do(**{name: lambda trainer, module, *args, name=name: hooks.append((name, *args[:1])) for name in names})
    game = Game(
        model, rows, folder / "run", callbacks=[tell], trainer={"logger": CSVLogger(folder, name="logs", version="0")}
    ).play()
    game.hooks, game.folder = hooks, folder  # type: ignore[attr-defined]
    return game


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> type[Forked]:
    """Commands that start others start them without the time that imports take."""
    monkeypatch.setattr(children.subprocess, "Popen", Forked)
    monkeypatch.setattr(Forked, "commands", [])
    monkeypatch.setattr(Forked, "fates", {})
    return Forked
