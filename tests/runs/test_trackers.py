"""Trackers beside a run's own logs: told all but secrets, continued by the same command, and never in the way."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import args_of, write_rows
from lightning.pytorch.loggers import Logger

from spin_lightning.cli.commands import main, run
from spin_lightning.runs.trackers import TRACKERS
from spin_lightning.types import UserError

SECRET = "sk-abcdefghijklmnopqrstuvwx0123"
QUICK = [
    "--self_play.iterations=1",
    "--self_play.epochs=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.batch_size=4",
    "--data.val_fraction=0.2",
    "--data.generator.max_new_tokens=4",
    "--model.learning_rate=1e-3",
    "--model.loss=games.SecretiveLoss",
    f"--model.loss.push_token={SECRET}",
]


class NotebookLogger(Logger):
    """Keeps what it is told in a file of lines, and breaks down where it is asked to."""

    def __init__(self, file: str, id: str | None = None, breaks: str = "", api_key: str = "") -> None:
        super().__init__()
        self.file, self.id, self.breaks = Path(file), id, breaks

    @property
    def experiment(self) -> str:
        if self.breaks == "experiment":
            raise ConnectionError(f"no route to https://me:{SECRET}@tracker")
        self.id = self.id or "run-7"
        return self.id

    name = property(lambda self: "notebook")
    version = property(lambda self: self.id)

    def write(self, kind: str, value: Any) -> None:
        if self.breaks == kind:
            raise ConnectionError("the tracker is down")
        with self.file.open("a") as file:
            file.write(json.dumps([kind, self.id, value]) + "\n")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.write("settings", params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.write("metrics", {**metrics, "step": step})


class WandbLogger(NotebookLogger):
    """By the name of one whose run is continued by ``id``."""


@pytest.fixture
def fit(tmp_path, model):
    rows = write_rows(tmp_path / "rows.jsonl")

    def play(kind: str, *flags: str) -> list[list[Any]]:
        args = [*args_of("fit", model, rows, tmp_path / "run"), *QUICK, f"--trainer.logger+=test_trackers.{kind}"]
        run([*args, f"--trainer.logger.file={tmp_path}/notes", f"--trainer.logger.api_key={SECRET}", *flags])
        return [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]

    return play


def rows_of(path: Path) -> list[dict[str, str]]:
    with next(path.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def test_a_tracker_is_told_metrics_and_settings_without_secrets_beside_the_run_s_own_logs(fit, tmp_path):
    notes = fit("NotebookLogger")
    (settings,) = [value for kind, _, value in notes if kind == "settings"]
    assert settings["model"]["beta"] == 1.0 and settings["self_play"]["iterations"] == 1
    assert settings["model"]["loss"]["init_args"] == {"push_token": "***"} and "logger" not in settings["trainer"]
    names = {name for kind, _, value in notes if kind == "metrics" for name in value}
    assert {"loss", "rewards/margins", "rewards/accuracies", "val/nll", "lr"} <= names
    own = rows_of(tmp_path / "run" / "logs")
    assert sum(bool(row["loss"]) for row in own) == sum(
        "loss" in value for kind, _, value in notes if kind == "metrics"
    )
    assert list((tmp_path / "run" / "tensorboard").rglob("events*"))
    everywhere = "".join(path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert SECRET not in everywhere + (tmp_path / "notes").read_text()


def test_the_same_command_continues_the_tracker_s_run(fit, tmp_path):
    fit("WandbLogger", "--trainer.max_time=00:00:00:00", "--trainer.logger.id=mine")
    (tmp_path / "run" / "game.json").unlink(missing_ok=True)
    assert json.loads((tmp_path / "run" / TRACKERS).read_text()) == {"test_trackers.WandbLogger": "mine"}
    assert {number for _, number, _ in fit("WandbLogger", "--self_play.iterations=2")} == {"mine"}


def test_a_tracker_that_cannot_begin_is_refused_before_anything_is_made(fit, tmp_path):
    with pytest.raises(UserError, match=r"the tracker NotebookLogger cannot begin: no route to .*leave it out of"):
        fit("NotebookLogger", "--trainer.logger.breaks=experiment")
    assert not (tmp_path / "run" / "iteration_0").exists()


@pytest.mark.parametrize("breaks", ["metrics", "settings"])
def test_a_run_outlives_its_tracker_and_says_so_once(breaks, fit, tmp_path, capsys):
    (tmp_path / "notes").touch()
    fit("NotebookLogger", f"--trainer.logger.breaks={breaks}")
    said = [line for line in capsys.readouterr().out.splitlines() if "the tracker NotebookLogger" in line]
    assert len(said) == 1 and said[0].endswith("It said: the tracker is down.")
    assert (tmp_path / "run" / "game.json").exists() and any(row["loss"] for row in rows_of(tmp_path / "run" / "logs"))


def test_without_any_logger_nothing_is_logged(fit, tmp_path, model):
    rows = write_rows(tmp_path / "rows.jsonl")
    run([*args_of("fit", model, rows, tmp_path / "run"), *QUICK, "--trainer.logger=false"])
    assert not (tmp_path / "run" / "logs").exists() and not (tmp_path / "run" / TRACKERS).exists()


def test_a_package_that_is_missing_is_named(fit, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(SystemExit):
        main(["fit", "--model.model_name_or_path=x", "--data.train_data=y", "--trainer.logger=TrackioLogger"])
    assert "needs the package 'trackio'. Install spin-lightning[trackio]." in capsys.readouterr().err
