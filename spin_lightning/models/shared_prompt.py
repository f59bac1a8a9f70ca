"""Attention over a batch in which each prompt stands once, followed by all its responses.

A response sees its prompt and itself, never another response, and its positions continue those of the prompt: the
numbers are those of separate sequences. Models of ``transformers`` are not changed; they look their attention and its
mask up by name, and find these, which leave every other forward pass (generation, evaluation elsewhere) to those they
had.

A sliding window is read off the mask that the model asks for, as many models tell their attention nothing of it. A mask
that is neither causal nor causal with a window is refused, and so is whatever else attention is given but not known
here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spin_lightning.models.attention import attention_of, heads_of, set_attention
from spin_lightning.models.batches import pack
from spin_lightning.models.block_mask import MASK_BLOCK, block_mask
from spin_lightning.models.cache import cache_argument
from spin_lightning.models.cpu_memory import round_up, rounded
from spin_lightning.types import ResponseBatch

SUFFIX = "+shared_prompt"
#: Rows of the score matrix that are held at a time: the part above the diagonal is never computed.
BLOCK = 128
#: Rows of a mask that are looked at to tell what kind it is.
ROWS = 32
#: From queries, keys, values, layout, scale and window to output and log of each softmax's sum.
Attend = Callable[..., tuple[Tensor, Tensor]]
#: The ``ResponseBatch`` that the forward pass in progress is over, if it is over one.
_sharing: ContextVar[ResponseBatch | None] = ContextVar("sharing", default=None)
_wants_kernel: ContextVar[bool] = ContextVar("wants_kernel", default=False)


def share_prompts(model: nn.Module, kernel: str = "kernel") -> None:
    """Let a model's attention understand a ``ResponseBatch`` given as ``layout=``. Idempotent; weights are not touched.

    Args:
        model: Of ``transformers``.
        kernel: Which of the ``CANDIDATES`` computes it on a CPU.

    Raises:
        NotImplementedError: The model's attention is not one that can be extended.
    """
    config: Any = model.config
    set_attention(config, sharing_attention_of(config, kernel))


def own_attention_of(config: Any) -> str:
    """The name of a model's attention without what :func:`share_prompts` adds to it."""
    return attention_of(config).partition(SUFFIX)[0]


def sharing_attention_of(config: Any, kernel: str) -> str:
    """The name of an attention that does what a model's own does, and understands a ``ResponseBatch`` too.

    Raises:
        NotImplementedError: The model's attention is not one that can be extended.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    own = own_attention_of(config)
    if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layers of kind {', '.join(sorted(others))} have no place for a shared prompt")
    if own not in ("sdpa", "eager"):
        raise NotImplementedError(f"attention {own!r} has no place for a shared prompt")
    name = f"{own}{SUFFIX}+{kernel}"
    if name not in AttentionInterface().valid_keys():
        AttentionInterface.register(name, _make_dispatch(own, CANDIDATES[kernel]))
        AttentionMaskInterface.register(name, _make_mask_dispatch(AttentionMaskInterface()[own]))
    return name


def hidden_states(decoder: nn.Module, batch: ResponseBatch) -> Tensor:
    """Last hidden states of a batch's tokens, shape ``(T, H)``. After :func:`share_prompts`."""
    hidden: Tensor = _forward(decoder, batch, 0, use_cache=False).last_hidden_state
    return hidden[0, : len(batch.input_ids)]


def fill_cache(decoder: nn.Module, batch: ResponseBatch, cache: Any) -> None:
    """Append the keys and values of a batch's tokens to a cache, under :func:`sharing_attention_of`.

    Args:
        decoder: The part of the model below its head.
        batch: Its tokens, of which the first may be in the cache already: all of them belong to the first prompt.
        cache: Of ``transformers``, with one row. Behind those of the batch's tokens come some of no meaning.
    """
    _forward(decoder, batch, cache.get_seq_length(), use_cache=True, **{cache_argument(decoder): cache})


