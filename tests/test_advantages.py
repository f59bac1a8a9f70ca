"""Advantages by hand, and by enumeration of every response of a small language: what they promise holds exactly there.

The language has three letters and a terminator, responses of at most three tokens (40 of them) and two prompts. Its
policy is a table of logits, so that the best policy, its values and every expected gradient can be written down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spin_lightning.advantages import (
    Advantage,
    BestOfGroup,
    Gae,
    GroupNormalized,
    LeaveOneOut,
    Trajectories,
    explained_variance,
    sum_by_response,
    whitened,
)
from spin_lightning.ppo_loss import clipped_ratio_losses, k3
from spin_lightning.types import UserError

BETA = 0.5


def near(*values: float) -> object:
    return pytest.approx(list(values), abs=1.5e-6)


def one_response(values: list[float], rewards: list[float]) -> Trajectories:
    """A response with these token rewards: what is not the last one's is divergence."""
    *before, last = rewards
    ratios = torch.tensor([*(-reward for reward in before), 0.0], dtype=torch.float64)
    whole = [torch.tensor(x) for x in ([last], [0], [len(values)])]
    return Trajectories(*whole, ratios, 1.0, torch.tensor(values, dtype=torch.float64))


def group(rewards: list[float], groups: list[int] | None = None) -> Trajectories:
    """Responses of one token."""
    count = len(rewards)
    ids = torch.tensor(groups or [0] * count)
    return Trajectories(torch.tensor(rewards).double(), ids, torch.ones(count, dtype=torch.long), torch.zeros(count), 0)


@pytest.mark.parametrize(
    ("lam", "expected"), [(0.0, (0.15, 0.32, 0.2)), (0.95, (0.6345, 0.51, 0.2)), (1.0, (0.67, 0.52, 0.2))]
)
def test_gae_by_hand(lam: float, expected: tuple[float, ...]) -> None:
    made = Gae(lam, whiten=False).estimate(one_response([0.3, 0.5, 0.8], [-0.05, 0.02, 1.0]))
    assert made.advantages.tolist() == near(*expected)
    assert made.returns is not None
    assert made.returns.tolist() == near(*(a + v for a, v in zip(expected, (0.3, 0.5, 0.8), strict=True)))
    if lam == 0.95:
        assert made.returns.tolist() == near(0.9345, 1.01, 1.0)


def test_a_response_does_not_see_the_next_one() -> None:
    """Two responses of other lengths end to end have the advantages that each has alone."""
    first, second = one_response([0.3, 0.5, 0.8], [-0.05, 0.02, 1.0]), one_response([0.1], [2.0])
    both = Trajectories(
        *(
            torch.cat([getattr(part, name) for part in (first, second, first)])
            for name in ("rewards", "groups", "lengths", "log_ratios")
        ),
        1.0,
        torch.cat([part.values for part in (first, second, first)]),  # type: ignore[misc]
    )
    assert Gae(0.95, whiten=False).estimate(both).advantages.tolist() == near(0.6345, 0.51, 0.2, 1.9, 0.6345, 0.51, 0.2)


def test_group_baselines_by_hand() -> None:
    rewards = group([1, 0.1, 0, 1])
    assert LeaveOneOut().estimate(rewards).advantages.tolist() == near(0.633333, -0.566667, -0.7, 0.633333)
    assert GroupNormalized().estimate(rewards).advantages.tolist() == near(0.863636, -0.772727, -0.954545, 0.863636)
    assert BestOfGroup().estimate(rewards).advantages.tolist() == [1, 0, 0, 0]  # the first of equals


