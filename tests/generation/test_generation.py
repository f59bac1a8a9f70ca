"""Answers of the opponent: honest samples, reproducible one by one, and scored as they were drawn."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from games import answers_of
from helpers import tiny_model
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from spin_lightning.generation import ResponseGenerator, TransformersGenerator, seed_of
from spin_lightning.generation.sampling import choose_tokens
from spin_lightning.models.batches import pack
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.types import Response, UserError

TERMINATOR, PAD = 4, 4
PROMPTS = [[1, 2, 3], [5], [6, 7, 8, 9, 10, 11, 12], [3, 2], [20, 21, 22, 23], [5, 6], [9] * 11, [14, 1]]
SEEDS = [seed_of(0, 0, prompt_id, 0) for prompt_id in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(32).eval()


def answers(
    model: nn.Module, prompts: Sequence[list[int]] = PROMPTS, seeds: Sequence[int] = SEEDS, **settings: Any
) -> list[Response]:
    return answers_of(
        TransformersGenerator(**{"max_new_tokens": 12, **settings}), model, prompts, seeds, TERMINATOR, PAD
    )


def assert_same(found: Sequence[Response], expected: Sequence[Response]) -> None:
    """The same tokens; log-probs up to what another padding rounds differently."""
    assert [response.ids for response in found] == [response.ids for response in expected]
    assert [response.finish_reason for response in found] == [response.finish_reason for response in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=2e-4)


class Fixed(nn.Module):
    """An LM head that gives the same next-token probabilities everywhere."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(probabilities).log())

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)


def fixed_model(probabilities: list[float]) -> PreTrainedModel:
    model = tiny_model(len(probabilities)).eval()
    model.lm_head = Fixed(probabilities)
    return model


