"""What each token of a response was worth beyond what was expected of it: from rewards and values to advantages.

Pure functions of tensors. Token t of a response of T tokens is an action, the terminator is one too; gamma is 1. All
divergence from the reference is in the reward, as the sampled ``k1 = log pi_old - log pi_ref`` of each token: so
``E[R - beta sum_t k1]`` is maximised, and the best policy is ``pi_ref exp(R / beta) / Z``. The same penalty in the loss
leads elsewhere. A response that was cut ends where it was cut: nothing is expected after its last token.

What may surprise: nothing here knows a batch. Advantages are those of a whole iteration, so no cut into batches or
passes can change them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spin_lightning.types import UserError


@dataclass(frozen=True)
class Trajectories:
    """R responses with their N tokens end to end, and what was found out about them before training.

    Attributes:
        rewards: Of each response, shape ``(R,)``.
        groups: Which prompt each response answers, shape ``(R,)``, integers. Only equality counts.
        lengths: Tokens of each response, at least 1, shape ``(R,)``.
        log_ratios: ``log pi_old - log pi_ref`` of each token, in nats, shape ``(N,)``. Zeros without a reference.
        beta: How much a nat of divergence costs.
        values: What a critic expected before each token, shape ``(N,)``; None without one.
    """

    rewards: Tensor
    groups: Tensor
    lengths: Tensor
    log_ratios: Tensor
    beta: float
    values: Tensor | None = None

    @property
    def token_rewards(self) -> Tensor:
        """``-beta k1`` of each token, and at each response's last one its reward besides. Shape ``(N,)``."""
        rewards = -self.beta * self.log_ratios
        last = self.lengths.cumsum(0) - 1
        return rewards.index_add(0, last, self.rewards.to(rewards.dtype))

    @property
    def penalised_rewards(self) -> Tensor:
        """``R - beta sum_t k1`` of each response, shape ``(R,)``."""
        return sum_by_response(self.token_rewards, self.lengths)


@dataclass(frozen=True)
class Advantages:
    """What training takes from an iteration's responses.

    Attributes:
        advantages: Of each token, shape ``(N,)``.
        returns: What a critic should have expected before each token, shape ``(N,)``; None where there is no critic.
    """

    advantages: Tensor
    returns: Tensor | None = None


class Advantage(ABC):
    """From rewards to advantages. Write your own as a subclass with :meth:`estimate`; it keeps no state."""

    #: Whether it wants ``values``, so that there is a critic.
    needs_values = False
    #: Whether it compares the responses to one prompt, so that one alone teaches nothing.
    needs_group = False

    @abstractmethod
    def estimate(self, trajectories: Trajectories) -> Advantages:
        """The advantages of an iteration, from all of its responses at once."""


