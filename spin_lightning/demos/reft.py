"""Reinforcement learning after SFT (ReFT), with its control, on a real model and two CPU cores.

A program knows which answers are right, so a response needs no teacher. The control gets the same seconds: SFT goes on.
It plays through the command line that everybody uses, prints each command, and can be killed and run again at any
point. What it says is what it has just measured, whichever way it goes.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

from spin_lightning.demos.steps import Asked, arguments_of, begin, has_bf16_units, run_step, say_step
from spin_lightning.demos.sums import write_sums
from spin_lightning.rewards.base import make_answer, scored
from spin_lightning.rewards.program import NumberMatch
from spin_lightning.runs.files import read_json, write_json
from spin_lightning.terminal import say

MAX_NEW_TOKENS = 48
WARM_UP_UPDATES = 24
ITERATIONS = 20
#: More would be hundreds of epochs.
MOST_CONTROL_UPDATES = 1000
CONTROL = "control: more SFT"


def main(args: list[str]) -> None:
    """``spin-lightning reft``: the folder, the model and settings, all of which may be left out."""
    play(*arguments_of(args))


def play(folder: str = "runs/reft", model: str | None = None, *overrides: str) -> dict[str, Any]:
    """Train, or continue where it was, and print what came out.

    Args:
        folder: Where everything goes.
        model: A model to play with in place of SmolLM2-135M-Instruct. None or empty: that one.
        overrides: Flags for every stage, such as ``--trainer.accelerator gpu``.

    Returns:
        The results by stage, as in ``results.json``.

    Raises:
        UserError: The package with the model is not installed.
    """
    started = time.monotonic()
    root, base = begin(folder, r"sft|ppo|control|data|results\.json", model)
    train, held_out = write_sums(root / "data")
    precision = [] if has_bf16_units() else ["--trainer.precision", "32-true"]
    data = ["--data.train_data", str(train), "--data.val_data", str(held_out), "--trainer.accelerator", "cpu"]
    data += [*precision, *overrides]
    sft = [
        "--data.batch_size",
        "16",
        "--data.max_response_tokens",
        str(MAX_NEW_TOKENS),
        "--model.learning_rate",
        "3e-5",
    ]
    sft += ["--trainer.max_epochs", "1000", *data]

    say_step("1/4  SFT: the model learns to write the steps, briefly")
    sft_on(base, root / "sft", WARM_UP_UPDATES, sft)
    start, warm_up = str(root / "sft" / "policy"), read_json(root / "sft" / "summary.json")
    say_step("2/4  PPO: it learns from its own responses, by whether their last number is right")
    ppo = ["--model.model_name_or_path", start, "--rollouts.output_dir", str(root / "ppo")]
    run_step("ppo", "reft.yaml", *ppo, "--rollouts.iterations", str(ITERATIONS), "--rollouts.eval_every", "0", *data)
    iterations = read_json(root / "ppo" / "rollouts.json")["iterations"]
    seconds = sum(sum(iteration["seconds"].values()) for iteration in iterations)
    say_step("3/4  The control: SFT goes on from the same model for as many seconds")
    updates = math.ceil(warm_up["updates"] * seconds / max(warm_up["seconds"], 1e-9))
    sft_on(start, root / "control", min(max(1, updates), MOST_CONTROL_UPDATES), sft)
    for name in ("sft", "ppo", "control"):
        shutil.rmtree(root / name / "checkpoints", ignore_errors=True)  # the exported model is what is wanted

    say_step("4/4  The same sums to every model")
    models = {"base model": base, "SFT": start, "PPO after it": str(root / "ppo" / "policy")}
    models[CONTROL] = str(root / "control" / "policy")
    more = read_json(root / "control" / "summary.json")
    known_of = {
        "SFT": {"seconds": warm_up["seconds"], "updates": warm_up["updates"]},
        "PPO after it": {"seconds": seconds, "updates": sum(iteration["updates"] for iteration in iterations)},
        CONTROL: {"seconds": more["seconds"], "updates": more["updates"]},
    }
    results: dict[str, Any] = read_json(root / "results.json") or {}
    for stage, name in models.items():
        if stage not in results:
            say(f"asking: {stage}")
            results[stage] = {**measure(name, held_out), **known_of.get(stage, {}), "model": name}
            write_json(root / "results.json", results)
    _report(root, results, time.monotonic() - started)
    return results


def sft_on(model: str, folder: Path, updates: int, flags: list[str]) -> None:
    """So many updates of SFT."""
    given = ["--model.model_name_or_path", model, "--export.output_dir", str(folder)]
    run_step("sft", "demo_sft.yaml", *given, "--model.max_updates", str(updates), *flags)


def measure(model_name_or_path: str, rows_file: Path) -> dict[str, Any]:
    """Held-out NLL, and the share of right responses, greedy and sampled at temperature 1."""
    asked = Asked(model_name_or_path, rows_file, MAX_NEW_TOKENS)
    found: dict[str, Any] = {"nll": asked.nll(), "rows": len(asked.prompts)}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        responses = asked.respond(temperature)
        answers = [
            make_answer(prompt, response.ids, asked.encoder.decode(response.ids), response.finish_reason)
            for prompt, response in zip(asked.prompts, responses, strict=True)
        ]
        found[name] = [value == 1.0 for value in scored(NumberMatch(partial=0.0), answers)]
    return found


def _report(root: Path, results: dict[str, Any], seconds: float) -> None:
    say()
    say(f"{'stage':<20}{'right, greedy':>15}{'right, sampled':>16}{'held-out NLL':>14}{'updates':>9}{'seconds':>9}")
    for stage, result in results.items():
        spent = "".join(
            "-".rjust(9) if result.get(key) is None else f"{result[key]:9.0f}" for key in ("updates", "seconds")
        )
        greedy, sampled = (sum(result[name]) / len(result[name]) for name in ("greedy", "sampled"))
        say(f"{stage:<20}{greedy:>15.1%}{sampled:>16.1%}{result['nll']:>14.3f}{spent}")
    rows = next(iter(results.values()))["rows"]
    say(
        f"(right: the last number of a response, one to each of {rows} held-out prompts; sampled: at temperature 1; "
        "NLL in nats a real response, which PPO does not aim at)"
    )
    say()
    say(verdict(results))
    say()
    say(f"models: {root}/sft/policy, {root}/ppo/policy, {root}/control/policy; all numbers: {root}/results.json")
    say(f"({seconds:.0f} s this time)")


def verdict(results: dict[str, Any]) -> str:
    """What the numbers say, with the standard errors of paired differences."""
    sentences = []
    for other in ("SFT", CONTROL):
        parts = []
        for name in ("greedy", "sampled"):
            mean, error = paired_difference(results["PPO after it"][name], results[other][name])
            word = "more" if mean > 2 * error else "fewer" if mean < -2 * error else "as many within noise"
            parts.append(f"{word} {name} ({100 * mean:+.1f} +- {100 * error:.1f} points)")
        named = "the SFT model" if other == "SFT" else "more SFT"
        sentences.append(f"Against {named}, PPO gives right responses: {', '.join(parts)}.")
    return " ".join(sentences)


def paired_difference(first: list[bool], second: list[bool]) -> tuple[float, float]:
    """Mean of the differences between two shares on the same prompts, and its standard error.

    Example:
        >>> paired_difference([True, True, False, True], [True, False, False, False])
        (0.5, 0.28867513459481287)
    """
    differences = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))
