"""From hidden states to the log-probs of given tokens, without ever holding the logits of all of them.

A chunk of tokens at a time meets the vocabulary, under a budget of bytes. Logits come from the model's own code, so
scaling, soft-capping, biases and adapters on the head are what the model makes of them; a head that is one matrix and
nothing else takes a shorter forward path to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: Bytes of logits, in the dtype of the computation, that may exist at a time.
LOGITS_BUDGET = 256 * 2**20
#: Bytes of float32 scratch in which a CPU turns logits to log-probs: small enough to stay in its cache.
CACHE_BUDGET = 2 * 2**20


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model below its head."""
    decoder: nn.Module = _unwrap_adapter(model).get_decoder()
    return decoder


def head_of(model: nn.Module) -> nn.Module | None:
    """The layer of a causal language model that makes logits of its last hidden states; None if it names none."""
    ask = getattr(_unwrap_adapter(model), "get_output_embeddings", None)
    head: nn.Module | None = ask() if ask is not None else None
    return head


def logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a model's own forward pass does after its decoder: hidden states ``(N, H)`` to logits ``(N, V)``.

    Raises:
        ValueError: The decoder is not a direct part of the model.
    """
    causal, decoder = _unwrap_adapter(model), decoder_of(model)
    names = [name for name, child in causal.named_children() if child is decoder]
    if len(names) != 1:
        raise ValueError("the decoder is not a direct part of the model")
    headless = object.__new__(type(causal))  # shares every weight
    headless.__dict__ |= causal.__dict__
    headless._modules = {**causal._modules, names[0]: _GivenHiddenStates()}
    return lambda hidden: headless(inputs_embeds=hidden[None], use_cache=False).logits[0]


def token_log_probs(
    model: nn.Module, hidden: Tensor, targets: Tensor, *, is_linear: bool, budget: int = LOGITS_BUDGET
) -> Tensor:
    """Log-probability of each target token given the hidden state that predicts it, in nats.

    Args:
        model: Whose head to use.
        hidden: Shape ``(N, H)``.
        targets: Token ids, shape ``(N,)``; or several at each place, ``(N, m)``.
        is_linear: Whether the head is one matrix and nothing comes after it (see :func:`is_linear`).
        budget: Bytes of logits that may exist at a time; with more tokens they are computed again in the backward pass.

    Returns:
        Of the shape of ``targets``, float32 (float64 for float64 hidden states).
    """
    if targets.ndim == 1:
        return token_log_probs(model, hidden, targets[:, None], is_linear=is_linear, budget=budget).squeeze(1)
    dtype, chunk = _plan_chunks(model, hidden, budget)
    if is_linear:
        weight = _unwrap_adapter(model).get_output_embeddings().weight
        with torch.autocast(hidden.device.type, enabled=False):
            return _LinearHead.apply(hidden.to(dtype), weight.to(dtype), targets, chunk)
    logits = logits_of(model)

    def log_probs(hidden: Tensor, targets: Tensor) -> Tensor:
        return gather_log_probs(logits(hidden), targets)

    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(log_probs, *piece, use_reentrant=False) for piece in pieces])


@torch.no_grad()
def top_ids(model: nn.Module, hidden: Tensor, k: int, *, is_linear: bool, budget: int = LOGITS_BUDGET) -> Tensor:
    """The tokens that are most likely after each hidden state, the likeliest first.

    Args:
        model: Whose head to use.
        hidden: Shape ``(N, H)``.
        k: How many.
        is_linear: Whether the head is one matrix and nothing comes after it (see :func:`is_linear`).
        budget: Bytes of logits that may exist at a time.

    Returns:
        Token ids, shape ``(N, k)``, or ``(N, V)`` where the vocabulary has no more.
    """
    dtype, chunk = _plan_chunks(model, hidden, budget)
    logits = logits_of(model)
    if is_linear:
        hidden, weight = hidden.to(dtype), _unwrap_adapter(model).get_output_embeddings().weight.to(dtype)
        logits = partial(F.linear, weight=weight)
    return torch.cat([pick_top(logits(piece), k) for piece in hidden.split(chunk)])


def gather_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of tokens ``(N, m)`` by the logits of their places ``(N, V)``, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, targets) - logits.logsumexp(1, keepdim=True)


def pick_top(logits: Tensor, k: int) -> Tensor:
    """The tokens with the k highest logits ``(N, V)``, the highest first."""
    return logits.topk(min(k, logits.shape[1]), 1).indices


def _plan_chunks(model: nn.Module, hidden: Tensor, budget: int) -> tuple[torch.dtype, int]:
    """The dtype in which logits are computed, and for how many tokens at a time."""
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    width: int = _unwrap_adapter(model).get_output_embeddings().weight.shape[0]
    return dtype, max(1, budget // (width * dtype.itemsize))


@torch.no_grad()
def is_linear(model: nn.Module) -> bool:
    """Whether a model's logits are its hidden states times one matrix: no bias, scaling, capping or adapter.

    False also where that cannot be found out: whatever a model's code raises is no reason to stop here.
    """
    head = _unwrap_adapter(model).get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head._forward_hooks or head._forward_pre_hooks:
        return False
    hidden = torch.randn(3, head.in_features, generator=torch.Generator().manual_seed(0)).to(head.weight) * 10
    try:
        return torch.equal(logits_of(model)(hidden), F.linear(hidden, head.weight))
    except Exception:
        return False


def _unwrap_adapter(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _GivenHiddenStates(nn.Module):
    def forward(self, *args: Any, inputs_embeds: Tensor, **settings: Any) -> Any:
        return _HiddenStates([inputs_embeds])


class _HiddenStates(list[Tensor]):
    """A decoder's output: last hidden states, and nothing else it may have (router logits, a state, ...)."""

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


