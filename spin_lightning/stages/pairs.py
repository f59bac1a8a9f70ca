"""What the stages that learn from pairs share: the loss of a batch, the gate at the first one, and what is measured.

Where the pairs come from, a stage's ``Iteration`` knows. The loss is in ``losses``, the log-probs in ``log_probs``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from spin_lightning.losses import PairLoss, SelfPlayLoss, SpinLoss, with_preference
from spin_lightning.models.forward_paths import rounding_of
from spin_lightning.models.log_probs import batch_log_probs
from spin_lightning.models.modes import evaluating
from spin_lightning.runs import processes
from spin_lightning.schedule import at_iteration, check_schedule
from spin_lightning.stages.gate import check_gate
from spin_lightning.stages.iterative import IterativeModule
from spin_lightning.stages.metrics import PairMetrics
from spin_lightning.stages.opponent import Opponent
from spin_lightning.types import PairBatch, TokenBatch, UserError


class PairModule(IterativeModule):
    """A policy that learns from pairs of responses, against the log-probs of an opponent that it begins as."""

    #: What ``model.loss`` may be.
    losses_taken: ClassVar[tuple[type[SelfPlayLoss], ...]] = (PairLoss,)
    opponent: Opponent

    def learn_from_pairs(self, beta: float | list[float], loss: SelfPlayLoss | None, opponent: Opponent) -> None:
        """Take the settings of the loss. A subclass calls it where it is made.

        Raises:
            UserError: One is outside its range.
        """
        for value in beta if isinstance(beta, list) else [beta]:
            if not value > 0:
                raise UserError(
                    f"model.beta must be positive, got {value!r}: at 0 every margin is 0 and nothing is learned."
                )
        if loss is not None and not isinstance(loss, self.losses_taken):
            raise UserError(
                f"model.loss must be a PairLoss, got {type(loss).__name__}. Derive it from spin_lightning.PairLoss."
            )
        self.beta = beta
        self.loss: SelfPlayLoss = loss if loss is not None else SpinLoss()
        self.opponent = opponent
        self.metrics = PairMetrics()
        self._gate_is_due = False

    @property
    def beta_now(self) -> float:
        """The scale of the loss in this iteration."""
        return at_iteration(self.beta, self.iteration)

    def check_schedules(self, iterations: int) -> None:
        super().check_schedules(iterations)
        check_schedule("model.beta", self.beta, iterations)
        self.loss.check(self.beta, iterations)

    def start_iteration(self, iteration: int, epochs: int, *, is_fresh: bool) -> None:
        super().start_iteration(iteration, epochs, is_fresh=is_fresh)
        self.loss.iteration = iteration
        self._gate_is_due = is_fresh

    def describe_iteration(self, iteration: int) -> dict[str, Any]:
        metrics = {name: float(value) for name, value in self.metrics.compute().items()}
        return {"beta": at_iteration(self.beta, iteration), "epoch_metrics": metrics}

    def pair_log_probs(self, batch: PairBatch | TokenBatch) -> Any:
        """The policy's log-probs of a batch."""
        return batch_log_probs(self.policy, batch)

    def training_step(self, batch: list[PairBatch] | list[TokenBatch], batch_idx: int) -> Tensor:
        """The loss of one batch: its share of the mean over the update's pairs, or over its tokens."""
        beta = self.beta_now
        num_pairs = sum(map(len, batch))
        seen = []

        def sum_of(part: PairBatch | TokenBatch) -> Tensor:
            policy, opponent = self.pair_log_probs(part), self.opponent.log_probs(part)
            if self._gate_is_due:
                self._check_gate(part, policy, opponent, beta)
                self._gate_is_due = False
            output = with_preference(self.loss, part.preference, policy, opponent, beta, part.initial)
            seen.append((output, policy))
            return output.losses.sum()

        is_first = not self._update.count
        loss = self.mean_of_update(sum_of, batch, num_pairs)
        self._gate_is_due = False  # of a process that had no pass, too
        seen = seen[: len(processes.deal(batch))]  # without a pass that had no weight
        self.log_dict(self.metrics(seen, is_first=is_first), batch_size=num_pairs)
        return loss

    def _check_gate(self, part: PairBatch | TokenBatch, policy: Any, opponent: Any, beta: float) -> None:
        """Compare the policy with what was stored, and with what the opponent says of it."""
        check = partial(
            check_gate,
            policy=policy,
            dtype=self.compute_dtype,
            iteration=self.iteration,
            recompute=self._recompute(part),
            rounding=partial(rounding_of, self.plain_policy, part.responses),
        )
        check(self.loss, beta, part)
        if opponent is not part.opponent and self.opponent.starts_as_policy:
            name = type(self.opponent).__name__
            cause = (
                f"{name}.log_probs does not give those of the policy where an iteration begins. Mend it, or set "
                f"{name}.starts_as_policy = False if it is meant to be another model"
            )
            check(self.loss, beta, replace(part, opponent=opponent), otherwise=cause)

    def on_train_epoch_start(self) -> None:
        self.metrics.reset()

    def on_train_epoch_end(self) -> None:
        values = self.metrics.compute()
        # all processes have the same values, which Lightning is told not to doubt
        self.log_dict({f"epoch/{name}": value for name, value in values.items()}, sync_dist=processes.world_size() > 1)

    def _recompute(self, batch: PairBatch | TokenBatch) -> Callable[[bool], Any]:
        def recompute(is_evaluating: bool) -> Any:
            model = self.plain_policy  # as one process may ask for it alone
            with evaluating(model) if is_evaluating else nullcontext():
                return self.pair_log_probs(batch) if model is self.policy else batch_log_probs(model, batch)

        return recompute
