"""Linear layers that decode from a packed copy of their weights.

Decoding multiplies the same weights with a few rows, thousands of times. On a CPU in bfloat16 each product spends half
of its time on bringing the weights into the order that the processor's matrix units want; here that is done once. The
sums are the same within rounding, and where it was measured, to the bit.

A layer with an adapter is packed as one matrix, base and adapter together: three products become one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from spin_lightning.models.merging import merged_linear
from spin_lightning.models.modes import compute_dtype

Forward = Callable[[Tensor], Tensor]


@torch.no_grad()
def packed_forwards(model: nn.Module, rows: int) -> dict[nn.Module, Forward]:
    """A forward pass for each linear layer of a model, from a copy of its weights as they are now.

    Args:
        model: It is not touched.
        rows: About how many rows a product will have.

    Returns:
        Empty where it would not pay: on other devices and processors, and in other dtypes.
    """
    device = next(model.parameters()).device
    dtype = compute_dtype(device, model)
    operators = torch.ops.mkldnn
    if (
        device.type != "cpu"
        or dtype is not torch.bfloat16
        or not torch.backends.mkldnn.is_available()
        or not hasattr(operators, "_reorder_linear_weight")
        or not operators._is_mkldnn_bf16_supported()
    ):
        return {}
    forwards: dict[nn.Module, Forward] = {}
    for module, linear in _find_linear(model):
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        packed = operators._reorder_linear_weight(linear.weight.detach().to(dtype).contiguous(), rows)
        forwards[module] = partial(_multiply_packed, packed=packed, bias=bias)
    return forwards


def _find_linear(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Linear]]:
    """The linear layers of a module, each with one that computes the same: itself, or of an adapter a merged copy."""
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
        yield module, module
    elif (merged := merged_linear(module)) is not None:
        yield module, merged
    else:
        for child in module.children():
            yield from _find_linear(child)


@contextmanager
def decoding_with(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """Let these layers compute with these forwards."""
    for module, forward in forwards.items():
        module.forward = forward  # type: ignore[method-assign, assignment]  # beside the class's own, which comes back
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def _multiply_packed(x: Tensor, *, packed: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), packed, bias, "none", [], "")
    return result
