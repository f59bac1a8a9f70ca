"""``spin-lightning score`` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_judge import FakeJudge, shown
from fake_vllm import Drop
from games import read
from helpers import save_tiny_model, write_rows

from spin_lightning.cli import commands as cli
from spin_lightning.cli.score import parse
from spin_lightning.rewards import judge_server

Refusal = Callable[[Sequence[str]], str]


def args_of(model: str, rows: str, folder: Path, *flags: str) -> list[str]:
    return [
        *("score", f"--model.model_name_or_path={model}", f"--data.train_data={rows}"),
        *(f"--score.output_dir={folder}", "--data.generator.max_new_tokens=5", *flags),
    ]


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"rewards_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(
        "import os, pathlib, time\n"
        "from spin_lightning import Reward, RewardUnavailable\n"
        "def length(completions, **kwargs):\n    return [float(len(c[0]['content'])) for c in completions]\n"
        "def nan(completions):\n    return [float('nan')] * len(completions)\n"
        "def short(completions):\n    return [1.0]\n"
        "def broken(completions):\n    return [1 / 0]\n"
        "def labelled(completions, label):\n    return [1.0] * len(completions)\n"
        "class Silent(Reward):\n"
        "    def score(self, answers):\n        raise RewardUnavailable('the judge is gone')\n"
        "class Slow(Reward):\n"
        "    def __init__(self, log: str):\n        self.log = log\n"
        "    def score(self, answers):\n"
        "        with open(self.log, 'a') as f:\n"
        "            for a in answers:\n                print(a.prompt[-1]['content'], file=f, flush=True)\n"
        "        time.sleep(float(os.environ.get('SLOW', 0)))\n"
        "        return [1.0] * len(answers)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_model_is_scored_and_the_same_command_shows_it_again(
    model: str, rows: str, rewards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = save_tiny_model(tmp_path / "other", seed=1)
    flags = ("--score.reward=FunctionReward", f"--score.reward.function={rewards}:length")
    args = args_of(model, rows, tmp_path / "run", *flags, "--data.answers_per_prompt=2", f"--score.against={other}")
    cli.main(args)
    printed = capsys.readouterr().out
    assert f"20 responses of {model} to 10 prompts\n  mean reward   " in printed
    assert "  win rate      " in printed and f"against {other} (95 %: " in printed
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["responses"] == summary["against"]["pairs"] == 20
    assert summary["reward"]["function"] == f"{rewards}:length"
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "answers_per_prompt: 2" in config
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("re*/*.parquet")}
    cli.main(["score", "--config", str(tmp_path / "run" / "config.yaml")])
    assert capsys.readouterr().out.split("\n\n")[-2] == printed.split("\n\n")[-2]
    assert written == {path: path.stat().st_mtime_ns for path in written} and len(written) == 2
    assert read(tmp_path / "run" / "summary.json") == summary


def test_the_recorded_responses_need_no_model(rows: str, model: str, tmp_path: Path, capsys: Any):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a", "label": "A"}\n' * 3)
    flags = ("--data.answers_per_prompt=0", "--score.reward=TextMatch", "--score.reward.column=label")
    cli.main(args_of(model, str(tmp_path / "rows.jsonl"), tmp_path / "run", *flags))
    assert "3 responses of the data to 3 prompts\n  mean reward   1" in capsys.readouterr().out
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "q", "label": "A"}\n')
    with pytest.raises(SystemExit):
        cli.main(args_of(model, str(tmp_path / "prompts.jsonl"), tmp_path / "other", *flags))
    assert "prompt" in capsys.readouterr().err  # whose responses are to be scored there?


def test_what_a_config_has_for_other_commands_is_read_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run.yaml").write_text(
        "model: {model_name_or_path: m, beta: 0.1, learning_rate: 1.0e-5}\n"
        "data: {train_data: x.jsonl, val_fraction: 0.1}\nself_play: {iterations: 2}\n"
        "trainer: {precision: bf16-true, max_epochs: 3}\nscore: {reward: {class_path: NumberMatch}}\n"
    )
    settings = parse(["--config", str(tmp_path / "run.yaml"), "--score.reward.partial=0.2"])
    assert capsys.readouterr().out == "note: score has no model.beta, self_play, trainer.max_epochs: read over.\n"
    assert (settings.trainer.precision, settings.data.val_fraction) == ("bf16-true", 0.1)
    assert settings.score.reward.init_args.partial == 0.2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "score.reward"),
        (("--score.reward=NumberMtch",), "no class is called 'NumberMtch'"),
        (("--score.reward=NumberMatch", "--score.reward.partial=2"), "NumberMatch.partial must be in [0, 1), got 2"),
        (("--score.reward=FunctionReward", "--score.reward.function={}:nan"), "gave nan, of "),
        (("--score.reward=FunctionReward", "--score.reward.function={}:short"), "gave 1 values for 10 responses"),
        (("--score.reward=FunctionReward", "--score.reward.function={}:broken"), "ends with ZeroDivisionError"),
        (("--score.reward=FunctionReward", "--score.reward.function={}:labelled"), "needs the columns 'label', but"),
        (("--score.reward=NumberMatch", "--score.reward.column=label"), "needs the columns 'label', but"),
        (("--score.reward=NumberMatch",), "judged none of 10 responses. The real responses have no number behind"),
        (("--score.reward=NumberMatch", "--score.nothing=3"), "score.nothing"),
        (("--score.reward=NumberMatch", "--score.part=held_out"), "there are no held_out rows"),
        (("--score.reward=NumberMatch", "--data.train_data=no.jsonl"), "no.jsonl"),
        (("--score.reward=NumberMatch", "--trainer.precision=x"), "Precision 'x' is invalid"),
        (("--score.reward=NumberMatch", "--trainer.accelerator=tpu"), "trainer"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    refusal: Refusal, model: str, rows: str, rewards: str, tmp_path: Path, flags: Sequence[str], words: str
):
    printed = refusal(args_of(model, rows, tmp_path / "run", *(flag.format(rewards) for flag in flags)))
    assert words in printed.replace("\n", " ")


def test_a_judge_that_does_not_reply_ends_with_75(
    model: str, rows: str, rewards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        cli.main(args_of(model, rows, tmp_path / "run", f"--score.reward={rewards}.Silent"))
    assert stop.value.code == 75
    assert capsys.readouterr().err == "spin-lightning: error: the judge is gone\n"


def test_a_judge_that_is_back_goes_on_where_it_was_left(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(judge_server, "PAUSES", (0.01,))
    asked: dict[str, int] = {}

    def reply(question: str, body: Any) -> Any:
        text = shown(question, "conversation")
        if len(asked) >= 4 and is_tired and text not in asked:
            raise Drop
        asked[text] = asked.get(text, 0) + 1
        return {"7": 1.0}

    is_tired = True
    with FakeJudge(reply) as server:
        flags = ("--score.reward=JudgeReward", f"--score.reward.url={server.url}", "--score.shard_size=4")
        with pytest.raises(SystemExit) as stop:
            cli.main(args_of(model, rows, tmp_path / "run", *flags, "--score.reward.concurrency=2"))
        assert stop.value.code == 75 and "run the same command again" in capsys.readouterr().err
        is_tired = False
        cli.main(args_of(model, rows, tmp_path / "run", *flags))
    # the finished shard is not asked about again; of the one that was not, the server may have had a question in hand
    assert len(asked) == 10 and list(asked.values())[:4] == [1] * 4
    assert read(tmp_path / "run" / "summary.json")["mean"] == pytest.approx(1.5 / 4.5)


def test_what_is_best_is_trained_on_and_the_policy_is_scored_again(model: str, tmp_path: Path):
    """``score``, ``sft``, ``score``: each reads what the one before wrote."""
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    flags = ("--score.reward=FunctionReward", "--score.reward.function=fake_judge:count_vowels")
    flags += ("--data.generator.max_new_tokens=40",)
    cli.main(args_of(model, rows, tmp_path / "scored", *flags, "--data.answers_per_prompt=4"))
    best, folder = tmp_path / "scored" / "best.jsonl", tmp_path / "sft"
    args = ["sft", f"--model.model_name_or_path={model}", f"--data.train_data={best}", f"--export.output_dir={folder}"]
    cli.main([*args, "--data.batch_size=2", "--trainer.enable_progress_bar=false"])
    cli.main(args_of(str(folder / "policy"), rows, tmp_path / "again", *flags, f"--score.against={model}"))
    assert read(tmp_path / "again" / "summary.json")["against"]["pairs"] == 12


def test_its_help_teaches_it_at_once(capsys: pytest.CaptureFixture[str]):
    started = time.monotonic()
    cli.main(["score", "--help"])
    assert time.monotonic() - started < 1
    printed = capsys.readouterr().out
    assert "spin-lightning score \\\n    --model.model_name_or_path" in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.slow
def test_after_kill_9_no_judge_is_asked_again(model: str, rows: str, rewards: str, tmp_path: Path):
    log = tmp_path / "asked.txt"
    flags = (f"--score.reward={rewards}.Slow", f"--score.reward.log={log}", "--score.shard_size=2")
    command = [sys.executable, "-m", "spin_lightning", *args_of(model, rows, tmp_path / "run", *flags)]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "SLOW": "0.5"})
    while not log.exists() or len(log.read_text().splitlines()) < 5:  # in the third shard of five
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, cwd=tmp_path, check=True)
    asked = log.read_text().splitlines()
    assert len(set(asked)) == 10 and len(asked) == 12  # the shard in progress alone, again
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["mean"] == 1.0
