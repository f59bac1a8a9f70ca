"""Decoder layers that ``torch.compile`` makes one of, for passes with shared prompts on a GPU.

There a layer's small steps (normalisation, rotary positions, gates, residuals) take as long to start as to compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from spin_lightning.models.fused_layers import Fused, fused_class


def find_compiled_layer(module: nn.Module) -> type[nn.Module] | None:
    """The class that computes a decoder layer compiled, where it is on a GPU."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not isinstance(module, GradientCheckpointingLayer) or next(module.parameters()).device.type == "cpu":
        return None
    own: Any = type(module)
    return fused_class(own, _CompiledLayer)


class _CompiledLayer(Fused):
    def forward(self, *args: Any, **settings: Any) -> Any:
        own: Any = type(self).__bases__[1]
        if settings.get("layout") is None:  # generation and the like, of any shape
            return own.forward(self, *args, **settings)
        return _compile(own)(self, *args, **settings)


@cache
def _compile(own: Any) -> Callable[..., Any]:
    """One function for all layers of a class, and for passes of any length."""
    return torch.compile(own.forward, dynamic=True)


def _compute_compiled(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        raise NotImplementedError("layers are compiled on GPUs only")
    return x


#: How a model's layers are computed.
CANDIDATES: dict[str, Callable[[Tensor], Tensor]] = {"plain": torch.clone, "compiled": _compute_compiled}


def make_inputs(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor]:
    """What a trial gives the candidates: nothing to compare, as only a setting chooses them."""
    return (torch.zeros(1, dtype=dtype),)
