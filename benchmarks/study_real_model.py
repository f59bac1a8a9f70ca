"""``python -m benchmarks.study_real_model``: self-play beside tuned SFT on a real model, by ``spin-lightning compare``.

For 64 and for 208 demonstrations of the demo's skills: a start that SFT has taught their format, rows of other tasks
(what the start itself says of other prompts, so that the NLL that rises on them is KL(start, policy)), and the arms.
Everything is kept in the folder; the same command continues where it stopped. ``--render`` writes what is finished to
``docs/when_self_play_helps_real_model.json``, and from there tables and pictures into ``docs/when-self-play-helps.md``.

    OMP_NUM_THREADS=1 python -m benchmarks.study_real_model [--demonstrations 64] [--folder FOLDER] [--render]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from benchmarks.study.report import DOCS, PAGE, filled, table
from spin_lightning.cli.compare_report import reward_at
from spin_lightning.cli.verdict import t_interval
from spin_lightning.demos.skills import WORDS, write_skills
from spin_lightning.demos.steps import smollm2
from spin_lightning.progress import format_time
from spin_lightning.runs.files import read_json, replacing
from spin_lightning.runs.settings import versions

FOLDER = Path(".bench/real_model")
#: The longest real response has 17 tokens.
MOST_TOKENS = 32
HELD_OUT = 104  # eight of each skill: half of them choose, the others are reported on
QUESTIONS = ("What is a {}?", "Tell me something about a {}.", "Write a short sentence with the word {}.")
RATES = [1e-5, 3e-5, 1e-4]
NUMBERS = DOCS / "when_self_play_helps_real_model.json"
#: What the others are compared with.
SFT = "sft_tuned"
#: Of the numbers, what the docs need not have: single rows, and a folder of this machine.
_LEFT_OUT = ("by_row", "nll_by_row", "model")
#: Iterations, and passes over the rows in each, by demonstrations. With one response a prompt these are at most 80 and
#: 78 updates, as from iteration 1 on a game trains on the pairs of the iteration before too.
SCHEDULES = {64: (3, 2), 208: (2, 1)}
#: The same of token-level self-play, which trains on the rows of one iteration alone: 72 and 78 updates.
TOKEN_SCHEDULES = {64: (3, 3), 208: (3, 1)}
#: Arms for the few demonstrations alone: with many, they do not fit into the hours of two cores that the study has.
ONLY_FEW = ("spin_k4", "spin_k4_hot", "reward")


def settings(rows: Path, start: Path, folder: Path, demonstrations: int) -> dict[str, Any]:
    """The config of a comparison."""
    generator = {"class_path": "ContinuousGenerator", "init_args": {"max_new_tokens": MOST_TOKENS}}
    hot = {"class_path": "ContinuousGenerator", "init_args": {"max_new_tokens": MOST_TOKENS, "temperature": 2.0}}
    best = {"keep": "best", "patience": 6, "average_weights": 0.9}
    tuned = {"stage": "sft", "equal_updates": "spin_k1", "learning_rates": True, "export": best}

    def token(temperature: float, beta: float) -> dict[str, Any]:
        loss = {"class_path": "TokenSpinLoss", "init_args": {"temperature": temperature, "top_k": 64}}
        iterations, epochs = TOKEN_SCHEDULES[demonstrations]
        return {
            "stage": "fit",
            "learning_rates": RATES[1:],
            "self_play": {"iterations": iterations, "epochs": epochs},
            "model": {"loss": loss, "beta": beta},
        }

    four = {"answers_per_prompt": 4}
    iterations, epochs = SCHEDULES[demonstrations]
    arms: list[dict[str, Any]] = [
        {"name": "spin_k1", "stage": "fit", "learning_rates": RATES[:2]},
        {"name": "sft_tuned", **tuned},
        {"name": "sft_kl", **tuned, "model": {"kl_to_start": 0.3}},
        {"name": "token", **token(1.0, 5.0)},
        {"name": "token_hot", **token(2.0, 5.0)},
        {"name": "spin_k4", "stage": "fit", "data": four, "self_play": {"epochs": 1}, "model": {"beta": 1.0}},
        {
            "name": "spin_k4_hot",
            "stage": "fit",
            "data": {**four, "generator": hot},
            "self_play": {"epochs": 1},
            "model": {"beta": 5.0},
        },
        {
            "name": "reward",
            "stage": "ppo",
            "model": {"advantage": {"class_path": "LeaveOneOut"}, "beta": 0.05, "learning_rate": 1e-5},
            "data": {"answers_per_prompt": 4, "batch_size": 32},
            "rollouts": {"reward": {"class_path": "TextMatch"}, "iterations": 12, "prompts": 16},
        },
    ]
    return {
        "model": {"model_name_or_path": str(start), "learning_rate": 3e-5, "beta": 1.0},
        "data": {
            "train_data": str(rows / "train.jsonl"),
            "val_data": str(rows / "held_out.jsonl"),
            "other_data": str(rows / "other.jsonl"),
            "batch_size": 8,
            "generator": generator,
        },
        "self_play": {"iterations": iterations, "epochs": epochs},
        "health": {"stop": "never"},
        "trainer": {"accelerator": "cpu", "precision": "bf16-true", "gradient_clip_val": 1.0},
        "compare": {
            "output_dir": str(folder),
            "seeds": 3,
            "samples": 1,
            "temperatures": [0, 0.7, 1],
            "learning_rates": RATES,
            "arms": [arm for arm in arms if demonstrations == min(SCHEDULES) or arm["name"] not in ONLY_FEW],
        },
    }


def run(*args: str, **streams: Any) -> None:
    """A command of the package."""
    print("spin-lightning", *args, flush=True)
    subprocess.run([sys.executable, "-m", "spin_lightning", *args], check=True, **streams)


def prepare(folder: Path, demonstrations: int) -> Path:
    """The rows, the start and what it says of other prompts; returns the start."""
    train, held_out = write_skills(folder, num_train=demonstrations, num_held_out=HELD_OUT)
    data = ["--data.train_data", str(train), "--data.val_data", str(held_out)]
    sft = folder / "sft"
    updates = ["--model.max_updates", str(demonstrations // 8), "--trainer.max_epochs", "1", "--data.batch_size", "8"]
    how = ["--model.learning_rate", "2e-5", "--trainer.accelerator", "cpu", "--trainer.precision", "bf16-true"]
    cap = ["--data.max_response_tokens", str(MOST_TOKENS), "--trainer.gradient_clip_val", "1"]
    run("sft", "--model.model_name_or_path", smollm2(), "--export.output_dir", str(sft), *data, *updates, *how, *cap)
    other = folder / "other.jsonl"
    if not other.exists():
        asked = "\n".join(QUESTIONS[place % 3].format(word) for place, word in enumerate(WORDS[: 3 * 24]))
        with replacing(other) as file, file.open("w") as rows:
            sampling = ["--temperature", "1", "--max_new_tokens", str(MOST_TOKENS), "--json"]
            run("chat", str(sft), *sampling, input=asked, text=True, stdout=rows)
    return sft / "policy"


# --- what came out ----------------------------------------------------------------------------------------------------


def keep(folder: Path, file: Path = NUMBERS) -> None:
    """Write the numbers of the comparisons that are over, without those of single rows, and their pictures."""
    found: dict[str, Any] = {}
    for demonstrations in SCHEDULES:
        comparison = folder / f"demonstrations_{demonstrations}" / "comparison"
        if (result := read_json(comparison / "comparison.json")) is not None:
            found[str(demonstrations)] = _without_rows(result)
            shutil.copyfile(comparison / "comparison.svg", file.with_name(f"{file.stem}_{demonstrations}.svg"))
    file.write_text(json.dumps({"versions": versions(), "demonstrations": found}, indent=1) + "\n", encoding="utf-8")


def _without_rows(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_rows(item) for key, item in value.items() if key not in _LEFT_OUT}
    if isinstance(value, list):
        return [_without_rows(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def render(page: Path = PAGE, numbers: Path = NUMBERS) -> None:
    """Write the tables into the page."""
    page.write_text(filled(page.read_text(encoding="utf-8"), sections(read_json(numbers) or {})), encoding="utf-8")


def sections(report: Mapping[str, Any]) -> dict[str, str]:
    """The page's generated parts, by the name of their place."""
    return {
        f"real model {number}": f"{result['verdict']['sentence']}\n\n{_table_of(result)}"
        for number, result in report["demonstrations"].items()
    }