def _forward(decoder: nn.Module, batch: ResponseBatch, past: int, **settings: Any) -> Any:
    """A pass over the tokens of a batch from number ``past`` on."""
    input_ids, position_ids = (
        round_up(x[past:], on_gpu=MASK_BLOCK)[None] for x in (batch.input_ids, batch.position_ids)
    )
    token = _sharing.set(batch)
    try:
        return decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            # told that nothing is padding, a model does not look for sequences of its own in the positions
            attention_mask=torch.ones(1, past + input_ids.shape[1], dtype=torch.bool, device=input_ids.device),
            layout=batch,
            **settings,
        )
    finally:
        _sharing.reset(token)


@contextmanager
def in_kernel() -> Iterator[None]:
    """Attention by torch's kernel, which other forward paths take, whatever is faster: for comparisons with them."""
    token = _wants_kernel.set(True)
    try:
        yield
    finally:
        _wants_kernel.reset(token)


class _Mask(torch.Tensor):
    """What stands in for a mask: it has no numbers, and tells how far back a token sees. None: to the beginning."""

    window: int | None
    #: Whatever is made of it is an ordinary tensor, and no mask.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _make_mask_dispatch(own: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **settings: Any) -> Any:
        layout = _sharing.get()
        if layout is None:
            return own(*args, **settings)
        result = torch.empty(1, 1, 1, 1, device=settings.get("device")).as_subclass(_Mask)
        length = settings["kv_length"]
        result.window = _find_window(settings["mask_function"], length)
        if result.device.type != "cpu":  # before the layers, which may be compiled
            block_mask(layout, result.window, length, result.device)
        return result

    return mask


def _find_window(mask_function: Callable[..., Tensor], length: int) -> int | None:
    """How far back tokens see by a mask of ``transformers``; None if to the beginning of ``length`` tokens.

    Raises:
        NotImplementedError: It is neither causal nor causal with a window.
    """
    queries = torch.linspace(0, length - 1, min(ROWS, length), dtype=torch.float64).long()[:, None]
    keys, first = torch.arange(length), torch.zeros((), dtype=torch.long)
    visible = torch.as_tensor(mask_function(first, first, queries, keys)).expand(len(queries), length)
    window = int(visible[-1].sum())
    if not torch.equal(visible, (keys <= queries) & (keys > queries - window)):
        raise NotImplementedError("a mask that is more than a sliding window has no place for a shared prompt")
    return window if window < length else None


def _make_dispatch(own: str, attend: Attend) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        layout: ResponseBatch | None = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if layout is not None or isinstance(attention_mask, _Mask):
            if layout is None or not isinstance(attention_mask, _Mask):
                raise NotImplementedError("attention with a mask of its own has no place for a shared prompt")
            if unknown := [
                name for name, value in settings.items() if name not in _KNOWN and _may_change_result(value)
            ]:
                raise NotImplementedError(f"attention with {', '.join(unknown)} has no place for a shared prompt")
            settings["sliding_window"] = attention_mask.window
            if own == "sdpa":  # leaves it out, and so does all that the model computes elsewhere
                settings.pop("softcap", None)
            return shared_prompt_attention(module, query, key, value, layout, attend=attend, **settings), None
        if own == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            function = ALL_ATTENTION_FUNCTIONS[own]
        return function(module, query, key, value, attention_mask, **settings)

    return attention


#: What models give their attention beside queries, keys, values and mask, and what this one needs none of.
_KNOWN = ("scaling", "dropout", "sliding_window", "softcap", "position_ids", "cache_position")


