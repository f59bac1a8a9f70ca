"""Log-probabilities of responses, against a second implementation that is slow and plain."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import tiny_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from spin_lightning.encoding import collate_pairs, pad_sequences
from spin_lightning.log_probs import pair_log_probs, response_log_probs

SHAPE = {
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
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=1.5, attn_logit_softcapping=1.0, sliding_window=4)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=29, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    ),
}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]
RESPONSES = [[14, 15, 16, 2], [17, 2], [18], [19, 20, 21, 22, 23, 24, 25, 26, 2]]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = MODELS[request.param]()
    with torch.no_grad():
        for parameter in made.parameters():  # far from uniform, so that every mistake shows
            if parameter.ndim == 2:
                parameter.mul_(20.0)
    # Gemma 2's own softmax runs in float32, where the mask of a float64 model turns padding into NaN
    return made.eval() if request.param == "gemma2" else made.double().eval()


@pytest.fixture(scope="module")
def reference(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).double()


def assert_close(found: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[found.dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def slow_log_prob(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """One row, no padding, no mask, no cut: the whole softmax, one token after another."""
    logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0]
    total = torch.zeros((), dtype=logits.dtype)
    for place, token in enumerate(response, start=len(prompt)):
        total = total + (logits[place - 1] - logits[place - 1].exp().sum().log())[token]
    return total


def fast_log_probs(model: nn.Module, prompts: list, responses: list, pad_id: int = 2) -> Tensor:
    batch = pad_sequences(prompts, responses, pad_id)
    return response_log_probs(model, batch.input_ids, batch.attention_mask, batch.response_mask)


def test_equals_the_slow_sum_of_one_row_at_a_time(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    with torch.no_grad():
        fast = fast_log_probs(model, PROMPTS, RESPONSES)
        slow = torch.stack([slow_log_prob(reference, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)])
    assert fast.dtype == model.dtype
    assert_close(fast, slow)
    assert len(set(slow.tolist())) == 4 and slow.max() < -0.5  # a test of something


def test_soft_capping_and_sliding_window_are_at_work() -> None:
    """The comparison above means nothing for these two if the settings never bite."""
    torch.manual_seed(0)
    for name, off in (("gemma2", {"final_logit_softcapping": None}), ("mistral", {"sliding_window": None})):
        torch.manual_seed(0)
        capped = MODELS[name]().double().eval()
        with torch.no_grad():
            for parameter in capped.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(20.0)
        free = type(capped)(type(capped.config)(**{**capped.config.to_dict(), **off})).double().eval()
        free.load_state_dict(capped.state_dict())
        with torch.no_grad():
            a, b = (fast_log_probs(each, PROMPTS[2:], RESPONSES[2:]) for each in (capped, free))
        assert (a - b).abs().max() > 1e-3, name


def test_gradient_equals_that_of_the_slow_sum(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    weights = torch.tensor([0.3, -1.1, 0.7, 2.0], dtype=torch.float64)
    fast = torch.autograd.grad((weights * fast_log_probs(model, PROMPTS, RESPONSES)).sum(), list(model.parameters()))
    rows = zip(weights, PROMPTS, RESPONSES, strict=True)
    slow = torch.autograd.grad(
        sum(w * slow_log_prob(reference, p, r) for w, p, r in rows), list(reference.parameters())
    )
    for a, b in zip(fast, slow, strict=True):
        assert_close(a, b)
    assert sum(float(gradient.abs().sum()) for gradient in slow) > 1


@torch.no_grad()
def test_padding_changes_nothing(model: PreTrainedModel) -> None:
    alone = torch.cat([fast_log_probs(model, [p], [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    for pad_id in (0, 2, 28):
        assert_close(fast_log_probs(model, PROMPTS, RESPONSES, pad_id), alone)
    batch = pad_sequences(PROMPTS, RESPONSES, 0)
    wider = [torch.cat([tensor, torch.zeros(4, 7, dtype=tensor.dtype)], dim=1) for tensor in vars(batch).values()]
    assert_close(response_log_probs(model, *wider), alone)


@torch.no_grad()
def test_row_without_response_gives_exactly_zero(model: PreTrainedModel) -> None:
    values = fast_log_probs(model, [*PROMPTS, [3, 4]], [*RESPONSES, []])
    assert values[-1] == 0
    assert_close(values[:-1], fast_log_probs(model, PROMPTS, RESPONSES))
    assert fast_log_probs(model, [[3, 4], [5]], [[], []]).tolist() == [0, 0]


def test_row_without_response_has_no_gradient(model: PreTrainedModel) -> None:
    values = fast_log_probs(model, [[3, 4], [5]], [[], [6]])
    gradients = torch.autograd.grad(values[0], list(model.parameters()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


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
    values = fast_log_probs(Memoryless([0.5, 0.25, 0.25]), [[0], [0, 0]], [[0, 0, 1], [2]], pad_id=0)
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
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    values = fast_log_probs(Memoryless([0.5, 0.25, 0.25], dtype), [[0]], [[0] * 300], pad_id=0)
    assert values.dtype == expected
    # in bfloat16 the sum of 300 terms would stall; only the rounding of the logits themselves may show
    assert values.item() == pytest.approx(-300 * math.log(2), rel=2e-3)


def test_only_the_logits_that_are_needed_are_computed() -> None:
    asked = []
    model = tiny_model(32).eval()
    model.lm_head.register_forward_hook(lambda _module, args, _output: asked.append(args[0].shape[1]))
    fast_log_probs(model, [[1] * 10, [1] * 12], [[3, 4], [5]])
    assert asked == [4]  # of 13 places: from 9, just before the first scored token, to the last


@torch.no_grad()
def test_pair_log_probs_keeps_real_generated_and_initial_apart(
    model: PreTrainedModel, reference: PreTrainedModel
) -> None:
    sides = {"real_ids": RESPONSES[:2], "generated_ids": RESPONSES[2:], "initial_ids": [[3, 3, 3], [7]]}
    scores = {f"{player}_{side}_log_prob": 0.0 for player in ("opponent", "initial") for side in ("real", "generated")}
    pairs = [
        {"pair_id": i, "prompt_ids": PROMPTS[i], **{side: ids[i] for side, ids in sides.items()}, **scores}
        for i in range(2)
    ]
    expected = {
        side: torch.stack([slow_log_prob(reference, PROMPTS[i], ids[i]) for i in range(2)])
        for side, ids in sides.items()
    }
    found = pair_log_probs(model, collate_pairs(pairs, pad_id=0))
    assert_close(found.real, expected["real_ids"])
    assert_close(found.generated, expected["generated_ids"])
    assert found.initial_response is not None
    assert_close(found.initial_response, expected["initial_ids"])
    assert found.real_lengths.tolist() == [4, 2] and found.generated_lengths.tolist() == [1, 9]

    without = pair_log_probs(model, collate_pairs([{**pair, "initial_ids": None} for pair in pairs], pad_id=0))
    assert without.initial_response is None
    assert_close(without.generated, expected["generated_ids"])
