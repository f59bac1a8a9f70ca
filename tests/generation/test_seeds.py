"""How many different streams of random numbers the seeds of answers give."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from games import answers_of
from helpers import tiny_model

from spin_lightning import ContinuousGenerator, TransformersGenerator
from spin_lightning.generation import seed_of
from spin_lightning.generation.sampling import uniforms_of


def test_an_answer_s_random_numbers_come_from_the_lower_32_bits_of_its_seed() -> None:
    """As it is written down; were it otherwise on another version, continued runs would give other answers."""
    seed = seed_of(0, 1, 2, 3)
    numbers = uniforms_of(seed, 6)
    assert 2**50 < seed < 2**56
    assert torch.equal(numbers, uniforms_of(seed % 2**32, 6)) and torch.equal(numbers, uniforms_of(seed ^ 2**40, 6))
    for bit in range(32):
        assert not torch.equal(numbers, uniforms_of(seed ^ 2**bit, 6)), bit
    assert torch.equal(numbers[:3], uniforms_of(seed, 3))  # a longer answer begins with the same numbers


def test_as_many_streams_are_shared_as_32_bits_let_expect_and_none_within_a_prompt() -> None:
    """2 iterations, 25,000 prompts, 4 responses each: 200,000 seeds, of which n^2 / 2^33 = 4.7 pairs share 32 bits."""
    seeds = {
        (iteration, prompt): [seed_of(0, iteration, prompt, answer) for answer in range(4)]
        for iteration in range(2)
        for prompt in range(25_000)
    }
    every = [seed for four in seeds.values() for seed in four]
    assert len(set(every)) == 200_000  # all 56 bits
    used = Counter(seed % 2**32 for seed in every)
    assert sum(count - 1 for count in used.values()) <= 12  # with a chance of 1 in 1,000 of being more
    assert all(len({seed % 2**32 for seed in four}) == 4 for four in seeds.values())


def test_different_seeds_give_different_and_fair_numbers() -> None:
    numbers = torch.stack([uniforms_of(seed_of(0, 0, prompt, 0), 4) for prompt in range(5_000)])
    assert len({tuple(row) for row in numbers.tolist()}) == 5_000
    assert numbers.min() >= 0 and numbers.max() < 1
    # a tenth of them in each tenth, at every position; and one answer's numbers say nothing about the next one's
    counts = torch.stack([torch.histc(column, 10, 0, 1) for column in numbers.T])
    assert float(((counts - 500) ** 2 / 500).sum(1).max()) < 30  # chi squared with 9 degrees of freedom: 1 in 2,000
    assert float(torch.corrcoef(torch.stack([numbers[:-1, 0], numbers[1:, 0]]))[0, 1].abs()) < 0.05


def test_an_answer_s_numbers_are_those_of_float32_whatever_the_default_dtype() -> None:
    """Lightning's bf16-true makes bfloat16 the default while answers are sampled."""
    numbers = uniforms_of(7, 1000)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(uniforms_of(7, 1000), numbers) and numbers.dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", [ContinuousGenerator, TransformersGenerator])
def test_answers_are_the_same_whatever_the_default_dtype(kind: type[TransformersGenerator]) -> None:
    def answers() -> list[list[int]]:
        seeds = [seed_of(0, 0, n, 0) for n in range(40)]
        found = answers_of(kind(max_new_tokens=12), model, [[5, 6, 7]] * 40, seeds, 263)
        return [response.ids for response in found]

    model = tiny_model(seed=3).eval()
    expected = answers()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert answers() == expected
    finally:
        torch.set_default_dtype(torch.float32)
