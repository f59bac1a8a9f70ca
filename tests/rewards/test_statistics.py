from __future__ import annotations

import itertools
import math

import pytest

from spin_lightning.rewards.statistics import best_of, mean_and_error, pass_at, wilson


def test_pass_at_k_is_unbiased():
    assert pass_at(2, 2, 4) == pytest.approx(5 / 6, abs=1e-12)
    assert [pass_at(1, 3, 4), pass_at(4, 0, 4), pass_at(2, 3, 4)] == [0.75, 0.0, 1.0]
    p, n, k = 0.3, 6, 2
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at(k, c, n) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_best_of_k_is_the_expected_best_of_k_independent_responses():
    law, values = (0.4, 0.3, 0.2, 0.1), (-1.0, 0.5, 2.0, 7.0)
    rises = list(itertools.accumulate(law, initial=0.0))
    of_best = [high**4 - low**4 for low, high in itertools.pairwise(rises)]
    assert of_best == pytest.approx([0.0256, 0.2145, 0.416, 0.3439], abs=1e-12)
    divergence = sum(q * math.log(q / p) for q, p in zip(of_best, law, strict=True))
    assert divergence == pytest.approx(0.587114, abs=1e-6) and divergence < math.log(4) - 3 / 4
    expected = math.fsum(
        math.prod(law[i] for i in drawn) * best_of(4, [values[i] for i in drawn])
        for drawn in itertools.product(range(4), repeat=5)
    )
    assert expected == pytest.approx(sum(q * v for q, v in zip(of_best, values, strict=True)), abs=1e-9)
    assert best_of(3, [3.0, 1.0, 2.0]) == 3.0 and best_of(1, [3.0, 1.0, 2.0]) == pytest.approx(2.0)


def test_responses_to_one_prompt_are_no_independent_trials():
    assert mean_and_error([[1.0] * 10, [0.0] * 10]) == (0.5, pytest.approx(0.5))
    assert mean_and_error([[1.0, 0.0], []]) == (0.5, None)
    assert mean_and_error([]) == (None, None)


def test_wilson_s_interval():
    assert wilson(0.8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