def _table_of(result: Mapping[str, Any]) -> str:
    """A row an arm: means over its seeds, with their standard deviation."""
    columns: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "held-out NLL": lambda found: found["nll"],
        **{f"exact match, T = {t:g}": reward_at("exact_match", t) for t in result["temperatures"]},
        "NLL of other prompts": lambda found: found["other_nll"],
        "KL to the start": lambda found: found["kl_to_start"],
    }
    rows = [["the start", "", "", "", *(f"{of(result['start']):.3f}" for of in columns.values()), "", ""]]
    sft = result["arms"][SFT]["seeds"]
    for name, arm in result["arms"].items():
        seeds = arm["seeds"]
        if not seeds:
            continue
        first = next(iter(seeds.values()))
        less = [found["nll"] - sft[seed]["nll"] for seed, found in seeds.items() if seed in sft]
        apart = ""
        if less and name != SFT:
            mean, low, high = t_interval(less)
            apart = f"{mean:+.2f}" + (f" ({low:+.2f} to {high:+.2f})" if len(less) > 1 else "")
        cells = []
        for of in columns.values():
            values = [of(found) for found in seeds.values()]
            cells.append(f"{fmean(values):.3f}" + (f" +- {stdev(values):.3f}" if len(values) > 1 else ""))
        rate = f"{first['learning_rate']:.0e}".replace("e-0", "e-") if "learning_rate" in first else ""
        known = [found["token_passes"] for found in seeds.values() if found["token_passes"] is not None]
        passes = f"{fmean(known) / 1000:.0f}k" if known else ""
        updates, seconds = (fmean(found[key] for found in seeds.values()) for key in ("updates", "seconds"))
        rows.append([f"`{name}`", rate, f"{updates:.0f}", apart, *cells, passes, format_time(seconds)])
    head = ["arm", "learning rate", "updates", "NLL less `sft_tuned` (95 %)", *columns, "passes", "time"]
    return table(head, rows)


def main() -> None:
    """Prepare and compare, one number of demonstrations after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demonstrations", type=int, nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--render", action="store_true", help="write numbers, pictures and tables of what is finished")
    given = parser.parse_args()
    if given.render:
        keep(given.folder)
        return render()
    for demonstrations in given.demonstrations:
        folder = given.folder / f"demonstrations_{demonstrations}"
        start = prepare(folder, demonstrations)
        config = folder / "compare.yaml"
        with replacing(config) as file:
            file.write_text(
                yaml.safe_dump(settings(folder, start, folder / "comparison", demonstrations), sort_keys=False)
            )
        run("compare", "--config", str(config))


if __name__ == "__main__":
    main()
