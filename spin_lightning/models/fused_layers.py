"""Layers of a model that are computed in another way, where that proves to give the same numbers.

No architecture is known by name: a layer is replaced if what replaces it computes the same on numbers drawn at random.
Weights, their names and the layers inside stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn


class Fused(nn.Module):
    """What replaces a layer: a class beside the layer's own, whose ``forward`` comes first."""


#: Tells which class, made by :func:`fused_class`, computes what a layer does; None if none does.
FindFused = Callable[[nn.Module], type[nn.Module] | None]


def fuse_layers(model: nn.Module, kinds: Sequence[FindFused]) -> None:
    """Let the layers of a model compute by the first of some kinds that proves equal. Others are left alone."""
    for module in model.modules():
        for find in kinds:
            if not isinstance(module, Fused) and (found := find(module)) is not None:
                module.__class__ = found


def unfuse_layers(model: nn.Module) -> None:
    """Undo :func:`fuse_layers`."""
    for module in model.modules():
        if isinstance(module, Fused):
            module.__class__ = type(module).__bases__[1]


@cache
def fused_class(own: Any, fused: type[Fused], **settings: Any) -> type[nn.Module]:
    """One class for all layers of a kind: ``torch.compile`` compiles a layer of a model once, not each anew."""
    return type(own.__name__, (fused, own), settings)


def is_single_token(x: Tensor) -> bool:
    """Whether there is a token a row, as in decoding: a layer's own few steps cost less there than any in blocks."""
    return x.ndim == 3 and x.shape[1] == 1
