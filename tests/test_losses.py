"""The losses against formulas written out by hand, at ordinary and extreme values, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spin_lightning.losses import (
    LINKS,
    AlphaSpinLoss,
    DpopLoss,
    IpoLoss,
    LengthNormalizedLoss,
    PairLoss,
    SpaceLoss,
    SpinLoss,
    TSpinLoss,
)
from spin_lightning.types import PairLogProbs, PairLossOutput, UserError

REAL_LENGTHS, GENERATED_LENGTHS = [3, 5, 2, 7], [4, 1, 6, 2]


def log_probs(real: list[float], generated: list[float], initial: list[float] | None = None) -> PairLogProbs:
    """Float64 log-probs that want a gradient, with the lengths above."""

    def leaf(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, requires_grad=True)

    lengths = torch.tensor(REAL_LENGTHS[: len(real)]), torch.tensor(GENERATED_LENGTHS[: len(real)])
    return PairLogProbs(leaf(real), leaf(generated), *lengths, leaf(initial) if initial is not None else None)


POLICY = [-11.0, -7.5, -3.2, -20.0], [-9.0, -8.0, -14.1, -6.0], [-10.0, -7.0, -5.0, -9.5]
OPPONENT = [-10.0, -8.0, -3.0, -22.5], [-9.5, -6.0, -12.0, -6.75]
INITIAL = [-12.0, -8.2, -3.5, -21.0], [-9.1, -6.4, -11.0, -7.5]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ell(link: str, m: float) -> float:
    return {
        "logistic": math.log(1 + math.exp(-m)),
        "hinge": max(0.0, 1 - m),
        "exponential": math.exp(-m),
        "correlation": 1 - m,
    }[link]


def dpo_sigmoid_loss(pi_w: float, pi_l: float, ref_w: float, ref_l: float, beta: float, eps: float) -> float:
    """DPO's sigmoid loss with conservative label smoothing, straight from the formula in plain Python.

    The independent implementation that ours is compared with: it is the loss that TRL computes, but not TRL's code.
    """
    logits = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    return -(1 - eps) * math.log(sigmoid(logits)) - eps * math.log(sigmoid(-logits))


def slope(function, x: float, h: float = 1e-5) -> float:
    """Central difference of fourth order."""
    return (8 * (function(x + h) - function(x - h)) - function(x + 2 * h) + function(x - 2 * h)) / (12 * h)


def at(loss: PairLoss, iteration: int) -> PairLoss:
    loss.iteration = iteration
    return loss


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_loss_and_gradients_are_those_of_dpo_with_the_opponent_as_reference(beta, eps):
    policy, opponent = log_probs(*POLICY), log_probs(*OPPONENT)
    losses = SpinLoss(label_smoothing=eps)(policy, opponent, beta).losses
    real_gradient, generated_gradient = torch.autograd.grad(losses.sum(), [policy.real, policy.generated])
    for i in range(4):
        pi_w, pi_l, ref_w, ref_l = POLICY[0][i], POLICY[1][i], OPPONENT[0][i], OPPONENT[1][i]
        assert losses[i].item() == pytest.approx(dpo_sigmoid_loss(pi_w, pi_l, ref_w, ref_l, beta, eps), rel=1e-9)
        by_real = slope(
            lambda x, i=i: dpo_sigmoid_loss(x, POLICY[1][i], OPPONENT[0][i], OPPONENT[1][i], beta, eps), pi_w
        )
        by_generated = slope(
            lambda x, i=i: dpo_sigmoid_loss(POLICY[0][i], x, OPPONENT[0][i], OPPONENT[1][i], beta, eps), pi_l
        )
        assert real_gradient[i].item() == pytest.approx(by_real, rel=1e-6, abs=1e-8)
        assert generated_gradient[i].item() == pytest.approx(by_generated, rel=1e-6, abs=1e-8)


def by_hand(name: str, i: int, beta: float) -> float:
    """Each loss of pair i as one scalar formula, with the settings of ``CASES``."""
    pi_real, pi_generated, pi_initial = (column[i] for column in POLICY)
    r, r_generated = pi_real - OPPONENT[0][i], pi_generated - OPPONENT[1][i]
    m = beta * (r - r_generated)
    if name in LINKS:
        return ell(name, m)
    if name == "smoothed hinge":
        return 0.8 * ell("hinge", m) + 0.2 * ell("hinge", -m)
    if name == "nll a sequence":
        return ell("logistic", m) - 0.05 * pi_real
    if name == "nll a token":
        return ell("logistic", m) - 0.05 * pi_real / REAL_LENGTHS[i]
    if name == "alpha-SPIN":
        reference_real = 0.7 * OPPONENT[0][i] + 0.3 * INITIAL[0][i]
        reference_generated = 0.7 * OPPONENT[1][i] + 0.3 * INITIAL[1][i]
        return ell("exponential", beta * ((pi_real - reference_real) - (pi_generated - reference_generated)))
    if name == "T-SPIN":
        return ell("logistic", beta * (pi_real - pi_generated)) + 0.1 * ell(
            "logistic", beta * (pi_generated - pi_initial)
        )
    if name == "SPACE":
        first = -math.log(1 / (1 + 3 * math.exp(-beta * r)))
        return first - 3 * math.log(1 / (1 + (1 / 3) * math.exp(beta * r_generated)))
    if name == "IPO":
        return (r - r_generated - 1 / (2 * beta)) ** 2
    if name == "IPO with a target":
        return (r - r_generated - 1.5) ** 2
    if name == "DPOP":
        return ell("logistic", m - beta * 2.0 * max(0.0, -r))
    assert name == "length-normalised"
    return ell("logistic", beta * (r / REAL_LENGTHS[i] - r_generated / GENERATED_LENGTHS[i]))


CASES = {
    **{link: SpinLoss(link) for link in LINKS},
    "smoothed hinge": SpinLoss("hinge", label_smoothing=0.2),
    "nll a sequence": SpinLoss(nll_weight=0.05),
    "nll a token": SpinLoss(nll_weight=0.05, nll_per="token"),
    "alpha-SPIN": AlphaSpinLoss(0.3, link="exponential"),
    "T-SPIN": at(TSpinLoss(), 1),
    "SPACE": SpaceLoss(mu=3.0),
    "IPO": IpoLoss(),
    "IPO with a target": IpoLoss(target=1.5),
    "DPOP": DpopLoss(2.0),
    "length-normalised": LengthNormalizedLoss(),
}


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_each_loss_is_its_formula(name, beta):
    losses = CASES[name](log_probs(*POLICY), log_probs(*OPPONENT), beta, log_probs(*INITIAL)).losses
    assert losses.tolist() == pytest.approx([by_hand(name, i, beta) for i in range(4)], rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_is_that_of_finite_differences(name):
    def losses(real: Tensor, generated: Tensor, first: Tensor) -> Tensor:
        policy = PairLogProbs(real, generated, torch.tensor(REAL_LENGTHS), torch.tensor(GENERATED_LENGTHS), first)
        return CASES[name](policy, log_probs(*OPPONENT), 0.7, log_probs(*INITIAL)).losses

    policy = log_probs(*POLICY)
    assert torch.autograd.gradcheck(losses, (policy.real, policy.generated, policy.initial_response))


@pytest.mark.parametrize("name", CASES)
def test_losses_are_unreduced_and_rewards_are_without_gradient(name):
    output = CASES[name](log_probs(*POLICY), log_probs(*OPPONENT), 0.5, log_probs(*INITIAL))
    assert output.losses.shape == output.real_rewards.shape == output.generated_rewards.shape == (4,)
    assert output.losses.requires_grad
    assert not output.real_rewards.requires_grad and not output.generated_rewards.requires_grad


@pytest.mark.parametrize("loss", [SpinLoss(), SpinLoss("hinge"), IpoLoss(), DpopLoss(), SpaceLoss()])
def test_rewards_are_beta_times_the_log_ratio(loss):
    output = loss(log_probs(*POLICY), log_probs(*OPPONENT), 0.5)
    assert output.real_rewards.tolist() == pytest.approx([-0.5, 0.25, -0.1, 1.25])
    assert output.generated_rewards.tolist() == pytest.approx([0.25, -1.0, -1.05, 0.375])


def test_rewards_of_the_other_losses_are_what_they_compare():
    alpha = AlphaSpinLoss(0.5)(log_probs(*POLICY), log_probs(*OPPONENT), 0.5, log_probs(*INITIAL))
    assert alpha.real_rewards[0].item() == pytest.approx(0.5 * (-11 + 11))
    triplet = TSpinLoss()(log_probs(*POLICY), log_probs(*OPPONENT), 0.5)
    assert triplet.real_rewards.tolist() == pytest.approx([0.5 * value for value in POLICY[0]])
    normalised = LengthNormalizedLoss()(log_probs(*POLICY), log_probs(*OPPONENT), 0.5)
    assert normalised.generated_rewards.tolist() == pytest.approx([0.25 / 4, -1.0 / 1, -1.05 / 6, 0.375 / 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize(
    "loss", [SpinLoss(), SpinLoss(label_smoothing=0.1), DpopLoss(), SpaceLoss(), LengthNormalizedLoss()]
)
def test_logistic_losses_stay_finite_at_extreme_margins(loss, margin, dtype):
    one, zero = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=dtype)
    policy = PairLogProbs(torch.tensor([margin], dtype=dtype, requires_grad=True), zero, one, one)
    losses = loss(policy, PairLogProbs(zero, zero, one, one), 1.0).losses
    losses.sum().backward()
    assert losses.isfinite().all() and policy.real.grad.isfinite().all()


def test_logistic_loss_keeps_its_digits_in_both_tails():
    one, zero = torch.ones(2, dtype=torch.long), torch.zeros(2, dtype=torch.float64)
    policy = PairLogProbs(torch.tensor([1e4, -1e4], dtype=torch.float64), zero, one, one)
    assert SpinLoss()(policy, PairLogProbs(zero, zero, one, one), 1.0).losses.tolist() == [0.0, 1e4]
    policy.real = torch.tensor([21.0, -21.0], dtype=torch.float64)
    losses = SpinLoss()(policy, PairLogProbs(zero, zero, one, one), 1.0).losses
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-21)), 21 + math.log1p(math.exp(-21))], rel=1e-12)


def test_exponential_loss_without_smoothing_is_zero_not_nan_at_a_large_margin():
    one, zero = torch.ones(1, dtype=torch.long), torch.zeros(1)
    policy = PairLogProbs(torch.tensor([1e4]), zero, one, one)
    assert SpinLoss("exponential")(policy, PairLogProbs(zero, zero, one, one), 1.0).losses.item() == 0


@pytest.mark.parametrize("link", LINKS)
def test_each_link_decreases_is_convex_and_falls_at_zero(link):
    points = torch.linspace(-5, 5, 101, dtype=torch.float64)
    values = LINKS[link](points)
    assert (values.diff() <= 0).all()
    assert (values.diff().diff() >= -1e-12).all()
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    LINKS[link](zero).backward()
    assert zero.grad < 0


EVERY = [
    SpinLoss(),
    SpinLoss("hinge", label_smoothing=0.2),
    SpinLoss("exponential"),
    SpinLoss("correlation"),
    SpinLoss(nll_weight=0.05),
    SpinLoss(nll_weight=[0.05, 0.0]),
    at(SpinLoss(nll_weight=[0.05, 0.0]), 1),
    AlphaSpinLoss(0.3),
    AlphaSpinLoss(0.3, nll_weight=0.1),
    TSpinLoss(),
    at(TSpinLoss(), 1),
    at(TSpinLoss(anchor_weight=0.0), 1),
    SpaceLoss(),
    IpoLoss(),
    DpopLoss(),
    DpopLoss(0.0),
    LengthNormalizedLoss(),
]


@pytest.mark.parametrize("loss", EVERY, ids=lambda loss: type(loss).__name__)
def test_every_loss_is_a_number_for_any_log_probs(loss):
    """Sequences from impossible (-1e5 nats) to certain, of one token or thousands; exp overflows by its nature."""
    draw = torch.Generator().manual_seed(0)
    size = 4000

    def nats():
        return -(10 ** (torch.rand(size, generator=draw) * 11 - 6)) * (torch.rand(size, generator=draw) > 0.05)

    def leaf():
        return nats().requires_grad_()

    lengths = [torch.randint(1, 4096, (size,), generator=draw) for _ in range(2)]
    policy = PairLogProbs(leaf(), leaf(), *lengths, initial_response=leaf())
    output = loss(policy, PairLogProbs(nats(), nats(), *lengths), 1.0, PairLogProbs(nats(), nats(), *lengths))
    assert not output.losses.isnan().any() and not output.real_rewards.isnan().any()
    if getattr(loss, "link", None) == "exponential":
        return
    assert output.losses.isfinite().all()
    output.losses.sum().backward()
    for log_probs in (policy.real, policy.generated, policy.initial_response):
        assert log_probs.grad is None or log_probs.grad.isfinite().all()


@pytest.mark.parametrize("loss", EVERY, ids=lambda loss: type(loss).__name__)
def test_identical_pair_has_a_gradient_exactly_when_the_loss_says_it_learns_from_it(loss):
    log_p = torch.tensor([-7.0], dtype=torch.float64, requires_grad=True)  # one response, on both sides
    length, opponent, first = torch.tensor([4]), torch.tensor([-6.5]), torch.tensor([-5.0])
    policy = PairLogProbs(log_p, log_p, length, length, first)
    output = loss(
        policy, PairLogProbs(opponent, opponent, length, length), 0.7, PairLogProbs(first, first, length, length)
    )
    (gradient,) = torch.autograd.grad(output.losses.sum(), log_p)
    assert (gradient.item() != 0) == loss.learns_from_identical


def test_loss_says_what_it_needs():
    assert [type(loss).__name__ for loss in EVERY if loss.needs_initial_log_probs] == ["AlphaSpinLoss"] * 2
    assert [type(loss).__name__ for loss in EVERY if loss.needs_initial_response] == ["TSpinLoss"] * 3


def test_alpha_of_zero_is_spin_and_an_iteration_starts_at_ln2():
    policy, opponent, initial = log_probs(*POLICY), log_probs(*OPPONENT), log_probs(*INITIAL)
    spin = SpinLoss()(policy, opponent, 0.5).losses
    assert torch.equal(AlphaSpinLoss(0.0)(policy, opponent, 0.5, initial).losses, spin)
    start = AlphaSpinLoss(0.3)(initial, initial, 0.5, initial).losses
    assert torch.equal(start, torch.full((4,), math.log(2), dtype=torch.float64))


def test_t_spin_has_no_anchor_in_iteration_zero():
    policy, opponent = log_probs(*POLICY[:2]), log_probs(*OPPONENT)
    expected = [ell("logistic", POLICY[0][i] - POLICY[1][i]) for i in range(4)]
    assert TSpinLoss(anchor_weight=5.0)(policy, opponent, 1.0).losses.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("listed", "single"),
    [
        (SpinLoss(label_smoothing=[0.0, 0.2]), SpinLoss(label_smoothing=0.2)),
        (SpinLoss(nll_weight=[0.0, 0.2]), SpinLoss(nll_weight=0.2)),
        (AlphaSpinLoss([0.0, 0.2]), AlphaSpinLoss(0.2)),
        (TSpinLoss(anchor_weight=[0.0, 0.2]), TSpinLoss(anchor_weight=0.2)),
        (SpaceLoss([1.0, 2.0]), SpaceLoss(2.0)),
        (IpoLoss([1.0, 2.0]), IpoLoss(2.0)),
        (DpopLoss([0.0, 2.0]), DpopLoss(2.0)),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_list_holds_one_value_an_iteration(listed, single):
    arguments = log_probs(*POLICY), log_probs(*OPPONENT), 1.0, log_probs(*INITIAL)
    listed.check(1.0, iterations=2)
    assert not torch.equal(at(listed, 0)(*arguments).losses, at(listed, 1)(*arguments).losses)
    assert torch.equal(at(listed, 1)(*arguments).losses, at(single, 1)(*arguments).losses)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SpinLoss("log"), r"model.loss.link must be one of \['logistic', 'hinge', .*\], got 'log'. Choose one"),
        (lambda: TSpinLoss("log"), r"model.loss.link must be one of .*, got 'log'"),
        (lambda: SpinLoss(nll_per="word"), r"model.loss.nll_per must be one of \['sequence', 'token'\], got 'word'"),
        (
            lambda: SpinLoss(label_smoothing=0.5),
            r"model.loss.label_smoothing must be in \[0, 0.5\), got 0.5. At 0.5 real",
        ),
        (lambda: SpinLoss(label_smoothing=[0.1, -0.1]), r"label_smoothing must be in \[0, 0.5\), got -0.1"),
        (
            lambda: SpinLoss(nll_weight=-1.0),
            "model.loss.nll_weight must be 0 or positive, got -1.0. 0 turns the term off",
        ),
        (lambda: SpinLoss(nll_weight=math.nan), "model.loss.nll_weight must be 0 or positive, got nan"),
        (lambda: SpinLoss(nll_weight=math.inf), "model.loss.nll_weight must be 0 or positive, got inf"),
        (lambda: AlphaSpinLoss(1.1), r"model.loss.alpha must be in \[0, 1\], got 1.1. 0 is SPIN"),
        (
            lambda: TSpinLoss(anchor_weight=-0.1),
            "model.loss.anchor_weight must be 0 or positive, got -0.1. 0 drops the",
        ),
        (
            lambda: TSpinLoss(anchor_weight=[0.1, 0.2]),
            r"anchor_weight must start with 0, got \[0.1, 0.2\]: in iteration 0 .* Use \[0.0, 0.2\].",
        ),
        (lambda: SpaceLoss(0.0), "model.loss.mu must be positive, got 0.0. 1 weighs"),
        (lambda: IpoLoss(0.0), r"model.loss.target must be positive or null, got 0.0. null is 1 / \(2 beta\)"),
        (lambda: DpopLoss(-1.0), "model.loss.penalty_weight must be 0 or positive, got -1.0. 0 is plain SPIN"),
    ],
)
def test_setting_out_of_range_is_refused_with_what_was_expected(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_check_refuses_a_list_that_is_not_one_value_an_iteration():
    loss = SpinLoss(nll_weight=[0.1, 0.2])
    loss.check(0.1, iterations=2)
    words = r"model.loss.nll_weight is a list of 2 values \[0.1, 0.2\], but the game has 3 iterations. .* a list of 3."
    with pytest.raises(UserError, match=words):
        loss.check(0.1, iterations=3)


@pytest.mark.parametrize("beta", [0.1, [1.0, 0.1]])
def test_space_refuses_any_beta_but_one(beta):
    SpaceLoss().check(1.0, iterations=2)
    SpaceLoss().check([1.0, 1.0], iterations=2)
    words = "SpaceLoss needs model.beta: 1, got 0.1: .* Set model.beta: 1, or use SpinLoss"
    with pytest.raises(UserError, match=words):
        SpaceLoss().check(beta, iterations=2)
    with pytest.raises(UserError, match=r"model.loss.mu is a list of 1 values"):
        SpaceLoss([1.0]).check(1.0, iterations=2)


def test_loss_that_misses_what_it_needs_says_what_to_pass():
    policy, opponent = log_probs(*POLICY[:2]), log_probs(*OPPONENT)
    with pytest.raises(UserError, match=r"AlphaSpinLoss needs the log-probs .* iteration 0, got None. Pass initial="):
        AlphaSpinLoss()(policy, opponent, 1.0)
    with pytest.raises(
        UserError, match=r"TSpinLoss needs the policy's log-probs .*initial_response=None. Fill it in, or"
    ):
        at(TSpinLoss(), 1)(policy, opponent, 1.0)


def test_a_loss_of_ones_own_is_a_subclass_with_forward():
    class Sharper(SpinLoss):
        def __init__(self, sharpness: float | list[float] = 2.0) -> None:
            super().__init__()
            self.sharpness = sharpness

        def forward(self, policy, opponent, beta, initial=None):
            return super().forward(policy, opponent, beta * self.now(self.sharpness))

    arguments = log_probs(*POLICY), log_probs(*OPPONENT)
    torch.testing.assert_close(Sharper()(*arguments, 0.5).losses, SpinLoss()(*arguments, 1.0).losses)
    with pytest.raises(UserError, match=r"model.loss.sharpness is a list of 1 values"):
        Sharper([2.0]).check(0.5, iterations=2)


WRONG_ANSWERS = {
    "Tensor of shape ()": lambda losses, rewards: losses.mean(),
    "Tensor of shape (2,)": lambda losses, rewards: losses,
    "tuple": lambda losses, rewards: (losses, rewards, rewards),
    "NoneType": lambda losses, rewards: None,
    "losses as Tensor of shape ()": lambda losses, rewards: PairLossOutput(losses.mean(), rewards, rewards),
    "losses as Tensor of shape (2, 1)": lambda losses, rewards: PairLossOutput(losses[:, None], rewards, rewards),
    "generated_rewards as float": lambda losses, rewards: PairLossOutput(losses, rewards, 0.0),
    "real_rewards as Tensor of shape (1,)": lambda losses, rewards: PairLossOutput(losses, rewards[:1], rewards),
    "losses without a gradient": lambda losses, rewards: PairLossOutput(losses.detach(), rewards, rewards),
}


@pytest.mark.parametrize("found", WRONG_ANSWERS)
def test_loss_that_returns_the_wrong_thing_is_named_with_what_came(found):
    class MyLoss(PairLoss):
        def forward(self, policy, opponent, beta, initial=None):
            margin = policy.real - policy.generated
            return WRONG_ANSWERS[found](-torch.nn.functional.logsigmoid(margin), margin.detach())

    lengths = torch.tensor([3, 4])
    weights = torch.tensor([-4.0, -5.0], requires_grad=True)
    policy = PairLogProbs(weights, weights * 2, lengths, lengths)
    with pytest.raises(UserError) as refusal:
        MyLoss()(policy, policy, 1.0)
    message = str(refusal.value)
    assert message.startswith("MyLoss must return a PairLossOutput with one entry a pair in losses, real_rewards")
    assert "each of shape (2,)" in message and f"; got {found}. End its forward with return" in message


def test_loss_that_forgets_to_call_its_base_class_says_so():
    class MyLoss(SpinLoss):
        def __init__(self):
            pass

    lengths = torch.tensor([3])
    policy = PairLogProbs(torch.tensor([-4.0]), torch.tensor([-4.0]), lengths, lengths)
    with pytest.raises(
        UserError, match=r"MyLoss.__init__ must begin with super\(\).__init__\(\), which was not called"
    ):
        MyLoss()(policy, policy, 1.0)


def test_loss_without_gradient_is_right_where_none_is_asked_for():
    lengths = torch.tensor([3])
    policy = PairLogProbs(torch.tensor([-4.0], requires_grad=True), torch.tensor([-4.0]), lengths, lengths)
    with torch.no_grad():
        assert SpinLoss()(policy, policy, 1.0).losses == pytest.approx(math.log(2))
