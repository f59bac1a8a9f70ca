"""Token-level self-play, checked on laws that can be enumerated, and on the gradient of SFT of a whole model.

Seven tokens may follow one prefix; every expectation over the real token is a sum over all seven, in float64. Expected
values come from closed forms written beside them, or from plain sums over the whole vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import tiny_model
from test_theory import P_DATA, P_START, normalized
from torch import Tensor
from torch.nn import functional as F

from spin_lightning.losses import TokenSpinLoss
from spin_lightning.models.batches import pack
from spin_lightning.models.forward_paths import token_log_probs
from spin_lightning.models.token_laws import says_of, top_says
from spin_lightning.types import TokenLaws, TokenLogProbs, TokenLossOutput, UserError

LN2 = math.log(2)
GROUPS = [([1, 2, 3], [[14, 15, 16, 2]]), ([4], [[17, 2, 9]]), ([5, 6], [[18, 19, 20]])]


def says(log_p: Tensor, ids: list[int]) -> TokenLogProbs:
    """What a law says where each of its tokens is the real one in turn, cut to some tokens and the rest."""
    others = [v for v in range(len(log_p)) if v not in ids]
    rest = log_p[others].logsumexp(0) if others else log_p.new_tensor(-math.inf)
    count = len(log_p)
    laws = TokenLaws(torch.tensor([ids] * count), log_p[ids].expand(count, -1), rest.expand(count))
    return TokenLogProbs(log_p, laws)


def expected_loss(logits: Tensor, loss: TokenSpinLoss, p_t: Tensor, beta: float, p_data: Tensor = P_DATA) -> Tensor:
    ids = p_t.argsort(descending=True)[: loss.top_k].tolist()
    return p_data @ loss(says(logits.log_softmax(0), ids), says(p_t.log(), ids), beta).losses


def gradient_at(p: Tensor, loss: TokenSpinLoss, p_t: Tensor, beta: float, p_data: Tensor = P_DATA) -> Tensor:
    logits = p.log().requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(logits, loss, p_t, beta, p_data), logits)
    return gradient


@pytest.mark.parametrize("top_k", [1, 3, 7])
@pytest.mark.parametrize("temperature", [1.0, 2.0, math.inf])
def test_loss_is_ln2_where_policy_and_opponent_are_one(top_k: int, temperature: float) -> None:
    same = says(P_START.log(), list(range(top_k)))
    output = TokenSpinLoss(temperature, top_k)(same, same, 5.0)
    assert output.losses.tolist() == pytest.approx([LN2] * 7, abs=1e-15)
    assert output.real_rewards.tolist() == output.generated_rewards.tolist() == [0.0] * 7
    assert output.wins.tolist() == pytest.approx([0.5] * 7, abs=1e-15)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("top_k", [1, 3, 6, 7])
def test_first_gradient_is_half_beta_times_that_of_sft(beta: float, top_k: int) -> None:
    found = gradient_at(P_START, TokenSpinLoss(top_k=top_k), P_START, beta)
    torch.testing.assert_close(found, beta / 2 * (P_START - P_DATA), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("top_k", [2, 8, 264])
def test_first_gradient_of_a_model_is_half_beta_times_that_of_sft(top_k: int) -> None:
    """Of all its weights: cosine 1, ratio 2.5 at a beta of 5, however few tokens are kept."""
    model = tiny_model().double()
    batch, weights = pack(GROUPS), list(model.parameters())
    opponent = top_says(model, batch, top_k)
    losses = TokenSpinLoss(top_k=top_k)(says_of(model, batch, opponent.laws.ids), opponent, 5.0).losses
    assert losses.tolist() == pytest.approx([LN2] * 10, abs=1e-9)
    found, sft = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(of, weights)])
        for of in (losses.sum(), -token_log_probs(model, batch).sum())
    )
    assert float(F.cosine_similarity(found, sft, 0)) == pytest.approx(1, abs=1e-9)
    assert float(found.norm() / sft.norm()) == pytest.approx(2.5, rel=1e-7)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("top_k", [1, 4, 7])
def test_the_data_is_the_fixed_point_at_temperature_1(beta: float, top_k: int) -> None:
    assert gradient_at(P_DATA, TokenSpinLoss(top_k=top_k), P_DATA, beta).abs().max() < 1e-15
    assert gradient_at(P_START, TokenSpinLoss(top_k=top_k), P_START, beta).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 2.0, 3.0])
def test_the_fixed_point_of_another_temperature_is_that_power_of_the_data(temperature: float) -> None:
    loss, sharpened = TokenSpinLoss(temperature, 7), normalized(P_DATA**temperature)
    assert gradient_at(sharpened, loss, sharpened, 2.0).abs().max() < 1e-15
    assert gradient_at(P_DATA, loss, P_DATA, 2.0).abs().max() > 1e-3


def test_the_power_is_of_the_outcomes_and_the_rest_stays_divided_as_in_the_data() -> None:
    """Of three tokens and the rest: p ~ (.30, .22, .16, .32)^2, and the rest in the ratios .12 : .09 : .07 : .04."""
    outcomes = normalized(torch.tensor([0.30, 0.22, 0.16, 0.32], dtype=torch.float64) ** 2)
    fixed = torch.cat([outcomes[:3], outcomes[3] * normalized(P_DATA[3:])])
    logits = fixed.log().requires_grad_()
    same = TokenSpinLoss(2.0, 3)(says(logits.log_softmax(0), [0, 1, 2]), says(fixed.log(), [0, 1, 2]), 2.0)
    (gradient,) = torch.autograd.grad(P_DATA @ same.losses, logits)
    assert gradient.abs().max() < 1e-15


def test_an_infinite_temperature_pushes_all_outcomes_down_alike() -> None:
    found = gradient_at(P_START, TokenSpinLoss(math.inf, 7), P_START, 2.0)
    torch.testing.assert_close(found, torch.full((7,), 1 / 7, dtype=torch.float64) - P_DATA, rtol=0, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_an_exact_iteration_is_the_closed_form(beta: float, temperature: float) -> None:
    """p_t (p_data / q)^(1/beta), normalised, is where the expected loss is least."""
    q = normalized(P_START ** (1 / temperature))
    best = normalized(P_START * (P_DATA / q) ** (1 / beta))
    loss = TokenSpinLoss(temperature, 7)
    assert gradient_at(best, loss, P_START, beta).abs().max() < 1e-14
    logits = best.log()
    least = float(expected_loss(logits, loss, P_START, beta))
    for step in torch.randn(20, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        assert float(expected_loss(logits + 0.1 * step, loss, P_START, beta)) > least


@pytest.mark.parametrize(("temperature", "beta", "factor"), [(1.0, 2.0, 0.5), (2.0, 1.0, 0.5), (1.0, 0.4, -1.5)])
def test_an_exact_iteration_shrinks_the_distance_by_1_minus_1_over_beta_t(
    temperature: float, beta: float, factor: float
) -> None:
    fixed = normalized(P_DATA**temperature)
    q = normalized(P_START ** (1 / temperature))
    after = normalized(P_START * (P_DATA / q) ** (1 / beta))
    before, left = ((p / fixed).log() - (p / fixed).log().mean() for p in (P_START, after))
    torch.testing.assert_close(left, factor * before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_are_the_plain_sum_over_the_vocabulary(temperature: float) -> None:
    policy, beta = normalized(P_DATA + 0.1), 3.0
    found = TokenSpinLoss(temperature, 7)(
        says(policy.log(), list(range(7))), says(P_START.log(), list(range(7))), beta
    ).losses
    q = normalized(P_START ** (1 / temperature))
    ratios = [math.log(policy[v] / P_START[v]) for v in range(7)]
    for y in range(7):
        plain = sum(float(q[v]) * math.log1p(math.exp(-beta * (ratios[y] - ratios[v]))) for v in range(7))
        assert float(found[y]) == pytest.approx(plain, rel=1e-13)


def test_gradient_equals_finite_differences() -> None:
    loss, opponent = TokenSpinLoss(2.0, 3), says(P_START.log(), [2, 4, 6])

    def sum_of(logits: Tensor) -> Tensor:
        return loss(says(logits.log_softmax(0), [2, 4, 6]), opponent, 3.0).losses

    assert torch.autograd.gradcheck(sum_of, (torch.randn(7, dtype=torch.float64)).requires_grad_())


def test_what_is_reported_is_the_mean_over_what_the_opponent_may_say() -> None:
    """By hand: token 0 is real; the opponent says .2, .5 and .3 (the rest), the policy .4, .5 and .1."""
    policy, opponent = (
        TokenLogProbs(p[:1].log(), TokenLaws(torch.tensor([[0, 1]]), p[None, :2].log(), p[2:].log()))
        for p in torch.tensor([[0.4, 0.5, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64)
    )
    output = TokenSpinLoss()(policy, opponent, 2.0)
    assert float(output.real_rewards) == pytest.approx(2 * LN2)
    assert float(output.generated_rewards) == pytest.approx(2 * (0.2 * LN2 - 0.3 * math.log(3)))
    assert float(output.wins) == pytest.approx(0.2 / 2 + 0.5 + 0.3)
    assert float(output.generated_log_probs) == pytest.approx(
        0.2 * math.log(0.4) + 0.5 * math.log(0.5) + 0.3 * math.log(0.1)
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, math.inf])
def test_a_token_that_the_opponent_never_says_counts_nothing(temperature: float) -> None:
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    rest = torch.full((1,), -math.inf, dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2]])
    opponent = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64).log()
    log_p = logits.log_softmax(0)
    policy = TokenLogProbs(log_p[:1], TokenLaws(ids, log_p[None], rest))
    output = TokenSpinLoss(temperature)(policy, TokenLogProbs(opponent[:, 0], TokenLaws(ids, opponent, rest)), 1.0)
    (gradient,) = torch.autograd.grad(output.losses.sum(), logits)
    assert all(value.isfinite().all() for value in vars(output).values()) and gradient.isfinite().all()
    q = {1.0: 0.75, 2.0: 3**0.5 / (1 + 3**0.5), math.inf: 0.5}[temperature]
    assert output.losses.tolist() == pytest.approx([(1 - q) * LN2 + q * math.log1p(0.25 / 0.75)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "model.loss.temperature must be positive, got 0.0"),
        ({"temperature": [1.0, math.nan]}, "model.loss.temperature must be positive, got nan"),
        ({"top_k": 0}, "model.loss.top_k must be a number of tokens, at least 1, got 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenSpinLoss(**settings)  # type: ignore[arg-type]


def test_the_temperature_may_fall_over_the_iterations() -> None:
    loss, opponent = TokenSpinLoss([3.0, 1.0], 7), says(P_START.log(), list(range(7)))
    policy = says(P_DATA.log(), list(range(7)))
    loss.check(1.0, 2)
    for iteration, temperature in enumerate([3.0, 1.0]):
        loss.iteration = iteration
        expected = TokenSpinLoss(temperature, 7)(policy, opponent, 1.0).losses
        assert torch.equal(loss(policy, opponent, 1.0).losses, expected)
    with pytest.raises(UserError, match=r"model\.loss\.temperature"):
        loss.check(1.0, 3)


def test_an_output_of_another_shape_is_refused_by_name() -> None:
    class Mean(TokenSpinLoss):
        def forward(self, *args: object) -> TokenLossOutput:
            output = super().forward(*args)  # type: ignore[arg-type]
            output.losses = output.losses.mean()
            return output

    same = says(P_START.log(), [0, 1])
    with pytest.raises(UserError, match=r"Mean must return a TokenLossOutput with one entry a token in losses.*\(7,\)"):
        Mean()(same, same, 1.0)