# --- One seed, one answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5}, {"top_p": 0.7}, {"temperature": 0.0}])
def test_answers_do_not_depend_on_the_batch_they_are_in(model: PreTrainedModel, sampling: dict[str, float]) -> None:
    alone = [
        answers(model, [prompt], [seed], batch_size=1, **sampling)[0]
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert len({tuple(response.ids) for response in alone}) > 4
    for batch_size in (1, 2, 3, 8, 100):
        assert_same(answers(model, batch_size=batch_size, **sampling), alone)


class ReadsItsNeighbours(LlamaForCausalLM):
    """With a neighbour in its batch, and with nothing else, its logits are others."""

    def forward(self, *arguments: Any, **inputs: Any) -> Any:
        output = super().forward(*arguments, **inputs)
        output.logits = output.logits + (len(output.logits) > 1) * torch.arange(32)
        return output


class DecodesOtherwise(LlamaForCausalLM):
    """Its logits after one token are others than after several: a cache that does not work."""

    def forward(self, *arguments: Any, **inputs: Any) -> Any:
        output = super().forward(*arguments, **inputs)
        output.logits = output.logits + (inputs["input_ids"].shape[1] == 1) * torch.arange(32)
        return output


def recurrent() -> PreTrainedModel:
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_window_size=6,
        lru_width=16,
    )
    model = RecurrentGemmaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def of_kind(kind: type[LlamaForCausalLM]) -> PreTrainedModel:
    usual = tiny_model(32)
    model = kind(usual.config).eval()
    model.load_state_dict(usual.state_dict())
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (recurrent, "only prompts of equal length are answered together"),
        (lambda: of_kind(ReadsItsNeighbours), "its prompts are answered one by one"),
        (lambda: of_kind(DecodesOtherwise), "its prompts are answered one by one, without a cache"),
    ],
)
def test_answers_are_those_given_alone_whatever_a_model_makes_of_padding_neighbours_and_caches(
    make: Callable[[], PreTrainedModel], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make()
    prompts = [prompt for prompt in [*PROMPTS, [7, 7]] if len(prompt) > 1]
    seeds = SEEDS[: len(prompts)]
    found = answers(model, prompts, seeds, batch_size=4)
    said = capsys.readouterr().out
    assert said.startswith(f"note: {type(model).__name__} is slow to answer: {words} (its logits would be off by ")
    assert said.count("\n") == 1
    assert_same(found, answers(model, prompts, seeds, batch_size=1))
    assert capsys.readouterr().out == ""
    for prompt, response in zip(prompts, found, strict=True):  # and that is what they were drawn from
        scored = response_log_probs(model, pack([(prompt, [response.ids])])).item()
        assert response.log_prob == pytest.approx(scored, abs=1e-3)


def test_a_model_that_scores_otherwise_than_it_answers_is_refused() -> None:
    class Whimsical(LlamaForCausalLM):
        slope = 0.0

        def generate(self, *arguments: Any, **inputs: Any) -> Any:
            self.slope = 1.0
            try:
                return super().generate(*arguments, **inputs)
            finally:
                self.slope = 0.0

        def forward(self, *arguments: Any, **inputs: Any) -> Any:
            output = super().forward(*arguments, **inputs)
            output.logits = output.logits + self.slope * torch.arange(32)
            return output

    with pytest.raises(UserError, match=r"Whimsical cannot answer prompts as it scores them.*off by"):
        answers(of_kind(Whimsical))


def test_answers_do_not_depend_on_the_order_of_the_prompts(model: PreTrainedModel) -> None:
    expected = answers(model)
    for order in (list(reversed(range(8))), random.Random(1).sample(range(8), 8)):
        shuffled = answers(model, [PROMPTS[i] for i in order], [SEEDS[i] for i in order], batch_size=3)
        assert_same(shuffled, [expected[i] for i in order])


def test_answers_do_not_depend_on_how_many_are_asked_for(model: PreTrainedModel) -> None:
    wanted = list(itertools.product(range(len(PROMPTS)), range(3)))
    many = answers(model, [PROMPTS[i] for i, _ in wanted], [seed_of(0, 0, i, k) for i, k in wanted], batch_size=5)
    first = [response for (_, k), response in zip(wanted, many, strict=True) if k == 0]
    assert_same(first, answers(model))
    assert sum(many[3 * i].ids != many[3 * i + 1].ids for i in range(len(PROMPTS))) >= 6  # and they are new answers


def test_answers_do_not_depend_on_the_global_random_state(model: PreTrainedModel) -> None:
    torch.manual_seed(1)
    expected, state = answers(model), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert_same(answers(model), expected)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # and leave it alone


def test_a_lower_cap_gives_the_beginning_of_the_same_answer(model: PreTrainedModel) -> None:
    for short, long in zip(answers(model, max_new_tokens=5), answers(model, max_new_tokens=20), strict=True):
        assert short.ids == long.ids[:5]


def test_left_padding_is_invisible_to_absolute_positions_too() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    ).eval()
    with torch.no_grad():
        for parameter in gpt2.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15.0)
    alone = [answers(gpt2, [prompt], [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert_same(answers(gpt2, batch_size=8), alone)


def test_seed_of_is_written_down() -> None:
    digest = hashlib.sha256(b"7/2/30/1").digest()
    assert (
        seed_of(7, 2, 30, 1)
        == sum(byte << 8 * (6 - place) for place, byte in enumerate(digest[:7]))
        == 13102770277806541
    )


def test_seeds_differ_in_each_of_their_four_numbers_and_fit_a_signed_column() -> None:
    seeds = [seed_of(*numbers) for numbers in itertools.product(range(12), repeat=4)]
    assert len(set(seeds)) == 12**4  # also 1/11 and 11/1
    assert min(seeds) >= 0 and max(seeds) < 2**63


# --- The distribution of the answers ----------------------------------------------------------------------------------


def adjusted(probabilities: Tensor, temperature: float, top_p: float) -> list[float]:
    """Next-token probabilities after temperature and top-p, in plain Python."""
    values = [p ** (1 / temperature) for p in probabilities.tolist()]
    values = [value / sum(values) for value in values]
    kept: list[int] = []
    for token in sorted(range(len(values)), key=lambda token: -values[token]):
        if sum(values[other] for other in kept) < top_p:
            kept.append(token)
    total = sum(values[token] for token in kept)
    return [value / total if token in kept else 0.0 for token, value in enumerate(values)]


def exact_distribution(
    model: nn.Module, prompt: list[int], cap: int, temperature: float, top_p: float
) -> dict[tuple[int, ...], float]:
    """Probability of every possible answer, by walking the tree of tokens."""
    distribution: dict[tuple[int, ...], float] = {}

    def walk(answer: tuple[int, ...], probability: float) -> None:
        if len(answer) == cap or (answer and answer[-1] == TERMINATOR):
            distribution[answer] = probability
            return
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, -1].double()
        for token, share in enumerate(adjusted(logits.softmax(-1), temperature, top_p)):
            if share > 0:
                walk((*answer, token), probability * share)

    with torch.no_grad():
        walk((), 1.0)
    return distribution


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (0.5, 0.7)])
def test_frequencies_follow_the_exact_distribution(temperature: float, top_p: float) -> None:
    model, prompt, count = tiny_model(5, seed=3, hidden_size=8).eval(), [0, 3, 1], 6000
    with torch.no_grad():
        if top_p == 1:  # far enough from uniform for a temperature that is 10 % off to show
            model.lm_head.weight.mul_(2.0)
    distribution = exact_distribution(model, prompt, 3, temperature, top_p)
    assert sum(distribution.values()) == pytest.approx(1)
    found = Counter(
        tuple(response.ids)
        for response in answers(
            model,
            [prompt] * count,
            list(range(count)),
            max_new_tokens=3,
            temperature=temperature,
            top_p=top_p,
            batch_size=3000,
        )
    )
    assert set(found) <= set(distribution)  # nothing outside of the nucleus, nothing past a terminator
    frequent = [answer for answer in distribution if distribution[answer] * count >= 5]
    rare = [answer for answer in distribution if distribution[answer] * count < 5]
    cells = [(found[answer], distribution[answer] * count) for answer in frequent]
    cells.append((sum(found[answer] for answer in rare), sum(distribution[answer] for answer in rare) * count))
    chi_square = sum((observed - expected) ** 2 / expected for observed, expected in cells if expected > 0)
    freedom = len(frequent)
    assert freedom >= 8
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@torch.no_grad()
def test_greedy_takes_the_most_likely_token_each_time(model: PreTrainedModel) -> None:
    for prompt, response in zip(PROMPTS, answers(model, temperature=0.0), strict=True):
        ids = list(prompt)
        for token in response.ids:
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)


