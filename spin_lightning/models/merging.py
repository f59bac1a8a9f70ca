"""What base and adapter are as one: in copies, so that no weight of the model is touched.

An adapter's own arithmetic gives the merged weights; they are rounded once more, to the dtype of the base.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from spin_lightning.models.loading import forget_packing
from spin_lightning.models.modes import evaluating
from spin_lightning.types import UserError

#: Tokens that a merged model is compared on, and how far its predictions may be from those of base and adapter: the KL
#: divergence in nats a token, on average.
COMPARED_TOKENS = 64
MOST_DIVERGENCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}


def merged_linear(layer: Any) -> nn.Linear | None:
    """A linear layer that computes what one with an adapter does, of weights of its own; None if this is no such layer.

    Packed layers are none: their merged weights would take the memory that packing saves.
    """
    if not hasattr(layer, "get_base_layer") or type(layer.get_base_layer()) is not nn.Linear:
        return None
    if not hasattr(layer, "merge") or layer.disable_adapters or layer.merged:
        return None
    merged = copy.deepcopy(layer)
    merged.merge()
    linear: nn.Linear = merged.get_base_layer()
    return linear


@torch.no_grad()
def merged_copy(model: Any) -> Any:
    """A whole model that predicts what one with an adapter does. Packed weights are unpacked, then merged.

    For a moment the model is in memory twice.

    Raises:
        UserError: Rounding makes it predict something else.
    """
    merged = copy.deepcopy(model)
    if getattr(model, "is_quantized", False):
        dtype = next(model.parameters()).dtype
        _unpack_linear(merged, dtype)
        forget_packing(merged.get_base_model())
    merged = merged.merge_and_unload()
    difference, allowed = _measure_divergence(model, merged), MOST_DIVERGENCE[next(merged.parameters()).dtype]
    if not difference <= allowed:
        raise UserError(
            f"merged into one, base and adapter predict something else: {difference:.2g} nats a token, where rounding "
            f"may make it {allowed:g}. The adapter itself is whole. Set model.adapter.merged: false to export it alone."
        )
    return merged


def _unpack_linear(module: Any, dtype: torch.dtype) -> None:
    """Replace the packed linear layers in a module, with adapters or without, by plain ones that compute the same."""
    for name, child in module.named_children():
        base = child.get_base_layer() if hasattr(child, "get_base_layer") else child
        if hasattr(getattr(base, "weight", None), "quant_state"):
            with evaluating(child):
                setattr(module, name, _make_plain(child, base, dtype))
        else:
            _unpack_linear(child, dtype)


def _make_plain(layer: Any, base: Any, dtype: torch.dtype) -> nn.Linear:
    """The matrix of a linear layer is what it makes of the unit vectors."""
    device, bias = base.weight.device, base.bias is not None
    plain = nn.Linear(base.in_features, base.out_features, bias, device=device, dtype=dtype)
    nothing = layer(torch.zeros(1, base.in_features, device=device, dtype=dtype)) if bias else 0.0
    plain.weight.copy_((layer(torch.eye(base.in_features, device=device, dtype=dtype)) - nothing).mT)
    if isinstance(nothing, Tensor):
        plain.bias.copy_(nothing[0])
    return plain


def _measure_divergence(model: Any, merged: Any) -> float:
    """The KL divergence of the merged model's predictions, in nats a token, on tokens from all over the vocabulary."""
    embeddings: Tensor = model.get_input_embeddings().weight
    ids = torch.arange(COMPARED_TOKENS, device=embeddings.device)[None] * 7919 % len(embeddings)
    with evaluating(model), evaluating(merged):
        own, other = (
            one(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).clamp_min(-1e4)
            for one in (model, merged)
        )
    return float((own.exp() * (own - other)).sum(-1).mean())
