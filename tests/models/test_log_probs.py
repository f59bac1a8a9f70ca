"""Log-probabilities of responses, against a second implementation that is slow and plain."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    PhiConfig,
    PhiForCausalLM,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from spin_lightning.models import cpu_memory, forward_paths, head, shared_prompt
from spin_lightning.models.batches import collate_pairs, pack
from spin_lightning.models.fused_layers import Fused, fused_class
from spin_lightning.models.log_probs import pair_log_probs, response_log_probs
from spin_lightning.types import UserError

SHAPE: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SLIDING = ["sliding_attention", "full_attention"]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama-tied-eager": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, tie_word_embeddings=True, attn_implementation="eager")
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, head_dim=8, sliding_window=4, use_sliding_window=True, layer_types=SLIDING)
    ),
    "gemma2": lambda: (
        Gemma2ForCausalLM(  # eager attention, which alone has the softcap; older versions have another default
            Gemma2Config(
                **SHAPE,
                head_dim=8,
                final_logit_softcapping=1.5,
                attn_logit_softcapping=1.0,
                sliding_window=4,
                attn_implementation="eager",
            )
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, layer_types=SLIDING)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "cohere-scaled-logits": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
    "cohere2-no-positions": lambda: Cohere2ForCausalLM(Cohere2Config(**SHAPE, sliding_window=4, layer_types=SLIDING)),
    "granite-divided-logits": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "phi-biased-head": lambda: PhiForCausalLM(PhiConfig(**{**SHAPE, "num_key_value_heads": 2})),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=29, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    ),
    "bloom-alibi": lambda: BloomForCausalLM(BloomConfig(vocab_size=29, hidden_size=16, n_layer=2, n_head=2)),
}
SEPARATE = {"bloom-alibi"}  # the others share prompts
SHAPED_HEAD = {"gemma2", "cohere-scaled-logits", "cohere2-no-positions", "granite-divided-logits", "phi-biased-head"}
#: Two prompts with several responses, two with one.
GROUPS = [
    ([1, 2, 3], [[14, 15, 16, 2], [3, 5], [20]]),
    ([4], [[17, 2]]),
    ([5, 6, 7, 8, 9, 10, 11], [[18], [19, 20, 21, 22, 23, 24, 25, 26, 2]]),
    ([12, 13], [[19, 20, 21, 22, 23, 24, 25, 26, 2]]),
]
ROWS = [(prompt, response) for prompt, responses in GROUPS for response in responses]


def spread_out(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # far from uniform, so that every mistake shows
            if parameter.ndim == 2:
                parameter.mul_(20.0)
            elif name.endswith("lm_head.bias"):
                parameter.normal_()
    return model


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made = spread_out(MODELS[name]())
    # Gemma 2's own softmax runs in float32, where the mask of a float64 model turns padding into NaN
    return made.eval() if name == "gemma2" else made.double().eval()


@pytest.fixture(scope="module")
def reference(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights as they come: nothing of this package has touched its attention."""
    return copy.deepcopy(model).double()


def rounding(model: nn.Module) -> float:
    """Of the model's dtype, or of the float32 in which some take softmax and norms whatever their own dtype is."""
    if next(model.parameters()).dtype is torch.float32:
        return 1e-4
    config = getattr(model, "config", None)
    is_eager = config is not None and str(config._attn_implementation).startswith("eager")
    return 1e-5 if is_eager or config.model_type == "bloom" else 1e-9