def test_groups_are_told_by_their_prompt_and_not_by_their_place() -> None:
    mixed = group([1, 5, 0, 7, 0.1, 1], [9, 4, 9, 4, 9, 9])
    expected = {0: 0.633333, 2: -0.7, 4: -0.566667, 5: 0.633333, 1: -2.0, 3: 2.0}
    assert LeaveOneOut().estimate(mixed).advantages.tolist() == near(*(expected[index] for index in range(6)))
    assert BestOfGroup().estimate(mixed).advantages.tolist() == [1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("advantage", [LeaveOneOut(), GroupNormalized(), BestOfGroup()])
def test_flat_groups_and_lone_responses_teach_nothing(advantage: Advantage) -> None:
    for kind in (torch.float32, torch.float64):  # not even by rounding
        flat = group([0.1, 0.1, 0.1, 2.0], [0, 0, 0, 1])
        flat = replace(flat, rewards=flat.rewards.to(kind), log_ratios=flat.log_ratios.to(kind))
        assert advantage.estimate(flat).advantages.tolist() == [0, 0, 0, 0]


def test_a_group_advantage_counts_the_divergence() -> None:
    """Equal rewards, and one response strayed by 0.4 nats."""
    strayed = replace(group([1.0, 1.0]), log_ratios=torch.tensor([0.4, 0.0], dtype=torch.float64), beta=0.5)
    assert LeaveOneOut().estimate(strayed).advantages.tolist() == near(-0.2, 0.2)
    assert BestOfGroup().estimate(strayed).advantages.tolist() == [0, 1]


def test_whitening_by_hand() -> None:
    values = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    assert whitened(values).tolist() == near(-1.341641, -0.447214, 0.447214, 1.341641)
    assert whitened(torch.full((3,), 5.0)).tolist() == [0, 0, 0]
    plain = one_response([0.3, 0.5, 0.8], [-0.05, 0.02, 1.0])
    assert Gae(0.0).estimate(plain).advantages.tolist() == near(
        *whitened(torch.tensor([0.15, 0.32, 0.2]).double()).tolist()
    )


def test_lambda_is_a_share() -> None:
    with pytest.raises(UserError, match=r"model\.advantage\.lam must be between 0 and 1, got 1\.5"):
        Gae(1.5)


def test_explained_variance_of_nothing_is_nan() -> None:
    assert math.isnan(explained_variance(torch.tensor([1.0, 2.0]), torch.ones(2)))
    assert explained_variance(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])) == -3.0


# --- a language whose every response is known ----------------------------------------------------------------------

LETTERS, MOST = 3, 3
END = LETTERS


class Response(NamedTuple):
    """Its tokens, and for each the state in which it was chosen."""

    tokens: tuple[int, ...]
    states: tuple[int, ...]


@cache
def responses() -> tuple[list[Response], int]:
    """All responses, and how many states there are."""
    prefixes: dict[tuple[int, ...], int] = {(): 0}
    found = []

    def grow(prefix: tuple[int, ...], states: tuple[int, ...]) -> None:
        state = prefixes.setdefault(prefix, len(prefixes))
        for token in range(LETTERS + 1):
            tokens, seen = (*prefix, token), (*states, state)
            if token == END or len(tokens) == MOST:
                found.append(Response(tokens, seen))
            else:
                grow(tokens, seen)

    grow((), ())
    return found, len(prefixes)


