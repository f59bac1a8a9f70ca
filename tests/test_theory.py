"""What the theory of SPIN promises, checked through the package's own losses on a space small enough to enumerate.

Seven replies to one prompt; a policy is a softmax over seven free logits, in float64. Every expectation over pairs
(y, y') is a sum over all 49 of them with weights p_data(y) p_t(y'), so nothing is a Monte-Carlo estimate unless a test
says so. Expected values come from closed forms written beside them, never from the loss under test.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spin_lightning.losses import (
    AlphaSpinLoss,
    DpopLoss,
    IpoLoss,
    LengthNormalizedLoss,
    PairLoss,
    SpaceLoss,
    SpinLoss,
    TSpinLoss,
)
from spin_lightning.types import PairLogProbs

LN2 = math.log(2)
LINKS = ["logistic", "hinge", "exponential", "correlation"]
P_DATA = torch.tensor([0.30, 0.22, 0.16, 0.12, 0.09, 0.07, 0.04], dtype=torch.float64)
P_START = torch.tensor([0.08, 0.12, 0.25, 0.05, 0.20, 0.10, 0.20], dtype=torch.float64)
LENGTHS = torch.tensor([1, 2, 2, 3, 4, 4, 5])
REAL, GENERATED = (index.flatten() for index in torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij"))


def pairs(log_p: Tensor, initial_reply: Tensor | None = None) -> PairLogProbs:
    """All 49 pairs under one distribution."""
    initial = None if initial_reply is None else log_p[initial_reply]
    return PairLogProbs(log_p[REAL], log_p[GENERATED], LENGTHS[REAL], LENGTHS[GENERATED], initial)


def expected_loss(
    logits: Tensor,
    loss: PairLoss,
    p_t: Tensor,
    beta: float,
    p_data: Tensor = P_DATA,
    p_0: Tensor | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    """The loss against ``p_t``, averaged over y ~ p_data and y' ~ ``negatives`` (``p_t`` itself unless given)."""
    weights = p_data[REAL] * (p_t if negatives is None else negatives)[GENERATED]
    log_p, opponent = logits.log_softmax(0), pairs(p_t.log())
    initial = None if p_0 is None else pairs(p_0.log())
    if not (loss.needs_initial_response and p_0 is not None):
        return weights @ loss(pairs(log_p), opponent, beta, initial).losses
    # the third response of T-SPIN is independent of the pair, so it is summed over in turn
    per_reply = [loss(pairs(log_p, torch.full((49,), k)), opponent, beta).losses for k in range(7)]
    return weights @ (torch.stack(per_reply, 1) @ p_0)


def gradient_at(p: Tensor, loss: PairLoss, p_t: Tensor, beta: float, **kwargs: Tensor) -> Tensor:
    logits = p.log().requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(logits, loss, p_t, beta, **kwargs), logits)
    return gradient


def best_response(loss: PairLoss, p_t: Tensor, beta: float, **kwargs: Tensor) -> Tensor:
    """The policy that minimises the expected loss, by Newton steps on six free logits with a line search."""

    def objective(free: Tensor) -> Tensor:
        return expected_loss(torch.cat([free, free.new_zeros(1)]), loss, p_t, beta, **kwargs)

    free = (p_t[:6] / p_t[6]).log()
    for _ in range(200):
        gradient = torch.autograd.functional.jacobian(objective, free)
        if gradient.abs().max() < 1e-13:
            break
        # the policy's curvature can be indefinite far from the optimum, so take absolute eigenvalues
        values, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(objective, free))
        step = -vectors @ ((vectors.T @ gradient) / values.abs().clamp_min(1e-12))
        step *= min(1.0, 5.0 / float(step.abs().max()))
        here, size = objective(free), 1.0
        while objective(free + size * step) > here + 1e-4 * size * (gradient @ step) and size > 1e-12:
            size /= 2
        if size <= 1e-12:
            break  # no more decrease in float64
        free = free + size * step
    return torch.cat([free, free.new_zeros(1)]).softmax(0)


def normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum()


def closed_form(p_t: Tensor, beta: float, p_data: Tensor = P_DATA) -> Tensor:
    """Theorem 5.4: p_t (p_data / p_t)^(1/beta), normalised."""
    return (p_t.log() + (p_data.log() - p_t.log()) / beta).softmax(0)


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p.log() - q.log())).sum())


