"""Self-play fine-tuning as a Lightning module: a policy, its frozen opponent, and the SPIN loss between them.

The loss is in ``losses``, the log-probs in ``log_probs``, the clock of the game in ``clock``, and what is done in an
iteration in ``iteration``. Data sets, templates and sampling are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from spin_lightning.losses import PairLoss, SelfPlayLoss, TokenLoss
from spin_lightning.models.loading import ModelOrName
from spin_lightning.runs.files import read_json
from spin_lightning.schedule import check_schedule
from spin_lightning.stages.iteration import Iteration, Run, SpinIteration, iteration_folder
from spin_lightning.stages.opponent import OPPONENTS, Opponent, StoredOpponent
from spin_lightning.stages.pairs import PairModule
from spin_lightning.stages.stage import Stage, played_enough
from spin_lightning.stages.token_iteration import TokenIteration
from spin_lightning.types import UserError


class SpinLightningModule(PairModule):
    """Self-play fine-tuning of one language model (Chen et al. 2024, arXiv:2401.01335).

    Settings that may change over the game take one value, or a list with one value an iteration. Takes every setting of
    ``PolicyModule`` too.

    Args:
        model_name_or_path: The SFT model to start from: a hub name, a Hugging Face folder or a ``.gguf`` file. In
            Python also a model of ``transformers``, which is then trained in place.
        beta: The paper's lambda. At 1 an exact iteration lands on the data's distribution; below 1/2 exact iterations
            overshoot and diverge. The paper ran 0.1, with few and small steps.
        loss: The loss of pairs, or of tokens (``TokenSpinLoss``: nothing is generated), as a class path with its
            settings.
        learning_rate: Peak of the schedule. The paper used 5e-7, later 1e-7, for 7B; small models want more (1e-5).
        opponent: ``stored`` computes its log-probs once an iteration, ``resident`` keeps a frozen copy in memory. Or an
            ``Opponent`` of your own by its class path.

    Raises:
        UserError: A setting is outside its range.

    Example:
        >>> module = SpinLightningModule("HuggingFaceTB/SmolLM2-135M-Instruct", beta=[0.1, 0.1, 0.1, 5.0])
    """

    losses_taken = (PairLoss, TokenLoss)

    def __init__(
        self,
        model_name_or_path: ModelOrName,
        beta: float | list[float] = 1.0,
        loss: SelfPlayLoss | None = None,
        learning_rate: float | list[float] = 5e-7,
        opponent: Opponent | Literal["stored", "resident"] = "stored",
        **policy: Any,
    ) -> None:
        super().__init__(model_name_or_path, learning_rate=learning_rate, **policy)
        if isinstance(loss, TokenLoss) and opponent != "stored" and not isinstance(opponent, StoredOpponent):
            raise UserError(
                f"{type(loss).__name__} compares with laws that the opponent gave once, where an iteration began, so "
                f"model.opponent must be stored, got {opponent!r}. Leave it out."
            )
        if not isinstance(opponent, Opponent) and opponent not in OPPONENTS:
            raise UserError(f"model.opponent must be one of {sorted(OPPONENTS)} or an Opponent, got {opponent!r}.")
        self.learn_from_pairs(beta, loss, opponent if isinstance(opponent, Opponent) else OPPONENTS[opponent]())
        if self.adapter is not None and self.opponent.holds_weights:
            raise UserError(
                f"model.opponent {type(self.opponent).__name__} holds a copy of the whole model, which model.adapter "
                "is there to avoid. Leave model.opponent at stored: its log-probs are the same numbers."
            )

    def make_iteration(self, number: int, run: Run) -> Iteration:
        if isinstance(self.loss, TokenLoss):
            return TokenIteration(number, run, self.policy_view, self.loss)
        assert isinstance(self.loss, PairLoss)
        return SpinIteration(number, run, self.policy_view, self.opponent, self.loss)

    @property
    def needs_generator(self) -> bool:
        """Whether anything is generated, so that the data's generator has to be ready."""
        return not isinstance(self.loss, TokenLoss)

    @property
    def needs_start(self) -> bool:
        return self.loss.needs_initial_log_probs or self.opponent.holds_weights

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if getattr(self.trainer.datamodule, "game", None) is None:  # type: ignore[attr-defined]
            raise UserError(
                "SpinLightningModule needs the SelfPlay callback, which plays the iterations, and a "
                "SyntheticDataModule. Use Trainer(callbacks=[SelfPlay(...), ...]).fit(module, "
                "SyntheticDataModule(...))."
            )


def _count_epochs(iterations: int, epochs: int | list[int]) -> int:
    return sum(epochs) if isinstance(epochs, list) else iterations * epochs


def _is_over(result: dict[str, Any], settings: Any) -> bool:
    return played_enough(result, settings.self_play.iterations)


def _last_policy(folder: Path) -> Path:
    """That of the last iteration which was played; where there is none, where the first would have left it."""
    played = len((read_json(folder / "game.json") or {"iterations": [{}]})["iterations"])
    return iteration_folder(folder, max(played, 1) - 1) / "policy"


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
