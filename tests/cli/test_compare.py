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

from spin_lightning.cli.children import Children
from spin_lightning.cli.commands import main
from spin_lightning.cli.compare_file import merged
from spin_lightning.cli.compute import passes_of, updates_for
from spin_lightning.generation.pair_store import PairStore
from spin_lightning.runs.files import write_json
from spin_lightning.stages.law_table import LawStore
from spin_lightning.types import StageFailed

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
    assert page.count("<svg") == 2 and "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in page


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


def test_a_game_of_tokens_is_compared_and_its_compute_is_that_of_scoring_and_training(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By classes that the arms name, in which the comparison's own parser has no part."""
    loss = {"class_path": "spin_lightning.TokenSpinLoss", "init_args": {"top_k": 8}}
    near = {"name": "near", "stage": "sft", "equal_compute": "tokens", "model": {"kl_to_start": 0.5}}
    arms = {"arms": [{"name": "tokens", "stage": "fit", "model": {"loss": loss}}, near], "seeds": 1}
    args = write_config(tmp_path, model, write_rows(tmp_path / "rows.jsonl", 16), compare=arms)
    run_here(monkeypatch)
    main(args)
    rows = LawStore(tmp_path / "run" / "tokens-seed_0" / "iteration_0" / "laws").read().to_pylist()
    tokens = sum(len(row["prompt_ids"]) + len(row["real_ids"]) for row in rows)
    found = {name: arm["seeds"]["0"] for name, arm in read(tmp_path / "run" / "comparison.json")["arms"].items()}
    assert found["tokens"]["token_passes"] == tokens + 3 * tokens and found["tokens"]["updates"] == 3
    trained = read(tmp_path / "run" / "near-seed_0" / "summary.json")["trained_tokens"]
    assert found["near"]["token_passes"] == 3 * trained + tokens and found["near"]["updates"] == 4  # 4/3 of an epoch


def test_exact_match_is_that_of_the_stored_responses(asked: tuple[Path, list[str], list[list[str]]]) -> None:
    folder, _, _ = asked
    for temperature, count in (("0", 3), ("1", 6)):
        stored = folder / "measured-sft-seed_0" / f"temperature_{temperature}"
        assert read(stored / "summary.json")["responses"] == count
    found = read(folder / "comparison.json")["arms"]["sft"]["seeds"]["0"]["rewards"]["1"]["exact_match"]
    assert found["mean"] == pytest.approx(sum(found["by_row"]) / 3)


# --- what goes wrong, with arms that only pretend ---------------------------------------------------------------------


class Pretended:
    """In the place of the commands: each writes what its run would have left, or fails."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.fails: dict[str, int] = {}
        patch.setattr(Children, "run", lambda children, command, what, advice="": self.run(command, what))

    def run(self, command: list[str], what: str) -> None:
        folder = Path(command[-1].partition("=")[2])
        self.ran.append(folder.name)
        if code := self.fails.get(folder.name):
            folder.mkdir(parents=True, exist_ok=True)
            raise StageFailed(what, code)
        seed = int(folder.name[-1]) if "seed" in folder.name else 0
        if command[3] == "fit":
            iteration = {"updates": 7, "seconds": {"training": 2.0}, "val_nll": 5.0}
            write_json(
                folder / "game.json", {"ended_because": "all 1 iterations were played", "iterations": [iteration]}
            )
            (folder / "iteration_0" / "policy").mkdir(parents=True)
        elif command[3] == "sft":
            own = yaml.safe_load(Path(command[5].partition("=")[2]).read_text())
            nll = {1e-3: 6.0, 1e-2: 4.0}.get(own["model"].get("learning_rate"), 4.5)
            updates = own["model"]["max_updates"]
            write_json(folder / "summary.json", {"updates": updates, "seconds": 1.0, "val_nll": nll})
            (folder / "policy").mkdir()
        else:
            nll = {"self_play": 5.0, "measured": 9.0}.get(folder.name.split("-")[1], 4.0) + 0.1 * seed
            exact = {"exact_match": {"mean": 0.5, "by_row": [0.0, 1.0]}}
            write_json(
                folder / "summary.json",
                {"nll": nll, "nll_by_row": [nll - 1, nll + 1], "rewards": {"0": exact, "1": exact}},
            )


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return Pretended(monkeypatch)


def pretend_config(folder: Path, model: str, rows: str) -> list[str]:
    arms = [
        {"name": "self_play", "stage": "fit"},
        {"name": "tuned", "stage": "sft", "equal_updates": "self_play", "learning_rates": [1e-3, 1e-2]},
    ]
    return write_config(folder, model, rows, compare={"arms": arms})


def test_a_learning_rate_is_chosen_with_the_first_seed_and_kept_for_the_others(
    pretended: Pretended, model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = pretend_config(tmp_path, model, rows)
    pretended.fails["tuned-0.01-seed_1"] = 75  # no room on the disk: it ends there
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 75
    played = ["self_play-seed_0", "tuned-0.001-seed_0", "tuned-0.01-seed_0", "self_play-seed_1", "tuned-0.01-seed_1"]
    assert [name for name in pretended.ran if "measured" not in name] == played
    pretended.fails.clear()
    pretended.ran.clear()
    main(args)
    assert pretended.ran == ["tuned-0.01-seed_1", "measured-tuned-0.01-seed_1"]
    result = read(tmp_path / "run" / "comparison.json")
    tuned = result["arms"]["tuned"]["seeds"]
    assert {seed: found["learning_rate"] for seed, found in tuned.items()} == {"0": 1e-2, "1": 1e-2}
    assert tuned["0"]["updates"] == 7 and tuned["0"]["search_updates"] == 14
    printed = capsys.readouterr().out
    assert "run 5 of 5: tuned, seed 1, learning rate 0.01 (sft)" in printed
    assert "tuned: of the learning rates 0.001, 0.01 the best is 0.01" in printed


def test_an_arm_that_ends_with_nan_is_left_out_by_name_and_not_tried_again(
    pretended: Pretended, model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = pretend_config(tmp_path, model, rows)
    pretended.fails["self_play-seed_1"] = 1
    for _ in range(2):
        main(args)
        result = read(tmp_path / "run" / "comparison.json")
        assert (
            list(result["arms"]["self_play"]["seeds"]) == ["0"] and "nll" in result["arms"]["self_play"]["seeds"]["0"]
        )
        assert result["verdict"]["sentence"].endswith(
            "left out: self_play, seed 1 (NaN or infinite numbers, or an error), tuned, seed 1 (self_play has no "
            "result)."
        )
    assert pretended.ran.count("self_play-seed_1") == 1
    assert "has it tried again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"arms": [{"name": "x", "stage": "score"}]},
            "the stage of the arm 'x' must be one of fit, sft, ppo, dpo, got",
        ),
        ({"arms": [{"stage": "fit"}]}, "the name of arm 0 of compare.arms must be letters, digits and _"),
        ({"arms": [ARMS[0], ARMS[0]]}, "two arms of compare.arms are called 'game'"),
        ({"arms": ARMS[1:]}, "the arm 'sft' gets as much as 'game'; the arms before it are none"),
        (
            {"arms": [ARMS[0], {**ARMS[0], "name": "b", "equal_updates": "game"}]},
            "an arm of the stage sft may have one",
        ),
        (
            {"arms": [{"name": "rl", "stage": "ppo"}, {"name": "b", "stage": "sft", "equal_compute": "rl"}]},
            "that of the stage ppo is not counted",
        ),
        ({"seeds": 0}, "compare.seeds and compare.samples must be at least 1, got 0 and 2"),
        ({"temperatures": [-1.0]}, "compare.temperatures must be a list of numbers from 0 up, got [-1.0]"),
        ({"learning_rates": []}, "compare.learning_rates must be a list of positive numbers"),
        ({"seed": 3}, "seed"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    refusal: Refusal, model: str, rows: str, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    printed = " ".join(refusal(write_config(tmp_path, model, rows, compare=changes)).split())
    assert words in printed and not (tmp_path / "run" / "data").exists()


def test_a_row_that_is_taken_twice_is_on_one_side_alone(
    pretended: Pretended, model: str, rows: str, tmp_path: Path
) -> None:
    path = Path(write_config(tmp_path, model, rows, compare={"arms": ARMS[:1], "seeds": 1})[-1])
    config = yaml.safe_load(path.read_text())
    config["data"]["train_data"] = {rows: 2.0}
    path.write_text(yaml.safe_dump(config))
    main(["compare", "--config", str(path)])
    parts = [path.read_text().splitlines() for path in (tmp_path / "run" / "data").iterdir()]
    assert sum(len({*part}) for part in parts) == len(set().union(*parts)) == sum(map(len, parts)) / 2


def test_missing_files_and_other_rows_are_refused(
    refusal: Refusal, pretended: Pretended, model: str, rows: str, tmp_path: Path
) -> None:
    assert "no/file.jsonl" in refusal(write_config(tmp_path, model, "no/file.jsonl"))
    arms = {"arms": [{"name": "x", "stage": "fit", "model": {"betta": 1}}]}
    assert "betta" in refusal(write_config(tmp_path, model, rows, compare=arms))
    main(write_config(tmp_path, model, rows, compare={"arms": ARMS[:1], "seeds": 1}))
    other = write_rows(tmp_path / "other.jsonl", 12)
    printed = " ".join(refusal(write_config(tmp_path, model, other, compare={"arms": ARMS[:1], "seeds": 1})).split())
    assert "holds other rows than the data has now" in printed
