"""Arms from one start over seeds: played once, measured alike, and one sentence; continued wherever it was killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from games import read
from helpers import write_rows
from several import run_here

from spin_lightning.cli.commands import main
from spin_lightning.cli.compare_file import merged
from spin_lightning.cli.compute import passes_of, updates_for
from spin_lightning.generation.pair_store import PairStore

Refusal = Callable[..., str]
ARMS: list[dict[str, Any]] = [
    {"name": "game", "stage": "fit"},
    {"name": "sft", "stage": "sft", "equal_compute": "game", "model": {"learning_rate": 3e-2}},
]


def write_config(folder: Path, model: str, rows: str, **changes: Any) -> list[str]:
    """The command of a comparison of two arms with two seeds."""
    content = {
        "model": {"model_name_or_path": model, "learning_rate": 1e-2},
        "data": {
            "train_data": rows,
            "val_fraction": 0.4,
            "batch_size": 4,
            "generator": {"class_path": "TransformersGenerator", "init_args": {"max_new_tokens": 5}},
        },
        "self_play": {"iterations": 1, "epochs": 1},
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        "compare": {
            **{"output_dir": str(folder / "run"), "seeds": 2, "samples": 2, "temperatures": [0.0, 1.0], "arms": ARMS},
            **changes.pop("compare", {}),
        },
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(merged(content, changes)))
    return ["compare", "--config", str(path)]


@pytest.fixture(scope="module")
def asked(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[list[str]]]:
    """A folder with a whole comparison, its command, and the commands that it ran."""
    folder = tmp_path_factory.mktemp("compared")
    others = write_rows(folder / "others.jsonl", 4)
    args = write_config(folder, model, write_rows(folder / "rows.jsonl", 16), data={"other_data": others})
    with pytest.MonkeyPatch.context() as patch:
        commands = run_here(patch)
        main(args)
    return folder / "run", args, commands


def test_each_arm_is_played_and_measured_with_each_seed_and_then_never_again(
    asked: tuple[Path, list[str], list[list[str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, args, commands = asked
    assert [command[3] for command in commands] == ["compare", *["fit", "compare", "sft", "compare"] * 2]
    result = read(folder / "comparison.json")
    assert list(result["arms"]) == ["game", "sft"] and not result["failed"]
    nlls = [found["nll"] for arm in result["arms"].values() for found in arm["seeds"].values()]
    assert len(set(nlls)) == 4 and max(nlls) < result["start"]["nll"]  # each seed trains otherwise, and all learn
    assert result["start"]["kl_to_start"] == 0.0
    assert all(found["kl_to_start"] > 0 for found in result["arms"]["game"]["seeds"].values())
    again = run_here(monkeypatch)
    main(args)
    assert not again and read(folder / "comparison.json") == result
    printed = capsys.readouterr().out
    said = result["verdict"]["sentence"]
    assert said.startswith("On held-out NLL plain SFT (sft) is better than game, ") and said in printed
    tables = printed[printed.index("3 held-out rows") : printed.index(said)]
    assert max(map(len, tables.splitlines())) <= 80
    assert not list(folder.glob("*/checkpoints"))  # of runs that are over
    page = (folder / "comparison.html").read_text()
    assert page.count("<svg") == 2 and "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_rows_to_choose_by_are_not_those_to_report_on(asked: tuple[Path, list[str], list[list[str]]]) -> None:
    folder, _, _ = asked
    parts = {path.stem: path.read_text().splitlines() for path in (folder / "data").iterdir()}
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 10, "choose": 3, "report": 3, "other": 4}
    assert len({*parts["train"], *parts["choose"], *parts["report"]}) == 16
    config = yaml.safe_load((folder / "game-seed_1" / "config.yaml").read_text())
    assert config["data"]["val_data"] == str(folder / "data" / "choose.jsonl")
    assert config["data"]["seed"] == config["seed_everything"] == 1


def test_equal_compute_counts_what_the_game_sampled_scored_and_trained_on(
    asked: tuple[Path, list[str], list[list[str]]],
) -> None:
    folder, _, _ = asked
    game = folder / "game-seed_0"
    rows = PairStore(game / "iteration_0" / "pairs").read().to_pylist()
    sampled = sum(len(row["prompt_ids"]) + len(row["generated_ids"]) for row in rows)
    scored = sum(len(row["prompt_ids"]) + len(row["real_ids"]) + len(row["generated_ids"]) for row in rows)
    assert passes_of("fit", game) == sampled + scored + 3 * scored  # one epoch of one answer each
    sft = read(folder / "sft-seed_0" / "summary.json")
    lengths = [len(row["prompt_ids"]) + len(row["real_ids"]) for row in rows]
    assert sft["updates"] == round((sampled + 4 * scored) / (3 * sum(lengths)) * 3)  # three updates an epoch
    assert passes_of("sft", folder / "sft-seed_0") == 3 * sft["trained_tokens"]
    assert updates_for(1.0, rows=10, row_tokens=20.0, batch_size=4) == 1


def test_exact_match_is_that_of_the_stored_responses(asked: tuple[Path, list[str], list[list[str]]]) -> None:
    folder, _, _ = asked
    for temperature, count in (("0", 3), ("1", 6)):
        stored = folder / "measured-sft-seed_0" / f"temperature_{temperature}"
        assert read(stored / "summary.json")["responses"] == count
    found = read(folder / "comparison.json")["arms"]["sft"]["seeds"]["0"]["rewards"]["1"]["exact_match"]
    assert found["mean"] == pytest.approx(sum(found["by_row"]) / 3)
