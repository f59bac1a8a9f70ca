"""A run of several processes is the run of one: the same pairs, losses and weights; and they end together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from games import Do, Game, pairs_of, read, without_seconds
from helpers import load, write_rows
from several import together

#: Games that are played by two processes and by one. Two shards at least, held-out rows, two epochs in each iteration.
GAMES: dict[str, dict[str, Any]] = {
    "float64, clipped, two answers, two passes each": {
        "trainer": {"precision": "64-true", "gradient_clip_val": 1.0},
        "data": {"answers_per_prompt": 2, "batch_size": 6, "micro_batch_tokens": 60},
    },
    "float32, accumulated, a last update of one pair, resident opponent": {
        "trainer": {"accumulate_grad_batches": 2},
        "module": {"opponent": "resident"},
        "data": {"batch_size": 5},
    },
}


def play(model: str, rows: str, folder: Path, settings: dict[str, Any], several: bool) -> None:
    """Play a game, and leave beside it what it was like."""
    losses: list[float] = []
    note = Do(on_train_batch_end=lambda trainer, module, *_: losses.append(float(module.update_loss)))
    trainer = {**settings.get("trainer", {}), **({"devices": 2, "strategy": "ddp"} if several else {})}
    game = Game(model, rows, folder, **{**settings, "trainer": trainer}, callbacks=[note]).play()
    rank = game.trainer.global_rank
    (folder / f"losses_{rank}.json").write_text(json.dumps(losses))
    (folder / f"weights_{rank}").write_bytes(game.weights)


def compare(one: Path, two: Path, loss: float, weight: float) -> None:
    """Both games were the same, but for so much in losses and weights."""
    losses, *others = (
        json.loads((folder / f"losses_{n}.json").read_text()) for folder, n in ((one, 0), (two, 0), (two, 1))
    )
    assert others == [pytest.approx(losses, abs=loss, rel=0)] * 2
    assert (two / "weights_0").read_bytes() == (two / "weights_1").read_bytes()
    for k in range(2):
        mine, theirs = (load(folder / f"iteration_{k}" / "policy", torch.float64).state_dict() for folder in (one, two))
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, atol=weight, rtol=0)
        pairs = [pairs_of(folder, k) for folder in (one, two)]
        for pair, other in zip(*pairs, strict=True):
            columns = [name for name in pair if not name.endswith(("_log_prob", "sha256"))]
            assert {name: pair[name] for name in columns} == {name: other[name] for name in columns}
        summaries = [without_seconds(read(folder / f"iteration_{k}" / "summary.json")) for folder in (one, two)]
        assert_close(summaries[1], summaries[0], 100 * max(loss, 1e-7))
    assert_close(read(two / "start.json"), read(one / "start.json"), 100 * max(loss, 1e-7))
    assert {path.name for path in (two / "iteration_0" / "pairs").iterdir()} == {
        path.name for path in (one / "iteration_0" / "pairs").iterdir()
    }


def assert_close(found: Any, expected: Any, allowed: float) -> None:
    """Two summaries are the same, but for so much in their numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, allowed)
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=allowed, abs_tol=allowed), (found, expected)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def more_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 20)


@pytest.mark.parametrize(
    ("name", "loss", "weight"),
    [
        ("float64, clipped, two answers, two passes each", 1e-14, 1e-13),
        ("float32, accumulated, a last update of one pair, resident opponent", 1e-5, 2e-4),
    ],
)
def test_two_processes_play_the_game_of_one(
    name: str, loss: float, weight: float, model: str, more_rows: str, tmp_path: Path
) -> None:
    play(model, more_rows, tmp_path / "one", GAMES[name], False)
    ended = together(tmp_path, play, model, more_rows, tmp_path / "two", GAMES[name], True)
    assert ended.codes == [0, 0], ended.printed
    assert "iteration 1: " in ended.printed[0] and "iteration" not in ended.printed[1]  # the first one speaks for both
    compare(tmp_path / "one", tmp_path / "two", loss, weight)
