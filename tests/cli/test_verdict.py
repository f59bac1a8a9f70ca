"""What a comparison says is what its numbers say: intervals by hand, and no more than chance where nothing differs."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import stdev
from typing import Any

import pytest

from spin_lightning.cli.verdict import Values, best_of_arms, bootstrap_interval, judge, sentence, t_interval, t_quantile


def values(name: str, *by_seed: float, rows: Sequence[Sequence[float | None]] = ()) -> Values:
    return Values(name, dict(enumerate(by_seed)), dict(enumerate(rows)))


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (29, 2.04523), (1000, 1.96234)]
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=2e-5)


def test_an_interval_over_seeds_is_students() -> None:
    mean, low, high = t_interval([0.1, 0.2, 0.3, 0.4])
    half = 3.18245 * stdev([0.1, 0.2, 0.3, 0.4]) / 2
    assert (mean, low, high) == pytest.approx((0.25, 0.25 - half, 0.25 + half), abs=1e-5)
    assert t_interval([2.0]) == (2.0, -math.inf, math.inf)


def test_an_interval_over_rows_is_about_that_of_the_normal_law_and_the_same_each_time() -> None:
    draw = random.Random(3)
    rows = [draw.gauss(1.0, 2.0) for _ in range(400)]
    mean, low, high = bootstrap_interval(rows)
    half = 1.96 * stdev(rows) / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.04)
    assert bootstrap_interval(rows) == (mean, low, high)


def test_seeds_are_paired_and_the_difference_has_to_leave_the_noise() -> None:
    sft = values("sft", 5.0, 6.0, 7.0)  # its seeds differ by much: noise 1
    near = judge("NLL", values("game", 4.5, 5.49, 6.5), sft, lower_is_better=True)
    far = judge("NLL", values("game", 3.0, 3.99, 5.0), sft, lower_is_better=True)
    assert near is not None and far is not None
    assert near.difference[2] < 0 and near.noise == 1.0  # beyond 0 for sure, and within what seeds do
    assert near.word == "too close to call" and far.word == "better"
    other = judge("NLL", sft, values("game", 3.0, 3.99, 5.0), lower_is_better=True)
    assert other is not None and other.word == "worse"
    share = judge("exact match", values("game", 0.9, 0.91, 0.92), values("sft", 0.5, 0.51, 0.5), lower_is_better=False)
    assert share is not None and share.word == "better" and share.count == 3 and share.over == "seeds"


def test_with_one_seed_rows_are_compared_and_said_to_be() -> None:
    rows = [[0.0] * 10 + [1.0] * 30, [1.0] * 40]
    found = judge("exact match", values("game", 1.0, rows=rows[1:]), values("sft", 0.75, rows=rows[:1]), False)
    assert found is not None and (found.over, found.count, found.noise, found.word) == ("rows", 40, None, "better")
    said = sentence([found], ["sft"], {})
    assert said.startswith("On exact match game is better than sft, 1.000 against 0.750, difference +0.250, 95 % ")
    assert said.endswith("with one seed the intervals are over rows: with other seeds this may be otherwise.")
    alone = judge("NLL", values("game", 1.0), values("sft", 2.0), True)
    assert alone is not None and alone.word == "too close to call"
    assert "one seed, and no rows to compare" in sentence([alone], ["sft"], {})


def test_rows_that_one_of_both_has_no_value_for_are_left_out() -> None:
    game, sft = values("game", 1.0, rows=[[1.0, None, 1.0, 1.0]]), values("sft", 0.5, rows=[[0.0, 1.0, 0.0, None]])
    found = judge("a reward", game, sft, lower_is_better=False)
    assert found is not None and (found.over, found.count, found.word) == ("rows", 2, "better")


def test_where_all_seeds_differ_by_one_number_rows_decide() -> None:
    """A t-interval of equal differences has no width, and would call half a row better."""
    equal = values("game", 0.5, 0.5, rows=[[0.0, 1.0], [0.0, 1.0]])
    found = judge("exact match", equal, values("sft", 0.5, 0.5, rows=[[1.0, 0.0], [1.0, 0.0]]), False)
    assert found is not None and found.over == "rows" and found.word == "too close to call"
    same = judge("exact match", equal, equal, False)
    assert same is not None and same.difference == (0.0, 0.0, 0.0) and same.word == "too close to call"
    assert "0.500 (game) against 0.500 (game), no difference in any of 2 rows" in sentence([same], ["sft"], {})


def test_a_seed_without_a_number_is_left_out_and_an_arm_without_any_is_no_candidate() -> None:
    broken = values("game", math.nan, 4.0, 4.1)
    found = judge("NLL", broken, values("sft", 5.0, 5.0, 5.1), lower_is_better=True)
    assert found is not None and found.count == 2 and found.values == pytest.approx((4.05, 5.05))
    assert judge("NLL", values("game", math.nan), values("sft", 5.0), True) is None
    assert best_of_arms([values("a", math.nan), values("b", 3.0)], True).name == "b"  # type: ignore[union-attr]
    assert best_of_arms([values("a", math.nan), Values("c", {}, {})], True) is None
    assert sentence([], [], {"game, seed 0": "NaN"}) == "Nothing can be compared; left out: game, seed 0 (NaN)."


def test_the_sentence_says_when_plain_sft_is_better() -> None:
    arms: Any = [("game at 0.7", 5.0, 5.1, 5.2), ("sft at 0", 4.0, 4.05, 4.2)]
    found = judge("held-out NLL", *(values(name, *of) for name, *of in arms), lower_is_better=True)
    assert found is not None and found.noise == pytest.approx(0.10408, abs=1e-5)
    assert sentence([found], ["sft"], {}) == (
        "On held-out NLL plain SFT (sft at 0) is better than game at 0.7, 4.083 against 5.100, difference -1.017, 95 % "
        "-1.088 to -0.945 over 3 seeds, noise 0.104."
    )


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_without_a_difference_one_is_said_in_no_more_than_five_per_cent(seeds: int) -> None:
    """Differences alone leave zero out in five per cent; with the noise between them, hardly ever."""
    draw, trials, beyond, said = random.Random(seeds), 2000, 0, 0
    for _ in range(trials):
        shared = [draw.gauss(5.0, 0.3) for _ in range(seeds)]  # what a seed does to both
        game, sft = ([value + draw.gauss(0.0, 0.1) for value in shared] for _ in range(2))
        found = judge("NLL", values("game", *game), values("sft", *sft), lower_is_better=True)
        assert found is not None
        _, low, high = found.difference
        beyond += low > 0 or high < 0
        said += found.word != "too close to call"
    assert 0.035 < beyond / trials < 0.065
    assert said / trials < 0.05
