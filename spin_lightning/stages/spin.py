"""Self-play fine-tuning as a Lightning module: a policy, its frozen opponent, and the SPIN loss between them.

The loss is in ``losses``, the log-probs in ``log_probs``, the clock of the game in ``clock``. Data
sets, templates and sampling are not known here.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

from torch import Tensor

from spin_lightning.losses import PairLoss, SpinLoss
from spin_lightning.models.forward_paths import rounding_of
from spin_lightning.models.loading import ModelOrName
from spin_lightning.models.log_probs import pair_log_probs
from spin_lightning.models.modes import evaluating
from spin_lightning.schedule import at_iteration, check_schedule
from spin_lightning.stages.gate import check_gate
from spin_lightning.stages.metrics import PairMetrics
from spin_lightning.stages.opponent import Opponent, ResidentOpponent, StoredOpponent
from spin_lightning.stages.policy import PolicyModule
from spin_lightning.types import PairBatch, PairLogProbs, UserError

OPPONENTS: dict[str, type[Opponent]] = {"stored": StoredOpponent, "resident": ResidentOpponent}


class SpinLightningModule(PolicyModule):
    """Self-play fine-tuning of one language model (Chen et al. 2024, arXiv:2401.01335).

    Settings that may change over the game take one value, or a list with one value an iteration. Takes every setting of
    ``PolicyModule`` too.

    Args:
        model_name_or_path: The SFT model to start from: a hub name, a Hugging Face folder or a ``.gguf`` file. In Python also
            a model of ``transformers``, which is then trained in place.
        beta: The paper's lambda. At 1 an exact iteration lands on the data's distribution; below 1/2 exact iterations overshoot
            and diverge. The paper ran 0.1, with few and small steps.
        loss: The pair loss, as a class path with its settings.
        learning_rate: Peak of the schedule. The paper used 5e-7, later 1e-7, for 7B; small models want more (1e-5).
        opponent: ``stored`` computes its log-probs once an iteration; ``resident`` keeps a frozen copy in memory.

    Raises:
        UserError: A setting is outside its range.

    Example:
        >>> module = SpinLightningModule("HuggingFaceTB/SmolLM2-135M-Instruct", beta=[0.1, 0.1, 0.1, 5.0])
    """

    def __init__(
        self,
        model_name_or_path: ModelOrName,
        beta: float | list[float] = 1.0,
        loss: PairLoss | None = None,
        learning_rate: float | list[float] = 5e-7,
        opponent: Literal["stored", "resident"] = "stored",
        **policy: Any,
    ) -> None:
        super().__init__(model_name_or_path, learning_rate=learning_rate, **policy)
        for value in beta if isinstance(beta, list) else [beta]:
            if not value > 0:
                raise UserError(
                    f"model.beta must be positive, got {value!r}: at 0 every margin is 0 and nothing is learned."
                )
        if opponent not in OPPONENTS:
            raise UserError(f"model.opponent must be one of {sorted(OPPONENTS)}, got {opponent!r}.")
        if loss is not None and not isinstance(loss, PairLoss):
            raise UserError(
                f"model.loss must be a PairLoss, got {type(loss).__name__}. Derive it from spin_lightning.PairLoss."
            )
        self.beta = beta
        self.loss = loss if loss is not None else SpinLoss()
        self.opponent = OPPONENTS[opponent]()
        self.metrics = PairMetrics()
        self._gate_is_due = False

    def check_schedules(self, iterations: int) -> None:
        """Refuse lists that do not fit the number of iterations, before anything is loaded.

        Raises:
            UserError: A list is too short or too long, or a setting does not suit the loss.
        """
        check_schedule("model.beta", self.beta, iterations)
        check_schedule("model.learning_rate", self.learning_rate, iterations)
        self.loss.check(self.beta, iterations)

    @property
    def needs_start(self) -> bool:
        return self.loss.needs_initial_log_probs or self.opponent.holds_weights

    def start_iteration(self, iteration: int, epochs: int, *, is_fresh: bool) -> None:
        """Move every schedule to this iteration. ``is_fresh`` is False when it resumes after steps were taken."""
        self.iteration = self.loss.iteration = iteration
        self.epochs_in_iteration = epochs
        self._gate_is_due = is_fresh
        self.first_step = self.trainer.global_step if is_fresh else -1

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if getattr(self.trainer.datamodule, "game", None) is None:  # type: ignore[attr-defined]
            raise UserError(
                "SpinLightningModule needs the SelfPlay callback, which plays the iterations, and a SyntheticDataModule. "
                "Use Trainer(callbacks=[SelfPlay(...), ...]).fit(module, SyntheticDataModule(...))."
            )

    def pair_log_probs(self, batch: PairBatch) -> PairLogProbs:
        """The policy's log-probs of a batch."""
        return pair_log_probs(self.policy, batch)

    def training_step(self, batch: list[PairBatch], batch_idx: int) -> Tensor:
        """The SPIN loss of one batch of pairs (Eq. 4.7): its share of the mean over the update's pairs."""
        beta = at_iteration(self.beta, self.iteration)
        num_pairs = sum(map(len, batch))
        seen = []

        def sum_of(part: PairBatch) -> Tensor:
            policy = self.pair_log_probs(part)
            if self._gate_is_due:
                measured = partial(rounding_of, self.policy, part.responses)
                recompute = self._recompute(part)
                check_gate(self.loss, beta, part, policy, self.compute_dtype, self.iteration, recompute, measured)
                self._gate_is_due = False
            output = self.loss(policy, self.opponent.log_probs(part), beta, part.initial)
            seen.append((output, policy))
            return output.losses.sum()

        is_first = not self._update.count
        loss = self.mean_of_update(sum_of, batch, num_pairs)
        self.log_dict(self.metrics(seen, is_first=is_first), batch_size=num_pairs)
        return loss

    def on_train_epoch_start(self) -> None:
        self.metrics.reset()

    def on_train_epoch_end(self) -> None:
        values = self.metrics.compute()
        self.log_dict({f"epoch/{name}": value for name, value in values.items()})

    def _recompute(self, batch: PairBatch):  # type: ignore[no-untyped-def]
        def recompute(is_evaluating: bool) -> PairLogProbs:
            with evaluating(self.policy) if is_evaluating else nullcontext():
                return self.pair_log_probs(batch)

        return recompute