class Language:
    """Two prompts, with the reference's logits and the rewards drawn once."""

    def __init__(self) -> None:
        self.responses, self.num_states = responses()
        draw = torch.Generator().manual_seed(3)
        self.reference = torch.randn(2, self.num_states, LETTERS + 1, generator=draw, dtype=torch.float64)
        self.rewards = torch.randn(2, len(self.responses), generator=draw, dtype=torch.float64)
        self.lengths = torch.tensor([len(response.tokens) for response in self.responses]).repeat(2)
        flat = [(state, token) for response in self.responses for state, token in zip(*response[::-1], strict=True)]
        states, tokens = (torch.tensor(column) for column in zip(*flat, strict=True))
        self.prompts = torch.arange(2).repeat_interleave(len(flat))
        self.states, self.tokens = states.repeat(2), tokens.repeat(2)

    def log_probs(self, logits: Tensor) -> Tensor:
        """Of every token of every response, end to end."""
        return logits.log_softmax(-1)[self.prompts, self.states, self.tokens]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of every response."""
        return sum_by_response(self.log_probs(logits), self.lengths).exp()

    def objective(self, logits: Tensor) -> Tensor:
        """J: expected reward less beta times the divergence, the mean over the prompts."""
        log_probs = sum_by_response(self.log_probs(logits), self.lengths)
        ratios = log_probs - sum_by_response(self.log_probs(self.reference), self.lengths)
        return (log_probs.exp() * (self.rewards.flatten() - BETA * ratios)).sum() / 2

    @cache  # noqa: B019
    def best(self) -> tuple[Tensor, Tensor]:
        """The best policy, as log-probs, and its values, by going back through the tree."""
        index = {response.tokens: number for number, response in enumerate(self.responses)}
        prefixes = {
            response.tokens[:t]: state for response in self.responses for t, state in enumerate(response.states)
        }
        reference = self.reference.log_softmax(-1)
        policy, values = torch.zeros_like(reference), torch.zeros(2, self.num_states, dtype=torch.float64)
        for prefix in sorted(prefixes, key=len, reverse=True):
            state = prefixes[prefix]
            following = [(*prefix, token) for token in range(LETTERS + 1)]
            worth = torch.stack(
                [self.rewards[:, index[t]] if t in index else values[:, prefixes[t]] for t in following], dim=1
            )
            values[:, state] = BETA * (reference[:, state] + worth / BETA).logsumexp(-1)
            policy[:, state] = reference[:, state] + (worth - values[:, state, None]) / BETA
        return policy, values

    def trajectories(self, logits: Tensor, values: Tensor | None = None) -> Trajectories:
        """All responses, as if each had been sampled once."""
        with torch.no_grad():
            ratios = self.log_probs(logits) - self.log_probs(self.reference)
        groups = torch.arange(2).repeat_interleave(len(self.responses))
        of_states = None if values is None else values[self.prompts, self.states]
        return Trajectories(self.rewards.flatten(), groups, self.lengths, ratios, BETA, of_states)

    def divergence_from_best(self, logits: Tensor) -> float:
        log_probs = sum_by_response(self.log_probs(logits), self.lengths)
        best = sum_by_response(self.log_probs(self.best()[0]), self.lengths)
        return float((log_probs.exp() * (log_probs - best)).sum() / 2)


@pytest.fixture(scope="module")
def language() -> Language:
    return Language()


def test_the_best_policy_is_the_reference_weighed_by_the_rewards(language: Language) -> None:
    policy, values = language.best()
    assert (len(language.responses), language.num_states) == (40, 13)
    expected = (language.probabilities(language.reference) * (language.rewards.flatten() / BETA).exp()).view(2, -1)
    z = expected.sum(1, keepdim=True)
    assert (language.probabilities(policy).view(2, -1) - expected / z).abs().max() < 1e-14
    assert (values[:, 0] - BETA * z[:, 0].log()).abs().max() < 1e-14  # what is expected of a prompt is J*
    gap = float(language.objective(policy) - language.objective(language.reference))
    assert gap == pytest.approx(BETA * language.divergence_from_best(language.reference), abs=1e-14)
    assert gap > 0.1


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_at_the_best_policy_every_token_is_worth_what_was_expected(language: Language, lam: float) -> None:
    """One assert that finds every off-by-one: terminators, cut responses, the reward's place, the shift of values."""
    policy, values = language.best()
    exact = language.trajectories(policy, values)
    assert Gae(lam, whiten=False).estimate(exact).advantages.abs().max() < 1e-13
    misplaced = replace(exact, log_ratios=torch.where(language.tokens == END, 0.0, exact.log_ratios))
    assert (
        Gae(lam, whiten=False).estimate(misplaced).advantages.abs().max() > 0.5
    )  # divergence without the terminator's


def expected_gradient(language: Language, advantage: Advantage, logits: Tensor, values: Tensor | None) -> Tensor:
    """Of the loss, over every response with its probability; as ascent."""
    trajectories = language.trajectories(logits, values)
    logits = logits.clone().requires_grad_()
    now = language.log_probs(logits)
    losses = clipped_ratio_losses(now, now.detach(), advantage.estimate(trajectories).advantages, clip=0.2)
    weights = language.probabilities(logits).detach().repeat_interleave(language.lengths)
    (gradient,) = torch.autograd.grad(-(losses * weights).sum() / 2, logits)
    return gradient


