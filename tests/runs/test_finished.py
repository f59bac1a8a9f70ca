"""A run that is over, and the same command, or another one, given again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from helpers import args_of, save_tiny_model, write_rows

from spin_lightning import UserError
from spin_lightning.cli.commands import run
from spin_lightning.runs.settings import _values_agree

QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
QUICK += ["--data.batch_size=4", "--model.learning_rate=1e-3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """A game and a fine-tuning that are over, each with its folder and the command that made it."""
    folder = tmp_path_factory.mktemp("finished")
    model = save_tiny_model(folder / "model")
    rows = write_rows(folder / "rows.jsonl")
    commands = {
        "fit": args_of(
            "fit", model, rows, folder / "fit", "--self_play.iterations=1", "--data.generator.max_new_tokens=4", *QUICK
        ),
        "sft": args_of("sft", model, rows, folder / "sft", "--data.max_response_tokens=4", *QUICK),
    }
    for args in commands.values():
        run(args)
    return {stage: (folder / stage, args) for stage, args in commands.items()}


@pytest.mark.parametrize(
    ("stage", "flag", "shown"),
    [
        ("fit", "--model.beta=0.5", "model.beta: 1.0 -> 0.5"),
        ("fit", "--model.learning_rate=1e-2", "model.learning_rate: 0.001 -> 0.01"),
        ("fit", "--model.optimizer=SGD", "model.optimizer.class: 'AdamW' -> 'SGD'"),
        ("fit", "--model.optimizer.weight_decay=0.5", "model.optimizer.weight_decay: 0.01 -> 0.5"),
        ("fit", "--model.loss.nll_weight=0.5", "model.loss: "),
        ("fit", "--data.generator.temperature=0.5", "data.generator.temperature: 1.0 -> 0.5"),
        ("fit", "--data.batch_size=2", "data.batch_size: 4 -> 2"),
        ("fit", "--data.seed=3", "data.seed: 0 -> 3"),
        ("fit", "--self_play.epochs=1", "self_play.epochs: [2] -> [1]"),
        ("fit", "--health.stop=harm", "health.stop: 'equilibrium' -> 'harm'"),
        ("fit", "--trainer.precision=bf16-mixed", "trainer.precision: '32-true' -> 'bf16-mixed'"),
        ("fit", "--trainer.gradient_clip_val=1", "trainer.gradient_clip_val: None -> 1"),
        ("fit", "--trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches: 1 -> 2"),
        ("sft", "--trainer.max_epochs=3", "trainer.max_epochs: 1 -> 3"),
        ("sft", "--data.max_response_tokens=5", "data.max_response_tokens: 4 -> 5"),
        ("sft", "--model.average=response", "model.average: 'token' -> 'response'"),
    ],
)
def test_another_setting_is_refused_with_the_difference_and_no_model_is_loaded(
    stage: str, flag: str, shown: str, finished: dict[str, Any]
) -> None:
    folder, command = finished[stage]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with (
        patch("spin_lightning.stages.policy.load_policy", side_effect=AssertionError("loaded")),
        pytest.raises(UserError) as refusal,
    ):
        run([*command, flag])
    message = str(refusal.value)
    assert "is over, and had other settings than this command gives:" in message
    assert f"\n  {shown}" in message
    assert "Use another folder" in message
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["fit", "sft"])
def test_the_same_command_says_that_it_is_over(
    stage: str, finished: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, command = finished[stage]
    harmless = ["--data.num_workers=1", "--data.micro_batch_tokens=99", "--trainer.log_every_n_steps=7"]
    for flags in ([], harmless, ["--checkpoint.allow_changes=[model.learning_rate]", "--model.learning_rate=1e-2"]):
        with patch("spin_lightning.stages.policy.load_policy", side_effect=AssertionError("loaded")):
            assert run([*command, *flags]) is None
        assert f"the run in {folder} is over" in capsys.readouterr().out
    # a record of a version that did not know a setting yet: it had its default
    shutil.copytree(folder, tmp_path / "older")
    record = json.loads((folder / "run.json").read_text())
    for name in ("data.on_bad_row", "model.revision", "data.columns", "model.warmup_ratio"):
        record["settings"].pop(name, None)
    (tmp_path / "older/run.json").write_text(json.dumps(record))
    key = {"fit": "self_play", "sft": "export"}[stage]
    command = [*command, f"--{key}.output_dir={tmp_path / 'older'}"]
    assert run(command) is None
    with pytest.raises(UserError, match=r"model.warmup_ratio: 0.1 -> 0.2"):
        run([*command, "--model.warmup_ratio=0.2"])


def test_other_data_is_refused_and_moved_data_is_not(finished: dict[str, Any], tmp_path: Path) -> None:
    _, command = finished["fit"]
    rows = next(flag for flag in command if "train_data" in flag).partition("=")[2]
    shutil.copy(rows, tmp_path / "moved.jsonl")
    assert run([*command, f"--data.train_data={tmp_path / 'moved.jsonl'}"]) is None
    with pytest.raises(UserError, match=r"\n  data.prompts_sha256: "):
        run([*command, f"--data.train_data={write_rows(tmp_path / 'other.jsonl', 11)}"])
    with pytest.raises(UserError, match=r"\n  data.held_out_sha256: "):
        run([*command, f"--data.val_data={rows}"])


def test_what_an_older_version_left_out_of_the_record_agrees_with_any_value() -> None:
    assert (
        _values_agree("***", "hf_dataset_of_words")
        and _values_agree("a *** c", "a b c")
        and _values_agree(["***"], ["x"])
    )
    assert not _values_agree("a *** c", "a b d") and not _values_agree("x", "***") and _values_agree("***", "***")
    assert (
        _values_agree({"a": "***"}, {"a": "x"})
        and not _values_agree({"a": "***"}, {"b": "x"})
        and not _values_agree({"a": 1}, {"a": 2})
    )