def log_ratio(p: Tensor, q: Tensor) -> Tensor:
    """log p/q up to the constant that normalisation hides: centred over the seven replies."""
    difference = p.log() - q.log()
    return difference - difference.mean()


# T1
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(("link", "expected"), [("logistic", LN2), *((link, 1) for link in LINKS[1:])])
def test_loss_is_ell_of_zero_when_policy_equals_opponent(link, expected, beta):
    same = pairs(P_START.log())
    losses = SpinLoss(link)(same, same, beta).losses
    torch.testing.assert_close(losses, torch.full((49,), float(expected), dtype=torch.float64), rtol=0, atol=1e-15)


# T2
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("link", LINKS)
def test_gradient_is_zero_once_the_opponent_is_the_data(link, beta):
    assert gradient_at(P_DATA, SpinLoss(link), P_DATA, beta).abs().max() < 1e-14


# T3
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(("link", "slope"), [("logistic", -0.5), *((link, -1) for link in LINKS[1:])])
def test_first_gradient_is_beta_times_slope_times_the_gap_to_the_data(link, slope, beta):
    expected = beta * slope * (P_DATA - P_START)
    torch.testing.assert_close(gradient_at(P_START, SpinLoss(link), P_START, beta), expected, rtol=1e-12, atol=1e-14)


# T4
@pytest.mark.parametrize("beta", [0.3, 0.5, 1.0, 2.0, 5.0])
def test_minimiser_of_the_logistic_loss_is_the_closed_form_of_theorem_5_4(beta):
    assert total_variation(best_response(SpinLoss(), P_START, beta), closed_form(P_START, beta)) < 1e-8


# T5
@pytest.mark.parametrize("beta", [0.3, 0.5, 1.0, 2.0, 5.0])
def test_minimum_is_ln2_minus_the_jensen_shannon_divergence_of_the_pairs_whatever_beta(beta):
    plus, minus = P_DATA[REAL] * P_START[GENERATED], P_DATA[GENERATED] * P_START[REAL]
    middle = (plus + minus) / 2
    divergence = (kl(plus, middle) + kl(minus, middle)) / 2
    minimum = expected_loss(best_response(SpinLoss(), P_START, beta).log(), SpinLoss(), P_START, beta)
    assert float(minimum) == pytest.approx(LN2 - divergence, abs=1e-13)


# T6
@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_exponential_loss_takes_half_the_exponent(beta):
    expected = closed_form(P_START, 2 * beta)
    assert total_variation(best_response(SpinLoss("exponential"), P_START, beta), expected) < 1e-8


# T7
@pytest.mark.parametrize(("beta", "factor"), [(1.0, 0.0), (0.5, -1.0), (2.0, 0.5), (5.0, 0.8), (0.4, -1.5)])
def test_each_exact_iteration_multiplies_the_log_ratio_to_the_data_by_one_minus_one_over_beta(beta, factor):
    p_t = P_START
    for _ in range(3):
        p_next = best_response(SpinLoss(), p_t, beta)
        torch.testing.assert_close(log_ratio(p_next, P_DATA), factor * log_ratio(p_t, P_DATA), rtol=1e-6, atol=1e-6)
        p_t = p_next


def test_exact_play_lands_at_one_cycles_at_a_half_and_diverges_below():
    assert total_variation(best_response(SpinLoss(), P_START, 1.0), P_DATA) < 1e-8
    twice = best_response(SpinLoss(), best_response(SpinLoss(), P_START, 0.5), 0.5)
    assert total_variation(twice, P_START) < 1e-7
    p_t, distances = P_START, [kl(P_DATA, P_START)]
    for _ in range(3):
        p_t = best_response(SpinLoss(), p_t, 0.4)
        distances.append(kl(P_DATA, p_t))
    assert distances == sorted(distances)
    assert distances[-1] > 3 * distances[0]


# T8
@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_mean_margin_at_the_optimum_is_the_symmetric_divergence_whatever_beta(beta):
    output = SpinLoss()(pairs(best_response(SpinLoss(), P_START, beta).log()), pairs(P_START.log()), beta)
    mean_margin = (P_DATA[REAL] * P_START[GENERATED]) @ (output.real_rewards - output.generated_rewards)
    assert float(mean_margin) == pytest.approx(kl(P_DATA, P_START) + kl(P_START, P_DATA), abs=1e-7)


