"""Sums are right, and the demo of reinforcement learning says what it measured."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from spin_lightning.demos import reft
from spin_lightning.demos.sums import MOST_ROWS, make_sums, write_sums
from spin_lightning.types import UserError


def test_every_step_of_every_sum_is_right() -> None:
    train, held_out = make_sums(num_train=200, num_held_out=100, seed=1)
    prompts = [row["messages"][0]["content"] for row in train + held_out]
    assert len(set(prompts)) == 300
    for row in train + held_out:
        prompt, response = (turn["content"] for turn in row["messages"])
        left, word, right = re.fullmatch(r"What is (\d+) (plus|minus) (\d+)\?", prompt).groups()  # type: ignore[union-attr]
        result = int(left) + (int(right) if word == "plus" else -int(right))
        assert response.endswith(f"The answer is {result}.") and result >= 0
        for a, sign, b, c in re.findall(r"(\d+) (plus|minus) (\d+) is (\d+)", response):
            assert int(a) + (int(b) if sign == "plus" else -int(b)) == int(c)
    assert make_sums(num_train=5, num_held_out=100, seed=1)[0] == train[:5]


def test_more_sums_than_there_are_prompts_are_refused() -> None:
    with pytest.raises(UserError, match=f"a sum of at most {MOST_ROWS}"):
        make_sums(MOST_ROWS, 1)


def test_it_says_what_it_measured_and_continues(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reft, "ITERATIONS", 1)
    monkeypatch.setattr(reft, "WARM_UP_UPDATES", 2)
    monkeypatch.setattr(reft, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(reft, "MOST_CONTROL_UPDATES", 2)
    monkeypatch.setattr(reft, "write_sums", partial(write_sums, num_train=24, num_held_out=6))
    quick = ("--trainer.precision=32-true", "--trainer.enable_progress_bar=false")
    results = reft.play(str(tmp_path / "reft"), model, *quick)
    printed = capsys.readouterr().out
    assert list(results) == ["base model", "SFT", "PPO after it", reft.CONTROL]
    assert results["SFT"]["updates"] == 2 and results[reft.CONTROL]["updates"] == 2
    assert len(results["PPO after it"]["greedy"]) == 6
    for words in ("right, greedy", "Against the SFT model, PPO gives right responses", "points)"):
        assert words in printed
    assert reft.play(str(tmp_path / "reft"), model, *quick) == results
    assert "is over" in capsys.readouterr().out


def test_the_verdict_has_its_noise() -> None:
    def of(greedy: list[bool]) -> dict[str, list[bool]]:
        return {"greedy": greedy, "sampled": [True, False] * 50}

    results = {"SFT": of([False] * 100), "PPO after it": of([True] * 60 + [False] * 40), reft.CONTROL: of([True] * 100)}
    words = reft.verdict(results)
    assert "Against the SFT model, PPO gives right responses: more greedy (+60.0 +- 4.9 points)" in words
    assert "Against more SFT, PPO gives right responses: fewer greedy (-40.0 +- 4.9 points)" in words
    assert "as many within noise sampled (+0.0 +- 0.0 points)" in words
