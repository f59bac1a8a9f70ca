"""The fast generator gives the answers of the plain one, whatever comes and goes around them."""

from __future__ import annotations

import copy
import gc
import math
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from games import answering, answers_of
from helpers import tiny_model
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from spin_lightning.generation import (
    ContinuousGenerator,
    TransformersGenerator,
    continuous,
    packed_linear,
    seed_of,
    slots,
)
from spin_lightning.models import cpu_memory, decode_attention, kernels, rope, shared_prompt
from spin_lightning.types import Response

TERMINATOR, PAD = 4, 4
SHAPE = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama, eager": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager")),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=1.0, sliding_window=4)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=29, n_positions=60, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=29, hidden_size=16, n_layer=2, n_head=2)),
}
CHANCE = random.Random(0)
PROMPTS = [[CHANCE.randrange(5, 29) for _ in range(length)] for length in (3, 1, 7, 2, 40, 11, 1, 5, 23, 4, 4, 9)]
PROMPTS.append(PROMPTS[2])  # a second answer to a prompt
SEEDS = [seed_of(0, 0, number, 0) for number in range(len(PROMPTS))]


def made(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
        if changes:
            model = type(model)(type(model.config)(**{**model.config.to_dict(), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that every mistake shows
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return model.to(dtype).eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return made(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return made("llama")


def answers(
    model: nn.Module,
    prompts: Sequence[list[int]] = PROMPTS,
    seeds: Sequence[int] = SEEDS,
    kind: type[TransformersGenerator] = ContinuousGenerator,
    **settings: Any,
) -> list[Response]:
    return answers_of(kind(**{"max_new_tokens": 16, **settings}), model, prompts, seeds, TERMINATOR, PAD)


def plain_answers(model: nn.Module, **settings: Any) -> list[Response]:
    """One prompt at a time, by the plain generator."""
    return answers(model, kind=TransformersGenerator, **{"batch_size": 1, **settings})


def assert_same(found: Sequence[Response], expected: Sequence[Response], tolerance: float = 1e-4) -> None:
    assert [response.ids for response in found] == [response.ids for response in expected]
    assert [response.finish_reason for response in found] == [response.finish_reason for response in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=tolerance)


@torch.no_grad()
def log_prob_of(model: nn.Module, prompt: list[int], ids: list[int]) -> float:
    """One row, no cache, no padding."""
    logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0].double()
    return sum(float(logits[len(prompt) - 1 + place].log_softmax(-1)[token]) for place, token in enumerate(ids))


class Spy:
    """Notes what a cache is asked to do: rows fed at each step, rows kept and prompts taken in at each refill."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.refills: list[tuple[int, int]] = []
        self.caches: list[slots.SlotCache] = []
        step, refill, init = slots.SlotCache.step, slots.SlotCache.refill, slots.SlotCache.__init__

        def noted_init(cache: slots.SlotCache, *arguments: Any, **named: Any) -> None:
            init(cache, *arguments, **named)
            self.caches.append(cache)

        def noted_step(cache: slots.SlotCache, last_ids: list[int]) -> torch.Tensor:
            self.steps.append(len(last_ids))
            return step(cache, last_ids)

        def noted_refill(cache: slots.SlotCache, kept: list[int], prompts: list[list[int]], pad_id: int) -> list[int]:
            self.refills.append((len(kept), len(prompts)))
            return refill(cache, kept, prompts, pad_id)

        patch.setattr(slots.SlotCache, "__init__", noted_init)
        patch.setattr(slots.SlotCache, "step", noted_step)
        patch.setattr(slots.SlotCache, "refill", noted_refill)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch, llama: PreTrainedModel) -> Spy:
    continuous.refusal(llama, PROMPTS, PAD)  # the trial is not what is watched
    return Spy(monkeypatch)


# --- The same answers -----------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_plain_generator(model: PreTrainedModel) -> None:
    expected = plain_answers(model)
    assert len({tuple(response.ids) for response in expected}) == len(PROMPTS)
    assert {response.finish_reason for response in expected} == {"stop", "length"}
    for batch_size in (1, 3, 8, 100):
        assert_same(answers(model, batch_size=batch_size), expected)
    assert continuous.refusal(model, PROMPTS, PAD) == ""  # and they came from slots


def test_soft_capping_and_sliding_windows_are_at_work() -> None:
    """The comparison above means nothing for these if the settings never bite."""
    for name, off in (
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 64}),
        ("mistral", {"sliding_window": None}),
    ):
        bound = made(name)
        free = type(bound)(type(bound.config)(**{**bound.config.to_dict(), **off})).eval()
        free.load_state_dict(bound.state_dict())
        assert [a.ids for a in answers(bound)] != [a.ids for a in answers(free)], (name, off)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.6}, {"top_p": 0.7}, {"temperature": 2.0}])
def test_answers_are_those_of_the_plain_generator_however_they_are_sampled(
    llama: PreTrainedModel, sampling: dict[str, float]
) -> None:
    found = answers(llama, batch_size=4, **sampling)
    assert_same(found, plain_answers(llama, **sampling))
    assert [a.ids for a in found] != [a.ids for a in answers(llama)]
    for prompt, response in zip(PROMPTS, found, strict=True):  # scored under the untouched distribution
        assert response.log_prob == pytest.approx(log_prob_of(llama, prompt, response.ids), abs=1e-4)


@pytest.mark.parametrize(
    "sizes",
    [
        {"SPARE_COLUMNS": 1},
        {"SPARE_COLUMNS": 3, "BLOCK_ROWS": 1},
        {"BLOCK_ROWS": 2},
        {"BLOCK_ROWS": 3, "PREFILL_TOKENS": 1},
        {"PREFILL_TOKENS": 20},
        {"PREFILL_TOKENS": 10**6, "BLOCK_ROWS": 100},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_how_the_cache_is_laid_out(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]
) -> None:
    expected = plain_answers(llama)
    for name, size in sizes.items():
        monkeypatch.setattr(slots, name, size)
    for batch_size in (2, 6, 13):
        assert_same(answers(llama, batch_size=batch_size), expected)


def test_answers_do_not_depend_on_their_order_or_number(llama: PreTrainedModel) -> None:
    expected = answers(llama)
    for order in ([*reversed(range(13))], random.Random(1).sample(range(13), 13), [4], [1, 6], [1]):
        some = answers(llama, [PROMPTS[i] for i in order], [SEEDS[i] for i in order], batch_size=4)
        assert_same(some, [expected[i] for i in order])
    assert answers(llama, [], []) == []


def test_answers_do_not_depend_on_the_global_random_state(llama: PreTrainedModel) -> None:
    torch.manual_seed(1)
    expected, state = answers(llama), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert_same(answers(llama), expected)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # and leave it alone


@pytest.mark.parametrize("cap", [1, 2])
def test_cap_of_one_or_two_tokens(llama: PreTrainedModel, cap: int) -> None:
    found = answers(llama, max_new_tokens=cap, batch_size=3)
    assert max(len(response.ids) for response in found) == cap
    assert_same(found, plain_answers(llama, max_new_tokens=cap))


def test_terminator_in_the_last_possible_place_is_a_stop(llama: PreTrainedModel) -> None:
    stopped = [response for response in answers(llama, max_new_tokens=40) if response.finish_reason == "stop"]
    length = max(len(response.ids) for response in stopped)
    for cap, reason in ((length, "stop"), (length - 1, "length")):
        index = answers(llama, max_new_tokens=40).index(next(r for r in stopped if len(r.ids) == length))
        assert answers(llama, max_new_tokens=cap)[index].finish_reason == reason
        assert len(answers(llama, max_new_tokens=cap)[index].ids) == cap


# --- The distribution -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_frequencies_follow_the_exact_distribution() -> None:
    model, prompt, count = tiny_model(5, seed=3, hidden_size=8).eval(), [0, 3, 1], 4000
    model.lm_head.weight.mul_(2.0)
    distribution: dict[tuple[int, ...], float] = {}
    first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).tolist()
    for a, share in enumerate(first):
        if a == TERMINATOR:
            distribution[(a,)] = share
            continue
        second = model(torch.tensor([[*prompt, a]])).logits[0, -1].double().softmax(-1).tolist()
        distribution |= {(a, b): share * other for b, other in enumerate(second)}
    assert sum(distribution.values()) == pytest.approx(1)
    found = Counter(
        tuple(response.ids)
        for response in answers(model, [prompt] * count, range(count), max_new_tokens=2, batch_size=500)
    )
    assert set(found) <= set(distribution)
    frequent = [answer for answer in distribution if distribution[answer] * count >= 5]
    cells = [(found[answer], distribution[answer] * count) for answer in frequent]
    cells.append((count - sum(observed for observed, _ in cells), count - sum(expected for _, expected in cells)))
    chi_square = sum((observed - expected) ** 2 / max(expected, 1) for observed, expected in cells)
    assert len(frequent) >= 8
    assert chi_square < len(frequent) + 4 * math.sqrt(2 * len(frequent))


def test_log_prob_is_that_of_plain_forward_passes_in_float64(model: PreTrainedModel) -> None:
    # Gemma 2's own softmax runs in float32
    reference = copy.deepcopy(model) if isinstance(model, Gemma2ForCausalLM) else copy.deepcopy(model).double()
    for prompt, response in zip(PROMPTS, answers(model, batch_size=5), strict=True):
        assert response.log_prob == pytest.approx(log_prob_of(reference, prompt, response.ids), abs=1e-3)
        assert response.log_prob < -0.5


# --- Precision ------------------------------------------------------------------------------------------------------


def test_bfloat16_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama", torch.bfloat16)
    spy = Spy(monkeypatch)
    found = answers(model, batch_size=5)
    assert continuous.refusal(model, PROMPTS, PAD) == ""
    assert {buffer.dtype for layer in spy.caches[-1].buffers for buffer in layer} == {torch.bfloat16}
    reference = copy.deepcopy(model).float()
    for prompt, response in zip(PROMPTS, found, strict=True):
        assert response.log_prob == pytest.approx(log_prob_of(reference, prompt, response.ids), rel=0.1, abs=0.5)


def test_autocast_keeps_keys_as_attention_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    spy = Spy(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        found = answers(model, batch_size=5)
    assert continuous.refusal(model, PROMPTS, PAD) == ""
    assert {buffer.dtype for layer in spy.caches[-1].buffers for buffer in layer} == {torch.bfloat16}
    exact = [log_prob_of(model, prompt, response.ids) for prompt, response in zip(PROMPTS, found, strict=True)]
    assert [response.log_prob for response in found] == pytest.approx(exact, rel=0.1, abs=0.5)
    assert [response.log_prob for response in found] != pytest.approx(exact, rel=1e-5)  # it was bfloat16


# --- Who is under way, and when -------------------------------------------------------------------------------------


def test_finished_rows_are_replaced_at_once(llama: PreTrainedModel, spy: Spy) -> None:
    lengths = [len(response.ids) for response in answers(llama, batch_size=4)]
    assert spy.refills[0] == (0, 4)
    assert sum(entering for _, entering in spy.refills) == len(PROMPTS)
    assert sum(1 for kept, entering in spy.refills if kept and entering) >= 4  # while others went on
    assert sum(spy.steps) == sum(lengths)  # one row a token: no step for an answer that is finished
    waited = [entering for _, entering in spy.refills]
    last = max(number for number, entering in enumerate(waited) if entering)
    assert all(kept + entering == 4 for kept, entering in spy.refills[: last + 1])


def test_many_rows_are_replaced_several_at_a_time(llama: PreTrainedModel, spy: Spy) -> None:
    answers(llama, PROMPTS * 6, range(78), batch_size=32)
    entering = [new for _, new in spy.refills if new]
    assert min(entering[:-1]) >= 4 and len(entering) > 2
    assert max(spy.steps) == 32


def test_an_answer_is_handed_out_in_the_step_that_finishes_it(llama: PreTrainedModel, spy: Spy) -> None:
    shortest = min(len(response.ids) for response in answers(llama))
    spy.steps.clear()
    _, response = next(answering(ContinuousGenerator(16), llama, PROMPTS, SEEDS, TERMINATOR, PAD))
    assert len(response.ids) == shortest == len(spy.steps)


def test_cache_is_as_wide_as_its_widest_row_and_the_spare_columns(
    llama: PreTrainedModel, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "SPARE_COLUMNS", 5)
    generator = ContinuousGenerator(16, batch_size=4)
    widest = 0
    for _ in answering(generator, llama, PROMPTS, SEEDS, TERMINATOR, PAD):
        cache = spy.caches[-1]
        widest = max(widest, *cache.widths)
        assert cache.buffers[0][0].shape == (4, 2, cache.columns, 4)
        assert cache.columns <= widest + 5
    assert cache.columns < 40  # after the long prompt has gone


@pytest.mark.parametrize(("length_step", "width"), [(1, 10), (8, 16), (64, 64), (100, 100)])
def test_answers_to_one_prompt_share_its_pass(
    length_step: int, width: int, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a width that recurs."""
    monkeypatch.setattr(cpu_memory, "LENGTH_STEP", length_step)
    continuous.refusal(llama, PROMPTS, PAD)
    shapes: list[tuple[int, ...]] = []
    handle = llama.model.register_forward_pre_hook(
        lambda module, arguments, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    try:
        found = answers(llama, [PROMPTS[5]] * 5, range(5))
    finally:
        handle.remove()
    assert [shape for shape in shapes if shape[1] > 1] == [(1, width)]
    assert len({tuple(response.ids) for response in found}) > 1


@pytest.fixture
def tokens_read(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of each pass that reads prompts, none of which rounds its length up."""
    monkeypatch.setattr(cpu_memory, "LENGTH_STEP", 1)
    continuous.refusal(llama, PROMPTS, PAD)
    counts: list[int] = []

    def count(module: nn.Module, arguments: Any, inputs: Any) -> None:
        rows, tokens = inputs["input_ids"].shape
        if rows == 1 and "layout" in inputs:
            counts.append(tokens)

    handle = llama.model.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    handle.remove()


SYSTEM = [CHANCE.randrange(5, 29) for _ in range(20)]
WITH_SYSTEM = [SYSTEM + prompt for prompt in PROMPTS]


def test_each_prompt_is_read_once_for_all_its_answers(llama: PreTrainedModel, tokens_read: list[int]) -> None:
    """Also where the answers take their slots one after the other."""
    prompts, seeds = [PROMPTS[5], PROMPTS[7], PROMPTS[11]] * 5, range(15)
    found = answers(llama, prompts, seeds, batch_size=2)
    assert sum(tokens_read) == sum(len(prompt) - 1 for prompt in prompts[:3])
    assert_same(found, plain_answers(llama, prompts=prompts, seeds=seeds))


@pytest.mark.parametrize("batch_size", [3, 100])
def test_what_all_prompts_begin_with_is_read_once(
    batch_size: int, llama: PreTrainedModel, tokens_read: list[int]
) -> None:
    prompts = [prompt for prompt in WITH_SYSTEM if len(prompt) > len(SYSTEM) + 1]
    answers(llama, prompts, range(len(prompts)), batch_size=batch_size)
    tails = {tuple(prompt[len(SYSTEM) :]) for prompt in prompts}
    assert len(tails) < len(prompts)
    assert sum(tokens_read) == len(SYSTEM) + sum(len(tail) - 1 for tail in tails)
    assert tokens_read[0] == len(SYSTEM)


def test_answers_behind_a_common_beginning_are_those_of_the_plain_generator(model: PreTrainedModel) -> None:
    asked = [prompt for prompt in WITH_SYSTEM if len(prompt) < 40], range(20, 32)  # gpt2 has 60 positions
    expected = plain_answers(model, prompts=asked[0], seeds=asked[1])
    for batch_size in (1, 3, 100):
        assert_same(answers(model, *asked, batch_size=batch_size), expected)


def test_a_beginning_is_read_apart_only_where_that_pays_and_changes_no_position(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert continuous._find_prefix(llama, [[*SYSTEM, 5, 6], [*SYSTEM, 7, 8, 9]]) == SYSTEM
    assert continuous._find_prefix(llama, [[*SYSTEM, 5], [*SYSTEM, 7, 8]]) == SYSTEM[:-1]  # a token is left to read
    assert continuous._find_prefix(llama, [[*SYSTEM, 5, 6]] * 2) == []
    assert continuous._find_prefix(llama, [[*SYSTEM[:9], 5, 6], [*SYSTEM[:9], 7, 8, 9]]) == []
    assert continuous._find_prefix(llama, [[5], [*SYSTEM, 7, 8, 9]]) == []
    monkeypatch.setattr(rope, "limit_of", lambda model, length: 22)
    assert continuous._find_prefix(llama, [[*SYSTEM, 5, 6], [*SYSTEM, 7, 8, 9]]) == []


def test_a_model_whose_attention_is_unknown_reads_its_prompts_in_rows() -> None:
    bloom = made("bloom")
    with torch.no_grad():
        assert continuous.refusal(bloom, PROMPTS, PAD) == ""
    assert not continuous._verdicts[bloom].shares
    llama = made("llama")
    with torch.no_grad():
        continuous.refusal(llama, PROMPTS, PAD)
    assert continuous._verdicts[llama].shares


def test_a_mask_that_only_long_passes_have_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    expected = plain_answers(model)
    with torch.no_grad():
        continuous.refusal(model, PROMPTS, PAD)
    assert continuous._verdicts[model].shares
    find_window = shared_prompt._find_window

    def refuse_long(mask_function: Any, length: int) -> int | None:
        if length > 20:
            raise NotImplementedError("a mask of another kind")
        return find_window(mask_function, length)

    monkeypatch.setattr(shared_prompt, "_find_window", refuse_long)
    assert_same(answers(model, batch_size=3), expected)
    assert not continuous._verdicts[model].shares


@pytest.mark.parametrize("kernel", decode_attention.CANDIDATES)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_every_kernel_gives_the_logits_of_the_models_own_cache(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 within its rounding, which is what a model is refused for."""
    monkeypatch.setattr(kernels, "_pinned", {})
    model = made(name, torch.bfloat16, head_dim=16)
    if error := kernels.find_error(model, "decode_attention", kernel):
        pytest.skip(error)
    kernels.pin_kernels(model, {"decode_attention": kernel})
    with torch.no_grad():
        difference, allowed = continuous._measure_slots(model, list(range(28)), PAD, shares=True)
    assert difference < allowed / 4


# --- The model is left as it was ------------------------------------------------------------------------------------


def test_attention_is_the_models_own_between_answers_and_after_an_early_end(llama: PreTrainedModel) -> None:
    AttentionInterface.register("sdpa+own", AttentionInterface()["sdpa"])
    AttentionMaskInterface.register("sdpa+own", AttentionMaskInterface()["sdpa"])
    expected = answers(llama)
    for name in ("sdpa", "sdpa+own"):
        model = made("llama")
        model.config._attn_implementation = name
        settings = model.generation_config
        running = answering(ContinuousGenerator(16, batch_size=3), model, PROMPTS, SEEDS, TERMINATOR, PAD)
        for _ in range(4):
            index, response = next(running)
            assert response.ids == expected[index].ids
            assert model.config._attn_implementation == name
            assert torch.is_grad_enabled()
        running.close()
        assert model.config._attn_implementation == name
        assert model.generation_config is settings
        assert torch.is_grad_enabled()
        assert_same(answers(model), expected)


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_attention_is_the_models_own_after_a_failure(fails_at: int) -> None:
    model = made("llama")
    with torch.no_grad():
        continuous.refusal(model, PROMPTS, PAD)  # the trial is not what fails
    calls = 0

    def failing(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("no more")

    handle = model.model.layers[1].register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="no more"):
        answers(model)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert_same(answers(model), plain_answers(model))


def test_cache_is_freed_when_the_answers_are_done(llama: PreTrainedModel, spy: Spy) -> None:
    answers(llama)
    buffer = weakref.ref(spy.caches[-1].buffers[0][0])
    assert buffer() is not None
    spy.caches.clear()
    gc.collect()
    assert buffer() is None


# --- Models that slots cannot serve ---------------------------------------------------------------------------------


def test_recurrent_model_is_answered_by_the_plain_generator_and_says_so_once(capsys: pytest.CaptureFixture) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MambaForCausalLM(MambaConfig(vocab_size=29, hidden_size=8, num_hidden_layers=2, state_size=4)).eval()
    prompts, seeds = PROMPTS[:4], SEEDS[:4]
    found = answers(model, prompts, seeds, batch_size=2, max_new_tokens=4)
    said = capsys.readouterr().out
    assert said.startswith("note: ContinuousGenerator cannot serve MambaForCausalLM (")  # the reason is the library's
    assert said.endswith("its responses come from TransformersGenerator, which is slower.\n")
    assert said.count("\n") == 1
    assert_same(found, answers(model, prompts, seeds, kind=TransformersGenerator, batch_size=2, max_new_tokens=4), 0.0)
    assert capsys.readouterr().out == ""


class ForgetsPositions(LlamaForCausalLM):
    """Takes its positions from the columns of the batch, padding included, as some models do."""

    def forward(self, *arguments: Any, position_ids: Any = None, **inputs: Any) -> Any:
        return super().forward(*arguments, **inputs)


class ForgetsPadding(LlamaForCausalLM):
    """Looks at columns that are not its row's."""

    def forward(self, *arguments: Any, attention_mask: Any = None, **inputs: Any) -> Any:
        return super().forward(*arguments, **inputs)


@pytest.mark.parametrize("kind", [ForgetsPositions, ForgetsPadding])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_whose_logits_would_be_off_is_answered_by_the_plain_generator(
    kind: type[LlamaForCausalLM], dtype: torch.dtype, capsys: pytest.CaptureFixture
) -> None:
    model = made("llama", dtype)
    wrong = kind(model.config).to(dtype).eval()
    wrong.load_state_dict(model.state_dict())
    found = answers(wrong)
    said = capsys.readouterr().out
    first, *others = said.splitlines()
    assert f"cannot serve {kind.__name__} (its logits would be off by " in first
    # positions are given back by the plain generator; padding is seen there too, and so there is none
    together = "ForgetsPadding is slow to answer: only prompts of equal length are answered together"
    assert len(others) == (kind is ForgetsPadding) and all(line.startswith(f"note: {together}") for line in others)
    assert_same(found, answers(wrong, kind=TransformersGenerator), 0.0)


def test_verdict_on_a_model_goes_with_it(capsys: pytest.CaptureFixture) -> None:
    gc.collect()
    before = len(continuous._verdicts)
    model = made("gpt2")
    answers(model, PROMPTS[:2], SEEDS[:2])
    assert len(continuous._verdicts) == before + 1
    del model
    gc.collect()
    assert len(continuous._verdicts) == before
    assert capsys.readouterr().out == ""


def test_impossible_tokens_are_no_reason_to_refuse(llama: PreTrainedModel) -> None:
    model = made("llama")

    def forbid(module: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([7, 8]), -torch.inf)

    model.lm_head.register_forward_hook(forbid)
    found = answers(model)
    assert continuous.refusal(model, PROMPTS, PAD) == ""
    assert not {7, 8} & {token for response in found for token in response.ids}
    assert_same(found, plain_answers(model))


# --- Settings -------------------------------------------------------------------------------------------------------


def test_sampling_is_that_of_the_plain_generator_so_that_either_can_continue_the_other() -> None:
    settings = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "batch_size": 3}
    assert ContinuousGenerator(**settings).sampling == TransformersGenerator(**settings).sampling

    class Other(ContinuousGenerator):
        """May have another distribution."""

    assert Other(**settings).sampling["generator"].endswith("Other")


bfloat16_units = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no units for bfloat16"
)


@bfloat16_units
@pytest.mark.parametrize("rows", [1, 5, 32, 70])
def test_packed_weights_give_the_same_numbers(rows: int) -> None:
    torch.manual_seed(rows)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 33)).bfloat16()
    forwards = packed_linear.packed_forwards(model, 32)
    assert list(forwards) == list(model)
    x = torch.randn(rows, 3, 64).bfloat16()
    with torch.no_grad():
        expected = model(x)
        with packed_linear.decoding_with(forwards):
            model[0].weight.zero_()  # the copy is what is multiplied with
            found = model(x)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    assert not model(x).equal(expected)  # and afterwards the layer itself again


@bfloat16_units
def test_packed_weights_follow_autocast() -> None:
    layer = nn.Linear(64, 96)
    x = torch.randn(4, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with packed_linear.decoding_with(packed_linear.packed_forwards(layer, 4)):
            torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=2**-7)


def test_weights_in_float32_and_layers_of_other_kinds_are_not_packed() -> None:
    class Other(nn.Linear):
        """May compute anything."""

    assert not packed_linear.packed_forwards(nn.Linear(8, 8), 4)
    assert not packed_linear.packed_forwards(Other(8, 8).bfloat16(), 4)