# T9
def test_real_responses_lose_probability_at_small_beta_and_gain_it_at_one():
    def reward_of_real_responses(beta: float) -> float:
        policy = best_response(SpinLoss(), P_START, beta)
        return float(P_DATA @ (beta * (policy.log() - P_START.log())))

    # by Theorem 5.4: KL(p_data, p_t) less beta times the log of the normaliser
    log_normalizer = float((P_START.log() + (P_DATA.log() - P_START.log()) / 0.1).logsumexp(0))
    assert reward_of_real_responses(0.1) == pytest.approx(kl(P_DATA, P_START) - 0.1 * log_normalizer, abs=1e-6)
    assert reward_of_real_responses(0.1) < -0.5
    assert reward_of_real_responses(1.0) == pytest.approx(kl(P_DATA, P_START), abs=1e-8)


# T10
@pytest.mark.parametrize("tau", [0.5, 0.8, 1.25])
def test_sampling_at_another_temperature_moves_the_fixed_point_to_a_power_of_the_data(tau):
    power = normalized(P_DATA**tau)
    sampled = normalized(power ** (1 / tau))  # what a temperature of tau makes of it: the data
    assert gradient_at(power, SpinLoss(), power, 1.0, negatives=sampled).abs().max() < 1e-15
    untempered = normalized(P_DATA ** (1 / tau))
    assert gradient_at(P_DATA, SpinLoss(), P_DATA, 1.0, negatives=untempered).abs().max() > 1e-3
    # and play goes there: for beta = 2 each iteration multiplies the distance to it by 1 - 1 / (beta tau)
    p_t = P_START
    for _ in range(4):
        p_next = best_response(SpinLoss(), p_t, 2.0, negatives=normalized(p_t ** (1 / tau)))
        expected = (1 - 1 / (2 * tau)) * log_ratio(p_t, power)
        torch.testing.assert_close(log_ratio(p_next, power), expected, rtol=1e-6, atol=1e-6)
        p_t = p_next


def test_greedy_negatives_push_the_mode_to_zero():
    greedy = torch.nn.functional.one_hot(P_DATA.argmax(), 7).double()  # the opponent IS the data, and still:
    logits = P_DATA.log().requires_grad_()
    loss, modes = SpinLoss(), []
    for _ in range(3000):
        (gradient,) = torch.autograd.grad(expected_loss(logits, loss, P_DATA, 1.0, negatives=greedy), logits)
        logits = (logits - 2.0 * gradient).detach().requires_grad_()
        modes.append(float(logits.detach().softmax(0)[0]))
    assert all(later < earlier for earlier, later in zip([0.30, *modes], modes, strict=False))
    assert modes[-1] < 0.01


# T11
def test_negatives_from_two_iterations_have_the_same_threshold_and_oscillate_with_damping():
    """Newest half from t, older half from t-1, all scored against p_t, as the paper mixed them."""

    def play(beta: float, iterations: int, scale: float) -> list[Tensor]:
        start = (P_DATA.log() + scale * log_ratio(P_START, P_DATA)).softmax(0)
        history = [start, start]
        for _ in range(iterations):
            older, p_t = history[-2:]
            history.append(best_response(SpinLoss(), p_t, beta, negatives=(older + p_t) / 2))
        return [log_ratio(p, P_DATA) for p in history[1:]]

    # near the fixed point: d_next = d - (d + d_before) / (2 beta), whose roots have modulus sqrt(1 / (2 beta))
    small = play(0.7, 6, scale=1e-3)
    before, now = small[0], small[0]
    for found in small[1:]:
        before, now = now, now - (now + before) / (2 * 0.7)
        torch.testing.assert_close(found, now, rtol=0, atol=3e-6)
    for beta, shrinks in [(0.4, False), (0.7, True)]:
        norms = [float(d.norm()) for d in play(beta, 12, scale=1e-2)]
        assert (max(norms[-3:]) < 0.3 * norms[0]) == shrinks
        assert (max(norms[-3:]) > 2 * norms[0]) == (not shrinks)
    signs = [float(d @ small[0]) > 0 for d in play(0.7, 6, scale=1e-2)]
    assert True in signs[1:] and False in signs[1:], "no oscillation"
    # far from it: mixed negatives converge from the real start too
    assert float(play(0.7, 12, scale=1.0)[-1].norm()) < 0.3 * float(play(0.7, 0, scale=1.0)[0].norm())


