"""Shows training and validation on the one display that the other phases of a run report to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from spin_lightning.models.loading import dtype_name
from spin_lightning.progress import Phase, display, progress
from spin_lightning.stages.metrics import count_tokens, starting_metrics
from spin_lightning.terminal import say


class ShowProgress(ProgressBar):
    """One line for what a ``Trainer`` does: iteration, step, time left, loss, margin, tokens per second.

    It is in the place of Lightning's own bar, which writes over whatever else is shown. The command line adds it,
    unless ``trainer.enable_progress_bar`` is false. On a terminal the line is live; elsewhere a plain line comes every
    thirty seconds or ten per cent. What is on it of a module's own is whatever it logs with ``prog_bar=True``.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[ShowProgress()], logger=False, enable_checkpointing=False)
        >>> type(trainer.progress_bar_callback).__name__
        'ShowProgress'
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_enabled = True
        self._training: Phase | None = None
        self._validation: Phase | None = None

    def enable(self) -> None:
        self._is_enabled = True

    def disable(self) -> None:
        self._is_enabled = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        policy = getattr(pl_module, "policy", None)
        if policy is None or not self._is_enabled:
            return
        weights = list(policy.parameters())
        count, trained = (sum(w.numel() for w in part) for part in (weights, [w for w in weights if w.requires_grad]))
        of_these = "" if trained == count else f", of which {trained:,} are trained"
        dtype = dtype_name(weights[0].dtype)
        say(f"model: {type(policy).__name__} with {count:,} parameters{of_these}, {dtype}, on {pl_module.device}")

    # --- the game's hook, and training ----------------------------------------------------------------------------

    def on_iteration_start(self, trainer: L.Trainer, module: L.LightningModule, iteration: int) -> None:
        self._end_training()
        self._show_heading(trainer, iteration)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._training is None and self._is_enabled:
            done, total = _count_steps(trainer, pl_module, batch_idx)
            game = _game_of(trainer)
            if game is not None:
                self._show_heading(trainer, game.iteration)
            self._training = progress("training", total, "steps", lambda: self._collect_facts(trainer)).begin()
            self._training.skip(done)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._training is not None:
            self._training.advance(1, count_tokens(batch))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._training is not None and self._training.done >= self._training.total:
            self._end_training()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_training()

    # --- validation -----------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_enabled:
            batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            total = sum(batches) if isinstance(batches, list) else batches
            what = getattr(pl_module, "what_is_measured", "held-out NLL")
            self._validation = progress(f"measuring {what}", total, "batches").begin()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._validation is not None:
            self._validation.advance(1, count_tokens(batch))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._validation is not None:
            self._validation.end()
            self._validation = None
            is_after_training = trainer.state.fn == "fit" and not trainer.sanity_checking  # type: ignore[attr-defined]
            if is_after_training and _game_of(trainer) is None:  # a game has the words of Health
                self._say_nll(trainer.callback_metrics, "")

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if hasattr(trainer.datamodule, "val_prompts"):  # type: ignore[attr-defined]
            self._say_nll(starting_metrics(trainer), " before training")

    def _say_nll(self, metrics: Mapping[str, Any], when: str) -> None:
        if self._is_enabled and "val/nll" in metrics:
            say(f"held-out NLL{when}: {float(metrics['val/nll']):.3f} nats a response")

    # --- the end --------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end_phases()
        if display.phases:  # of a loop that the error's traceback keeps alive, as it does in a notebook
            display.phases[0].end(is_done=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end_phases()

    def _show_heading(self, trainer: L.Trainer, iteration: int) -> None:
        if self._is_enabled:
            display.heading = f"iteration {iteration} ({iteration + 1} of {_game_of(trainer).iterations})"

    def _collect_facts(self, trainer: L.Trainer) -> dict[str, str]:
        """What was logged since this training began; before its first step it is of the one before."""
        training = self._training
        return _collect_facts(trainer) if training is not None and training.done > training.skipped else {}

    def _end_training(self) -> None:
        if self._training is not None:
            self._training.end()
            self._training = None

    def _end_phases(self) -> None:
        for phase in (self._validation, self._training):
            if phase is not None:
                phase.end(is_done=False)
        self._validation = self._training = None
        display.heading = ""


def _game_of(trainer: L.Trainer) -> Any:
    return getattr(trainer.datamodule, "game", None)  # type: ignore[attr-defined]


def _count_steps(trainer: L.Trainer, module: L.LightningModule, batch_idx: int) -> tuple[int, float]:
    """Batches that were trained on before this one, and batches in all: of this iteration, if there is a game."""
    batches, epoch, epochs = trainer.num_training_batches, trainer.current_epoch, trainer.max_epochs
    game = _game_of(trainer)
    if game is not None:
        epoch -= sum(game.epochs[: game.iteration])
        epochs = game.epochs[game.iteration]
    total = batches * epochs if epochs is not None and epochs > 0 else math.inf
    limits = [trainer.max_steps if trainer.max_steps > 0 else None, getattr(module, "max_updates", None)]
    limit = min((limit * trainer.accumulate_grad_batches for limit in limits if limit), default=math.inf)
    done = batch_idx + (epoch * int(batches) if epoch > 0 else 0)
    return done, min(total, limit)


def _collect_facts(trainer: L.Trainer) -> dict[str, str]:
    known = trainer.callback_metrics
    facts = {
        name: f"{float(known[key]):z.3f}"
        for name, key in (("loss", "loss"), ("margin", "rewards/margins"))
        if key in known
    }
    others = trainer.progress_bar_metrics.items()  # a module's own
    return facts | {name: f"{float(value):.3g}" for name, value in others if name not in ("loss", "val/nll")}  # type: ignore[arg-type]
