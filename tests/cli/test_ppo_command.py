"""``sft`` and then ``ppo`` as commands on a tiny model: each reads the folder of the one before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from games import read, weight_bits
from helpers import args_of, load

from spin_lightning.cli.commands import main

TINY = ["--data.val_fraction=0.2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


def ppo_args(model: str, rows: str, folder: Path, *flags: str) -> list[str]:
    return [
        "ppo",
        f"--model.model_name_or_path={model}",
        f"--data.train_data={rows}",
        f"--rollouts.output_dir={folder}",
        "--rollouts.reward=NumberMatch",
        "--rollouts.reward.pattern=^",
        "--rollouts.cut=-0.5",
        "--rollouts.iterations=2",
        "--rollouts.prompts=3",
        "--rollouts.eval_every=1",
        "--data.answers_per_prompt=2",
        "--data.batch_size=4",
        "--data.generator.max_new_tokens=6",
        "--model.learning_rate=1e-2",
        *TINY,
        *flags,
    ]


def test_sft_and_then_ppo(model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft = tmp_path / "sft"
    main([*args_of("sft", model, rows, sft, *TINY), "--data.batch_size=4", "--model.learning_rate=1e-2"])
    args = ppo_args(str(sft / "policy"), rows, tmp_path / "ppo")
    main(args)
    over = read(tmp_path / "ppo" / "rollouts.json")
    assert over["ended_because"] == "all 2 iterations were played" and "val/reward" in over["held_out"]
    assert weight_bits(load(tmp_path / "ppo" / "policy")) != weight_bits(load(sft / "policy"))
    manifest = read(tmp_path / "ppo" / "iteration_0" / "answers_manifest.json")
    assert manifest["binding"]["reward"]["reward"].endswith("NumberMatch")
    settings = read(tmp_path / "ppo" / "run.json")["settings"]
    assert settings["model.advantage"] == {"class": "Gae", ".lam": 1.0, ".whiten": True}
    assert settings["rollouts.reward"]["class"] == "NumberMatch"
    assert (settings["data.keep_prompts_together"], settings["trainer.gradient_clip_val"]) == (True, 1.0)
    logged = (tmp_path / "ppo" / "logs" / "version_0" / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert {
        "reward/mean", "reward/std", "kl/reference", "kl/step", "ratio/clipped", "loss/policy", "loss/value", "val/nll",
        "groups/flat", "completions/mean_length", "completions/cut", "completions/distinct", "sampler/difference",
        "val/reward",
    } <= set(logged)  # fmt: skip
    capsys.readouterr()
    main(args)
    assert "is over" in capsys.readouterr().out


def test_a_longer_run_continues_and_other_settings_are_refused(
    model: str, rows: str, tmp_path: Path, refusal: Callable[[Sequence[str]], str]
) -> None:
    main(ppo_args(model, rows, tmp_path))
    assert "model.advantage" in refusal(
        ppo_args(model, rows, tmp_path, "--model.advantage=Gae", "--model.advantage.lam=0.9")
    )
    assert "another stage (ppo)" in refusal(args_of("fit", model, rows, tmp_path, *TINY))
    main(ppo_args(model, rows, tmp_path, "--rollouts.iterations=3"))  # from the checkpoint of its end
    assert read(tmp_path / "rollouts.json")["ended_because"] == "all 3 iterations were played"


def test_prompts_alone_are_enough(model: str, tmp_path: Path) -> None:
    data = [{"messages": [{"role": "user", "content": f"{n}?"}], "gold": str(n)} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    flags = ["--rollouts.reward.column=gold", "--model.advantage=LeaveOneOut"]
    main(ppo_args(model, str(tmp_path / "rows.jsonl"), tmp_path / "run", *flags))
    start = read(tmp_path / "run" / "iteration_0" / "summary.json")
    assert start["val_nll"] is None and start["pairs"]["val/reward"] is not None


def test_an_adapter_is_trained_and_exported(model: str, rows: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    main(ppo_args(model, rows, tmp_path, "--model.adapter=LoraAdapter", "--model.adapter.r=2"))
    last = read(tmp_path / "iteration_1" / "answers_manifest.json")["statistics"]
    assert last["kl/reference"] != 0  # from the adapter as it was drawn, and so from the base
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() and (tmp_path / "policy").exists()


def test_a_reward_is_needed(model: str, rows: str, tmp_path: Path, refusal: Callable[[Sequence[str]], str]) -> None:
    args = [arg for arg in ppo_args(model, rows, tmp_path) if not arg.startswith("--rollouts.reward")]
    assert "rollouts.reward is missing: what responses are worth. Such as NumberMatch" in refusal(args)


def test_check_knows_its_settings_and_plan_says_that_it_does_not(
    model: str, rows: str, tmp_path: Path, refusal: Callable[[Sequence[str]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, *settings = ppo_args(model, rows, tmp_path)
    main(["check", *settings])
    assert "to train on: 8 rows" in capsys.readouterr().out
    assert "plan does not know the iterations of ppo" in refusal(["plan", *settings])


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [6.0, 9.0, 12.0])
def test_a_killed_process_continues(model: str, rows: str, tmp_path: Path, seconds: float) -> None:
    def run(folder: Path, timeout: float | None = None) -> Any:
        args = ppo_args(model, rows, folder, "--rollouts.iterations=40", "--checkpoint.every_n_iterations=7")
        command = [sys.executable, "-m", "spin_lightning", *args]
        try:
            subprocess.run(command, check=True, timeout=timeout, capture_output=True, env=dict(os.environ))
        except subprocess.TimeoutExpired:
            return None  # killed
        return weight_bits(load(folder / "policy"))

    whole = run(tmp_path / "whole")
    run(tmp_path / "run", seconds)
    assert run(tmp_path / "run") == whole
