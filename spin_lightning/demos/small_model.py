"""The demo: SFT, two iterations of self-play and the continued-SFT control, on a real model, on two CPU cores.

It plays through the command line that everybody uses, prints each command, and can be killed and run again at any
point. What it says about self-play and its control is what it has just measured.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from spin_lightning.data.rows import load_rows
from spin_lightning.demos.skills import is_exact, write_skills
from spin_lightning.demos.steps import Asked, arguments_of, begin, has_bf16_units, run_step, say_step
from spin_lightning.runs.files import read_json, write_json
from spin_lightning.stages.samples import side_by_side
from spin_lightning.terminal import say

MAX_NEW_TOKENS = 32


def main(args: list[str]) -> None:
    """``spin-lightning demo``: the folder, the model and settings, all of which may be left out."""
    play(*arguments_of(args))


def play(folder: str = "runs/demo", model: str | None = None, *overrides: str) -> dict[str, Any]:
    """Play the demo into a folder, or continue it there, and print what came out.

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
    root, base = begin(folder, r"sft|spin|control_\d+|data|results\.json", model)
    train, held_out = write_skills(root / "data", num_train=156)
    precision = [] if has_bf16_units() else ["--trainer.precision", "32-true"]
    data = ["--data.train_data", str(train), "--data.val_data", str(held_out), *precision, *overrides]
    sft, spin = root / "sft", root / "spin"

    say_step("1/4  SFT: the model learns the style of the answers, briefly")
    run_step("sft", "demo_sft.yaml", "--model.model_name_or_path", base, "--export.output_dir", str(sft), *data)
    say_step("2/4  SPIN: two iterations of self-play from there")
    start = str(sft / "policy")
    run_step("fit", "demo.yaml", "--model.model_name_or_path", start, "--self_play.output_dir", str(spin), *data)
    say_step("3/4  The control: SFT continued from the same model, with the same updates and schedules")
    iterations = read_json(spin / "game.json")["iterations"]
    for number, summary in enumerate(iterations):
        control = root / f"control_{number}"
        steps = ["--model.max_updates", str(summary["updates"]), "--trainer.max_epochs", "1000"]
        run_step(
            "sft",
            "demo_sft.yaml",
            "--model.model_name_or_path",
            start,
            "--export.output_dir",
            str(control),
            *steps,
            *data,
        )
        start = str(control / "policy")
    for finished in (sft, *(root / f"control_{number}" for number in range(len(iterations)))):
        shutil.rmtree(finished / "checkpoints", ignore_errors=True)  # the exported model is what is wanted

    say_step("4/4  The same questions to every model")
    results = _measure(root, base, held_out, iterations)
    _report(root, results, time.monotonic() - started)
    return results


def measure(model_name_or_path: str, rows_file: Path, batch_size: int = 65) -> dict[str, Any]:
    """Held-out NLL (nats a response), share of exact greedy answers, and the answers, of one model."""
    asked = Asked(model_name_or_path, rows_file, MAX_NEW_TOKENS)
    nll = asked.nll()
    answers = [asked.encoder.decode(response.ids) for response in asked.respond(batch_size=batch_size)]
    exact = sum(is_exact(answer, row.real) for answer, row in zip(answers, asked.rows, strict=True))
    return {"nll": nll, "exact": exact / len(answers), "answers": answers}


def _measure(root: Path, base: str, held_out: Path, iterations: list[dict[str, Any]]) -> dict[str, Any]:
    summaries = {"SFT": read_json(root / "sft" / "summary.json")}
    models = {"base model": base, "SFT": str(root / "sft" / "policy")}
    for number, summary in enumerate(iterations):
        models[f"SPIN iteration {number}"] = str(root / "spin" / f"iteration_{number}" / "policy")
        summaries[f"SPIN iteration {number}"] = {**summary, "seconds": sum(summary["seconds"].values())}
    for number in range(len(iterations)):
        models[f"control {number} (more SFT)"] = str(root / f"control_{number}" / "policy")
        summaries[f"control {number} (more SFT)"] = read_json(root / f"control_{number}" / "summary.json")
    results: dict[str, Any] = read_json(root / "results.json") or {}
    for stage, model in models.items():
        if stage not in results:
            say(f"asking: {stage}")
            known = {
                key: summaries.get(stage, {}).get(key) for key in ("first_loss", "last_loss", "updates", "seconds")
            }
            results[stage] = {**measure(model, held_out), **known, "model": model}
            write_json(root / "results.json", results)
    return results


