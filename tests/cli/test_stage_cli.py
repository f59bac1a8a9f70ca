"""A stage is a record: what it says is what its command does, and no other file knows its word."""

from __future__ import annotations

import json
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from spin_lightning import SftLightningModule, UserError
from spin_lightning.cli.commands import COMMANDS, OVERVIEW, STAGES, Command, run
from spin_lightning.cli.stage_cli import parse_settings
from spin_lightning.runs.checkpoints import hash_file
from spin_lightning.runs.files import sha256_of
from spin_lightning.stages.stage import Stage


class Repeated(SftLightningModule):
    """A stage that is not the package's: maximum likelihood with a setting of its own."""

    def __init__(self, model_name_or_path: str, weight: float = 2.0, **shared: Any) -> None:
        super().__init__(model_name_or_path, **shared)
        self.weight = weight


def _refuse_many_epochs(settings: Any) -> None:
    if settings.trainer.max_epochs > 3:
        raise UserError(f"trainer.max_epochs must be at most 3 here, got {settings.trainer.max_epochs!r}.")


STAGE = Stage(
    module=f"{__name__}.Repeated",
    data="spin_lightning.RowDataModule",
    callbacks={"export": "spin_lightning.ExportPolicy"},
    folder="export",
    over_file="summary.json",
    mark="model.weight",
    defaults={"data.batch_size": 5},
    links={"trainer.max_epochs": (("model.weight",), int)},
    is_over=lambda result, settings: result["updates"] > 2,
    refuse=_refuse_many_epochs,
)


@pytest.fixture
def repeat(monkeypatch: pytest.MonkeyPatch, model: str, rows: str, tmp_path: Path) -> list[str]:
    """A command for the stage above: one line in the table."""
    path = f"{__name__}.STAGE"
    monkeypatch.setitem(COMMANDS, "repeat", Command("maximum likelihood, again", path))
    monkeypatch.setitem(STAGES, "repeat", path)
    flags = [f"--model.model_name_or_path={model}", f"--data.train_data={rows}", "--data.val_fraction=0"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    return ["repeat", *flags, *quiet, f"--export.output_dir={tmp_path / 'run'}"]


def test_a_stage_of_ones_own_is_a_record_and_a_line(repeat, tmp_path, capsys):
    cli = run(repeat)
    assert isinstance(cli.model, Repeated) and cli.datamodule.batch_size == 5
    assert cli.trainer.max_epochs == 2  # follows from the weight
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["updates"] == 4  # 10 rows in batches of 5, twice
    assert (tmp_path / "run" / "config.yaml").exists()
    assert run(repeat) is None
    assert f"is over; its models are in {tmp_path / 'run'}. For another run set --export.output_dir." in (
        capsys.readouterr().out
    )


def test_its_run_is_not_over_before_the_record_says_so(repeat, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"updates": 2}')
    assert run(repeat).trainer.global_step == 4


def test_its_checks_and_its_links_speak(repeat):
    with pytest.raises(UserError, match=r"trainer.max_epochs must be at most 3 here, got 4"):
        run([*repeat, "--model.weight=4"])
    with pytest.raises(UserError, match=r"^trainer.max_epochs follows from model.weight: leave it out"):
        run([*repeat, "--trainer.max_epochs=1"])


def test_sections_and_folders_of_other_stages_are_known_without_being_named(repeat, tmp_path):
    with pytest.raises(UserError, match=r"The section self_play is of spin-lightning fit; this is repeat\."):
        run([*repeat, "--self_play.iterations=2"])
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000000001.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"x")
    hash_file(checkpoint).write_text(sha256_of(checkpoint))
    for settings, other in (({"self_play.epochs": [1]}, "fit"), ({"model.max_updates": None}, "sft")):
        (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": settings, "changes": [], "versions": {}}))
        with pytest.raises(UserError, match=rf"run holds a run of another stage \({other}\)\. Set --export.output_dir"):
            run(repeat)


def test_check_takes_the_first_stage_that_the_settings_fit(repeat, capsys):
    from spin_lightning.cli import check

    check.main([*repeat[1:], "--model.weight=1"])  # fit and sft have no such setting
    assert "to train on: 10 rows" in capsys.readouterr().out


@pytest.mark.parametrize("word", STAGES)
def test_the_records_of_the_package_name_what_is_there(word):
    stage = resolve_name(STAGES[word])
    settings = parse_settings(word, ["--model.model_name_or_path=a/b", "--data.train_data=c"])
    assert {"model", "data", "checkpoint", *stage.callbacks} <= set(vars(settings))
    assert settings[stage.folder].output_dir.startswith("runs/")
    for name, value in stage.defaults.items():
        given = settings[name]
        assert given == value or given.class_path == value["class_path"]
    assert settings.checkpoint.dirpath == f"{settings[stage.folder].output_dir}/checkpoints"


@pytest.mark.parametrize(
    ("ended_because", "played", "wanted", "is_over"),
    [("all 2 iterations are played", 2, 2, True), ("all 2 iterations are played", 2, 3, False), ("harm", 1, 3, True)],
)
def test_a_game_of_all_its_iterations_may_be_made_longer(ended_because, played, wanted, is_over):
    flags = ["--model.model_name_or_path=a/b", "--data.train_data=c", f"--self_play.iterations={wanted}"]
    game = {"ended_because": ended_because, "iterations": [{}] * played}
    assert resolve_name(STAGES["fit"]).is_over(game, parse_settings("fit", flags)) == is_over


def test_the_overview_is_made_from_the_table_for_80_columns():
    for word, command in COMMANDS.items():
        assert f"\n  {word:<8}  {command.summary}\n" in OVERVIEW
    texts = [OVERVIEW, *(command.help for command in COMMANDS.values())]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 80