class _LinearHead(torch.autograd.Function):
    """Where all logits fit the budget they are kept, and become their own gradient in place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(targets.shape, dtype=wide, device=hidden.device)
        log_sums = log_probs.new_empty(len(targets))
        logits = hidden.new_empty(min(chunk, len(targets)), len(weight))
        scratch = _make_scratch(logits, wide)
        for part in _cut_into_slices(len(targets), chunk):
            torch.mm(hidden[part], weight.mT, out=logits[: part.stop - part.start])
            for rows in _cut_into_slices(part.stop - part.start, len(scratch)):
                places = slice(part.start + rows.start, part.start + rows.stop)
                scores = scratch[: rows.stop - rows.start].copy_(logits[rows])
                chosen = scores.gather(1, targets[places])
                largest = scores.amax(1, keepdim=True)
                log_sum = scores.sub_(largest).exp_().sum(1, keepdim=True).log_().add_(largest)
                log_sums[places] = log_sum.squeeze(1)
                log_probs[places] = chosen - log_sum
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.chunk = chunk
        ctx.logits = logits if len(targets) <= chunk and any(ctx.needs_input_grad) else None
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets, log_sums = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        kept, ctx.logits = ctx.logits, None
        logits = kept if kept is not None else hidden.new_empty(min(ctx.chunk, len(targets)), len(weight))
        scratch = _make_scratch(logits, log_sums.dtype)
        for part in _cut_into_slices(len(targets), ctx.chunk):
            grad_logits = logits[: part.stop - part.start]
            if kept is None:
                torch.mm(hidden[part], weight.mT, out=grad_logits)
            for rows in _cut_into_slices(
                part.stop - part.start, len(scratch)
            ):  # (one-hot - softmax) x what came from above
                places = slice(part.start + rows.start, part.start + rows.stop)
                from_above = grad_output[places]
                grad = torch.sub(grad_logits[rows], log_sums[places, None], out=scratch[: rows.stop - rows.start])
                grad.exp_().mul_(-from_above.sum(1, keepdim=True)).scatter_add_(1, targets[places], from_above)
                grad_logits[rows] = grad
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if needs_weight:
                product = grad_logits.mT @ hidden[part]
                grad_weight = product if grad_weight is None else grad_weight.to(log_sums.dtype).add_(product)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _cut_into_slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _make_scratch(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A few rows in a wider dtype; on a CPU few enough to stay in its cache."""
    rows = len(logits) if logits.device.type != "cpu" else max(1, CACHE_BUDGET // (dtype.itemsize * logits.shape[1]))
    return logits.new_empty(min(len(logits), rows), logits.shape[1], dtype=dtype)
