"""The losses of a pair: what the policy pays for a real and a generated response, given the opponent's log-probs.

Pure functions of log-probs, without reduction or logging: ``loss(policy, opponent, beta)`` gives one loss a pair. All
log-probs are sums over response tokens, in nats; all shapes are ``(B,)``. In the formulas ``y`` is the real response,
``y'`` the generated one, ``p_t`` the opponent and ``r(y) = log p_theta(y) - log p_t(y)`` the log-ratio. A reward is
what a loss compares, ``beta r`` unless its class says otherwise, and never carries a gradient. A setting that is out of
range is a ``UserError`` when the loss is made; one that does not suit the game is a ``UserError`` in ``check``.

A ``TokenLoss`` plays the same game token by token and needs no generated response: it gives one loss a real token.

What may surprise: the losses do not lead to one place. Each class names its fixed point, where exact play can rest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spin_lightning.schedule import at_iteration, check_schedule
from spin_lightning.types import PairLogProbs, PairLossOutput, TokenLogProbs, TokenLossOutput, UserError

T = TypeVar("T")
Link = Literal["logistic", "hinge", "exponential", "correlation"]

#: The paper's ell, by name: each is decreasing and convex with ell'(0) < 0 (Assumption 5.1). Only logistic and
#: exponential make the optimum a density ratio; exponential overflows float32 at margins below -88.
LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda margin: -F.logsigmoid(margin),
    "hinge": lambda margin: F.relu(1 - margin),
    "exponential": lambda margin: torch.exp(-margin),
    "correlation": lambda margin: 1 - margin,
}


def log_ratios(policy: PairLogProbs, opponent: PairLogProbs) -> tuple[Tensor, Tensor]:
    """What the policy gained on the opponent, in nats: ``r(y)`` and ``r(y')``."""
    return policy.real - opponent.real, policy.generated - opponent.generated


def _make_output(losses: Tensor, real_rewards: Tensor, generated_rewards: Tensor) -> PairLossOutput:
    return PairLossOutput(losses, real_rewards.detach(), generated_rewards.detach())


def _describe(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"


def _values_of(setting: T | list[T]) -> list[T]:
    return setting if isinstance(setting, list) else [setting]


def _require_value(
    is_right: Callable[[float], bool], name: str, setting: float | list[float], expected: str, advice: str
) -> None:
    for value in _values_of(setting):
        if not (math.isfinite(value) and is_right(value)):
            raise UserError(f"model.loss.{name} must be {expected}, got {value!r}. {advice}")


def _require_choice(name: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise UserError(f"model.loss.{name} must be one of {choices}, got {value!r}. Choose one of them.")


class SelfPlayLoss(nn.Module, ABC):
    """What losses of pairs and of tokens have in common. Their list attributes are schedules."""

    #: What ``forward`` returns, and of what one entry each.
    _returns: ClassVar[tuple[type[Any], str]]
    #: The loss wants ``initial``: log-probs of both responses under the opponent of iteration 0.
    needs_initial_log_probs = False
    #: The loss wants ``policy.initial_response``.
    needs_initial_response = False
    #: What the rewards compare the policy with, so that they are 0 where it is as likely. None: with nothing, they are
    #: log-probs of the policy alone, and always negative.
    reference: str | None = "the opponent"
    #: What are told apart, and what it may mean where that is nearly all of them.
    compares: ClassVar[str] = "pairs"
    if_all_apart: ClassVar[str] = "they are memorised, or a trivial cue such as length or format gives them away"

    def __init__(self) -> None:
        super().__init__()
        self.iteration = 0

    @property
    def learns_from_identical(self) -> bool:
        """Whether a pair whose two responses are the same tokens can have a gradient in this iteration."""
        return False

    @property
    def remedy(self) -> str:
        """What helps where training makes the real responses less likely than under the reference."""
        return "lower the learning rate or raise beta"

    def now(self, setting: T | list[T]) -> T:
        """A setting of this loss as it holds in the current iteration."""
        return at_iteration(setting, self.iteration)

    def check(self, beta: float | list[float], iterations: int) -> None:
        """Refuse, before anything is loaded, settings that cannot work. Every public list attribute is a schedule.

        Raises:
            UserError: A list is too short or too long, or beta does not suit this loss.
        """
        for name, value in vars(self).items():
            if not name.startswith("_"):
                check_schedule(f"model.loss.{name}", value, iterations)

    def __call__(self, policy: Any, *args: Any, **kwargs: Any) -> Any:
        """What ``forward`` gives, made sure to be one loss, and one of all else, for each pair or token.

        Raises:
            UserError: ``forward`` returned something else; the message names the class.
        """
        name, (returns, unit) = type(self).__name__, self._returns
        if "_parameters" not in vars(self):
            raise UserError(f"{name}.__init__ must begin with super().__init__(), which was not called. Add that line.")
        output: Any = super().__call__(policy, *args, **kwargs)
        wanted = tuple(policy.real.shape)
        if not isinstance(output, returns):
            found = _describe(output)
        else:
            wrong = {key: value for key, value in vars(output).items() if getattr(value, "shape", None) != wanted}
            found = ", ".join(f"{key} as {_describe(value)}" for key, value in wrong.items())
            if not found and not output.losses.is_floating_point():
                found = f"losses of {output.losses.dtype}"
            if not found and policy.real.requires_grad and torch.is_grad_enabled() and not output.losses.requires_grad:
                found = "losses without a gradient"
        if found:
            first, *others = (field.name for field in fields(returns))
            raise UserError(
                f"{name} must return a {returns.__name__} with one entry a {unit} in "
                f"{', '.join([first, *others[:-1]])} and {others[-1]}, each of shape {wanted}, the losses with a "
                f"gradient; got {found}. End its forward with return {returns.__name__}("
                f"{', '.join([first, *(f'{other}.detach()' for other in others)])}), without a mean or a sum."
            )
        return output


class PairLoss(SelfPlayLoss):
    """A loss on pairs. Write your own as a subclass with :meth:`forward`; its list attributes are schedules."""

    _returns = PairLossOutput, "pair"

    @abstractmethod
    def forward(
        self, policy: PairLogProbs, opponent: PairLogProbs, beta: float, initial: PairLogProbs | None = None
    ) -> PairLossOutput:
        """The loss of each pair.

        Args:
            policy: Log-probs under the policy, with gradient.
            opponent: Log-probs under the frozen opponent, ``p_t``.
            beta: Positive scale of the rewards, in this iteration.
            initial: Log-probs under the opponent of iteration 0, if ``needs_initial_log_probs``.
        """


def with_preference(
    loss: SelfPlayLoss,
    preference: Tensor | None,
    policy: Any,
    opponent: Any,
    beta: float,
    initial: PairLogProbs | None = None,
) -> Any:
    """A loss where the real response is the better one with a probability p: ``p loss(y, y') + (1 - p) loss(y', y)``.

    With the margin m the logistic loss is then ``p l(m) + (1 - p) l(-m)``, least at ``m = logit p`` instead of at
    infinity. The expected loss of labels that are drawn so.

    Args:
        loss: Of a pair whose real response is the better one.
        preference: p, shape ``(B,)``. None: 1 in every pair; so it is for a loss of tokens.
        policy: As the loss takes it.
        opponent: As the loss takes it.
        beta: As the loss takes it.
        initial: As the loss takes it.

    Example:
        >>> same = PairLogProbs(torch.tensor([-7.0]), torch.tensor([-9.0]), torch.tensor([4]), torch.tensor([4]))
        >>> better = replace(same, real=torch.tensor([-6.0]))
        >>> with_preference(SpinLoss(), torch.tensor([0.7]), better, same, beta=1.0).losses  # 0.7 l(1) + 0.3 l(-1)
        tensor([0.6133])
    """
    output = loss(policy, opponent, beta, initial)
    if preference is None or not (is_soft := preference < 1).any():
        return output
    p = preference[is_soft].to(output.losses.dtype)  # of those alone: zero times an infinite loss is NaN
    swapped = [None if of is None else _swapped(of, is_soft) for of in (policy, opponent, initial)]
    assert swapped[0] is not None and swapped[1] is not None
    other = loss(swapped[0], swapped[1], beta, swapped[2]).losses
    losses = output.losses.index_put((is_soft,), p * output.losses[is_soft] + (1 - p) * other)
    return replace(output, losses=losses)


def _swapped(log_probs: PairLogProbs, chosen: Tensor) -> PairLogProbs:
    """Of the chosen pairs, with both responses in each other's place."""
    initial = log_probs.initial_response
    return PairLogProbs(
        log_probs.generated[chosen],
        log_probs.real[chosen],
        log_probs.generated_lengths[chosen],
        log_probs.real_lengths[chosen],
        None if initial is None else initial[chosen],
    )


class SpinLoss(PairLoss):
    """The loss of SPIN (Chen et al. 2024, arXiv:2401.01335, Eq. 4.7), where ``beta`` is written lambda.

    With the margin ``m = beta [r(y) - r(y')]``: ``(1 - eps) ell(m) + eps ell(-m) - gamma log p_theta(y)``. Exactly
    ``ell(0)`` at an iteration's first step (0.693147 for logistic), as long as gamma is 0.

    Fixed point: the data's distribution. An exact logistic iteration without extras multiplies ``log(p_t / p_data)``
    by ``1 - 1/beta``: it converges at once for ``beta = 1`` and diverges below 1/2. The term with gamma keeps the fixed
    point and stabilises small betas where ``gamma > beta/2 - beta^2`` (0.04 for ``beta = 0.1``). Per token it tilts the
    fixed point towards short responses, unless all real responses to a prompt are equally long.

    Args:
        link: The paper's ell. It ran logistic only.
        label_smoothing: The share eps of pairs taken the wrong way round, in [0, 0.5). The logistic
            term is then least at the margin ``ln((1 - eps) / eps)`` instead of at infinity.
        nll_weight: The weight gamma of the real response's negative log-probability.
        nll_per: Whether that term is summed over the sequence, or divided by its tokens (``real_lengths``).

    Example:
        >>> lengths = torch.tensor([4])
        >>> opponent = PairLogProbs(torch.tensor([-8.0]), torch.tensor([-6.0]), lengths, lengths)
        >>> policy = PairLogProbs(torch.tensor([-7.0]), torch.tensor([-9.0]), lengths, lengths)
        >>> output = SpinLoss()(policy, opponent, beta=0.5)
        >>> output.real_rewards, output.generated_rewards, output.losses
        (tensor([0.5000]), tensor([-1.5000]), tensor([0.1269]))
    """

    def __init__(
        self,
        link: Link = "logistic",
        label_smoothing: float | list[float] = 0.0,
        nll_weight: float | list[float] = 0.0,
        nll_per: Literal["sequence", "token"] = "sequence",
    ) -> None:
        super().__init__()
        _require_choice("link", link, list(LINKS))
        _require_choice("nll_per", nll_per, ["sequence", "token"])
        advice = "At 0.5 real and generated weigh the same; 0 turns smoothing off."
        _require_value(lambda value: 0 <= value < 0.5, "label_smoothing", label_smoothing, "in [0, 0.5)", advice)
        advice = "0 turns the term off; 0.05 a sequence stabilises beta = 0.1."
        _require_value(lambda value: value >= 0, "nll_weight", nll_weight, "0 or positive", advice)
        self.link = link
        self.label_smoothing = label_smoothing
        self.nll_weight = nll_weight
        self.nll_per = nll_per

    @property
    def learns_from_identical(self) -> bool:
        """True with the term on the real response alone: the margin of an identical pair is constant."""
        return self.now(self.nll_weight) > 0

    @property
    def remedy(self) -> str:
        """What helps where training makes the real responses less likely than under the reference."""
        term = "raise the loss's nll_weight" if self.now(self.nll_weight) else "give the loss an nll_weight"
        return f"lower the learning rate, raise beta, or {term}"

    def forward(
        self, policy: PairLogProbs, opponent: PairLogProbs, beta: float, initial: PairLogProbs | None = None
    ) -> PairLossOutput:
        ell, smoothing, nll_weight = LINKS[self.link], self.now(self.label_smoothing), self.now(self.nll_weight)
        real, generated = log_ratios(policy, opponent)
        margin = beta * (real - generated)
        losses = ell(margin)
        if smoothing:  # not a zero weight: zero times an infinite ell(-m) is NaN
            losses = (1 - smoothing) * losses + smoothing * ell(-margin)
        if nll_weight:
            losses = losses - nll_weight * policy.real / (policy.real_lengths if self.nll_per == "token" else 1)
        return _make_output(losses, beta * real, beta * generated)


class AlphaSpinLoss(SpinLoss):
    """SPIN against the reference ``p_t^(1 - alpha) p_0^alpha`` (alpha-SPIN, Alami et al. 2024, arXiv:2404.04291).

    The generated responses still come from ``p_t``; only the log-ratios are taken to the reference (and so are the
    rewards). It need not be normalised: the constant cancels in the margin.

    Fixed point: ``p_data^(1 - w) p_0^w``, normalised, with ``w = alpha beta / (1 + alpha beta)``: biased to where
    the game began. Exact logistic play contracts to it for ``beta > 1 / (2 - alpha)``.

    Args:
        alpha: Share of the opponent of iteration 0 in the reference, in [0, 1]. 0 is SPIN, and 0.1 our default.
        link: As in SpinLoss.
        label_smoothing: As in SpinLoss.
        nll_weight: As in SpinLoss.
        nll_per: As in SpinLoss.
    """

    needs_initial_log_probs = True
    reference = "its reference between the opponent and the first one"

    def __init__(
        self,
        alpha: float | list[float] = 0.1,
        link: Link = "logistic",
        label_smoothing: float | list[float] = 0.0,
        nll_weight: float | list[float] = 0.0,
        nll_per: Literal["sequence", "token"] = "sequence",
    ) -> None:
        super().__init__(link, label_smoothing, nll_weight, nll_per)
        _require_value(
            lambda value: 0 <= value <= 1, "alpha", alpha, "in [0, 1]", "0 is SPIN; 1 always refers to the start."
        )
        self.alpha = alpha

    def forward(
        self, policy: PairLogProbs, opponent: PairLogProbs, beta: float, initial: PairLogProbs | None = None
    ) -> PairLossOutput:
        if initial is None:
            raise UserError(
                "AlphaSpinLoss needs the log-probs of both responses under the opponent of iteration 0, got None. "
                "Pass initial=..., which in iteration 0 is the opponent's own PairLogProbs."
            )
        reference = PairLogProbs(
            torch.lerp(opponent.real, initial.real, self.now(self.alpha)),
            torch.lerp(opponent.generated, initial.generated, self.now(self.alpha)),
            opponent.real_lengths,
            opponent.generated_lengths,
        )
        return super().forward(policy, reference, beta)


class TSpinLoss(PairLoss):
    """Triplet SPIN (arXiv:2601.08198): no reference model, and an anchor at the response the first opponent gave.

    ``ell(beta [log p_theta(y) - log p_theta(y')]) + b ell(beta [log p_theta(y') - log p_theta(y0)])``, ``y0 ~ p_0``.
    ``beta`` takes the role of the paper's alpha, which is 1; ``b`` counts as 0 in iteration 0, where ``y0`` is itself a
    generated response. Rewards are ``beta log p_theta``: an iteration starts at no known value of them or of the loss.

    Fixed point: not the data's distribution but ``p_data^(1 / (1 + beta))``, normalised, for the first term and the
    logistic link, to which exact play contracts only for ``beta > 1``. The anchor moves it.

    Args:
        link: The paper's ell, as in SpinLoss.
        anchor_weight: The weight b of the second term from iteration 1 on. In a list the first value must be 0.
    """

    needs_initial_response = True
    reference = None

    def __init__(self, link: Link = "logistic", anchor_weight: float | list[float] = 0.1) -> None:
        super().__init__()
        _require_choice("link", link, list(LINKS))
        _require_value(lambda value: value >= 0, "anchor_weight", anchor_weight, "0 or positive", "0 drops the anchor.")
        if isinstance(anchor_weight, list) and anchor_weight and anchor_weight[0] != 0:
            raise UserError(
                f"model.loss.anchor_weight must start with 0, got {anchor_weight!r}: in iteration 0 the anchor is "
                f"itself a generated response. Use {[0.0, *anchor_weight[1:]]!r}."
            )
        self.link = link
        self.anchor_weight = anchor_weight

    @property
    def learns_from_identical(self) -> bool:
        """True where the anchor counts, because it compares the generated response with a third one."""
        return self._anchor_weight_now > 0

    @property
    def _anchor_weight_now(self) -> float:
        return self.now(self.anchor_weight) if self.iteration > 0 else 0.0

    def forward(
        self, policy: PairLogProbs, opponent: PairLogProbs, beta: float, initial: PairLogProbs | None = None
    ) -> PairLossOutput:
        ell, anchor_weight = LINKS[self.link], self._anchor_weight_now
        losses = ell(beta * (policy.real - policy.generated))
        if anchor_weight:
            if policy.initial_response is None:
                raise UserError(
                    "TSpinLoss needs the policy's log-probs of the answer that the opponent of iteration 0 gave, got "
                    "policy.initial_response=None. Fill it in, or set model.loss.anchor_weight: 0."
                )
            losses = losses + anchor_weight * ell(beta * (policy.generated - policy.initial_response))
        return _make_output(losses, beta * policy.real, beta * policy.generated)


class SpaceLoss(PairLoss):
    """Self-play by noise-contrastive estimation (SPACE, arXiv:2512.07175).

    ``-log s_mu(r(y)) - mu log s_{1/mu}(-r(y'))`` with ``s_mu(x) = 1 / (1 + mu exp(-x))``: real and generated responses
    are classified one by one, not against each other.

    Fixed point: the data's distribution, which is also the exact best response to every opponent, whatever mu. This
    needs ``beta = 1``: the classifier's logit is the log-ratio itself, not a multiple of it.

    Args:
        mu: How many generated responses a real one weighs against.

    Example:
        >>> same = PairLogProbs(torch.tensor([-7.0]), torch.tensor([-9.0]), torch.tensor([4]), torch.tensor([4]))
        >>> SpaceLoss()(same, same, beta=1.0).losses  # 2 ln 2
        tensor([1.3863])
    """

    def __init__(self, mu: float | list[float] = 1.0) -> None:
        super().__init__()
        _require_value(lambda value: value > 0, "mu", mu, "positive", "1 weighs real and generated alike.")
        self.mu = mu

    @property
    def learns_from_identical(self) -> bool:
        """Always True: an identical pair pulls its log-ratio to 0, and dropping it would bias the optimum."""
        return True

    @property
    def remedy(self) -> str:
        """What helps where training makes the real responses less likely than under the reference. Beta has to be 1."""
        return "lower the learning rate"

    def check(self, beta: float | list[float], iterations: int) -> None:
        super().check(beta, iterations)
        for value in _values_of(beta):
            if value != 1:
                raise UserError(
                    f"SpaceLoss needs model.beta: 1, got {value!r}: only then is the data's distribution its optimum. "
                    "Set model.beta: 1, or use SpinLoss, which takes any beta."
                )

    def forward(
        self, policy: PairLogProbs, opponent: PairLogProbs, beta: float, initial: PairLogProbs | None = None
    ) -> PairLossOutput:
        mu, (real, generated) = self.now(self.mu), log_ratios(policy, opponent)
        real, generated = beta * real, beta * generated
        losses = -F.logsigmoid(real - math.log(mu)) - mu * F.logsigmoid(math.log(mu) - generated)
        return _make_output(losses, real, generated)


class IpoLoss(PairLoss):
    """A square that asks for a gap of a given size (IPO, Azar et al. 2023, arXiv:2310.12036).

    ``(h - c)^2`` with ``h = r(y) - r(y')`` in nats and ``c = 1 / (2 beta)`` unless ``target`` says otherwise.

    Fixed point: the data's distribution. An exact iteration is a bounded step: no two outcomes move apart by more than
    ``2c`` nats. Close to the fixed point it multiplies ``log(p_t / p_data)`` by ``1 - c/2``, so it contracts for
    ``beta > 1/8`` and lands for ``beta = 1/4``.

    Args:
        target: The gap c in nats, or null for ``1 / (2 beta)``. With a target beta only scales the rewards.
    """

    def __init__(self, target: float | list[float] | None = None) -> None:
        super().__init__()
        if target is not None:
            _require_value(lambda value: value > 0, "target", target, "positive or null", "null is 1 / (2 beta) nats.")
        self.target = target

    @property
    def remedy(self) -> str:
        """What helps where training makes the real responses less likely than under the reference."""
        return "lower the learning rate or " + ("raise beta" if self.target is None else "lower the loss's target")

    def forward(
        self, policy: PairLogProbs, opponent: PairLogProbs, beta: float, initial: PairLogProbs | None = None
    ) -> PairLossOutput:
        real, generated = log_ratios(policy, opponent)
        target = 1 / (2 * beta) if self.target is None else self.now(self.target)
        return _make_output((real - generated - target) ** 2, beta * real, beta * generated)


class DpopLoss(PairLoss):
    """SPIN's logistic loss with a penalty on real responses that became less likely (DPOP, arXiv:2402.13228).

    ``-log sigmoid(beta [r(y) - r(y') - w max(0, -r(y))])``.

    Fixed point: the data's distribution. The step towards it is no density ratio: it gives up contrast to keep real
    responses from losing the probability that SPIN's optimum takes from them at small beta.

    Args:
        penalty_weight: The weight w; the paper's lambda, 50 in its largest runs. 0 is SPIN.
    """

    def __init__(self, penalty_weight: float | list[float] = 50.0) -> None:
        super().__init__()
        _require_value(lambda value: value >= 0, "penalty_weight", penalty_weight, "0 or positive", "0 is plain SPIN.")
        self.penalty_weight = penalty_weight

    @property
    def learns_from_identical(self) -> bool:
        """True with the penalty: it lifts a real response that fell, whatever the generated one is."""
        return self.now(self.penalty_weight) > 0

    @property
    def remedy(self) -> str:
        """What helps where training makes the real responses less likely than under the reference."""
        return "lower the learning rate, raise beta, or raise the loss's penalty_weight"

    def forward(
        self, policy: PairLogProbs, opponent: PairLogProbs, beta: float, initial: PairLogProbs | None = None
    ) -> PairLossOutput:
        real, generated = log_ratios(policy, opponent)
        # relu, not clamp: its gradient at 0 is 0, so an iteration's first step is SPIN's
        penalty = self.now(self.penalty_weight) * F.relu(-real)
        return _make_output(-F.logsigmoid(beta * (real - generated - penalty)), beta * real, beta * generated)


class LengthNormalizedLoss(PairLoss):
    """SPIN's logistic loss with each log-ratio divided by the tokens of its own response, so length alone wins nothing.

    ``-log sigmoid(beta [r(y) / |y| - r(y') / |y'|])``, DPO's length-normalised form (Lambert et al. 2024,
    arXiv:2411.15124). Rewards are the normalised ones, in nats a token times beta: scale beta up by a typical length.

    Fixed point: the data's distribution. An exact iteration multiplies ``p_t(y)`` by
    ``(C p_data(y) / p_t(y))^(|y| / beta)`` with the C that normalises, so long responses overshoot first: beta above
    half the longest length contracts.

    Example:
        >>> opponent = PairLogProbs(torch.tensor([-8.0]), torch.tensor([-6.0]), torch.tensor([2]), torch.tensor([4]))
        >>> policy = PairLogProbs(torch.tensor([-7.0]), torch.tensor([-8.0]), torch.tensor([2]), torch.tensor([4]))
        >>> LengthNormalizedLoss()(policy, opponent, beta=2.0).losses
        tensor([0.1269])
    """

    def forward(
        self, policy: PairLogProbs, opponent: PairLogProbs, beta: float, initial: PairLogProbs | None = None
    ) -> PairLossOutput:
        real, generated = log_ratios(policy, opponent)
        real = beta * real / policy.real_lengths
        generated = beta * generated / policy.generated_lengths
        return _make_output(-F.logsigmoid(real - generated), real, generated)


class TokenLoss(SelfPlayLoss):
    """A loss of the tokens of real responses, each against what the opponent may say in its place.

    Write your own as a subclass with :meth:`forward`; its list attributes are schedules.

    Attributes:
        top_k: So many of the opponent's most likely tokens are kept at each place; all others are one outcome.
    """

    _returns = TokenLossOutput, "token"
    compares = "tokens"
    if_all_apart = "they are memorised, or the opponent hardly ever says what the data say"
    top_k: int

    @abstractmethod
    def forward(
        self, policy: TokenLogProbs, opponent: TokenLogProbs, beta: float, initial: None = None
    ) -> TokenLossOutput:
        """The loss of each response token.

        Args:
            policy: Log-probs under the policy, with gradient; its laws are of the outcomes that the opponent's are of.
            opponent: Log-probs under the frozen opponent, ``p_t``.
            beta: Positive scale of the rewards, in this iteration.
            initial: As a pair loss is called. None: no token loss is told of the opponent of iteration 0.
        """


class TokenSpinLoss(TokenLoss):
    """SPIN's logistic loss token by token, with the opponent's answer summed over its law instead of sampled.

    Each prefix of a real response is a prompt, the next token ``y`` its real response: ``sum over v of q(v)
    log(1 + exp(-beta [r(y) - r(v)]))``, with q the opponent's law of the next token at a temperature T. Outcomes v are
    the opponent's ``top_k`` most likely tokens and the rest, all others as one. Nothing is generated. Exactly ``ln 2``
    at an iteration's first step, where the gradient is ``beta/2`` times that of SFT if T is 1, whatever ``top_k`` is.

    Fixed point: ``p_data^T`` at each prefix, normalised (of the outcomes; within the rest it is the data's). An exact
    iteration multiplies ``log(p_t / p_data^T)`` by ``1 - 1/(beta T)``: it converges at once for ``beta = 1/T`` and
    diverges below half of that. T above 1 is a fixed point sharper than the data.

    Args:
        temperature: T, positive; ``.inf`` takes all outcomes alike.
        top_k: As above. With a T far above 1 it decides what q is: the fewer, the closer to the opponent's own words.

    Example:
        >>> from spin_lightning.types import TokenLaws
        >>> ids = torch.tensor([[3, 5]])
        >>> def says(*p: float) -> TokenLogProbs:  # of tokens 3 and 5 and the rest; 3 is the real token
        ...     outcomes = torch.tensor([p]).log()
        ...     return TokenLogProbs(outcomes[:, 0], TokenLaws(ids, outcomes[:, :2], outcomes[:, 2]))
        >>> output = TokenSpinLoss()(says(0.4, 0.4, 0.2), says(0.2, 0.6, 0.2), beta=1.0)
        >>> output.losses  # 0.2 ln 2 + 0.6 ln(1 + 1/3) + 0.2 ln(1 + 1/2)
        tensor([0.3923])
    """

    def __init__(self, temperature: float | list[float] = 1.0, top_k: int = 64) -> None:
        super().__init__()
        for value in _values_of(temperature):
            if not value > 0:
                raise UserError(
                    f"model.loss.temperature must be positive, got {value!r}. 1 keeps the data's distribution as the "
                    "fixed point."
                )
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise UserError(f"model.loss.top_k must be a number of tokens, at least 1, got {top_k!r}. 64 is usual.")
        self.temperature = temperature
        self.top_k = top_k

    def forward(
        self, policy: TokenLogProbs, opponent: TokenLogProbs, beta: float, initial: None = None
    ) -> TokenLossOutput:
        of_opponent, of_policy = opponent.laws.outcomes, policy.laws.outcomes
        is_possible = of_opponent > -math.inf
        flattened = of_opponent.masked_fill(~is_possible, 0.0) / self.now(self.temperature)
        q = flattened.masked_fill(~is_possible, -math.inf).softmax(1)
        real = policy.real - opponent.real
        outcomes = (of_policy - of_opponent).masked_fill(~is_possible, 0.0)  # where q is 0
        losses = -(q * F.logsigmoid(beta * (real[:, None] - outcomes))).sum(1)
        with torch.no_grad():
            mean = (q * outcomes).sum(1)
            above, level = real[:, None] > outcomes, real[:, None] == outcomes
            return TokenLossOutput(
                losses,
                beta * real,
                beta * mean,
                (q * (above + 0.5 * level)).sum(1),
                (q * of_policy.masked_fill(~is_possible, 0.0)).sum(1),
            )


def bradley_terry(
    real_scores: Tensor,
    generated_scores: Tensor,
    preference: Tensor | None = None,
    margin: Tensor | None = None,
    centring: float = 0.0,
) -> Tensor:
    """The loss of a reward model on pairs of scores (Bradley and Terry 1952), one a pair.

    ``-[p log sigmoid(d) + (1 - p) log sigmoid(-d)] + c (s + s')^2`` with ``d = s - s' - margin``. Only differences of
    scores decide it, unless ``c`` holds their sum at 0 (arXiv:2312.09244).

    Args:
        real_scores: s of the better responses, shape ``(B,)``.
        generated_scores: s' of the others, shape ``(B,)``.
        preference: p, the probability that the first is the better one, shape ``(B,)``. None: 1. With p the loss is
            least at ``d = logit p``.
        margin: By how much the better one should lead (Llama 2, arXiv:2307.09288), shape ``(B,)``. None: 0.
        centring: c.

    Returns:
        Shape ``(B,)``. ``ln 2`` where both scores are 0 and there is no margin.

    Example:
        >>> bradley_terry(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.5]), centring=0.01)
        tensor([0.6931, 0.2639])
    """
    lead = real_scores - generated_scores
    if margin is not None:
        lead = lead - margin
    losses = -F.logsigmoid(lead)
    if preference is not None:
        losses = losses + (1 - preference) * lead  # log sigmoid(d) - log sigmoid(-d) is d
    return losses + centring * (real_scores + generated_scores) ** 2 if centring else losses