def _may_change_result(value: Any) -> bool:
    """Whether a setting may change attention's result, as tensors and functions do. Flags and numbers do not."""
    return isinstance(value, Tensor) or callable(value)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ResponseBatch,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    attend: Attend | None = None,
    **settings: Any,
) -> Tensor:
    """Causal attention in which each response sees its prompt and itself.

    Args:
        module: The attention layer, for what FlexAttention asks of it.
        query: Shape ``(1, heads, T, head_dim)``.
        key: Shape ``(1, key_heads, P + T, head_dim)``; ``heads`` is a multiple of ``key_heads``, and ``P`` tokens that
            begin the first prompt ask nothing.
        value: As ``key``, except that its last size may be another.
        layout: Where the batch's prompts and responses stand.
        scaling: Factor of the scores. None: 1 / sqrt(head_dim).
        dropout: Probability with which weights are dropped.
        sliding_window: How many positions back a token sees, itself included. None: all.
        softcap: Scores become ``softcap * tanh(scores / softcap)``. None: as they are.
        attend: One of the ``CANDIDATES``, for CPUs. None: torch's kernel.
        **settings: What else the model gives its attention, for FlexAttention. Nothing that changes the result.

    Returns:
        Shape ``(1, T, heads, head_dim)``, with the ``head_dim`` of ``value``.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    value_dim, most = value.shape[-1], max(query.shape[-1], value.shape[-1])
    # kernels want one width; zeros add nothing to the scores, and columns of zeros are cut off again
    query, key, value = (F.pad(x, (0, most - x.shape[-1])) if x.shape[-1] < most else x for x in (query, key, value))
    output = _attend(module, query, key, value, layout, scale, dropout, sliding_window, softcap, attend, settings)
    return output if value_dim == most else output[..., :value_dim]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ResponseBatch,
    scale: float,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
    attend: Attend | None,
    settings: dict[str, Any],
) -> Tensor:
    if query.device.type != "cpu" and not dropout:
        return _attend_in_flex_attention(module, query, key, value, layout, scale, sliding_window, softcap, settings)
    if dropout or softcap is not None:
        parts = []
        for q, k in segments(layout, key.shape[2] - query.shape[2]):
            keys, values = (_gather(kv, k) for kv in (key, value))
            parts.append(_attend_plainly(query[:, :, q], keys, values, scale, dropout, sliding_window, softcap))
        parts.append(torch.zeros_like(query[:, :, q.stop :]))
        return torch.cat(parts, dim=2).transpose(1, 2)
    if attend is None or _wants_kernel.get():
        attend = attend_in_kernel
    return _CpuAttention.apply(query, key, value, layout, scale, sliding_window, attend).transpose(1, 2)


def _attend_in_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ResponseBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    settings: dict[str, Any],
) -> Tensor:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    mask = block_mask(layout, window, query.shape[2], query.device)
    flex = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    output: Tensor = flex(module, query, key, value, mask, scaling=scale, softcap=softcap, **settings)[0]
    return output


def segments(layout: ResponseBatch, past: int = 0) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """Which tokens ask, and which they may see, in runs: a prompt with its first response, then each further response.

    The first ``past`` tokens ask nothing, and those that ask are counted from there on. Runs without tokens are left
    out: torch's kernel divides by their length.
    """
    start = 0
    for prompt_length, first, *others in layout.lengths:
        prompt = slice(start, start + prompt_length)
        start += prompt_length + first
        if start > max(prompt.start, past):
            yield slice(max(prompt.start - past, 0), start - past), (slice(prompt.start, start),)
        for length in filter(None, others):
            yield slice(start - past, start - past + length), (prompt, slice(start, start + length))
            start += length


def _gather(tensor: Tensor, places: tuple[slice, ...]) -> Tensor:
    return tensor[:, :, places[0]] if len(places) == 1 else torch.cat([tensor[:, :, place] for place in places], dim=2)


def _add_rows(total: Tensor, places: tuple[slice, ...], part: Tensor) -> None:
    """Add the rows of ``part`` where they belong, as far as they go: a block of queries sees the first keys only."""
    for place in places:
        here, part = part[:, : place.stop - place.start], part[:, place.stop - place.start :]
        total[:, place.start : place.start + here.shape[1]] += here


def _make_mask(num_queries: int, num_keys: int, window: int | None) -> Tensor:
    """True where the last ``num_queries`` of ``num_keys`` tokens may look."""
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    return visible if window is None else visible.triu(num_keys - num_queries - window + 1)


def _attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, window: int | None, softcap: float | None
) -> Tensor:
    """Softmax attention spelt out, for what the fast path does not do."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    visible = _make_mask(query.shape[2], key.shape[2], window).to(query.device)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


