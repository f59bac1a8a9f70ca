"""Hidden states for heads of values and rewards: those of a plain model on separate rows, by every forward path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_log_probs import GROUPS, KINDS, MODELS, ROWS, SHAPE, CountsTokens, assert_close, rounding, spread_out
from test_rope import GROUPS as LONG_GROUPS
from test_rope import dynamic, longrope
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, PreTrainedModel

from spin_lightning.models import forward_paths, shared_prompt
from spin_lightning.models.batches import pack
from spin_lightning.models.forward_paths import last_hidden, log_probs_and_hidden, predicting_hidden, token_log_probs
from spin_lightning.types import UserError

#: With what each forward path makes, and one model for it.
PATHS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "shared": (MODELS["llama"], "_read_shared"),
    "shared, windows": (MODELS["qwen3"], "_read_shared"),
    "shared, learned positions": (MODELS["gpt2"], "_read_shared"),
    "separate": (MODELS["bloom-alibi"], "_read_separate"),
    "plain": (
        lambda: AutoModelForCausalLM.from_config(
            OPTConfig(
                vocab_size=29, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
                word_embed_proj_dim=16,
            )
        ),
        "_read_plain",
    ),
}  # fmt: skip


def plainly(model: PreTrainedModel, rows: list[tuple[list[int], list[int]]]) -> list[tuple[Tensor, Tensor]]:
    """Each row alone: the log-probs of its response, and the states that ``transformers`` gives for all its tokens."""
    found = []
    for prompt, response in rows:
        output = model(torch.tensor([prompt + response]), use_cache=False, output_hidden_states=True)
        log_probs = output.logits[0].log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(response) - 1), response]
        found.append((log_probs, output.hidden_states[-1][0]))
    return found


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True))


def make(name: str) -> tuple[PreTrainedModel, PreTrainedModel, str]:
    torch.manual_seed(0)
    model = spread_out(PATHS[name][0]()).double().eval()
    return model, copy.deepcopy(model), PATHS[name][1]


@pytest.mark.parametrize("name", PATHS)
def test_states_and_log_probs_are_those_of_separate_rows_and_so_are_their_gradients(name: str) -> None:
    model, reference, path = make(name)
    batch = pack(GROUPS)
    log_probs, hidden = log_probs_and_hidden(model, batch)
    assert forward_paths.forward_path_of(model).read.__name__ == path
    assert torch.equal(log_probs, token_log_probs(model, batch))
    assert torch.equal(hidden, predicting_hidden(model, batch))
    rows = plainly(reference, ROWS)
    states = torch.cat([h[len(prompt) - 1 : -1] for (prompt, _), (_, h) in zip(ROWS, rows, strict=True)])
    assert_close(log_probs, torch.cat([values for values, _ in rows]), rounding(reference))
    assert_close(hidden, states, rounding(reference))
    torch.manual_seed(1)
    direction, weights = torch.randn_like(states), torch.randn(len(states)).double()
    found = gradients((hidden * direction).sum() + weights @ log_probs, model)
    expected = gradients((states * direction).sum() + weights @ torch.cat([values for values, _ in rows]), reference)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6
    assert sum(float(gradient.norm()) for gradient in expected) > 1


@pytest.mark.parametrize("name", PATHS)
def test_last_states_are_those_at_the_last_token_of_separate_rows_and_so_are_their_gradients(name: str) -> None:
    model, reference, _ = make(name)
    found = last_hidden(model, pack([*GROUPS, ([3, 4], [[], [5]])]))
    rows = [*ROWS, ([3, 4], []), ([3, 4], [5])]
    expected = torch.stack([states[-1] for _, states in plainly(reference, rows)])  # of the prompt, where no response
    assert_close(found, expected, rounding(reference))
    torch.manual_seed(1)
    direction = torch.randn_like(expected)
    for a, b in zip(
        gradients((found * direction).sum(), model), gradients((expected * direction).sum(), reference), strict=True
    ):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@pytest.mark.parametrize("way", [longrope, dynamic])
def test_states_on_either_side_of_a_boundary_are_those_of_each_sequence_alone(
    way: Callable[[], PreTrainedModel],
) -> None:
    model = way().double()
    rows = [(prompt, response) for prompt, responses in LONG_GROUPS for response in responses]
    alone = [plainly(copy.deepcopy(model), [row])[0] for row in rows]
    log_probs, hidden = log_probs_and_hidden(model, pack(LONG_GROUPS))
    assert_close(log_probs, torch.cat([values for values, _ in alone]), 1e-6)
    assert_close(
        hidden, torch.cat([h[len(prompt) - 1 : -1] for (prompt, _), (_, h) in zip(rows, alone, strict=True)]), 1e-6
    )
    assert_close(last_hidden(model, pack(LONG_GROUPS)), torch.stack([states[-1] for _, states in alone]), 1e-6)


def test_the_path_of_last_resort_shows_them_too() -> None:
    model, reference, _ = make("shared")
    forward_paths._chosen[model] = forward_paths.ForwardPath(forward_paths._read_alone)
    rows = plainly(reference, ROWS)
    log_probs, hidden = log_probs_and_hidden(model, pack(GROUPS))
    assert_close(log_probs, torch.cat([values for values, _ in rows]))
    assert_close(hidden, torch.cat([h[len(p) - 1 : -1] for (p, _), (_, h) in zip(ROWS, rows, strict=True)]))
    assert_close(last_hidden(model, pack(GROUPS)), torch.stack([states[-1] for _, states in rows]))


def test_experts_and_chunks_in_float32() -> None:
    for name in ("mixtral", "llama4, chunks of tokens"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(KINDS[name][0]()).eval()
        rows = plainly(copy.deepcopy(model), ROWS)
        assert_close(last_hidden(model, pack(GROUPS)), torch.stack([states[-1] for _, states in rows]), 1e-4)


def test_a_batch_without_a_response_token_has_no_states_and_yet_a_gradient() -> None:
    model, _, _ = make("shared")
    log_probs, hidden = log_probs_and_hidden(model, pack([([1, 2], [[]])]))
    assert (log_probs.shape, hidden.shape, hidden.dtype) == ((0,), (0, 16), torch.float64)
    (hidden.sum() + log_probs.sum()).backward()


def test_a_longer_path_is_taken_where_a_mask_turns_up_late(monkeypatch: pytest.MonkeyPatch) -> None:
    for ask in (log_probs_and_hidden, last_hidden):
        model, reference, _ = make("shared")
        expected = ask(reference, pack(GROUPS))
        token_log_probs(model, pack(GROUPS))
        with monkeypatch.context() as patch:
            patch.setattr(shared_prompt, "_find_window", lambda *_: (_ for _ in ()).throw(NotImplementedError("late")))
            found = ask(model, pack(GROUPS))
        assert forward_paths.forward_path_of(model).read is forward_paths._read_separate
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, 1e-7)


def test_no_logits_are_computed_for_the_last_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = make("shared")
    token_log_probs(model, pack(GROUPS))  # the choice of a path looks at them
    monkeypatch.setattr(forward_paths.head, "token_log_probs", lambda *_, **__: pytest.fail("the head was asked"))
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head was asked"))
    assert last_hidden(model, pack(GROUPS)).shape == (7, 16)


def test_a_model_that_shows_no_hidden_states_is_told_so() -> None:
    class Silent(LlamaForCausalLM):
        def get_decoder(self) -> Any:
            raise NotImplementedError

        def get_output_embeddings(self) -> Any:
            return None

    torch.manual_seed(0)
    model = Silent(LlamaConfig(**SHAPE)).eval()
    assert token_log_probs(model, pack(GROUPS)).isfinite().all()
    for ask in (last_hidden, log_probs_and_hidden):
        with pytest.raises(UserError, match="Silent does not show its hidden states, on which a head"):
            ask(model, pack(GROUPS))


def test_a_wrong_path_is_not_taken_for_states_either() -> None:
    torch.manual_seed(0)
    model = spread_out(CountsTokens(LlamaConfig(**SHAPE))).double().eval()
    found = last_hidden(model, pack(GROUPS))
    assert_close(found, torch.stack([states[-1] for _, states in plainly(model, ROWS)]))
