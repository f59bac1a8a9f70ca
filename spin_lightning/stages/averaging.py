"""The mean of a model's weights over its updates, the last ones counting most. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class WeightAverage:
    """Mean of the weights after each update, each counting ``decay`` times the next one.

    The weights of the start are not in it, so that a short training is not held back by them: after n updates that of
    number k has the share ``decay ** (n - k) * (1 - decay) / (1 - decay ** n)``. It is kept in float32, 4 bytes for
    each trained weight.

    Args:
        decay: Between 0 and 1. 0.95 is mostly the last 20 updates.

    Example:
        >>> average, weight = WeightAverage(0.5), torch.zeros(1)
        >>> for value in (1.0, 4.0):
        ...     average.add({"weight": weight.fill_(value)})
        >>> average.weights["weight"]  # (0.5 * 1 + 4) / 1.5
        tensor([3.])
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after an update, by name. Changes the average in place."""
        self.updates += 1
        if not self.weights:
            self.weights = {name: weight.detach().to(torch.float32, copy=True) for name, weight in weights.items()}
            return
        share = (1 - self.decay) / (1 - self.decay**self.updates)
        for name, weight in weights.items():
            self.weights[name] = self.weights[name].to(weight.device).lerp_(weight.detach().float(), share)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps. Its tensors are those of the average."""
        return {"updates": self.updates, "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what a checkpoint kept."""
        self.updates, self.weights = state["updates"], dict(state["weights"])


@torch.no_grad()
def exchange(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put values in the place of a model's weights, by name, and return what was there.

    Example:
        >>> weight = torch.ones(2)
        >>> before = exchange({"weight": weight}, {"weight": torch.zeros(2)})
        >>> weight, before["weight"]
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.copy_(values[name])
    return before