class _CpuAttention(torch.autograd.Function):
    """Forward by one of the ``CANDIDATES``; backward as a few large matrix products a block of queries.

    That takes half the time of torch's fused kernel backward in bfloat16. Keeps what the kernel keeps: inputs, output,
    and the log of each softmax's sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: ResponseBatch,
        scale: float,
        window: int | None,
        attend: Attend,
    ) -> Tensor:
        output, log_sums = attend(query, key, value, layout, scale, window)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, log_sums = ctx.saved_tensors
        heads = query.shape[1]
        key_heads, dtype = key.shape[1], query.dtype
        # exp(score - log_sum) is taken of a rounded log_sum, which the correction makes up for
        minus_log_sums = -log_sums.to(dtype)[..., None]
        correction = (-minus_log_sums[..., 0].to(log_sums.dtype) - log_sums).exp_()
        grad = (grad_output.to(correction.dtype) * correction[..., None]).to(dtype)
        minus_delta = -(grad * output).sum(-1, keepdim=True, dtype=log_sums.dtype).to(dtype)
        scaled = query * ctx.scale
        grad_query = torch.zeros_like(query)
        grad_key = torch.zeros(key.shape[1:], dtype=log_sums.dtype)
        grad_value = torch.zeros_like(grad_key)
        for rows, places, keys, values, diagonal in _cut_into_blocks(key, value, ctx.layout):
            queries, gradient = _fold(scaled, rows, key_heads), _fold(grad, rows, key_heads)
            shape = (key_heads, queries.shape[1], keys.shape[1])
            weights = torch.baddbmm(_fold(minus_log_sums, rows, key_heads).expand(shape), queries, keys.mT).exp_()
            _hide(weights.view(heads, -1, keys.shape[1]), diagonal, ctx.window)
            grad_scores = torch.baddbmm(_fold(minus_delta, rows, key_heads).expand(shape), gradient, values.mT)
            grad_scores.mul_(weights)
            grad_query[0, :, rows] = _unfold((grad_scores @ keys).mul_(ctx.scale), rows, heads)
            _add_rows(grad_value, places, weights.mT @ gradient)
            _add_rows(grad_key, places, grad_scores.mT @ queries)
        return grad_query, grad_key.to(dtype)[None], grad_value.to(dtype)[None], None, None, None, None


def attend_in_kernel(
    query: Tensor, key: Tensor, value: Tensor, layout: ResponseBatch, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Output and log of each softmax's sum, by torch's fused kernel."""
    output = torch.zeros_like(query)
    log_sums = _make_log_sums(query)
    repeats = query.shape[1] // key.shape[1]
    for q, k in segments(layout, key.shape[2] - query.shape[2]):
        keys, values = (_gather(kv, k).repeat_interleave(repeats, 1) for kv in (key, value))
        is_plain = keys.shape[2] == q.stop - q.start and (window is None or window >= keys.shape[2])
        mask = None
        if not is_plain:
            hidden = ~_make_mask(q.stop - q.start, keys.shape[2], window)
            mask = query.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        output[:, :, q], log_sums[:, :, q] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, :, q], keys, values, 0.0, is_plain, attn_mask=mask, scale=scale
        )
    return output, log_sums


