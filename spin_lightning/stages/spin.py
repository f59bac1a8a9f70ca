"""Self-play fine-tuning as a Lightning module: a policy, its frozen opponent, and the SPIN loss between them.

The loss is in ``losses``, the log-probs in ``log_probs``, the clock of the game in ``clock``, and what is done in an
iteration in ``iteration``. Data sets, templates and sampling are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from spin_lightning.losses import PairLoss, SpinLoss
from spin_lightning.models.forward_paths import rounding_of
from spin_lightning.models.loading import ModelOrName
from spin_lightning.models.log_probs import pair_log_probs
from spin_lightning.models.modes import evaluating
from spin_lightning.runs import processes
from spin_lightning.runs.files import read_json
from spin_lightning.schedule import at_iteration, check_schedule
from spin_lightning.stages.gate import check_gate
from spin_lightning.stages.iteration import Run, SpinIteration, iteration_folder
from spin_lightning.stages.iterative import IterativeModule
from spin_lightning.stages.metrics import PairMetrics
from spin_lightning.stages.opponent import OPPONENTS, Opponent
from spin_lightning.stages.stage import Stage
from spin_lightning.types import PairBatch, PairLogProbs, UserError


class SpinLightningModule(IterativeModule):
    """Self-play fine-tuning of one language model (Chen et al. 2024, arXiv:2401.01335).

    Settings that may change over the game take one value, or a list with one value an iteration. Takes every setting of
    ``PolicyModule`` too.

    Args:
        model_name_or_path: The SFT model to start from: a hub name, a Hugging Face folder or a ``.gguf`` file. In
            Python also a model of ``transformers``, which is then trained in place.
        beta: The paper's lambda. At 1 an exact iteration lands on the data's distribution; below 1/2 exact iterations
            overshoot and diverge. The paper ran 0.1, with few and small steps.
        loss: The pair loss, as a class path with its settings.
        learning_rate: Peak of the schedule. The paper used 5e-7, later 1e-7, for 7B; small models want more (1e-5).
        opponent: ``stored`` computes its log-probs once an iteration, ``resident`` keeps a frozen copy in memory. Or an
            ``Opponent`` of your own by its class path.

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
        opponent: Opponent | Literal["stored", "resident"] = "stored",
        **policy: Any,
    ) -> None:
        super().__init__(model_name_or_path, learning_rate=learning_rate, **policy)
        for value in beta if isinstance(beta, list) else [beta]:
            if not value > 0:
                raise UserError(
                    f"model.beta must be positive, got {value!r}: at 0 every margin is 0 and nothing is learned."
                )
        if not isinstance(opponent, Opponent) and opponent not in OPPONENTS:
            raise UserError(f"model.opponent must be one of {sorted(OPPONENTS)} or an Opponent, got {opponent!r}.")
        if loss is not None and not isinstance(loss, PairLoss):
            raise UserError(
                f"model.loss must be a PairLoss, got {type(loss).__name__}. Derive it from spin_lightning.PairLoss."
            )
        self.beta = beta
        self.loss = loss if loss is not None else SpinLoss()
        self.opponent = opponent if isinstance(opponent, Opponent) else OPPONENTS[opponent]()
        if self.adapter is not None and self.opponent.holds_weights:
            raise UserError(
                f"model.opponent {type(self.opponent).__name__} holds a copy of the whole model, which model.adapter "
                "is there to avoid. Leave model.opponent at stored: its log-probs are the same numbers."
            )
        self.metrics = PairMetrics()
        self._gate_is_due = False

    def check_schedules(self, iterations: int) -> None:
        super().check_schedules(iterations)
        check_schedule("model.beta", self.beta, iterations)
        self.loss.check(self.beta, iterations)

    def make_iteration(self, number: int, run: Run) -> SpinIteration:
        return SpinIteration(number, run, self.policy_view, self.opponent, self.loss)

    @property
    def needs_start(self) -> bool:
        return self.loss.needs_initial_log_probs or self.opponent.holds_weights

    def start_iteration(self, iteration: int, epochs: int, *, is_fresh: bool) -> None:
        super().start_iteration(iteration, epochs, is_fresh=is_fresh)
        self.loss.iteration = iteration
        self._gate_is_due = is_fresh

    def describe_iteration(self, iteration: int) -> dict[str, Any]:
        metrics = {name: float(value) for name, value in self.metrics.compute().items()}
        return {"beta": at_iteration(self.beta, iteration), "epoch_metrics": metrics}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if getattr(self.trainer.datamodule, "game", None) is None:  # type: ignore[attr-defined]
            raise UserError(
                "SpinLightningModule needs the SelfPlay callback, which plays the iterations, and a "
                "SyntheticDataModule. Use Trainer(callbacks=[SelfPlay(...), ...]).fit(module, "
                "SyntheticDataModule(...))."
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
            policy, opponent = self.pair_log_probs(part), self.opponent.log_probs(part)
            if self._gate_is_due:
                self._check_gate(part, policy, opponent, beta)
                self._gate_is_due = False
            output = self.loss(policy, opponent, beta, part.initial)
            seen.append((output, policy))
            return output.losses.sum()

        is_first = not self._update.count
        loss = self.mean_of_update(sum_of, batch, num_pairs)
        self._gate_is_due = False  # of a process that had no pass, too
        seen = seen[: len(processes.deal(batch))]  # without a pass that had no weight
        self.log_dict(self.metrics(seen, is_first=is_first), batch_size=num_pairs)
        return loss

    def _check_gate(self, part: PairBatch, policy: PairLogProbs, opponent: PairLogProbs, beta: float) -> None:
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

    def _recompute(self, batch: PairBatch):  # type: ignore[no-untyped-def]
        def recompute(is_evaluating: bool) -> PairLogProbs:
            model = self.plain_policy  # as one process may ask for it alone
            with evaluating(model) if is_evaluating else nullcontext():
                return self.pair_log_probs(batch) if model is self.policy else pair_log_probs(model, batch)

        return recompute


def _count_epochs(iterations: int, epochs: int | list[int]) -> int:
    return sum(epochs) if isinstance(epochs, list) else iterations * epochs


def _is_over(game: dict[str, Any], settings: Any) -> bool:
    """A game that played all its iterations may be given more of them; one that ended earlier had its reason."""
    return not game["ended_because"].startswith("all ") or len(game["iterations"]) >= settings.self_play.iterations


def _last_policy(folder: Path) -> Path:
    """That of the last iteration which was played."""
    played = len((read_json(folder / "game.json") or {"iterations": [{}]})["iterations"])
    return iteration_folder(folder, played - 1) / "policy"


def _refuse_other_number(settings: Any) -> None:
    check_schedule("data.train_data", settings.data.train_data, settings.self_play.iterations)


def _check_schedules(module: SpinLightningModule, callbacks: Mapping[str, Any]) -> None:
    module.check_schedules(callbacks["self_play"].iterations)


#: ``spin-lightning fit``.
STAGE = Stage(
    module="spin_lightning.stages.spin.SpinLightningModule",
    data="spin_lightning.generation.synthetic_data.SyntheticDataModule",
    callbacks={
        "self_play": "spin_lightning.stages.clock.SelfPlay",
        "health": "spin_lightning.stages.health.Health",
        "samples": "spin_lightning.stages.samples.ShowAnswers",
    },
    folder="self_play",
    over_file="game.json",
    mark="self_play.",
    defaults={
        "data.generator": {"class_path": "spin_lightning.ContinuousGenerator"},
        "model.loss": {"class_path": "spin_lightning.SpinLoss"},
    },
    links={"trainer.max_epochs": (("self_play.iterations", "self_play.epochs"), _count_epochs)},
    is_over=_is_over,
    refuse=_refuse_other_number,
    check=_check_schedules,
    exported=_last_policy,
)