def exact_gradient(language: Language, logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(language.objective(logits), logits)
    return gradient


def test_the_expected_gradient_is_that_of_the_objective(language: Language) -> None:
    draw = torch.Generator().manual_seed(4)
    logits = torch.randn(language.reference.shape, generator=draw, dtype=torch.float64)
    values = torch.randn(2, language.num_states, generator=draw, dtype=torch.float64)
    exact = exact_gradient(language, logits)

    def error(lam: float) -> float:
        found = expected_gradient(language, Gae(lam, whiten=False), logits, values)
        return float((found - exact).norm() / exact.norm())

    assert error(1.0) < 1e-14  # whatever the critic says
    assert 0.001 < error(0.95) < 0.5  # which a smaller lambda believes


def test_a_mean_over_each_response_first_is_another_gradient(language: Language) -> None:
    """As some do it: short responses weigh more, and no length of step makes up for it."""
    draw = torch.Generator().manual_seed(4)
    logits = torch.randn(language.reference.shape, generator=draw, dtype=torch.float64)
    exact, values = exact_gradient(language, logits), torch.zeros(2, language.num_states, dtype=torch.float64)
    advantages = Gae(1.0, whiten=False).estimate(language.trajectories(logits, values)).advantages
    weights = language.probabilities(logits).detach()
    for divisor, is_right in ((torch.ones(80), True), (language.lengths, False)):
        free = logits.clone().requires_grad_()
        by_token = (weights / divisor).repeat_interleave(language.lengths) * language.log_probs(free) * advantages
        (found,) = torch.autograd.grad(by_token.sum() / 2, free)
        cosine = float((found * exact).sum() / found.norm() / exact.norm())
        assert (cosine > 1 - 1e-12) == is_right and cosine > 0.8


def test_the_gradient_of_one_left_out_is_that_of_the_objective(language: Language) -> None:
    """Over every pair of independent responses to a prompt, each with its probability."""
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(language.reference.shape, generator=draw, dtype=torch.float64)
    exact = exact_gradient(language, logits)
    everything = language.trajectories(logits)
    count, worth = len(language.responses), everything.penalised_rewards.view(2, -1)
    first, second = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    pairs = torch.stack([first.flatten(), second.flatten()], 1)  # (1600, 2)
    weights = torch.zeros(2, count, dtype=torch.float64)
    for prompt in range(2):
        chosen = worth[prompt][pairs].flatten()
        groups = torch.arange(len(pairs)).repeat_interleave(2)
        ones = torch.ones(len(chosen), dtype=torch.long)
        advantages = (
            LeaveOneOut()
            .estimate(Trajectories(chosen, groups, ones, torch.zeros(len(chosen)).double(), 0.0))
            .advantages
        )
        chances = language.probabilities(logits).view(2, -1)[prompt][pairs].prod(1).repeat_interleave(2)
        weights[prompt].index_add_(0, pairs.flatten(), advantages * chances / 2)  # the mean over a group's responses
    logits = logits.requires_grad_()
    log_probs = sum_by_response(language.log_probs(logits), language.lengths)
    (found,) = torch.autograd.grad((log_probs * weights.flatten()).sum() / 2, logits)
    assert float((found - exact).norm() / exact.norm()) < 1e-13


def learn(language: Language, advantage: Advantage, *, in_loss: Callable[[Tensor], Tensor] | None = None) -> float:
    """400 updates of 2 x 64 sampled responses from the reference, and how far from the best policy they end."""
    draw = torch.Generator().manual_seed(0)
    logits = language.reference.clone().requires_grad_()
    critic = torch.zeros(2, language.num_states, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, critic], lr=0.05)
    starts = language.lengths.cumsum(0) - language.lengths
    count = len(language.responses)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        chances = language.probabilities(logits.detach()).view(2, -1)
        sampled = (chances.multinomial(64, True, generator=draw) + torch.tensor([[0], [count]])).flatten()
        lengths = language.lengths[sampled]
        places = torch.cat([torch.arange(starts[i], starts[i] + language.lengths[i]) for i in sampled.tolist()])
        everything = language.trajectories(logits.detach(), critic.detach())
        assert everything.values is not None
        beta = BETA if in_loss is None else 0.0
        made = advantage.estimate(
            Trajectories(
                everything.rewards[sampled],
                everything.groups[sampled],
                lengths,
                everything.log_ratios[places],
                beta,
                everything.values[places],
            )
        )
        now = language.log_probs(logits)[places]
        loss = clipped_ratio_losses(now, now.detach(), made.advantages, 0.2).sum() / 128
        if in_loss is not None:
            loss = loss + BETA * in_loss(now - language.log_probs(language.reference)[places]).sum() / 128
        if made.returns is not None:
            loss = loss + (critic[language.prompts, language.states][places] - made.returns).square().sum() / 256
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return language.divergence_from_best(logits.detach())


@pytest.mark.parametrize(
    "advantage", [Gae(1.0, whiten=False), Gae(0.95), LeaveOneOut(), GroupNormalized()], ids=lambda a: type(a).__name__
)
def test_samples_lead_to_the_best_policy(language: Language, advantage: Advantage) -> None:
    start = language.divergence_from_best(language.reference)
    assert learn(language, advantage) < 0.01 and start > 1


def test_a_divergence_in_the_loss_leads_elsewhere(language: Language) -> None:
    """Why it is in the reward: a token's effect on later divergence is left out otherwise."""
    assert learn(language, LeaveOneOut(), in_loss=k3) > 0.2


def test_sums_over_responses_stay_on_their_device() -> None:
    by_token, lengths = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 2])
    assert sum_by_response(by_token, lengths).tolist() == [1.0, 6.0]
    assert sum_by_response(by_token.to("meta"), lengths.to("meta")).device.type == "meta"  # of a GPU, say
