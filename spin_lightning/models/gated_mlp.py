"""The gated feed-forward layer, ``down(act(gate(x)) * up(x))``, which keeps ``gate`` and ``up`` for the backward pass.

What models write out keeps ``act(gate)`` and the product, too: a third of a small model's activations. Here these are
computed again, for less than a hundredth of a step's time on a CPU. The numbers are the same to the bit. The three
projections are called as they are, with whatever hooks and adapters they have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from spin_lightning.models.fused_layers import Fused, fused_class, is_single_token


def find_gated_mlp(module: nn.Module) -> type[nn.Module] | None:
    """The class that computes a layer, if that is ``down(act(gate(x)) * up(x))`` on the CPU."""
    names = {name: any(True for _ in child.parameters()) for name, child in module.named_children()}
    if module._parameters or module._buffers:  # which it may use
        return None
    if len(names) != 4 or sum(names.values()) != 3 or len(inspect.signature(module.forward).parameters) != 1:
        return None
    act = next(name for name, has_weights in names.items() if not has_weights)
    projections = [name for name, has_weights in names.items() if has_weights]
    first = getattr(module, projections[0])
    weight, width = next(first.parameters()), getattr(first, "in_features", None)
    if width is None or weight.device.type != "cpu" or not weight.dtype.is_floating_point:
        return None
    mode, module.training = module.training, True  # so that what it does in training only shows
    try:
        for gate, up, down in permutations(projections):
            places = (gate, up, down, act)
            width = getattr(getattr(module, gate), "in_features", width)
            x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
            if _are_equal(partial(_compute, module, places), module, x):
                own: Any = type(module)
                return fused_class(own, _GatedMlp, places=places)
    finally:
        module.training = mode
    return None


def _are_equal(some: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether two functions give the same bits, and the same gradient of what they are given."""

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_()
        result = function(given)
        (gradient,) = torch.autograd.grad(result.sum(), given)
        return result, gradient

    try:
        with torch.enable_grad():
            return all(map(torch.equal, run(some), run(other)))
    except Exception:  # sizes that do not fit, or layers that are used otherwise
        return False


class _GatedMlp(Fused):
    places: tuple[str, str, str, str]

    def forward(self, x: Tensor) -> Tensor:
        if is_single_token(x):
            own: Tensor = super().forward(x)
            return own
        return _compute(self, self.places, x)


def _compute(module: nn.Module, places: tuple[str, str, str, str], x: Tensor) -> Tensor:
    gate, up, down, act = (getattr(module, name) for name in places)
    product = _Product.apply(act, gate(x), up(x))
    node = product.grad_fn
    if node is None:
        return down(product)  # type: ignore[no-any-return]

    place, size = product.data_ptr(), product.numel()  # the hooks live as long as the graph, and must not hold it

    def pack(saved: Tensor) -> Any:
        return saved.shape if (saved.data_ptr(), saved.numel()) == (place, size) else saved

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else _multiply_again(node).view(kept)

    with saved_tensors_hooks(pack, unpack):
        return down(product)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """act(gate) * up, of which nothing is kept but gate and up."""

    @staticmethod
    def forward(ctx: Any, act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.again = act, None
        result: Tensor = act(gate) * up
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up, active = ctx.again or _activate_again(ctx)
        ctx.again = None
        (grad_gate,) = torch.autograd.grad(active, gate, grad_output * up)
        return None, grad_gate, grad_output * active.detach()


def _activate_again(node: Any) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = node.saved_tensors
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        return gate, up, node.act(gate)


def _multiply_again(node: Any) -> Tensor:
    """The product, once more. What it took is kept for the backward pass of its own, which comes next."""
    node.again = _, up, active = _activate_again(node)
    return active.detach() * up