def test_token_of_probability_zero_is_never_drawn() -> None:
    model = fixed_model([0.0, 0.5, 0.0, 0.5, 0.0])
    drawn = {token for response in answers(model, [[1]] * 300, range(300), batch_size=300) for token in response.ids}
    assert drawn == {1, 3}


@pytest.mark.parametrize("sampling", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.9)])
def test_extreme_random_numbers_take_the_first_and_the_last_possible_token(sampling: tuple[float, float]) -> None:
    logits = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).log().expand(4, 5)
    middle = 0.3**2 / (0.3**2 + 0.7**2) if sampling[0] == 0.5 else 0.3
    # torch.rand can give 0; 1 is what rounding can make of the last
    uniforms = torch.tensor([0.0, middle - 1e-4, middle + 1e-4, 1.0])
    tokens, log_probs = choose_tokens(logits, uniforms, *sampling)
    assert tokens.tolist() == [1, 1, 3, 3]
    assert log_probs.exp().tolist() == pytest.approx([0.3, 0.3, 0.7, 0.7])


def test_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    model = fixed_model([0.4, 0.3, 0.2, 0.1, 0.0])
    for top_p, kept in (
        (0.05, {0}),
        (0.39, {0}),
        (0.41, {0, 1}),
        (0.69, {0, 1}),
        (0.71, {0, 1, 2}),
        (0.95, {0, 1, 2, 3}),
    ):
        responses = answers(model, [[1]] * 200, range(200), top_p=top_p, batch_size=200)
        assert {token for response in responses for token in response.ids} == kept


# --- What a response says about itself ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.5}, {"temperature": 0.0}, {"top_p": 0.7}, {"temperature": 2.0}]
)
def test_log_prob_is_that_of_the_untouched_distribution(model: PreTrainedModel, sampling: dict[str, float]) -> None:
    responses = answers(model, batch_size=3, **sampling)
    scored = response_log_probs(model, pack([(p, [r.ids]) for p, r in zip(PROMPTS, responses, strict=True)]))
    assert [response.log_prob for response in responses] == pytest.approx(scored.tolist(), abs=2e-4)


def test_log_prob_by_hand() -> None:
    model = fixed_model([0.5, 0.0, 0.0, 0.0, 0.5])
    for response in answers(model, [[0]] * 50, range(50), temperature=0.7):
        assert response.log_prob == pytest.approx(-len(response.ids) * math.log(2), rel=1e-5)


