"""Float32 master weights for a model that computes in bfloat16, around any torch optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Float32Master(torch.optim.Optimizer):
    """Steps a float32 copy of the weights, then rounds it into the model's own.

    In pure bfloat16 an update below 1/256 of a weight is rounded away, and at the learning rates of self-play nearly all
    are. The copy costs 4 bytes a weight beside the optimiser's own state.

    Args:
        parameters: The model's trainable weights, in bfloat16 or float16.
        make_optimizer: Makes the optimiser from the float32 copies.
    """

    def __init__(self, parameters: Iterable[Tensor], make_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        model_weights = list(parameters)
        self.master_weights = [weight.detach().float().clone().requires_grad_() for weight in model_weights]
        self.inner = make_optimizer(self.master_weights)
        super().__init__(model_weights, dict(self.inner.defaults))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        for weight, master in zip(group["params"], self.master_weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        for inner_group in self.inner.param_groups:
            inner_group["lr"] = group["lr"]
        self.inner.step()
        for weight, master in zip(group["params"], self.master_weights, strict=True):
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