# T12
def hinge_minimiser(p_t: Tensor, beta: float) -> tuple[Tensor, float]:
    """The exact hinge optimum, by search: a corner of a linear programme whose margins are whole numbers."""
    levels = torch.cartesian_prod(*[torch.arange(4)] * 7).double()  # beta log(p / p_t), up to a constant
    margins = levels[:, REAL] - levels[:, GENERATED]
    values = (1 - margins).clamp_min(0) @ (P_DATA[REAL] * p_t[GENERATED])
    return normalized(p_t * (levels[values.argmin()] / beta).exp()), float(values.min())


def test_hinge_never_reaches_the_data_because_its_optimum_is_no_density_ratio():
    loss = SpinLoss("hinge")
    p_t, distances = P_START, []
    for _ in range(10):
        p_next, minimum = hinge_minimiser(p_t, 1.0)
        distances.append(kl(P_DATA, p_next))
        p_before, p_t = p_t, p_next
        found = expected_loss(p_t.log(), loss, p_before, 1.0)
        assert float(found) == pytest.approx(minimum, abs=1e-12)
    # it falls into a cycle of two steps that stays away from the data; logistic play lands in one
    assert distances[-1] == pytest.approx(distances[-3], abs=1e-12)
    assert min(distances) > 0.02
    assert kl(P_DATA, best_response(SpinLoss(), P_START, 1.0)) < 1e-12


def test_hinge_optimum_found_by_search_is_where_subgradient_descent_on_the_loss_ends():
    loss, logits = SpinLoss("hinge"), P_START.log().requires_grad_()
    lowest = math.inf
    for step in range(1500):
        value = expected_loss(logits, loss, P_START, 1.0)
        lowest = min(lowest, float(value.detach()))
        (gradient,) = torch.autograd.grad(value, logits)
        logits = (logits - 2.0 / (1 + 0.05 * step) * gradient).detach().requires_grad_()
    assert hinge_minimiser(P_START, 1.0)[1] - 1e-12 <= lowest < hinge_minimiser(P_START, 1.0)[1] + 2e-3


# T13
@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_reward_accuracy_at_the_optimum_is_the_bayes_accuracy_and_stays_below_one(beta):
    output = SpinLoss()(pairs(best_response(SpinLoss(), P_START, beta).log()), pairs(P_START.log()), beta)
    gap = (output.real_rewards - output.generated_rewards).round(decimals=6)
    accuracy = (P_DATA[REAL] * P_START[GENERATED]) @ ((gap > 0).double() + 0.5 * (gap == 0).double())
    # nobody can tell (y, y') from (y', y) better than this: one half, plus half the total variation of the two
    plus, minus = P_DATA[REAL] * P_START[GENERATED], P_DATA[GENERATED] * P_START[REAL]
    assert float(accuracy) == pytest.approx(0.5 + total_variation(plus, minus) / 2, abs=1e-12)
    assert 0.5 < float(accuracy) < 0.8


# T15
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_expected_gradient_at_the_start_is_half_beta_times_the_sft_gradient(beta):
    logits = P_START.log().requires_grad_()
    (sft_gradient,) = torch.autograd.grad(-(P_DATA @ logits.log_softmax(0)), logits)
    expected = beta / 2 * sft_gradient
    torch.testing.assert_close(gradient_at(P_START, SpinLoss(), P_START, beta), expected, rtol=1e-13, atol=1e-15)


def gradient_of_one_row(real: int, generated: Tensor) -> Tensor:
    """The gradient of one real reply against K generated ones, at the start of an iteration, beta = 1."""
    logits = P_START.log().requires_grad_()
    log_p, ones = logits.log_softmax(0), torch.ones(len(generated), dtype=torch.long)
    policy = PairLogProbs(log_p[real].expand(len(generated)), log_p[generated], ones, ones)
    opponent = PairLogProbs(policy.real.detach(), policy.generated.detach(), ones, ones)
    return torch.autograd.grad(SpinLoss()(policy, opponent, 1.0).losses.mean(), logits)[0]


