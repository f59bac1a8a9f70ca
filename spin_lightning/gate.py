"""The gate at each iteration's first step: policy and opponent are one model there, and the numbers must say so.

At that step every margin is 0 and the loss is what the loss gives a model against itself (ln 2 for the logistic
link). When it is not, something differs between how the pairs were scored and how they are trained on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spin_lightning.losses import PairLoss
from spin_lightning.types import PairBatch, PairLogProbs, UserError

#: Largest |log-ratio| allowed, in nats per response token. Rounding of the dtype is below, other weights well above. In
#: bfloat16 an answer of two tokens was seen 0.12 off, as matrix products round otherwise in batches of other sizes.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 4e-2, torch.bfloat16: 0.25}


def check_gate(
    loss: PairLoss,
    beta: float,
    batch: PairBatch,
    policy: PairLogProbs,
    dtype: torch.dtype,
    iteration: int,
    recompute: Callable[[bool], PairLogProbs],
) -> None:
    """Stop the run unless policy and opponent agree on the first batch of an iteration.

    Args:
        loss: The loss of this run.
        beta: Its scale in this iteration.
        batch: The first batch, with the stored opponent log-probs.
        policy: The policy's log-probs of that batch, before any update.
        dtype: The dtype of the computation, which sets the tolerance.
        iteration: For the message.
        recompute: Gives the policy's log-probs again, as in training (False) or in evaluation mode (True).

    Raises:
        UserError: They differ; the message gives the numbers and the likely cause.
    """
    tolerance = TOLERANCE[dtype]
    worst = _worst_log_ratio(policy, batch.opponent)
    with torch.no_grad():
        # NaN must not pass, so the condition asks for what is right
        start = PairLogProbs(**{**vars(batch.opponent), "initial_response": policy.initial_response})
        expected = loss(start, batch.opponent, beta, batch.initial).losses
        found = loss(policy, batch.opponent, beta, batch.initial).losses
    lengths = batch.opponent.real_lengths + batch.opponent.generated_lengths
    allowed = 2 * max(beta, 1.0) * tolerance * float(lengths.float().mean()) + tolerance
    loss_agrees = bool((found - expected).mean().abs() <= allowed * max(1.0, float(expected.abs().mean())))
    if worst <= tolerance and loss_agrees:
        return
    with torch.no_grad():
        again, evaluated = recompute(False), recompute(True)
    if not (policy.real.isfinite().all() and policy.generated.isfinite().all()):
        cause = "log-probs of the policy that are not numbers. Its weights are damaged, or the dtype overflows: try float32, or another model"
    elif not torch.equal(again.real, policy.real):
        cause = "the policy is random: two passes over one batch differ, so dropout is on. Set model.dropout: false"
    elif _worst_log_ratio(evaluated, batch.opponent) <= tolerance:
        cause = (
            "the policy computes otherwise in training mode than in evaluation mode (dropout, or a layer of its own)"
        )
    elif dtype in (torch.bfloat16, torch.float16) and worst <= 10 * tolerance:
        cause = f"the dtype: {dtype} rounds more on this model than expected. Score and train in float32, or in the same precision"
    else:
        cause = (
            "the stored log-probs are of other weights, another chat template or another dtype: stale pairs. "
            "Remove this iteration's folder, and run the same command again"
        )
    raise UserError(
        f"iteration {iteration} does not start where it should: policy and opponent are the same model at its first step, so the loss "
        f"must be {float(expected.mean()):.6f} and every log-ratio 0 (within {tolerance:g} nats a token), but the loss is "
        f"{float(found.mean()):.6f} and the largest log-ratio {worst:.3g} nats a token. Likely cause: {cause}."
    )


def _worst_log_ratio(policy: PairLogProbs, opponent: PairLogProbs) -> float:
    """Largest mean |log-ratio| a token over the batch's responses; infinite if any is not a number."""

    def per_token(a: Tensor, b: Tensor, lengths: Tensor) -> Tensor:
        return ((a.detach() - b).abs() / lengths.clamp_min(1)).max()

    worst = torch.maximum(
        per_token(policy.real, opponent.real, opponent.real_lengths),
        per_token(policy.generated, opponent.generated, opponent.generated_lengths),
    )
    return float(worst.nan_to_num(nan=torch.inf))