class Gae(Advantage):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, Eq. 16), with a critic.

    ``d_t = r_t + V(s_{t+1}) - V(s_t)`` and ``A_t = d_t + lam A_{t+1}``, with ``V(s_{T+1}) = 0``; the critic's targets
    are ``A_t + V(s_t)``.

    Args:
        lam: How much the rewards that came count against the critic's word for them. 1 is unbiased whatever the critic
            says. 0.95 has less variance, but sends only ``0.95 ** 100``, half a percent, of a reward 100 tokens back
            where the critic knows nothing yet.
        whiten: Shift and scale the advantages to mean 0 and variance 1 over all tokens of the iteration.

    Raises:
        UserError: ``lam`` is outside of [0, 1].

    Example:
        >>> one = Trajectories(
        ...     torch.ones(1), torch.zeros(1), torch.tensor([2]), torch.zeros(2), 0.0, torch.tensor([0.5, 0.75])
        ... )
        >>> Gae(lam=0.0, whiten=False).estimate(one).advantages
        tensor([0.2500, 0.2500])
    """

    needs_values = True

    def __init__(self, lam: float = 1.0, whiten: bool = True) -> None:
        if not 0 <= lam <= 1:
            raise UserError(f"model.advantage.lam must be between 0 and 1, got {lam!r}. 1 trusts rewards alone.")
        self.lam = lam
        self.whiten = whiten

    def estimate(self, trajectories: Trajectories) -> Advantages:
        values = trajectories.values
        assert values is not None, "needs_values"
        sizes = trajectories.lengths.tolist()
        rewards, values_by_token = (
            pad_sequence(list(flat.split(sizes)), batch_first=True) for flat in (trajectories.token_rewards, values)
        )
        # padding has reward and value 0, so what it adds to the last token is 0
        deltas = rewards + torch.nn.functional.pad(values_by_token[:, 1:], (0, 1)) - values_by_token
        advantages = torch.zeros_like(deltas)
        following = torch.zeros_like(deltas[:, 0])
        for place in reversed(range(deltas.shape[1])):
            following = advantages[:, place] = deltas[:, place] + self.lam * following
        flat = advantages[torch.arange(deltas.shape[1]) < trajectories.lengths[:, None]]
        return Advantages(whitened(flat) if self.whiten else flat, flat + values)


class LeaveOneOut(Advantage):
    """Each response against the mean of the others to its prompt (RLOO, Ahmadian et al. 2024, arXiv:2402.14740).

    ``A = k / (k - 1) (R_i - mean R)`` with ``R_i`` the reward after its penalty: an unbiased baseline without a critic.

    Example:
        >>> four = Trajectories(
        ...     torch.tensor([1.0, 0, 0, 1]), torch.zeros(4), torch.ones(4, dtype=int), torch.zeros(4), 0.0
        ... )
        >>> LeaveOneOut().estimate(four).advantages
        tensor([ 0.6667, -0.6667, -0.6667,  0.6667])
    """

    needs_group = True

    def estimate(self, trajectories: Trajectories) -> Advantages:
        rewards, groups = trajectories.penalised_rewards, _Groups(trajectories)
        others = (groups.sizes - 1).clamp_min(1)  # alone: the difference is 0
        return _of_tokens((rewards - groups.mean(rewards)) * groups.sizes / others, trajectories)


class GroupNormalized(Advantage):
    """Each response's distance from the mean of its prompt's responses, in their standard deviations.

    GRPO (Shao et al. 2024, arXiv:2402.03300). Prompts that are nearly always or never answered right weigh more than
    under ``LeaveOneOut``, whose gradient is that of the expected reward.
    """

    needs_group = True

    def estimate(self, trajectories: Trajectories) -> Advantages:
        rewards, groups = trajectories.penalised_rewards, _Groups(trajectories)
        centred = rewards - groups.mean(rewards)
        variance = groups.mean(centred.square()) * groups.sizes / (groups.sizes - 1).clamp_min(1)
        return _of_tokens(centred / (variance.sqrt() + 1e-6), trajectories)


class BestOfGroup(Advantage):
    """1 for the best response to a prompt (the first of equals), 0 for the others; all 0 if all are equally good.

    Imitation of what was best: RAFT (arXiv:2304.06767), ReST-EM (arXiv:2312.06585), expert iteration.
    """

    needs_group = True

    def estimate(self, trajectories: Trajectories) -> Advantages:
        rewards, groups = trajectories.penalised_rewards, _Groups(trajectories)
        best, least = groups.extreme(rewards, "amax"), groups.extreme(rewards, "amin")
        count = len(rewards)
        places = torch.where(rewards == best, torch.arange(count), count)
        is_first = groups.extreme(places, "amin") == torch.arange(count)
        return _of_tokens((is_first & (best > least)).to(rewards.dtype), trajectories)


class _Groups:
    """The responses to one prompt, wherever they stand."""

    def __init__(self, trajectories: Trajectories) -> None:
        _, self.members, counts = trajectories.groups.unique(return_inverse=True, return_counts=True)
        self.count = len(counts)
        self.sizes = counts[self.members].to(trajectories.log_ratios.dtype)

    def mean(self, values: Tensor) -> Tensor:
        """For each response the mean of its group: exactly their value where all are equal."""
        sums = values.new_zeros(self.count).index_add(0, self.members, values)
        return (sums[self.members] / self.sizes).clamp(self.extreme(values, "amin"), self.extreme(values, "amax"))

    def extreme(self, values: Tensor, which: str) -> Tensor:
        """For each response the largest (``amax``) or least (``amin``) of its group."""
        found = values.new_zeros(self.count).scatter_reduce(0, self.members, values, which, include_self=False)
        return found[self.members]


def _of_tokens(by_response: Tensor, trajectories: Trajectories) -> Advantages:
    return Advantages(by_response.repeat_interleave(trajectories.lengths))


def sum_by_response(by_token: Tensor, lengths: Tensor) -> Tensor:
    """The sum over each response's tokens.

    Args:
        by_token: Shape ``(N,)``.
        lengths: Tokens of each response, shape ``(R,)``, adding up to N.

    Returns:
        Shape ``(R,)``.
    """
    index = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(by_token))
    return by_token.new_zeros(len(lengths)).index_add(0, index, by_token)


def whitened(values: Tensor) -> Tensor:
    """Shifted and scaled to mean 0 and (biased) variance 1; only shifted where all are equal.

    Example:
        >>> whitened(torch.tensor([-1.0, 1.0, -1.0, 1.0]) * 5)
        tensor([-1.,  1., -1.,  1.])
    """
    if not values.numel():
        return values
    return (values - values.mean()) / (values.std(correction=0) + 1e-8)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """How much of the returns' variance a critic foresaw: 1 all, 0 nothing, below 0 worse than a constant.

    Args:
        values: What it said, shape ``(N,)``.
        returns: What came, shape ``(N,)``.

    Returns:
        NaN where all returns are equal.

    Example:
        >>> explained_variance(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]))
        0.75
    """
    spread: Any = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / spread) if spread > 0 else float("nan")
