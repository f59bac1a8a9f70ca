"""A run keeps its report current, and is the same run without it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from games import Do, Game
from helpers import args_of
from lightning.pytorch.loggers import CSVLogger

from spin_lightning import ExportPolicy, WriteReport
from spin_lightning.cli.commands import main, run
from spin_lightning.reports import callback
from spin_lightning.stages.health import forget_remarks, keep_remark


@pytest.fixture(scope="module")
def reported(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The game of ``plain``, with a report; and the reports as they were when an iteration had ended."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    seen: list[str] = []
    look = Do(on_iteration_end=lambda *args: seen.append((folder / "report.html").read_text()))
    callbacks = [WriteReport(str(folder)), look]
    logger = CSVLogger(folder, name="logs", flush_logs_every_n_steps=1)
    game = Game(model, rows, folder, callbacks=callbacks, trainer={"logger": logger}).play()
    game.folder, game.seen = folder, seen  # type: ignore[attr-defined]
    return game


def test_it_is_there_from_the_first_iteration_on_and_says_when_the_run_is_over(reported):
    first, _ = reported.seen
    assert "running when this was made" in first and "1 of 2 iterations are over" in first
    last = (reported.folder / "report.html").read_text()
    assert "It is over: all 2 iterations were played" in last and "running when" not in last
    nll = [json.loads((reported.folder / name).read_text()) for name in ("start.json", "iteration_1/summary.json")]
    assert f"from {nll[0]['val/nll']:.3f} to {nll[1]['val_nll']:.3f} nats a response" in last
    assert "2+3?" in last and last.count("cut at the length cap") > 8 and "Not in this report" not in last


def test_the_folder_is_that_of_the_callback_that_has_one(reported):
    path = reported.folder / "report.html"
    path.unlink()
    report = WriteReport()
    callbacks = [report, ExportPolicy(str(reported.folder))]
    trainer = SimpleNamespace(callbacks=callbacks, datamodule=SimpleNamespace(), fast_dev_run=False)
    report.teardown(trainer, None, "fit")
    assert "Self-play fine-tuning" in path.read_text()


def test_remarks_on_health_are_kept_and_shown(reported):
    kept = json.loads((reported.folder / "health.json").read_text())["remarks"]
    assert [(remark["iteration"], remark["sentence"]) for remark in kept] == reported.health.remarks != []
    assert kept[0]["sentence"] in (reported.folder / "report.html").read_text()


def test_nothing_that_is_trained_depends_on_it(reported, plain):
    assert reported.losses == plain.losses and reported.weights == plain.weights
    before, now = (
        json.loads((game.folder / place).read_text())
        for game, place in ((plain, "run/run.json"), (reported, "run.json"))
    )
    assert before == now


def test_a_report_that_fails_ends_no_run_and_is_said_once(model, rows, tmp_path, capsys, monkeypatch):
    calls = []

    def fail(*args: Any, **options: Any) -> None:
        calls.append(args)
        raise OSError("no space left")

    monkeypatch.setattr(callback, "write_report", fail)
    Game(model, rows, tmp_path / "run", callbacks=[WriteReport()]).play()
    note = "note: report.html could not be written, and the run goes on without it (OSError: no space left)."
    assert capsys.readouterr().out.count(note) == 1 and len(calls) == 1
    assert (tmp_path / "run" / "game.json").exists()


def test_it_takes_little_of_the_time_of_short_iterations(tmp_path, monkeypatch):
    class Clock:
        now = 1000.0

    clock, written = Clock(), []

    def write(folder: Path, running: bool) -> None:
        clock.now += 0.5
        written.append(running)

    monkeypatch.setattr(callback, "write_report", write)
    monkeypatch.setattr(callback.time, "monotonic", lambda: clock.now)
    trainer = Do(fast_dev_run=False, datamodule=None, callbacks=[])
    report = WriteReport(str(tmp_path))
    for _ in range(100):
        clock.now += 1.0
        report.on_iteration_end(trainer, None, 0, {})  # type: ignore[arg-type]
    assert 3 <= len(written) <= 5  # half a second in at least 25
    report.teardown(trainer, None, "fit")  # type: ignore[arg-type]
    assert written[-1] is False


def test_the_command_line_writes_it_unless_it_is_told_not_to(model, rows, tmp_path):
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    main(args_of("sft", model, rows, tmp_path / "with", *quiet))
    assert "Supervised fine-tuning (SFT)" in (tmp_path / "with" / "report.html").read_text()
    assert "report:\n  enabled: true\n" in (tmp_path / "with" / "config.yaml").read_text()
    run(args_of("sft", model, rows, tmp_path / "without", "--report.enabled=false", *quiet))
    assert not (tmp_path / "without" / "report.html").exists()


def test_a_remark_is_kept_once_and_forgotten_where_its_iteration_begins_again(tmp_path):
    for iteration, sentence in ((0, "a"), (1, "b"), (1, "b"), (None, "c"), (2, "d")):
        keep_remark(tmp_path, iteration, sentence)
    forget_remarks(tmp_path, 2)
    kept = json.loads((tmp_path / "health.json").read_text())["remarks"]
    assert [(remark["iteration"], remark["sentence"]) for remark in kept] == [(0, "a"), (1, "b"), (None, "c")]
    (tmp_path / "health.json").write_text("{")
    keep_remark(tmp_path, 0, "a")  # a damaged record ends no run
    assert json.loads((tmp_path / "health.json").read_text()) == {"remarks": [{"iteration": 0, "sentence": "a"}]}
