"""An iteration starts with policy and opponent equal, or with an error that says why they are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LOSSES, scored_batch, tiny_model
from torch import nn

from spin_lightning import losses
from spin_lightning.models.batches import pack
from spin_lightning.models.loading import disable_dropout
from spin_lightning.models.log_probs import pair_log_probs
from spin_lightning.stages.gate import FLOOR, check_gate
from spin_lightning.types import PairBatch, PairLogProbs, PairLossOutput, UserError


def run_gate(
    model: nn.Module,
    batch: PairBatch,
    loss: losses.PairLoss | None = None,
    beta: float = 0.1,
    dtype: torch.dtype = torch.float32,
    rounding: Callable[[], float] | None = None,
) -> None:
    def recompute(evaluating: bool) -> PairLogProbs:
        was_training = model.training
        model.train(was_training and not evaluating)
        found = pair_log_probs(model, batch)
        model.train(was_training)
        return found

    check_gate(loss or losses.SpinLoss(), beta, batch, recompute(False), dtype, 2, recompute, rounding)


def test_every_loss_of_the_package_is_in_the_list_of_losses() -> None:
    listed = {type(make()) for make, _ in LOSSES.values()}
    known = {value for value in vars(losses).values() if isinstance(value, type) and issubclass(value, losses.PairLoss)}
    assert listed == known - {losses.PairLoss}


@pytest.mark.parametrize("iteration", [0, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_gate_lets_every_loss_start(name: str, iteration: int) -> None:
    make, beta = LOSSES[name]
    loss = make()
    loss.iteration = iteration
    model = tiny_model().train()
    run_gate(model, scored_batch(model, initial=tiny_model(seed=9)), loss, beta)


@pytest.mark.parametrize("name", LOSSES)
def test_gate_stops_every_loss_with_stale_pairs(name: str) -> None:
    make, beta = LOSSES[name]
    with pytest.raises(UserError, match=r"stale pairs\. Remove this iteration's folder"):
        run_gate(tiny_model(seed=1).train(), scored_batch(tiny_model(seed=0)), make(), beta)


def test_gate_message_says_what_was_expected_and_what_came() -> None:
    model, batch = tiny_model(seed=1).train(), scored_batch(tiny_model(seed=0))
    found = pair_log_probs(model, batch)
    margins = 0.1 * ((found.real - batch.opponent.real) - (found.generated - batch.opponent.generated))
    loss = torch.log1p(torch.exp(-margins.double())).mean().item()
    lengths = [3, 4, 5, 7, 5, 3]
    ratios = torch.cat([found.real - batch.opponent.real, found.generated - batch.opponent.generated]).abs().tolist()
    ratio, length = max(zip(ratios, lengths, strict=True), key=lambda pair: pair[0] / pair[1] ** 0.5)
    with pytest.raises(UserError) as caught:
        run_gate(model, batch)
    message = str(caught.value)
    assert message.startswith("iteration 2 does not start where it should")
    assert f"every log-ratio 0 (within {0.002 * length**0.5:.3g} nats for a response of {length} tokens)" in message
    assert "must be 0.693147" in message and f"but the loss is {loss:.6f}" in message
    assert f"the log-ratio of such a response {ratio:.3g} nats" in message


def test_gate_names_dropout() -> None:
    model = tiny_model(attention_dropout=0.3).train()
    with pytest.raises(
        UserError, match=r"two passes over one batch differ, so dropout is on\. Set model\.dropout: false"
    ):
        run_gate(model, scored_batch(model))
    disable_dropout(model)
    run_gate(model, scored_batch(model))


def test_gate_names_a_policy_that_differs_in_training_mode() -> None:
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits * 1.5 if model.training else logits)
    with pytest.raises(UserError, match="otherwise in training mode than in evaluation mode"):
        run_gate(model.train(), scored_batch(model))
    run_gate(model.eval(), scored_batch(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_names_the_dtype(dtype: torch.dtype) -> None:
    model = tiny_model().train()
    batch = scored_batch(model)
    batch.opponent.real += 1.2 * FLOOR[dtype] * batch.opponent.real_lengths.sqrt()
    with pytest.raises(UserError, match=rf"Likely cause: the dtype: {dtype} rounds more.*float32"):
        run_gate(model, batch, dtype=dtype)
    batch.opponent.real += 30 * FLOOR[dtype] * batch.opponent.real_lengths.sqrt()
    with pytest.raises(UserError, match="stale pairs"):
        run_gate(model, batch, dtype=dtype)


@pytest.mark.parametrize("side", ["real", "generated"])
@pytest.mark.parametrize("factor", [0.9, 1.1, -1.1])
def test_gate_allows_rounding_and_no_more_on_both_sides(side: str, factor: float) -> None:
    """A nat over sqrt(tokens) in one response of one pair, which means would hide: the floor, or what was measured."""
    model = tiny_model().train()
    for rounding, limit in ((None, 0.002), (lambda: 0.01, 0.002 + 5 * 0.01)):
        batch = scored_batch(model)
        getattr(batch.opponent, side)[1] += factor * limit * (4 if side == "real" else 5) ** 0.5
        if abs(factor) < 1:
            run_gate(model, batch, rounding=rounding)
        else:
            with pytest.raises(UserError, match="stale pairs"):
                run_gate(model, batch, rounding=rounding)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_gate_allows_less_where_all_responses_are_off(factor: float) -> None:
    """Of six responses 0.5 + 1 / sqrt(6) of what one of them may be off by."""
    model = tiny_model().train()
    batch = scored_batch(model)
    for side in ("real", "generated"):  # to the same side, so that the loss stays
        lengths = getattr(batch.opponent, f"{side}_lengths")
        off = factor * 0.002 * (0.5 + 6**-0.5) * lengths.sqrt()
        setattr(batch.opponent, side, getattr(batch.opponent, side) + off)
    if factor < 1:
        run_gate(model, batch)
    else:
        with pytest.raises(UserError, match="stale pairs"):
            run_gate(model, batch)


@pytest.mark.parametrize("a_token", [0.01, 0.05, 0.24])
def test_gate_stops_a_wrong_opponent_in_bfloat16_however_long_the_answers(a_token: float) -> None:
    """The first loss would be 2 to 48 in place of 0.69."""
    lengths = torch.full((8,), 100)
    opponent = PairLogProbs(torch.full((8,), -150.0), torch.full((8,), -120.0), lengths, lengths)
    policy = PairLogProbs(opponent.real - 100 * a_token, opponent.generated + 100 * a_token, lengths, lengths)
    responses = pack([([1], [[1] * 100, [2] * 100])] * 8)
    places = torch.arange(16)
    batch = PairBatch(responses, places[::2], places[1::2], None, opponent, None, torch.arange(8))
    with pytest.raises(UserError, match="does not start where it should"):
        check_gate(losses.SpinLoss(), 1.0, batch, policy, torch.bfloat16, 0, lambda is_evaluating: policy)


def test_rounding_is_measured_only_where_it_could_matter() -> None:
    model = tiny_model().train()
    asked = []
    run_gate(model, scored_batch(model), rounding=lambda: asked.append(1) or 0.0)
    assert not asked
    batch = scored_batch(model)
    batch.opponent.real += 1.0
    with pytest.raises(UserError):
        run_gate(model, batch, rounding=lambda: asked.append(1) or 0.0)
    assert asked == [1]


def test_gate_passes_bfloat16_of_the_same_weights() -> None:
    model = tiny_model().to(torch.bfloat16).train()
    run_gate(model, scored_batch(model), dtype=torch.bfloat16)


@pytest.mark.parametrize("place", ["policy", "stored"])
def test_gate_does_not_pass_nan(place: str) -> None:
    model = tiny_model().train()
    batch = scored_batch(model)
    if place == "policy":
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
        cause = "log-probs of the policy that are not numbers"
    else:
        batch.opponent.generated[2] = math.nan
        cause = "stale pairs"
    with pytest.raises(UserError, match=f"the log-ratio of such a response inf nats. Likely cause: .*{cause}"):
        run_gate(model, batch)


class Lopsided(losses.SpinLoss):
    """Agrees in every log-ratio, and still has another loss: it looks at the gradient's presence."""

    def forward(self, policy: PairLogProbs, opponent: PairLogProbs, beta: float, initial: Any = None) -> PairLossOutput:
        output = super().forward(policy, opponent, beta, initial)
        return PairLossOutput(
            output.losses + 5.0 * (policy is not opponent) * policy.real.requires_grad, *list(vars(output).values())[1:]
        )


def test_gate_compares_the_loss_as_well_as_the_log_ratios() -> None:
    model = tiny_model().train()
    with pytest.raises(UserError, match=r"the loss must be 0\.693147 .* but the loss is 5\.693147"):
        run_gate(model, scored_batch(model), Lopsided())