def assert_close(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    tolerance = tolerance or {torch.float64: 1e-9, torch.float32: 1e-4}[found.dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_gradients_close(found: list[Tensor], expected: list[Tensor], model: nn.Module) -> None:
    normalises_in_float32 = not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    for a, b in zip(found, expected, strict=True):
        if normalises_in_float32 or rounding(model) > 1e-9:
            assert (a.double() - b.double()).norm() <= (1e-3 if a.dtype is torch.float32 else 1e-5) * b.norm() + 1e-6
        else:
            assert_close(a, b)


def slow_log_prob(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """One row, no padding, no mask, no cut: the whole softmax, one token after another."""
    logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0]
    total = torch.zeros((), dtype=logits.dtype)
    for place, token in enumerate(response, start=len(prompt)):
        total = total + (logits[place - 1] - logits[place - 1].exp().sum().log())[token]
    return total


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


def is_shared(model: nn.Module) -> bool:
    return forward_paths.is_shared(forward_paths.forward_path_of(model))


# --- The numbers, on every architecture -----------------------------------------------------------------------------


def test_equals_the_slow_sum_of_one_row_at_a_time(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    with torch.no_grad():
        fast = response_log_probs(model, pack(GROUPS))
        slow = torch.stack([slow_log_prob(reference, *row) for row in ROWS])
    assert fast.dtype == model.dtype
    assert_close(fast, slow, rounding(model))
    assert len(set(slow.tolist())) == len(ROWS) and slow.max() < -0.5  # a test of something


def test_gradient_equals_that_of_the_slow_sum(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    weights = torch.tensor([0.3, -1.1, 0.7, 2.0, -0.4, 1.3, 0.9], dtype=torch.float64)
    fast = gradients((weights * response_log_probs(model, pack(GROUPS))).sum(), model)
    slow_sum = torch.stack([w * slow_log_prob(reference, *row) for w, row in zip(weights, ROWS, strict=True)]).sum()
    slow = gradients(slow_sum, reference)
    assert_gradients_close(fast, slow, model)
    assert sum(float(gradient.abs().sum()) for gradient in slow) > 1


def test_every_architecture_takes_the_forward_path_it_should(name: str, model: PreTrainedModel) -> None:
    assert is_shared(model) == (name not in SEPARATE)
    assert head.is_linear(model) == (name not in SHAPED_HEAD)


def test_every_forward_path_gives_the_same_numbers(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    expected = gradients(response_log_probs(model, pack(GROUPS)).sum(), model)
    batch = pack(GROUPS)
    reference = copy.deepcopy(reference).to(model.dtype)
    for path in (
        forward_paths.ForwardPath(forward_paths._read_plain),
        forward_paths.ForwardPath(forward_paths._read_separate, head.is_linear(model)),
    ):
        values = path(reference, batch)
        assert_close(values, forward_paths.forward_path_of(model)(model, batch), rounding(model))
        assert_gradients_close(expected, gradients(values.sum(), reference), model)


def test_soft_capping_and_sliding_window_are_at_work() -> None:
    """The comparisons above mean nothing for these if the settings never bite."""
    for name, off in (
        ("gemma2", {"final_logit_softcapping": None}),
        ("mistral", {"sliding_window": None}),
        ("cohere-scaled-logits", {"logit_scale": 1.0}),
    ):
        torch.manual_seed(0)
        limited = spread_out(MODELS[name]()).eval()
        free = type(limited)(type(limited.config)(**{**limited.config.to_dict(), **off})).eval()
        free.load_state_dict(limited.state_dict())
        with torch.no_grad():
            a, b = (response_log_probs(each, pack(GROUPS[2:])) for each in (limited, free))
        assert (a - b).abs().max() > 1e-3, name


@torch.no_grad()
def test_responses_do_not_see_each_other(model: PreTrainedModel) -> None:
    prompt, (first, second, third) = GROUPS[0]
    alone = torch.cat([response_log_probs(model, pack([(prompt, [each])])) for each in (first, second, third)])
    for others in ([second, third], [[9] * 7, [10]], [[28] * 20]):
        together = response_log_probs(model, pack([([7] * 9, [[8]]), (prompt, [first, *others])]))
        assert_close(together[1], alone[0], rounding(model))
    reordered = response_log_probs(model, pack([(prompt, [third, first, second])]))
    assert_close(reordered, alone[[2, 0, 1]], rounding(model))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kernel", shared_prompt.CANDIDATES)
@pytest.mark.parametrize(("block", "length_step"), [(256, 64), (8, 4), (4, 8), (5, 1), (1, 3)])
def test_attention_in_blocks_equals_one_masked_softmax(
    block: int,
    length_step: int,
    kernel: str,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward, whatever the blocks and the padding; what stands behind the batch is left alone."""
    monkeypatch.setattr(shared_prompt, "BLOCK", block)
    monkeypatch.setattr(cpu_memory, "LENGTH_STEP", length_step)
    torch.manual_seed(0)
    batch = pack(GROUPS)
    count, length = len(batch.input_ids), len(batch.input_ids) + 6
    query = torch.randn(1, 4, length, 8, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 1, 2, length, 8, dtype=torch.float64).requires_grad_().unbind(0)
    visible = torch.zeros(length, length, dtype=torch.bool)
    for q, places in shared_prompt.segments(batch):
        seen = torch.cat([torch.arange(place.start, place.stop) for place in places])
        visible[torch.arange(q.start, q.stop)[:, None], seen] = shared_prompt._make_mask(
            q.stop - q.start, len(seen), window
        )
    scores = query @ key.repeat_interleave(2, 1).mT * 0.7
    weights = scores[:, :, :count].masked_fill(~visible[:count], -torch.inf).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    attend = shared_prompt.CANDIDATES[kernel]
    found = shared_prompt.shared_prompt_attention(
        nn.Identity(), query, key, value, batch, scaling=0.7, sliding_window=window, attend=attend
    )
    assert_close(found[:, :count], expected)
    assert found.shape[1] == length and not found[:, count:].any()
    direction = torch.randn(found.shape, dtype=found.dtype)
    for a, b in zip(
        torch.autograd.grad((found * direction).sum(), [query, key, value]),
        torch.autograd.grad((expected * direction[:, :count]).sum(), [query, key, value]),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kernel", shared_prompt.CANDIDATES)
@pytest.mark.parametrize("past", [1, 7, 12])
def test_tokens_that_ask_nothing_are_seen_by_those_behind_them(kernel: str, past: int, window: int | None) -> None:
    """A beginning of the first prompt, or all of it, whose keys and values came from a cache."""
    torch.manual_seed(0)
    batch = pack([([3] * 12, [[4] * 5, [], [5] * 9]), ([6] * 4, [[7] * 3])])
    query, key, value = torch.randn(3, 1, 4, len(batch.input_ids), 8, dtype=torch.float64)
    settings = {"sliding_window": window, "attend": shared_prompt.CANDIDATES[kernel]}
    whole = shared_prompt.shared_prompt_attention(nn.Identity(), query, key, value, batch, **settings)
    behind = shared_prompt.shared_prompt_attention(nn.Identity(), query[:, :, past:], key, value, batch, **settings)
    assert_close(behind, whole[:, past:])
    plain = shared_prompt.shared_prompt_attention(
        nn.Identity(), query[:, :, past:], key, value, batch, sliding_window=window, softcap=1e6
    )
    assert_close(plain, whole[:, past:], 1e-6)  # whose softmax is in float32


def test_large_scores_lose_no_more_in_bfloat16_products_than_in_the_kernel() -> None:
    """Scores of up to 60 rounded to bfloat16 would be off by 0.1; less their maximum they are not."""
    torch.manual_seed(0)
    batch = pack([([1] * 150, [[2] * 40, [3] * 70])])
    query, key, value = (
        torch.randn(1, heads, 260, 16).mul(scale).bfloat16() for heads, scale in ((4, 4), (2, 4), (2, 1))
    )

    def attend(kernel: str, dtype: torch.dtype) -> Tensor:
        inputs, function = (tensor.to(dtype) for tensor in (query, key, value)), shared_prompt.CANDIDATES[kernel]
        return shared_prompt.shared_prompt_attention(nn.Identity(), *inputs, batch, attend=function).double()

    exact, kernel = attend("kernel", torch.float64), attend("kernel", torch.bfloat16)
    products = attend("products", torch.bfloat16)
    assert not torch.equal(products, kernel)
    assert (products - exact).norm() <= 1.6 * (kernel - exact).norm() <= 0.01 * exact.norm()


def test_batches_of_about_the_same_lengths_ask_for_the_same_products() -> None:
    """A CPU's library keeps a kernel for every shape it has met, for ever."""

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
                seen.add((str(function), *(tuple(operand.shape) for operand in args)))
            return function(*args, **(kwargs or {}))

    aten = torch.ops.aten
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "max_position_embeddings": 512}))
    sets = []
    for prompt, first, second in ([300, 70, 90], [310, 69, 80], [300, 70, 150]):
        seen: set[Any] = set()
        batch = pack([([1] * prompt, [[3] * first, [4] * second])])
        response_log_probs(model, batch)  # the choice of a path has shapes of its own
        with Shapes():
            response_log_probs(model, batch).sum().backward()
        sets.append(seen)
    assert sets[0] == sets[1] != sets[2] and len(sets[0]) > 20


@torch.no_grad()
def test_response_without_tokens_gives_exactly_zero(model: PreTrainedModel) -> None:
    values = response_log_probs(model, pack([*GROUPS, ([3, 4], [[], [5]])]))
    assert values[-2] == 0
    assert_close(values[:-2], response_log_probs(model, pack(GROUPS)), rounding(model))
    assert response_log_probs(model, pack([([3, 4], [[]]), ([5], [[]])])).tolist() == [0, 0]


@pytest.mark.parametrize(
    "groups",
    [
        [([5, 6, 7], [[8, 9], []])],
        [([5, 6, 7], [[], [8, 9]])],
        [([5, 6, 7], [[], [8, 9], [], [7]]), ([3], [[]])],
        [([], [[]]), ([5], [[6]])],
        [([], [[], [4, 5]]), ([5], [[]])],
        [([], [[]])],
        [([1, 2], [[]])],
    ],
)
def test_empty_responses_give_zero_wherever_they_stand_and_no_gradient_that_is_not_a_number(
    model: PreTrainedModel, reference: PreTrainedModel, groups: Any
) -> None:
    rows = [(prompt, response) for prompt, responses in groups for response in responses]
    values = response_log_probs(model, pack(groups))
    for value, (prompt, response) in zip(values, rows, strict=True):
        if response:
            expected = (
                slow_log_prob(reference, prompt, response)
                if prompt
                else slow_log_prob(reference, response[:1], response[1:])
            )
            assert_close(value[None], expected[None], rounding(model))
        else:
            assert value.item() == 0
    (gradient,) = torch.autograd.grad(values.sum(), next(model.parameters()))
    assert gradient.isfinite().all()
    for path in (
        forward_paths.ForwardPath(forward_paths._read_plain),
        forward_paths.ForwardPath(forward_paths._read_separate, head.is_linear(model)),
    ):
        if len(pack(groups).scored):
            (gradient,) = torch.autograd.grad(path(model, pack(groups)).sum(), next(model.parameters()))
            assert gradient.isfinite().all()


@torch.no_grad()
def test_nothing_predicts_the_first_token_after_an_empty_prompt(model: PreTrainedModel) -> None:
    with_prompt = response_log_probs(model, pack([([7], [[8, 9, 2]])]))
    without = response_log_probs(model, pack([([], [[7, 8, 9, 2]]), ([1], [[2]])]))
    assert_close(without[:1], with_prompt)


# --- What the model is asked for ------------------------------------------------------------------------------------


def test_a_model_that_cannot_share_prompts_is_told_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = spread_out(MODELS["bloom-alibi"]())
    response_log_probs(model, pack(GROUPS))
    response_log_probs(model, pack(GROUPS))
    printed = capsys.readouterr().out
    assert printed.count("BloomForCausalLM cannot share a prompt between its responses") == 1
    response_log_probs(tiny_model(32), pack(GROUPS))
    assert capsys.readouterr().out == ""


def test_layers_that_are_not_attention_are_refused_before_they_are_tried(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(32)
    model.config.layer_types = ["linear_attention", "full_attention"]
    assert not is_shared(model)
    assert "layers of kind linear_attention have no place for a shared prompt" in capsys.readouterr().out
    assert model.config._attn_implementation == "sdpa"


def test_an_untrained_model_does_not_hide_a_wrong_path(capsys: pytest.CaptureFixture[str]) -> None:
    """Its next token hardly depends on the text, and so a wrong path is hardly off."""
    torch.manual_seed(0)
    model = CountsTokens(LlamaConfig(**SHAPE, initializer_range=0.02)).eval()
    assert not is_shared(model)
    said = capsys.readouterr().out
    difference = float(said.partition("log-probs would differ by ")[2].split()[0])
    assert 1e-5 < difference < forward_paths.AGREEMENT[torch.float32]


class CountsTokens(LlamaForCausalLM):
    """Takes a token's position from its place in the row: a wrong answer, and no error."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.register_forward_pre_hook(self._forget, with_kwargs=True)

    @staticmethod
    def _forget(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("layout") is not None:
            kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]
        return args, kwargs


def test_a_forward_path_that_gives_other_numbers_is_not_taken(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = spread_out(CountsTokens(LlamaConfig(**SHAPE)))
    found = response_log_probs(model, pack(GROUPS))
    assert not is_shared(model) and "log-probs would differ by" in capsys.readouterr().out
    slow = torch.stack([slow_log_prob(model, *row) for row in ROWS])
    assert_close(found, slow, 1e-4)


def test_a_model_keeps_its_own_attention_for_everything_else() -> None:
    for implementation in ("sdpa", "eager"):
        model = spread_out(LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=implementation))).eval()
        ids, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        before = model(ids, attention_mask=mask).logits
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        response_log_probs(model, pack(GROUPS))
        assert is_shared(model)
        assert_close(model(ids, attention_mask=mask).logits, before)
        again = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(generated, again)
        assert "shared_prompt" not in str(model.config.to_dict())


def test_a_copy_of_a_model_is_as_good_as_the_model() -> None:
    model = tiny_model(32)
    expected = response_log_probs(model, pack(GROUPS))
    assert torch.equal(response_log_probs(copy.deepcopy(model), pack(GROUPS)), expected)


def test_only_the_places_that_predict_a_response_token_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "LENGTH_STEP", 1)
    asked = []
    model = tiny_model(32).eval()
    model.lm_head = Recorded(model.lm_head, asked)
    response_log_probs(model, pack([([1] * 10, [[3, 4], [6]]), ([1] * 12, [[5]])]))
    assert asked[-1] == 4  # of 26


class Recorded(nn.Linear):
    """A head that is more than a matrix: it keeps count, and it has a low-rank adapter."""

    def __init__(self, head: nn.Linear, asked: list[int]) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, dtype=head.weight.dtype)
        self.weight = head.weight
        self.down = nn.Parameter(torch.randn(2, head.in_features, dtype=head.weight.dtype))
        self.up = nn.Parameter(torch.randn(head.out_features, 2, dtype=head.weight.dtype))
        self.asked = asked

    def forward(self, hidden: Tensor) -> Tensor:
        self.asked.append(hidden.shape[-2])
        return super().forward(hidden) + hidden @ self.down.mT @ self.up.mT


def test_an_adapter_on_the_head_counts_and_learns() -> None:
    model = tiny_model(32).double().eval()
    model.lm_head = Recorded(model.lm_head, [])
    fast = gradients(response_log_probs(model, pack(GROUPS)).sum(), model)
    slow = gradients(torch.stack([slow_log_prob(model, *row) for row in ROWS]).sum(), model)
    assert_gradients_close(fast, slow, model)
    assert model.lm_head.up.grad is None and float(slow[-1].abs().sum()) > 1e-3


# --- Models of every kind ------------------------------------------------------------------------------------------

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW: dict[str, Any] = {"sliding_window": 6}
#: How each is made, and the forward path it takes.
KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "mixtral": (lambda: MixtralConfig(**SHAPE, **WINDOW, num_local_experts=4), "_read_shared"),
    # the two below have windows that their attention is told nothing of
    "qwen2-moe": (
        lambda: Qwen2MoeConfig(
            **SHAPE,
            **EXPERTS,
            **WINDOW,
            use_sliding_window=True,
            layer_types=["sliding_attention"] * 2,
            shared_expert_intermediate_size=16,
        ),
        "_read_shared",
    ),
    "phimoe": (lambda: PhimoeConfig(**SHAPE, **WINDOW, num_local_experts=4), "_read_shared"),
    "qwen3-moe": (lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=8, output_router_logits=True), "_read_shared"),
    "granite-moe": (lambda: GraniteMoeConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2), "_read_shared"),
    "deepseek-v3, values narrower than keys": (
        lambda: DeepseekV3Config(
            **{**SHAPE, "num_key_value_heads": 2},
            moe_intermediate_size=16,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        "_read_shared",
    ),
    "gpt-oss, attention with sinks": (
        lambda: GptOssConfig(
            **SHAPE,
            **WINDOW,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "_read_separate",
    ),
    "jamba": (
        lambda: JambaConfig(
            **SHAPE, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2, mamba_d_state=4
        ),
        "_read_separate",
    ),
    "rwkv": (lambda: RwkvConfig(vocab_size=29, hidden_size=16, num_hidden_layers=2), "_read_separate"),
    "llama4, chunks of tokens": (
        lambda: Llama4TextConfig(
            **SHAPE, head_dim=8, intermediate_size_mlp=24, num_local_experts=4, attention_chunk_size=6
        ),
        "_read_plain",
    ),
}
LONG = [
    ([(3 * i) % 29 for i in range(20)], [[(5 * i) % 29 for i in range(30)], [7, 8], [(11 * i) % 29 for i in range(9)]]),
    ([4, 5], [[(7 * i + 1) % 29 for i in range(58)]]),
]


@pytest.mark.parametrize("name", KINDS)
def test_numbers_and_gradients_are_those_of_each_response_alone(name: str) -> None:
    """Mixtures of experts, recurrences, and masks that are more than they look: in float32, as they come."""
    make, path = KINDS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(0.15 * torch.randn_like(parameter))
    model(torch.tensor([[1]]))  # RWKV changes its weights on its first pass
    reference = copy.deepcopy(model)
    found = response_log_probs(model, pack(LONG))
    expected = torch.stack([slow_log_prob(reference, prompt, row) for prompt, rows in LONG for row in rows])
    assert (found - expected).abs().max() < 1e-3
    weights = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in reference.parameters() if parameter.ndim >= 2]
    fast = torch.autograd.grad(found[0] - 2 * found[1] + found[3], weights, allow_unused=True, materialize_grads=True)
    total = expected[0] - 2 * expected[1] + expected[3]
    slow = torch.autograd.grad(total, others, allow_unused=True, materialize_grads=True)
    off = sum((a - b).norm() ** 2 for a, b in zip(fast, slow, strict=True)) / sum(b.norm() ** 2 for b in slow)
    assert off < 1e-6
    chosen = forward_paths.forward_path_of(model)
    assert chosen.read.__name__ == path


def test_a_window_that_only_the_mask_knows_is_at_work() -> None:
    model = AutoModelForCausalLM.from_config(KINDS["qwen2-moe"][0]()).eval()
    ids = torch.tensor([[(7 * i + 1) % 29 for i in range(40)]])
    other = ids.clone()
    other[0, :20] = ids[0, :20].flip(0)  # further back than two layers of windows reach
    with torch.no_grad():
        assert torch.equal(model(ids).logits[0, -1], model(other).logits[0, -1])


def test_the_kind_of_a_mask_is_read_off_its_rows() -> None:
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        chunked_causal_mask_function,
        sliding_window_causal_mask_function,
    )

    assert shared_prompt._find_window(causal_mask_function, 70) is None
    assert shared_prompt._find_window(sliding_window_causal_mask_function(70), 70) is None
    for length in (9, 70, 700):
        assert shared_prompt._find_window(sliding_window_causal_mask_function(8), length) == 8
    for other in (chunked_causal_mask_function(8, torch.zeros(1)), bidirectional_mask_function):
        with pytest.raises(NotImplementedError, match="more than a sliding window"):
            shared_prompt._find_window(other, 70)


def test_a_mask_that_only_long_passes_have_is_no_reason_to_stop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = spread_out(LlamaForCausalLM(LlamaConfig(**SHAPE))).eval()
    expected = torch.stack([slow_log_prob(model, *row) for row in ROWS])
    assert is_shared(model) and capsys.readouterr().out == ""

    def changed(*_: Any) -> None:
        raise NotImplementedError("another mask")

    monkeypatch.setattr(shared_prompt, "_find_window", changed)
    for _ in range(2):
        assert_close(response_log_probs(model, pack(GROUPS)), expected, 1e-4)
    said = capsys.readouterr().out
    assert said.count("note: LlamaForCausalLM cannot share a prompt in passes as long as this one; its log-probs") == 1
    assert not is_shared(model) and model.config._attn_implementation == "sdpa"


class Temperamental(LlamaForCausalLM):
    """Reads what only its own decoder gives, and raises what nobody expects when it is not there."""

    def forward(self, *arguments: Any, **inputs: Any) -> Any:
        output = super().forward(*arguments, **inputs)
        if inputs.get("inputs_embeds") is not None:
            raise StopIteration
        return output


def test_whatever_a_probe_raises_leads_to_the_next_way(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = spread_out(Temperamental(LlamaConfig(**SHAPE))).eval()
    expected = torch.stack([slow_log_prob(model, *row) for row in ROWS])
    model.lm_head.bias = nn.Parameter(torch.zeros(29))  # more than one matrix
    assert_close(response_log_probs(model, pack(GROUPS)), expected, 1e-4)
    said = capsys.readouterr().out
    assert said.count("note: ") == 1 and "Temperamental cannot share a prompt" in said
    assert (
        "its log-probs take a longer forward path: the logits of all tokens of each response behind a prompt of its "
        "own." in said
    )


def encoder() -> PreTrainedModel:
    return BertLMHeadModel(
        BertConfig(vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )


def prefix() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=8, use_bidirectional_attention=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [encoder, prefix])
def test_a_model_that_looks_ahead_is_refused(make: Callable[[], PreTrainedModel], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = spread_out(make()).to(dtype)
    with pytest.raises(
        UserError, match=rf"{type(model).__name__} is not a causal language model.*is_decoder or is_causal"
    ):
        response_log_probs(model, pack(GROUPS))
    assert model.training


def test_a_model_that_gives_no_logits_of_its_input_is_refused() -> None:
    config = T5Config(vocab_size=29, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    for model in (T5ForConditionalGeneration(config), encoder().bert):
        with pytest.raises(
            UserError, match=f"{type(model).__name__} cannot be trained as a causal language model, which"
        ):
            response_log_probs(model, pack(GROUPS))


# --- The head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied-eager", "gemma2", "phi-biased-head"])
@pytest.mark.parametrize("tokens", [1, 3, 7, 100])
def test_the_budget_for_logits_changes_no_number(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    model = spread_out(MODELS[name]()).double().eval()
    hidden = torch.randn(10, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(29, (10,))
    weights = torch.randn(10, dtype=torch.float64)
    found = head.token_log_probs(
        model, hidden, targets, is_linear=head.is_linear(model), budget=tokens * 29 * hidden.dtype.itemsize
    )
    expected = head.logits_of(model)(hidden).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert_close(found, expected)
    inputs = [hidden, *model.lm_head.parameters()]
    for a, b in zip(
        torch.autograd.grad(weights @ found, inputs), torch.autograd.grad(weights @ expected, inputs), strict=True
    ):
        assert_close(a, b)


def test_logits_never_exceed_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(29)
    seen = []
    matmul = torch.mm

    def recorded(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        result = matmul(a, b, out=out) if out is not None else matmul(a, b)
        seen.append(result.shape)
        return result

    monkeypatch.setattr(torch, "mm", recorded)
    hidden = torch.randn(10, 16, requires_grad=True)
    head.token_log_probs(model, hidden, torch.arange(10), is_linear=True, budget=4 * 29 * 4).sum().backward()
    wide = [shape[0] for shape in seen if shape[1] == 29]
    assert wide == [4, 4, 2] * 2  # forward, and again backward


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_bfloat16_logits_are_summed_in_float32(scale: float) -> None:
    """Against float64 on the same rounded inputs: only the rounding of the logits themselves may show."""
    torch.manual_seed(0)
    model = tiny_model(1000).bfloat16()
    hidden = (scale * torch.randn(50, 16)).bfloat16().requires_grad_()
    targets = torch.randint(1000, (50,))
    found = head.token_log_probs(model, hidden, targets, is_linear=True)
    assert found.dtype is torch.float32
    logits = hidden.double() @ model.lm_head.weight.double().mT
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert ((found - expected).abs() <= 2**-8 * logits.abs().amax(1) + 1e-3).all()
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    (exact,) = torch.autograd.grad(expected.sum(), hidden)
    assert (gradient - exact).norm() <= 0.02 * exact.norm()


# --- Precision, checkpointing, dropout ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma3"])
def test_bfloat16_is_as_close_to_float64_as_separate_rows_in_bfloat16_are(name: str) -> None:
    torch.manual_seed(0)
    exact = MODELS[name]().double().eval()
    rounded = copy.deepcopy(exact).bfloat16()
    groups = [(list(range(20)), [list(range(3, 28)), list(range(9, 20)), [4] * 17]) for _ in range(3)]
    batch = pack(groups)
    expected = gradients(response_log_probs(exact, batch).sum(), exact)

    def error(path: Callable[..., Tensor]) -> float:
        found = gradients(path(rounded, batch).sum(), rounded)
        return float(
            sum((a.double() - b).norm() ** 2 for a, b in zip(found, expected, strict=True))
            / sum(b.norm() ** 2 for b in expected)
        )

    assert is_shared(rounded)
    assert (
        error(forward_paths.forward_path_of(rounded))
        <= 2 * error(forward_paths.ForwardPath(forward_paths._read_plain)) + 1e-6
    )


def test_autocast_computes_in_bfloat16_and_gives_float32_gradients() -> None:
    model = tiny_model(32)
    with torch.autocast("cpu", torch.bfloat16):
        value = response_log_probs(model, pack(GROUPS))
    assert value.dtype is torch.float32 and is_shared(model)
    exact = response_log_probs(model, pack(GROUPS))
    assert 0 < float((value - exact).detach().abs().max()) < 1.0
    found, expected = gradients(value.sum(), model), gradients(exact.sum(), model)
    assert all(gradient.dtype is torch.float32 for gradient in found)
    assert sum((a - b).norm() for a, b in zip(found, expected, strict=True)) < 0.1 * sum(b.norm() for b in expected)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = tiny_model(32).train()
    expected = gradients(response_log_probs(model, pack(GROUPS)).sum(), model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(response_log_probs(model, pack(GROUPS)).sum(), model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dropout_of_attention_weights_keeps_their_mean() -> None:
    model = tiny_model(32, attention_dropout=0.3).double().train()
    with torch.no_grad():
        torch.manual_seed(0)
        exact = response_log_probs(model.eval(), pack(GROUPS))
        assert is_shared(model)
        model.train()
        draws = torch.stack([response_log_probs(model, pack(GROUPS)) for _ in range(20)])
    assert draws.std(0).min() > 0.01
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 9, 8)
    from spin_lightning.models.shared_prompt import _attend_plainly

    plain = _attend_plainly(query, key, key, 0.3, 0.0, 4, None)
    mean = torch.stack([_attend_plainly(query, key, key, 0.3, 0.5, 4, None) for _ in range(4000)]).mean(0)
    assert_close(mean, plain, 0.1)
    assert exact.isfinite().all()


@torch.no_grad()
def test_flash_attention_gets_sequences_end_to_end() -> None:
    """The layout its variable-length kernel takes, run here through torch's own attention, which knows it too."""
    model = spread_out(MODELS["llama"]()).double().eval()
    batch = pack(GROUPS)
    places, predictors = forward_paths._lay_end_to_end(batch)
    output = model(
        input_ids=batch.input_ids[places][None], position_ids=batch.position_ids[places][None], use_cache=False
    )
    values = output.logits[0, predictors].log_softmax(-1).gather(1, batch.input_ids[batch.scored][:, None]).squeeze(1)
    assert_close(values, forward_paths.ForwardPath(forward_paths._read_plain)(model, batch))


# --- By hand --------------------------------------------------------------------------------------------------------


class Memoryless(nn.Module):
    """A language model whose next token never depends on the text."""

    def __init__(self, probabilities: list[float], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities, dtype=torch.float64).log().to(dtype))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> object:
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, -1))


def test_sum_over_tokens_in_nats_by_hand() -> None:
    """Token probabilities 1/2, 1/4, 1/4: a sum, not a mean, and natural logarithms."""
    values = response_log_probs(Memoryless([0.5, 0.25, 0.25]), pack([([0], [[0, 0, 1]]), ([0, 0], [[2]])]))
    assert values.tolist() == pytest.approx([-math.log(2 * 2 * 4), -math.log(4)], rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_half_precision_token_log_probs_are_summed_in_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    values = response_log_probs(Memoryless([0.5, 0.25, 0.25], dtype), pack([([0], [[0] * 300])]))
    assert values.dtype == expected
    # in bfloat16 the sum of 300 terms would stall; only the rounding of the logits themselves may show
    assert values.item() == pytest.approx(-300 * math.log(2), rel=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("max_tokens", [1, 17, 1000])
def test_pair_log_probs_keeps_real_generated_and_initial_apart(
    model: PreTrainedModel, reference: PreTrainedModel, max_tokens: int
) -> None:
    prompts = [[1, 2, 3], [4]]
    sides = {
        "real_ids": [[14, 15, 16, 2], [17, 2]],
        "generated_ids": [[18], [19, 20, 21, 22, 23, 24, 25, 26, 2]],
        "initial_ids": [[3, 3, 3], [7]],
    }
    scores = {f"{player}_{side}_log_prob": 0.0 for player in ("opponent", "initial") for side in ("real", "generated")}
    pairs = [
        {
            "pair_id": i,
            "prompt_id": i,
            "prompt_ids": prompts[i],
            **{side: ids[i] for side, ids in sides.items()},
            **scores,
        }
        for i in range(2)
    ]
    expected = {
        side: torch.stack([slow_log_prob(reference, prompts[i], ids[i]) for i in range(2)])
        for side, ids in sides.items()
    }
    parts = collate_pairs(pairs, max_tokens)
    assert len(parts) == (1 if max_tokens == 1000 else 2)
    found = [pair_log_probs(model, part) for part in parts]
    assert torch.cat([part.pair_ids for part in parts]).tolist() == [0, 1]
    assert_close(torch.cat([part.real for part in found]), expected["real_ids"], rounding(model))
    assert_close(torch.cat([part.generated for part in found]), expected["generated_ids"], rounding(model))
    assert_close(torch.cat([part.initial_response for part in found]), expected["initial_ids"], rounding(model))
    assert torch.cat([part.real_lengths for part in found]).tolist() == [4, 2]
    assert torch.cat([part.generated_lengths for part in found]).tolist() == [1, 9]

    (without,) = collate_pairs([{**pair, "initial_ids": None} for pair in pairs], 1000)
    assert pair_log_probs(model, without).initial_response is None
    assert_close(pair_log_probs(model, without).generated, expected["generated_ids"], rounding(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4, 1e9])
def test_log_probs_and_gradients_are_numbers_at_extreme_logits(scale: float, dtype: torch.dtype) -> None:
    """From a model that knows nothing to one that is certain, and wrong, by ten billion nats."""
    model = MODELS["llama"]().to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    values = response_log_probs(model, pack(GROUPS))
    assert values.dtype is torch.float32 and values.isfinite().all() and values.max() <= 0
    if scale == 0:
        lengths = torch.tensor([len(response) for _, responses in GROUPS for response in responses])
        assert_close(values, -lengths * math.log(SHAPE["vocab_size"]), 1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(values.sum(), model))


@pytest.mark.parametrize("length", [19, 255, 257, 511, 700])
@pytest.mark.parametrize("window", [None, 4, 300])
def test_a_mask_is_read_alike_whatever_the_default_dtype(length: int, window: int | None) -> None:
    """Lightning's bf16-true makes bfloat16 the default, in which 257 is no number."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_past = key <= query
        return is_past if window is None else is_past & (key > query - window)

    torch.set_default_dtype(torch.bfloat16)
    try:
        found = shared_prompt._find_window(mask, length)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == (window if window is not None and window < length else None)


def test_prompts_are_shared_in_bf16_true_too() -> None:
    model = tiny_model(max_position_embeddings=512).to(torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert forward_paths.is_shared(forward_paths.forward_path_of(model))
    finally:
        torch.set_default_dtype(torch.float32)


class Breaking(torch.autograd.Function):
    """As a layer that compiles in a pass without gradients, and not in one with them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("backend='inductor' raised: no kernel")


@pytest.mark.parametrize("asked_in", [torch.no_grad, torch.inference_mode])
def test_layers_that_compile_without_gradients_alone_are_computed_as_they_come(
    asked_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_layer(own: Any) -> Any:
        def compiled(layer: Any, hidden: Tensor, *args: Any, **settings: Any) -> Any:
            return Breaking.apply(own.forward(layer, hidden, *args, **settings))

        return compiled

    class Compiled(Fused):
        def forward(self, *args: Any, **settings: Any) -> Any:
            return compile_layer(type(self).__bases__[1])(self, *args, **settings)

    def find(module: nn.Module) -> Any:
        is_layer = isinstance(module, GradientCheckpointingLayer)
        return fused_class(type(module), Compiled) if is_layer else None

    kernel_of = forward_paths.kernel_of
    choose = lambda model, name: "compiled" if name == "layers" else kernel_of(model, name)  # noqa: E731
    model, plain, frozen = (tiny_model() for _ in range(3))
    batch = pack([([1, 2, 3], [[4, 5], [6, 7, 8]])])
    expected = response_log_probs(plain, batch)
    monkeypatch.setattr(forward_paths, "kernel_of", choose)
    monkeypatch.setattr(forward_paths, "find_compiled_layer", find)
    with asked_in():
        response_log_probs(model, batch)
    said = capsys.readouterr().out
    assert "cannot have its layers compiled (RuntimeError: backend='inductor' raised: no kernel)" in said
    found = response_log_probs(model, batch)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert not any(isinstance(module, Compiled) for module in model.modules())
    with asked_in():  # of which no gradient is asked
        response_log_probs(frozen.requires_grad_(False), batch)
    assert any(isinstance(module, Compiled) for module in frozen.modules())
    assert capsys.readouterr().out == ""