def test_gradient_of_sampled_answers_turns_to_the_sft_gradient_as_their_number_grows():
    real, draws = 1, 300
    sft_gradient = P_START - torch.nn.functional.one_hot(torch.tensor(real), 7)

    def cosine(gradient: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(gradient, sft_gradient, dim=0))

    generator = torch.Generator().manual_seed(0)
    means = []
    for count in (1, 4, 16, 256):
        samples = torch.multinomial(P_START, draws * count, replacement=True, generator=generator).view(draws, count)
        means.append(sum(cosine(gradient_of_one_row(real, row)) for row in samples) / draws)
    assert means == sorted(means)
    assert means[-1] > 0.99
    # one answer has only seven outcomes, so its mean cosine is a finite sum
    exact = sum(float(P_START[k]) * cosine(gradient_of_one_row(real, torch.tensor([k]))) for k in range(7))
    assert means[0] == pytest.approx(exact, abs=0.05)
    # and all seven at their probabilities, instead of samples of them, give the SFT gradient itself, halved
    enumerated = sum(P_START[k] * gradient_of_one_row(real, torch.tensor([k])) for k in range(7))
    torch.testing.assert_close(enumerated, 0.5 * sft_gradient, rtol=1e-13, atol=1e-15)


def test_identical_pair_has_exactly_no_gradient():
    assert torch.equal(gradient_of_one_row(3, torch.tensor([3])), torch.zeros(7, dtype=torch.float64))


# The cures
def test_nll_term_keeps_the_data_the_fixed_point():
    for weight in (0.05, 0.5):
        assert gradient_at(P_DATA, SpinLoss(nll_weight=weight), P_DATA, 0.1).abs().max() < 1e-15


def test_nll_term_per_token_keeps_the_fixed_point_only_if_all_lengths_are_equal(monkeypatch):
    loss = SpinLoss(nll_weight=0.5, nll_per="token")
    gradient = gradient_at(P_DATA, loss, P_DATA, 0.1)
    # the term alone has its minimum at p_data / length, normalised
    per_token = P_DATA / LENGTHS
    torch.testing.assert_close(gradient, -0.5 * (per_token - P_DATA * per_token.sum()), rtol=1e-12, atol=1e-15)
    assert gradient[0] < 0 < gradient[-1], "short replies should gain, long ones lose"
    monkeypatch.setattr(f"{__name__}.LENGTHS", torch.full((7,), 4))
    assert gradient_at(P_DATA, loss, P_DATA, 0.1).abs().max() < 1e-15