def _report(root: Path, results: dict[str, Any], seconds: float) -> None:
    say()
    say(
        f"{'stage':<22}{'held-out NLL':>14}{'exact answers':>15}{'first loss':>12}{'last loss':>11}{'updates':>9}"
        f"{'seconds':>9}"
    )
    for stage, result in results.items():
        numbers = "".join(
            f"{'-' if result[key] is None else format(result[key], style):>{width}}"
            for key, style, width in (
                ("first_loss", ".4f", 12),
                ("last_loss", ".4f", 11),
                ("updates", "d", 9),
                ("seconds", ".0f", 9),
            )
        )
        say(f"{stage:<22}{result['nll']:>14.3f}{result['exact']:>15.1%}{numbers}")
    say(
        "(NLL in nats a held-out answer; exact: greedy answers that are the real one to the letter; each loss of its "
        "own stage)"
    )
    if has_bf16_units():
        say(
            "In bfloat16 a sequence's log-prob is rounded by about 0.2 nats, so an iteration starts at ln 2 = 0.693 "
            "within a few hundredths."
        )
    rows = load_rows(str(root / "data" / "held_out.jsonl")).rows
    changed = [n for n, row in enumerate(rows) if len({result["answers"][n] for result in results.values()}) > 2]
    for number in (changed or list(range(len(rows))))[:3]:
        texts = {"prompt": rows[number].prompt[-1]["content"], "real": rows[number].real}
        say()
        say(side_by_side(texts | {stage: result["answers"][number] for stage, result in results.items()}))
    say()
    say(verdict(results))
    say()
    say(
        f"models: {root}/sft/policy, {root}/spin/iteration_*/policy; all numbers and answers: {root}/results.json "
        f"({seconds:.0f} s this time)"
    )
    say("next, on your own data:")
    program = "spin-lightning" if shutil.which("spin-lightning") else sys.argv[0]
    say(f"  {program} fit --model.model_name_or_path {root}/sft/policy --model.learning_rate 1e-5 \\")
    say("    --data.train_data YOUR.jsonl --self_play.output_dir runs/mine")


def verdict(results: dict[str, Any]) -> str:
    """What the numbers say about self-play and its control, in two sentences."""
    start = results["SFT"]
    spin = [result for stage, result in results.items() if stage.startswith("SPIN")][-1]
    control = [result for stage, result in results.items() if stage.startswith("control")][-1]
    direction = "improved" if spin["nll"] < start["nll"] else "did not improve"
    better, worse = ("self-play", "continued SFT") if spin["nll"] < control["nll"] else ("continued SFT", "self-play")
    times = _total(results, "SPIN") / max(_total(results, "control"), 1e-9)
    ahead, behind = (spin, control) if better == "self-play" else (control, spin)
    agree = "on both measures" if ahead["exact"] > behind["exact"] else "on held-out NLL, not on exact answers"
    return (
        f"Self-play {direction} the SFT model: held-out NLL {start['nll']:.3f} -> {spin['nll']:.3f}, exact answers "
        f"{start['exact']:.1%} -> {spin['exact']:.1%}. At the same number of updates {better} did better than {worse} "
        f"{agree} (NLL {spin['nll']:.3f} against {control['nll']:.3f}, exact {spin['exact']:.1%} against "
        f"{control['exact']:.1%}); self-play took {times:.1f} times as long."
    )


def _total(results: dict[str, Any], stage: str) -> float:
    return float(sum(result["seconds"] for name, result in results.items() if name.startswith(stage)))