def test_terminator_is_kept_exactly_when_the_answer_stopped(model: PreTrainedModel) -> None:
    seeds = range(400)
    responses = answers(fixed_model([0.3, 0.1, 0.1, 0.2, 0.3]), [[1, 2]] * 400, seeds, max_new_tokens=4, batch_size=64)
    for response in responses:
        assert TERMINATOR not in response.ids[:-1]
        if response.finish_reason == "stop":
            assert response.ids[-1] == TERMINATOR and 1 <= len(response.ids) <= 4
        else:
            assert response.ids[-1] != TERMINATOR and len(response.ids) == 4
    # 1 - 0.7 ** 4 = 0.76 stop, a few of them with their terminator at the cap; 5 standard deviations is 0.107
    assert sum(response.finish_reason == "stop" for response in responses) / 400 == pytest.approx(0.7599, abs=0.107)
    assert any(response.finish_reason == "stop" and len(response.ids) == 4 for response in responses)


def test_certain_terminator_gives_the_empty_answer() -> None:
    (response,) = answers(fixed_model([0.0, 0.0, 0.0, 0.0, 1.0]), [[1]], [0])
    assert response == Response([TERMINATOR], "stop", 0.0, [0.0])


def test_impossible_terminator_gives_the_cap() -> None:
    (response,) = answers(fixed_model([0.0, 1.0, 0.0, 0.0, 0.0]), [[1]], [0], max_new_tokens=7)
    assert response == Response([1] * 7, "length", 0.0, [0.0] * 7)


def test_cap_of_one_token() -> None:
    assert {
        len(response.ids) for response in answers(fixed_model([0.2] * 5), [[1]] * 40, range(40), max_new_tokens=1)
    } == {1}


# --- The model's own settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "temperature": 0.01},
        {"do_sample": True, "top_p": 0.01},
        {"repetition_penalty": 50.0},
        {"no_repeat_ngram_size": 1},
        {"forced_eos_token_id": TERMINATOR},
        {"forced_bos_token_id": 9},
        {"eos_token_id": [1, 2, 3, 5, 6, 7]},
        {"suppress_tokens": list(range(5, 32))},
        {"begin_suppress_tokens": list(range(5, 32))},
        {"bad_words_ids": [[token] for token in range(5, 32)]},
        {"min_new_tokens": 12},
        {"max_length": 3},
        {"max_new_tokens": 2},
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {"use_cache": False},
        {"stop_strings": ["x"]},
        {"max_time": 0.0},
    ],
    ids=lambda own: next(reversed(own)),
)
def test_generation_config_of_the_model_does_not_leak_in(model: PreTrainedModel, own: dict[str, Any]) -> None:
    expected = answers(model)
    kept = model.generation_config
    own_settings = GenerationConfig(**own)
    model.generation_config = own_settings
    try:
        assert_same(answers(model), expected)
        assert model.generation_config is own_settings  # and is given back
        assert all(getattr(own_settings, name) == value for name, value in own.items())
    finally:
        model.generation_config = kept


def test_generation_config_is_given_back_after_a_failure(model: PreTrainedModel) -> None:
    kept = model.generation_config
    with pytest.raises(IndexError):
        answers(model, [[1, 2, 99]], [0])  # outside of the vocabulary
    assert model.generation_config is kept


# --- Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens and batch_size must be at least 1, got 0 and 64"),
        ({"batch_size": 0}, r"max_new_tokens and batch_size must be at least 1, got 256 and 0"),
        ({"temperature": -0.5}, r"temperature must be 0 \(greedy\) or positive, got -0\.5.*assumes 1"),
        ({"temperature": math.nan}, r"temperature must be 0 \(greedy\) or positive, got nan"),
        ({"temperature": math.inf}, r"temperature must be 0 \(greedy\) or positive, got inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0.*assumes 1"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1\.1"),
        ({"top_p": math.nan}, r"top_p must be in \(0, 1\], got nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TransformersGenerator(**settings)


def test_defaults_are_the_game_as_the_paper_defines_it() -> None:
    generator = TransformersGenerator()
    assert (generator.max_new_tokens, generator.temperature, generator.top_p) == (256, 1.0, 1.0)


def test_sampling_names_all_that_decides_the_distribution_and_nothing_else() -> None:
    sampling = TransformersGenerator(max_new_tokens=5, temperature=0.5, top_p=0.9, batch_size=3).sampling
    assert sampling == {
        "generator": "spin_lightning.generation.transformers.TransformersGenerator",
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    assert isinstance(TransformersGenerator(), ResponseGenerator)
