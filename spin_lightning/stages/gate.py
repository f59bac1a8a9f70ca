"""The gate at each iteration's first step: policy and opponent are one model there, and the numbers must say so.

At that step every margin is 0 and the loss is what the loss gives a model against itself (ln 2 for the logistic
link). When it is not, something differs between how the pairs were scored and how they are trained on.

Rounding moves a response's log-prob like a random walk: by about sqrt(tokens) times what it moves a token. Other
weights, another template or a shifted mask move all tokens their own way, and mostly by more. So responses are judged
by their log-ratio over sqrt(tokens), and how far rounding moves a token of this batch is measured on the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from spin_lightning.losses import SelfPlayLoss
from spin_lightning.models.token_laws import sum_of_responses
from spin_lightning.types import PairBatch, PairLogProbs, TokenBatch, TokenLogProbs, UserError

#: |log-ratio| over sqrt(tokens) that needs no reason, in nats: rounding that two passes may happen not to show.
FLOOR = {torch.float64: 2e-6, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
#: So many times the measured rounding may be added to it, in the worst response; down to half of all that in the
#: typical one (root mean square), the more responses there are.
TIMES_ROUNDING = 5.0


def check_gate(
    loss: SelfPlayLoss,
    beta: float,
    batch: PairBatch | TokenBatch,
    policy: PairLogProbs | TokenLogProbs,
    dtype: torch.dtype,
    iteration: int,
    recompute: Callable[[bool], PairLogProbs | TokenLogProbs],
    rounding: Callable[[], float] | None = None,
    otherwise: str = "",
) -> None:
    """Stop the run unless policy and opponent agree on the first batch of an iteration.

    Args:
        loss: The loss of this run.
        beta: Its scale in this iteration.
        batch: The first batch, with the stored opponent log-probs.
        policy: The policy's log-probs of that batch, before any update.
        dtype: The dtype of the computation, which sets the floor of what is allowed.
        iteration: For the message.
        recompute: Gives the policy's log-probs again, as in training (False) or in evaluation mode (True).
        rounding: Measures how far rounding moves the log-prob of one token of this batch, in nats (root mean square).
            Asked only if it matters. None: not at all.
        otherwise: The likely cause if it is none that can be found out. Empty: stale pairs.

    Raises:
        UserError: They differ; the message gives the numbers and the likely cause.
    """
    with torch.no_grad():
        start = batch.opponent
        if isinstance(start, PairLogProbs):
            start = replace(start, initial_response=getattr(policy, "initial_response", None))
        expected = loss(start, batch.opponent, beta, batch.initial).losses
        found = loss(policy, batch.opponent, beta, batch.initial).losses
    found_sums, stored_sums = _sum_of_responses(policy, batch), _sum_of_responses(batch.opponent, batch)
    ratios, lengths = _measure_log_ratios(found_sums, stored_sums)
    root = lengths.clamp_min(1).sqrt()

    def loss_agrees(limit: float) -> bool:
        allowed = limit * (4 * max(beta, 1.0) * float(root.mean()) + 1)
        return bool((found - expected).mean().abs() <= allowed * max(1.0, float(expected.abs().mean())))

    limit = FLOOR[dtype]
    if not (_agree(ratios, root, limit) and loss_agrees(limit)) and rounding is not None:
        limit += TIMES_ROUNDING * rounding()
    if _agree(ratios, root, limit) and loss_agrees(limit):
        return
    with torch.no_grad():
        again, evaluated = (_sum_of_responses(recompute(is_evaluating), batch) for is_evaluating in (False, True))
    if ratios.isfinite().all() and not expected.isfinite().all():
        cause = (
            f"the loss: {type(loss).__name__} gives NaN or infinity for a model against itself. Mend it, or its "
            "settings"
        )
    else:
        cause = _find_cause(
            is_finite=bool(found_sums.real.isfinite().all() and found_sums.generated.isfinite().all()),
            is_random=not torch.equal(again.real, found_sums.real),
            evaluates_alike=_agree(_measure_log_ratios(evaluated, stored_sums)[0], root, limit),
            rounds=dtype if _agree(ratios, root, 3 * limit) else None,
            otherwise=otherwise or _STALE.format("pairs"),
        )
    worst = int((ratios / root).argmax())
    raise UserError(
        f"iteration {iteration} does not start where it should: policy and opponent are the same model at its first "
        f"step, so the loss must be {float(expected.mean()):.6f} and every log-ratio 0 (within "
        f"{limit * float(root[worst]):.3g} nats for a response of {int(lengths[worst])} tokens), but the loss is "
        f"{float(found.mean()):.6f} and the log-ratio of such a response {float(ratios[worst]):.3g} nats. Likely "
        f"cause: {cause}."
    )


def check_start(
    stored: Tensor,
    found: Tensor,
    lengths: Tensor,
    dtype: torch.dtype,
    iteration: int,
    recompute: Callable[[bool], Tensor],
    rounding: Callable[[], float],
) -> None:
    """Stop the run unless a policy still says of responses what it said when it sampled them, before any update.

    Args:
        stored: Their log-probs as they were stored, shape ``(R,)``.
        found: As they are now, shape ``(R,)``.
        lengths: Their tokens, shape ``(R,)``.
        dtype: The dtype of the computation, which sets the floor of what is allowed.
        iteration: For the message.
        recompute: Gives them again, as in training (False) or in evaluation mode (True).
        rounding: Measures how far rounding moves the log-prob of one token, in nats. Asked only if it matters.

    Raises:
        UserError: They differ; the message gives the numbers and the likely cause.
    """
    root, ratios = lengths.clamp_min(1).sqrt(), _sizes(found - stored)
    limit = FLOOR[dtype]
    if not _agree(ratios, root, limit):
        limit += TIMES_ROUNDING * rounding()
    if _agree(ratios, root, limit):
        return
    with torch.no_grad():
        again, evaluated = recompute(False), recompute(True)
    cause = _find_cause(
        is_finite=bool(found.isfinite().all()),
        is_random=not torch.equal(again, found),
        evaluates_alike=_agree(_sizes(evaluated - stored), root, limit),
        rounds=dtype if _agree(ratios, root, 3 * limit) else None,
        otherwise=_STALE.format("responses"),
    )
    worst = int((ratios / root).argmax())
    raise UserError(
        f"iteration {iteration} does not start where it should: the policy that trains is the one that sampled at its "
        f"first step, so every ratio must be 1 (within {limit * float(root[worst]):.3g} nats for a response of "
        f"{int(lengths[worst])} tokens), but such a response is {float(ratios[worst]):.3g} nats away. Likely cause: "
        f"{cause}."
    )


_STALE = (
    "the stored log-probs are of other weights, another chat template or another dtype: stale {}. "
    "Remove this iteration's folder, and run the same command again"
)


def _agree(ratios: Tensor, root: Tensor, limit: float) -> bool:
    scaled = ratios / root  # NaN must not pass, so the conditions ask for what is right
    typical = limit * min(1.0, 0.5 + len(scaled) ** -0.5)
    return bool(scaled.max() <= limit and scaled.square().mean().sqrt() <= typical)


def _find_cause(
    *, is_finite: bool, is_random: bool, evaluates_alike: bool, rounds: torch.dtype | None, otherwise: str
) -> str:
    if not is_finite:
        return (
            "log-probs of the policy that are NaN or infinite. Its weights are damaged, or the dtype overflows: try "
            "float32, or another model"
        )
    if is_random:
        return (
            "the policy is random: two passes over one batch differ, so dropout is on. Set model.dropout: false "
            "(and in the model's config whatever else is random, as the noise of a router)"
        )
    if evaluates_alike:
        return "the policy computes otherwise in training mode than in evaluation mode (dropout, or a layer of its own)"
    if rounds in (torch.bfloat16, torch.float16):
        return (
            f"the dtype: {rounds} rounds more on this model than was measured. Score and train in float32, or in the "
            "same precision. Or else the stored log-probs are of slightly other weights"
        )
    return otherwise


def _sizes(ratios: Tensor) -> Tensor:
    return ratios.detach().abs().nan_to_num(nan=torch.inf)


def _sum_of_responses(says: PairLogProbs | TokenLogProbs, batch: PairBatch | TokenBatch) -> PairLogProbs:
    """Log-probs of responses, where a batch is of tokens their sums."""
    if isinstance(says, PairLogProbs):
        return says
    assert isinstance(batch, TokenBatch)
    return sum_of_responses(says, batch)


def _measure_log_ratios(policy: PairLogProbs, opponent: PairLogProbs) -> tuple[Tensor, Tensor]:
    """Sizes of the log-ratios of a batch's responses, real and generated ones, infinite for NaN; and their lengths."""
    ratios = torch.cat([policy.real - opponent.real, policy.generated - opponent.generated])
    lengths = torch.cat([opponent.real_lengths, opponent.generated_lengths])
    return _sizes(ratios), lengths
