"""Float32 master weights for a model that computes in bfloat16, and the gradient of a batch in several passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from spin_lightning.types import UserError

#: Weights whose gradients are in float32 at a time.
WEIGHTS_AT_A_TIME = 2**25


def refuse_unusable(make_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """Try a step of an optimiser on one small weight, with an ordinary gradient; the step is given the pass to make it.

    Raises:
        UserError: It cannot be made, its step fails, or it does not call the pass exactly once. The message names it.
    """
    weight, calls = torch.ones(16, 16, requires_grad=True), 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        weight.grad = weight.detach().clone()
        return 1.0

    name, did = getattr(make_optimizer, "__name__", "of model.optimizer"), "made"
    try:
        optimizer = make_optimizer([weight])
        name, did = type(optimizer).__name__, "used"
        optimizer.step(closure)
    except Exception as error:  # a class of the user's own may raise anything
        said = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"the optimiser {name} cannot be {did}: {said.rstrip('.')}. Change model.optimizer.") from error
    if calls != 1:
        raise UserError(
            f"the optimiser {name} computes the gradient {calls} times in one step, where a batch is computed once: "
            + (
                "its step must call the closure that it is given."
                if not calls
                else "such optimisers are not for batches."
            )
            + " Change model.optimizer."
        )


class Float32Master(torch.optim.Optimizer):
    """Steps a float32 copy of the weights, then rounds it into the model's own.

    In pure bfloat16 an update below 1/256 of a weight is rounded away, and at the learning rates of self-play nearly
    all are. The copy costs 4 bytes a weight beside the optimiser's own state. A step uses the gradients up.

    Args:
        parameters: The model's trainable weights, in bfloat16 or float16; or groups of them, as ``as_groups`` has them.
        make_optimizer: Makes the optimiser from the float32 copies.
    """

    def __init__(self, parameters: Iterable[Any], make_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        given = list(parameters)
        groups = [group["params"] for group in given] if isinstance(given[0], dict) else [given]
        model_weights = [weight for weights in groups for weight in weights]
        masters = [
            [weight.detach().to(torch.float32, copy=True).requires_grad_() for weight in weights] for weights in groups
        ]
        self.master_weights = [master for part in masters for master in part]
        self.inner = make_optimizer(as_groups(masters))
        pairs = list(zip(model_weights, self.master_weights, strict=True))
        # torch's own optimisers treat each weight by itself, so float32 gradients of a few at a time are enough
        is_by_weight = (
            type(self.inner).__module__.startswith("torch.optim.") and type(self.inner) is not torch.optim.LBFGS
        )
        self._parts = _group_by_size(pairs, WEIGHTS_AT_A_TIME) if is_by_weight else [pairs]
        super().__init__(given, dict(self.inner.defaults))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner_group, group in zip(self.inner.param_groups, self.param_groups, strict=True):
            inner_group["lr"] = group["lr"]
        for part in self._parts:
            for weight, master in part:
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
            self.inner.step()
            for weight, master in part:
                weight.copy_(master)
                master.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.inner.state_dict(), "master_weights": list(self.master_weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        for master, saved in zip(self.master_weights, state_dict["master_weights"], strict=True):
            master.data.copy_(saved)
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})


def as_groups(parts: Sequence[Sequence[Tensor]]) -> list[Any]:
    """Weights as an optimiser takes them: one part as it is, several as groups."""
    return list(parts[0]) if len(parts) == 1 else [{"params": list(weights)} for weights in parts]


def _group_by_size(pairs: list[tuple[Tensor, Tensor]], limit: int) -> list[list[tuple[Tensor, Tensor]]]:
    parts: list[list[tuple[Tensor, Tensor]]] = [[]]
    size = 0
    for pair in pairs:
        if parts[-1] and size + pair[0].numel() > limit:
            parts.append([])
            size = 0
        parts[-1].append(pair)
        size += pair[0].numel()
    return parts


def fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser, updating in one pass over memory if it can and was not told otherwise: 3 times as fast on CPU."""
    for group in optimizer.param_groups:
        if group.get("fused", ...) is None and not group.get("foreach"):
            group["fused"] = True
    return optimizer


def sum_in_passes(
    loss_of: Callable[[Any], Tensor],
    parts: Sequence[Any],
    weights: Sequence[Tensor],
    unused: set[int] | None = None,
) -> Tensor:
    """The sum of the losses of a batch's parts, as if they were computed together, in the memory of one.

    Each part's gradients are taken before the next part begins, and handed on when the sum's are asked for.

    Args:
        loss_of: The loss of one part, a scalar. Called once for each part.
        parts: The parts.
        weights: What to differentiate; nothing else gets a gradient.
        unused: Where given, no part at all will do; weights that no loss depends on get a gradient of zeros, and this
            is told their places.

    Example:
        >>> weight = torch.tensor(3.0, requires_grad=True)
        >>> sum_in_passes(lambda part: part * weight**2, [1.0, 2.0], [weight]).backward()
        >>> weight.grad
        tensor(18.)
    """
    if (len(parts) == 1 and unused is None) or not torch.is_grad_enabled():
        return torch.stack([loss_of(part) for part in parts]).sum()
    return _Passes.apply(loss_of, parts, unused, *weights)


class _Passes(torch.autograd.Function):
    """Sums gradients in one block of memory, each as soon as it is known.

    No pass holds a second set of them, and what a pass leaves behind is no small blocks among those of the next one.
    """

    @staticmethod
    def forward(
        ctx: Any, loss_of: Callable[[Any], Tensor], parts: Sequence[Any], unused: set[int] | None, *weights: Tensor
    ) -> Tensor:
        none = weights[0].new_zeros((), dtype=torch.promote_types(weights[0].dtype, torch.float32))
        total: Any = 0.0 if parts else none
        gradients: list[Tensor | None] = [None] * len(weights)
        places = _make_block_like(weights)

        def add_at(index: int) -> Callable[[Tensor], Tensor]:
            def add(gradient: Tensor) -> Tensor:
                held = gradients[index]
                held = gradients[index] = places[index].copy_(gradient) if held is None else held.add_(gradient)
                return held  # in place of the gradient, which goes

            return add

        hooks = [weight.register_hook(add_at(index)) for index, weight in enumerate(weights)]
        try:
            for part in parts:
                with torch.enable_grad():
                    loss = loss_of(part)
                with torch.autocast(loss.device.type, enabled=False):
                    torch.autograd.grad(loss, weights, allow_unused=True)
                total = total + loss.detach()
        finally:
            for hook in hooks:
                hook.remove()
        if unused is not None:
            unused.update(index for index, gradient in enumerate(gradients) if gradient is None)
            gradients = [place.zero_() if held is None else held for held, place in zip(gradients, places, strict=True)]
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        if float(grad_output) != 1.0:
            gradients = [None if gradient is None else gradient.mul_(grad_output) for gradient in gradients]
        return None, None, None, *gradients


def _make_block_like(weights: Sequence[Tensor]) -> list[Tensor]:
    """An empty place for the gradient of each weight, side by side in one block for each dtype and device."""
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    starts = []
    for weight in weights:
        kind = (weight.dtype, weight.device)
        starts.append(sizes.get(kind, 0))
        sizes[kind] = starts[-1] + -(-weight.numel() // 64) * 64  # begins where vector instructions like it
    blocks = {kind: torch.empty(size, dtype=kind[0], device=kind[1]) for kind, size in sizes.items()}
    return [
        blocks[weight.dtype, weight.device][start : start + weight.numel()].view(weight.shape)
        for weight, start in zip(weights, starts, strict=True)
    ]