def test_nll_weight_of_a_twentieth_stabilises_a_beta_of_a_tenth():
    def distance_after(iterations: int, weight: float) -> float:
        p_t = P_START
        for _ in range(iterations):
            p_t = best_response(SpinLoss(nll_weight=weight), p_t, 0.1)
        return kl(P_DATA, p_t)

    assert distance_after(30, weight=0.05) < 1e-5
    assert distance_after(30, weight=0.03) > 0.1
    assert distance_after(1, weight=0.0) > 5 * kl(P_DATA, P_START)
    # near the data one iteration multiplies the log-ratio by this; it is -1 at gamma = beta/2 - beta^2 = 0.04
    near = (P_DATA.log() + 1e-4 * log_ratio(P_START, P_DATA)).softmax(0)
    found = log_ratio(best_response(SpinLoss(nll_weight=0.05), near, 0.1), P_DATA)
    factor = (0.1**2 - 0.1) / (0.1**2 + 2 * 0.05)
    torch.testing.assert_close(found, factor * log_ratio(near, P_DATA), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing_keeps_the_fixed_point_and_shortens_the_step(smoothing):
    loss = SpinLoss(label_smoothing=smoothing)
    assert gradient_at(P_DATA, loss, P_DATA, 0.6).abs().max() < 1e-15
    near = (P_DATA.log() + 1e-4 * log_ratio(P_START, P_DATA)).softmax(0)
    expected = (1 - (1 - 2 * smoothing) / 0.6) * log_ratio(near, P_DATA)
    torch.testing.assert_close(log_ratio(best_response(loss, near, 0.6), P_DATA), expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_space_lands_on_the_data_in_one_exact_best_response(mu):
    assert total_variation(best_response(SpaceLoss(mu), P_START, 1.0), P_DATA) < 1e-8


def test_space_misses_the_data_at_any_other_beta():
    for beta in (0.5, 2.0):
        assert total_variation(best_response(SpaceLoss(), P_START, beta), P_DATA) > 0.01


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_alpha_spin_comes_to_rest_between_the_data_and_the_start(alpha):
    loss, beta = AlphaSpinLoss(alpha), 0.8
    weight = alpha * beta / (1 + alpha * beta)
    rest = normalized(P_DATA ** (1 - weight) * P_START**weight)
    assert gradient_at(rest, loss, rest, beta, p_0=P_START).abs().max() < 1e-15
    p_t = P_START
    for _ in range(4):
        p_next = best_response(loss, p_t, beta, p_0=P_START)
        expected = (1 - alpha - 1 / beta) * log_ratio(p_t, rest)
        torch.testing.assert_close(log_ratio(p_next, rest), expected, rtol=1e-6, atol=1e-6)
        p_t = p_next


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_t_spin_without_its_anchor_comes_to_rest_at_a_power_of_the_data(alpha):
    rest = normalized(P_DATA ** (1 / (1 + alpha)))
    assert gradient_at(rest, TSpinLoss(), rest, alpha).abs().max() < 1e-15
    assert gradient_at(P_DATA, TSpinLoss(), P_DATA, alpha).abs().max() > 0.01
    p_next = best_response(TSpinLoss(), P_START, alpha)
    torch.testing.assert_close(log_ratio(p_next, rest), -log_ratio(P_START, rest) / alpha, rtol=1e-6, atol=1e-6)


def test_t_spin_anchor_moves_the_fixed_point_but_not_to_the_data():
    loss = TSpinLoss(anchor_weight=0.1)
    loss.iteration = 1
    for p in (normalized(P_DATA**0.5), P_DATA):
        assert gradient_at(p, loss, p, 1.0, p_0=P_START).abs().max() > 0.003


@pytest.mark.parametrize("beta", [0.2, 0.25, 1.0])
def test_ipo_takes_bounded_steps_and_contracts_where_spin_diverges(beta):
    step = log_ratio(best_response(IpoLoss(), P_START, beta), P_START)
    assert float(step.max() - step.min()) <= 1 / beta
    assert gradient_at(P_DATA, IpoLoss(), P_DATA, beta).abs().max() < 1e-14
    near = (P_DATA.log() + 1e-4 * log_ratio(P_START, P_DATA)).softmax(0)
    expected = (1 - 1 / (4 * beta)) * log_ratio(near, P_DATA)
    torch.testing.assert_close(log_ratio(best_response(IpoLoss(), near, beta), P_DATA), expected, rtol=1e-3, atol=1e-8)


def test_dpop_keeps_the_fixed_point_and_the_probability_of_real_responses():
    # at the data: no policy does better than ln 2, and the first step from anywhere is SPIN's
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            logits = P_DATA.log() + scale * torch.randn(7, generator=generator, dtype=torch.float64)
            assert expected_loss(logits, DpopLoss(5.0), P_DATA, 0.1) > LN2
    spin = gradient_at(P_START, SpinLoss(), P_START, 0.1)
    torch.testing.assert_close(gradient_at(P_START, DpopLoss(), P_START, 0.1), spin, rtol=0, atol=0)

    def mean_log_ratio_of_real_responses(penalty_weight: float) -> float:
        logits = P_START.log().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            expected_loss(logits, DpopLoss(penalty_weight), P_START, 0.1).backward()
            optimizer.step()
        return float(P_DATA @ (logits.detach().log_softmax(0) - P_START.log()))

    assert mean_log_ratio_of_real_responses(0.0) < -1
    assert mean_log_ratio_of_real_responses(5.0) > 0


@pytest.mark.parametrize("beta", [3.0, 5.0])
def test_length_normalised_optimum_is_the_density_ratio_to_the_power_of_length_over_beta(beta):
    gain = best_response(LengthNormalizedLoss(), P_START, beta).log() - P_START.log()
    constant = gain * beta / LENGTHS - (P_DATA.log() - P_START.log())
    torch.testing.assert_close(constant, constant[0].expand(7), rtol=1e-6, atol=1e-7)
    assert gradient_at(P_DATA, LengthNormalizedLoss(), P_DATA, beta).abs().max() < 1e-15
