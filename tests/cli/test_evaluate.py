"""``spin-lightning evaluate`` as a user types it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from games import read
from helpers import QUIET, load, save_tiny_model
from huggingface_hub import ModelCard
from lightning import Trainer

from spin_lightning import ExportPolicy, LoraAdapter, RowDataModule, SftLightningModule
from spin_lightning.cli import commands as cli
from spin_lightning.models.saving import weights_hash
from spin_lightning.stages.harness import Asker

pytest.importorskip("lm_eval")
Refusal = Callable[[Sequence[str]], str]


@pytest.fixture
def quiz(tmp_path: Path) -> str:
    rows = [{"question": f"{a}+1?", "choices": [str(a + 1), "no"], "answer": 0} for a in range(5)]
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(model: str, tmp_path: Path) -> Path:
    """The folder of a run with two iterations, the second one not finished."""
    for number in range(2):
        shutil.copytree(model, tmp_path / f"run/iteration_{number}/policy")
    (tmp_path / "run/iteration_0/summary.json").write_text("{}")
    (tmp_path / "run/iteration_0/policy/README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    return tmp_path / "run"


def test_the_last_policy_of_a_run_is_evaluated_beside_its_summary_and_once(
    run: Path, quiz: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    before = {path.name: path.read_bytes() for path in (run / "iteration_0/policy").iterdir()}
    cli.main(["evaluate", str(run), "--tasks", quiz, "--limit", "4"])
    said = capsys.readouterr().out
    results = read(run / "iteration_0/evaluation.json")
    entry, sha256 = results["tasks"]["quiz"], weights_hash(load(run / "iteration_0/policy"))
    assert results["model_sha256"] == sha256 and results["model"] == str(run / "iteration_0/policy")
    value = f"{entry['value']:.4f} +- {entry['stderr']:.4f}"
    assert "chat template off, stored dtype on cpu" in said and "the first 4 documents" in said
    assert re.search(rf"\nquiz +acc +0 +4 +{re.escape(value)}\n", said)
    after = {path.name: path.read_bytes() for path in (run / "iteration_0/policy").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"README.md"} and before.keys() == after.keys()
    card = ModelCard(after["README.md"].decode())
    assert card.data.license == "mit" and card.data.eval_results[0].metric_value == round(entry["value"], 6)
    monkeypatch.setattr(Asker, "ask", lambda *_: pytest.fail("asked again"))
    cli.main(["evaluate", str(run / "iteration_0"), "--tasks", quiz, "--limit", "4"])
    assert value in capsys.readouterr().out and read(run / "iteration_0/evaluation.json") == results


def test_two_models_are_shown_side_by_side(run: Path, quiz: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = save_tiny_model(tmp_path / "other", seed=3)
    cli.main(["evaluate", str(run), "--against", other, "--tasks", quiz, "--shots", "1"])
    said = capsys.readouterr().out
    ours, theirs = read(run / "iteration_0/evaluation.json"), read(tmp_path / "other/evaluation.json")
    gap = ours["against"]["tasks"]["quiz"]
    assert gap["difference"] == pytest.approx(ours["tasks"]["quiz"]["value"] - theirs["tasks"]["quiz"]["value"])
    assert ours["tasks"]["quiz"]["shots"] == 1 and ours["against"]["model_sha256"] == theirs["model_sha256"]
    assert f"{gap['difference']:+.4f} +- {gap['stderr']:.4f}\n" in said and "  other  " in said


def test_another_folder_and_dtype_leave_the_model_alone(model: str, quiz: str, tmp_path: Path, capsys: Any):
    files = sorted(Path(model).iterdir())
    cli.main(["evaluate", model, "--tasks", quiz, "--output", str(tmp_path / "out"), "--dtype", "bfloat16"])
    results = read(tmp_path / "out/evaluation.json")
    assert sorted(Path(model).iterdir()) == files and results["dtype"] == "bfloat16"
    assert results["model_sha256"] == weights_hash(load(model))  # of the weights as they are stored
    cli.main(["evaluate", model, "--tasks", quiz, "--output", str(tmp_path / "out"), "--chat_template"])
    assert "chat template on, stored dtype" in capsys.readouterr().out
    assert read(tmp_path / "out/evaluation.json")["tasks"]["quiz"]["chat_template"] is True


def test_an_adapter_is_put_on_its_base(model: str, rows: str, quiz: str, tmp_path: Path, capsys: Any):
    module = SftLightningModule(model, adapter=LoraAdapter(r=2, merged=False), learning_rate=1e-1)
    trainer = Trainer(
        max_epochs=1, enable_checkpointing=False, callbacks=[ExportPolicy(str(tmp_path / "run"))], **QUIET
    )
    trainer.fit(module, RowDataModule(rows, batch_size=8))
    cli.main(["evaluate", str(tmp_path / "run"), "--tasks", quiz])
    said = capsys.readouterr().out
    assert f"note: {tmp_path / 'run/adapter'} is an adapter, and is put on {model} (" in said
    assert read(tmp_path / "run/evaluation.json")["model_sha256"] == weights_hash(module.policy)
    assert "| quiz |" in (tmp_path / "run/adapter/README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere/at/all"], "'nowhere/at/all' does not exist"),
        (["{empty}"], "there is no model in '{empty}': it has nothing. Give"),
        (["{model}", "--task", "x"], "evaluate has no '--task'. Did you mean --tasks?"),
        (["{model}", "--limit", "x"], "argument --limit: invalid int value: 'x'"),
        (["{model}", "--limit", "0"], "limit must be at least 1, got 0"),
        (["{model}", "--shots", "few"], "--shots must be numbers, one or one for each task, got 'few'"),
        (["{model}", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["{model}", "--device", "abacus"], "--device 'abacus' cannot be used"),
        (["{model}", "--chat_template", "perhaps"], "invalid true or false value: 'perhaps'"),
        (["{model}", "--tasks", "{one}", "--shots", "1"], "--shots 1 needs at least 2 rows in"),
        (["{model}", "--tasks", "no.jsonl"], "the task 'no.jsonl' does not exist"),
        (["{model}", "--against", "{model}"], "both models would have their results in {model}"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    refusal: Refusal, model: str, tmp_path: Path, flags: Sequence[str], words: str
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    names = {"model": model, "empty": tmp_path / "empty", "one": tmp_path / "one.jsonl"}
    printed = refusal(["evaluate", *(flag.format(**names) for flag in flags)])
    assert words.format(**names) in printed.replace("\n", " ")


def test_without_the_package_its_extra_is_named(refusal: Refusal, model: str, monkeypatch: pytest.MonkeyPatch):
    from spin_lightning.stages import harness

    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert "needs the package lm-eval. Install it: pip install 'spin-lightning[eval]'" in refusal(["evaluate", model])