def attend_in_products(
    query: Tensor, key: Tensor, value: Tensor, layout: ResponseBatch, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """The same as a few large matrix products a block of queries, heads that share keys below one another.

    Scores are computed twice: less their maximum they lose little to rounding. Without AMX this took two thirds of the
    kernel's time in bfloat16 (8.3 ms a layer instead of 12.6, 3 pairs of 1,188 tokens); in float32 about as long.
    """
    heads, key_heads = query.shape[1], key.shape[1]
    output, scaled = torch.zeros_like(query), query * scale
    log_sums = _make_log_sums(query)
    for rows, _, keys, values, diagonal in _cut_into_blocks(key, value, layout, key.shape[2] - query.shape[2]):
        queries = _fold(scaled, rows, key_heads)
        scores = queries @ keys.mT
        by_head = scores.view(heads, -1, keys.shape[1])
        _hide(by_head, diagonal, window, -torch.inf)
        largest = scores.to(log_sums.dtype).amax(-1, keepdim=True).to(scores.dtype)  # bfloat16 takes twice as long
        weights = torch.baddbmm((-largest).expand(scores.shape), queries, keys.mT, out=scores).exp_()
        _hide(by_head, diagonal, window)
        sums = weights.sum(-1, keepdim=True, dtype=log_sums.dtype)
        output[0, :, rows] = _unfold((weights @ values).to(sums.dtype).div_(sums), rows, heads)
        log_sums[0, :, rows] = _unfold(sums.log_().add_(largest), rows, heads)[..., 0]
    return output, log_sums


CANDIDATES: dict[str, Attend] = {"kernel": attend_in_kernel, "products": attend_in_products}


def make_inputs(model: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the candidates, as a model's heads make them: two responses to a prompt.

    Raises:
        AttributeError: The config does not say how many heads there are, and how wide.
    """
    heads, key_heads, head_dim = heads_of(model)
    layout = pack([([0] * 160, [[0] * 96, [0] * 96])])
    random, length = torch.Generator().manual_seed(0), len(layout.input_ids)
    shapes = ((1, length, count, head_dim) for count in (heads, key_heads, key_heads))
    states = [torch.randn(shape, generator=random).to(dtype).transpose(1, 2) for shape in shapes]
    return *states, layout, head_dim**-0.5, None


def _make_log_sums(query: Tensor) -> Tensor:
    """Zeros for each query of each head, laid out as the heads of models are: what multiplies both is fast only so."""
    batch, heads, length, _ = query.shape
    return query.new_zeros((batch, length, heads), dtype=torch.promote_types(query.dtype, torch.float32)).transpose(
        1, 2
    )


def _cut_into_blocks(
    key: Tensor, value: Tensor, layout: ResponseBatch, past: int = 0
) -> Iterator[tuple[slice, tuple[slice, ...], Tensor, Tensor, int]]:
    """Queries of a block, where their keys stand, those keys and values, and which key the first query sees last.

    Keys and values have shape ``(key_heads, length, head_dim)``, a length that recurs. The first ``past`` tokens ask
    nothing.
    """
    for q, places in segments(layout, past):
        keys, values = (round_up(_gather(kv, places)[0], dim=1) for kv in (key, value))
        # keys that all its queries may see
        before = sum(place.stop - place.start for place in places) - (q.stop - q.start)
        for start in range(q.start, q.stop, BLOCK):
            rows = slice(start, min(start + BLOCK, q.stop))
            seen = slice(rounded(before + rows.stop - q.start))  # what is too many lies above the diagonal
            yield rows, places, keys[:, seen], values[:, seen], before + start - q.start


def _fold(tensor: Tensor, rows: slice, key_heads: int) -> Tensor:
    """The rows' heads that share a key head, below one another: keys and values are never repeated."""
    return round_up(tensor[0, :, rows], dim=1).reshape(key_heads, -1, tensor.shape[-1])


def _unfold(tensor: Tensor, rows: slice, heads: int) -> Tensor:
    return tensor.view(heads, -1, tensor.shape[-1])[:, : rows.stop - rows.start]


def _hide(scores: Tensor, diagonal: int, window: int | None, filler: float = 0.0) -> None:
    """Fill in what a block's queries do not see, in place: the first sees the key ``diagonal`` last, the next another.

    With no filler, zeros are written in its place. A filler is added.
    """
    late = scores[..., diagonal:]
    if not filler:
        late.tril_()
        if window is not None:
            scores.triu_(diagonal - window + 1)
        return
    late += late.new_full(late.shape[1:], filler).triu_(1)
    if window is not None:
        scores += scores.new_full(scores.shape[1:], filler).tril_(diagonal - window)
