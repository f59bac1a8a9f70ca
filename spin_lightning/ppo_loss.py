"""The losses of PPO (Schulman et al. 2017, arXiv:1707.06347), token by token, without reduction.

Pure functions of tensors of one shape, ``(N,)``. Log-probs are in nats; ``old`` is the policy that sampled the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_ratio_losses(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """``-min(rho A, clip(rho, 1 - clip, 1 + clip) A)`` with ``rho = exp(log_probs - old_log_probs)`` (Eq. 7).

    Where an update has moved a token's ratio out of the interval in the direction that its advantage asks for, the
    token has no gradient.

    Example:
        >>> from math import log
        >>> up, down = torch.tensor([1.0, -1.0]), torch.zeros(2)
        >>> clipped_ratio_losses(torch.tensor([log(1.5), log(1.5)]), down, up, clip=0.2)
        tensor([-1.2000,  1.5000])
    """
    ratios = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)


def is_clipped(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Which tokens have no gradient, since their ratio is beyond the interval already. Boolean."""
    ratios = (log_probs - old_log_probs).exp()
    return ((ratios > 1 + clip) & (advantages > 0)) | ((ratios < 1 - clip) & (advantages < 0))


def value_losses(values: Tensor, returns: Tensor, old_values: Tensor, clip: float | None = None) -> Tensor:
    """Half the squared error of a critic.

    Args:
        values: What it says now.
        returns: What it should say.
        old_values: What it said when the responses were made.
        clip: The larger is taken of this error and of that of a value that moved at most so far from the old one. In
            units of the reward. None: the error itself.

    Example:
        >>> value_losses(torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([0.1250])
    """
    squares = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        squares = torch.maximum(squares, (near - returns).square())
    return squares / 2


def k3(log_ratios: Tensor) -> Tensor:
    """The divergence from q to p at tokens that q sampled, estimated by ``p / q - 1 - log(p / q)``.

    Unbiased and never negative. To look at: what is trained on is k1, the log-ratio itself, as a part of the reward.

    Args:
        log_ratios: ``log q - log p`` of tokens that q sampled.

    Example:
        >>> k3(torch.tensor([0.5, -0.5]))
        tensor([0.1065, 0.1487])
    """
    return (-log_ratios).exp() - 1 + log_ratios
