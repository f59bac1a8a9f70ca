"""Laws of the next token, cut to the likeliest tokens and the rest: as the logits of plain rows have them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_hidden import PATHS, gradients, make
from test_log_probs import GROUPS, MODELS, ROWS, SHAPE, assert_close, spread_out
from test_rope import GROUPS as LONG_GROUPS
from test_rope import dynamic
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from spin_lightning.models import head
from spin_lightning.models.batches import pack
from spin_lightning.models.forward_paths import token_log_probs
from spin_lightning.models.token_laws import TokenLaws, coarse_kl, cut_laws, law_log_probs, laws_of, top_laws

#: Beside a model for each forward path, heads that are more than one matrix, and a tied one.
HEADS = {"soft cap": "gemma2", "scaled": "cohere-scaled-logits", "bias": "phi-biased-head", "tied": "llama-tied-eager"}


def make_any(name: str) -> tuple[Any, Any]:
    if name in PATHS:
        return make(name)[:2]
    torch.manual_seed(0)
    model = spread_out(MODELS[HEADS[name]]()).eval()
    model = model if name == "soft cap" else model.double()
    return model, copy.deepcopy(model).double()


def whole_laws(model: nn.Module) -> Tensor:
    """Log-probs of the whole vocabulary where each response token of ROWS stands: one row at a time, nothing cut."""
    laws = []
    for prompt, response in ROWS:
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0]
        laws.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    return torch.cat(laws)


def rest_of(laws: Tensor, ids: Tensor) -> Tensor:
    return laws.scatter(1, ids, -torch.inf).logsumexp(1)


@pytest.mark.parametrize("name", [*PATHS, *HEADS])
def test_top_laws_are_those_of_the_whole_softmax(name: str) -> None:
    model, reference = make_any(name)
    laws = top_laws(model, pack(GROUPS), 5)
    with torch.no_grad():
        whole = whole_laws(reference)
    values, ids = whole.topk(5)
    assert torch.equal(laws.ids, ids) and not laws.log_probs.requires_grad
    tolerance = 1e-4 if name == "soft cap" else 1e-6
    assert_close(laws.log_probs, values, tolerance)
    # where the tokens are nearly everything, what is left cannot be known better than the dtype tells
    assert_close(laws.rest.exp(), rest_of(whole, ids).exp(), tolerance)
    assert_close(laws.outcomes.exp().sum(1), torch.ones(len(laws), dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("name", [*PATHS, *HEADS])
def test_given_tokens_have_their_log_probs_and_gradients(name: str) -> None:
    model, reference = make_any(name)
    batch = pack(GROUPS)
    ids = torch.cat([batch.input_ids[batch.scored, None], torch.arange(len(batch.scored) * 3).view(-1, 3) % 29], 1)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values, expected = law_log_probs(model, batch, ids), whole_laws(reference).gather(1, ids)
    tolerance = 1e-4 if name == "soft cap" else 1e-6
    assert_close(values, expected, tolerance)
    assert torch.equal(values[:, 0], token_log_probs(model, batch)) or name == "soft cap"
    for a, b in zip(
        gradients((weights * values).sum(), model), gradients((weights * expected).sum(), reference), strict=True
    ):
        assert (a.double() - b.double()).norm() <= (1e-3 if name == "soft cap" else 1e-5) * b.norm() + 1e-6


def test_the_rest_has_the_gradient_of_the_tokens_that_are_left_out() -> None:
    model, reference = make_any("bias")
    batch = pack(GROUPS)
    ids = top_laws(model, batch, 2).ids
    laws = laws_of(model, batch, ids)
    expected = rest_of(whole_laws(reference), ids)
    assert_close(laws.rest, expected, 1e-6)
    for a, b in zip(gradients(laws.rest.sum(), model), gradients(expected.sum(), reference), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@pytest.mark.parametrize("k", [29, 500])
def test_the_whole_vocabulary_leaves_no_rest_and_no_nan(k: int) -> None:
    model, _, _ = make("shared")
    batch = pack(GROUPS)
    start = top_laws(model, batch, k)
    assert start.ids.shape == (len(batch.scored), 29) and torch.equal(
        start.rest, torch.full_like(start.rest, -math.inf)
    )
    laws = laws_of(model, batch, start.ids)
    assert all(gradient.isfinite().all() for gradient in gradients(coarse_kl(start, laws).sum(), model))


def test_a_rest_that_rounding_hides_stays_finite_and_so_do_its_gradients() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 3}))
    logits = torch.tensor([[60.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    laws = cut_laws(model, torch.tensor([[0, 1], [0, 1]]), logits.log_softmax(1)[:, :2])
    assert laws.rest.tolist() == pytest.approx([math.log(2**-23), -math.log(3)], abs=1e-3)
    other = TokenLaws(laws.ids, laws.log_probs.detach() - 0.1, laws.rest.detach() - 0.1)
    (gradient,) = torch.autograd.grad(coarse_kl(laws, other).sum() + coarse_kl(other, laws).sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_budget_of_logits_changes_no_number(name: str) -> None:
    torch.manual_seed(0)
    model = spread_out(MODELS[name]()).double().eval()
    hidden = torch.randn(11, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(33).view(11, 3) % 29
    weights = torch.randn(11, 3, dtype=torch.float64)
    is_linear = name == "llama"
    found = []
    for budget in (2**20, 2 * 29 * 8, 1):
        values = head.token_log_probs(model, hidden, targets, is_linear=is_linear, budget=budget)
        found.append((values, *torch.autograd.grad((values * weights).sum(), [hidden, model.lm_head.weight])))
        ids = head.top_ids(model, hidden, 3, is_linear=is_linear, budget=budget)
        assert torch.equal(ids, head.top_ids(model, hidden, 3, is_linear=is_linear))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_close(a, b, 1e-9)
    few = hidden.detach()[:3].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda few: head.token_log_probs(model, few, targets[:3], is_linear=is_linear, budget=2 * 29 * 8), few
    )


def test_a_token_that_is_asked_for_twice_counts_twice() -> None:
    """As a response token does that is also among the likeliest."""
    model, _, _ = make("shared")
    hidden = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    twice = head.token_log_probs(model, hidden, torch.tensor([[3, 3], [4, 4]]), is_linear=True)
    once = head.token_log_probs(model, hidden, torch.tensor([3, 4]), is_linear=True)
    (a,), (b,) = torch.autograd.grad(twice.sum(), hidden), torch.autograd.grad(2 * once.sum(), hidden)
    assert_close(a, b, 1e-12)


def test_no_response_token_at_all() -> None:
    model, _, _ = make("shared")
    laws = top_laws(model, pack([([1, 2], [[]])]), 4)
    assert laws.ids.shape == (0, 4) and len(laws) == 0


def test_laws_across_a_boundary_of_the_rope_come_in_the_order_of_the_batch() -> None:
    model = dynamic()
    batch = pack(LONG_GROUPS)
    ids = top_laws(model, batch, 3).ids
    assert torch.equal(law_log_probs(model, batch, ids).detach(), top_laws(model, batch, 3).log_probs)
    responses = batch.input_ids[batch.scored, None]
    assert torch.equal(law_log_probs(model, batch, responses)[:, 0], token_log_probs(model, batch))


def test_coarse_kl_is_exact_with_the_whole_vocabulary_and_below_it_else() -> None:
    model, other = make("shared")[0], make("shared, windows")[0]
    batch = pack(GROUPS)
    exact = coarse_kl(whole := top_laws(model, batch, 29), laws_of(other, batch, whole.ids))
    a, b = (F.log_softmax(laws.outcomes[:, :-1], 1) for laws in (whole, laws_of(other, batch, whole.ids)))
    assert_close(exact, (a.exp() * (a - b)).sum(1), 1e-9)
    before = torch.zeros_like(exact)
    for k in (1, 3, 9, 20):
        laws = top_laws(model, batch, k)
        coarse = coarse_kl(laws, laws_of(other, batch, laws.ids))
        assert (coarse >= before - 1e-9).all() and (coarse <= exact + 1e-9).all()
        before = coarse
    assert coarse_kl(whole, whole).abs().max() == 0
