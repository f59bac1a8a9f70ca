"""The checkpoints of a run, and what continuing it rests on: one process at a time, and the settings it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from filelock import FileLock
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from spin_lightning.runs import processes, signals
from spin_lightning.runs.checkpoints import (
    AtomicCheckpointIO,
    checkpoint_folder,
    checkpoints_in,
    hash_file,
    refuse_non_finite,
)
from spin_lightning.runs.files import hold, need_space, run_folder
from spin_lightning.runs.lightning_internals import was_cut_short
from spin_lightning.runs.settings import SETTINGS, check_settings
from spin_lightning.terminal import say
from spin_lightning.types import Interrupted, UserError

#: Complete checkpoints that are kept: the newest, and the one to fall back on should that be damaged.
KEPT = 2


class HoldsFolder(L.Callback):
    """A callback that works in a folder alone: no second run gets it while a fit lasts."""

    _lock: FileLock | None = None
    _holds = False

    def hold(self, folder: Path, trainer: L.Trainer) -> None:
        """Take the folder for all processes of the run. Together.

        Raises:
            UserError: Another run has it, something in it is a link, or the processes cannot be those of a run.
        """
        processes.meet(folder, trainer)
        if processes.is_first():
            self._lock = hold(folder)
            processes.forget_notices(folder)
        processes.wait()
        self._holds = True

    def let_go(self) -> None:
        """Give the folder back."""
        self._holds = False
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Exception):
            processes.settle(exception)
        self.let_go()


class RunCheckpoint(HoldsFolder, Checkpoint):
    """Keeps a run's checkpoints, from which the same command continues, and guards what continuing rests on.

    The newest two are kept. A second process in the same folder is refused, and so is a resume with other settings. The
    first SIGTERM, SIGINT or SIGUSR1 saves a checkpoint and ends the run; a second one ends it at once.

    Args:
        dirpath: Folder of the checkpoints. None: ``checkpoints`` in the SelfPlay callback's ``output_dir``.
        every_n_steps: Also save after this many optimiser steps. None: only at the end of each epoch.
        allow_changes: Settings that may differ from those the run began with, such as ``[model.beta]``. Each is
            recorded.
        every_n_iterations: In a stage of many short iterations: save at the end of every so many of them, of the last
            one, and where a signal ends the run. None: at the end of each epoch.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int | None = None,
        allow_changes: list[str] | None = None,
        every_n_iterations: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(
                f"checkpoint.every_n_steps must be at least 1, got {every_n_steps!r}. Leave it out to save at epoch "
                "ends only."
            )
        if every_n_iterations is not None and every_n_iterations < 1:
            raise UserError(f"checkpoint.every_n_iterations must be at least 1, got {every_n_iterations!r}.")
        self.every_n_iterations = every_n_iterations
        self.dirpath = None if dirpath is None else str(run_folder(dirpath, "checkpoint.dirpath"))
        self.every_n_steps = every_n_steps
        self.allow_changes = allow_changes or []
        self.last_saved = self._step_before = self._resumed_from = -1

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        assert self.dirpath is not None
        return Path(self.dirpath)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.dirpath is None:
            game = getattr(trainer.datamodule, "game", None)  # type: ignore[attr-defined]
            if game is None:
                raise UserError(
                    "RunCheckpoint needs a dirpath where there is no SelfPlay callback. Give "
                    "RunCheckpoint(dirpath=...)."
                )
            self.dirpath = checkpoint_folder(game.output_dir)
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self.hold(self.folder, trainer)
        if processes.is_first():
            for left_over in self.folder.glob(".*.tmp"):  # by a kill in the middle of a save
                left_over.unlink()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed_from = checkpoint["global_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.ckpt_path is None and checkpoints_in(self.folder):
            raise UserError(
                f"{self.folder} holds the checkpoints of a run, but this one was told to begin anew and would "
                "overwrite them. Continue it with trainer.fit(..., ckpt_path=last_checkpoint(output_dir)), or use "
                "another folder."
            )
        check_settings(trainer, self.folder.parent / SETTINGS, self.allow_changes)
        if processes.is_first():
            self._make_room(pl_module)
        processes.wait()

    def _make_room(self, module: L.LightningModule) -> None:
        self._set_later_aside()
        # what a checkpoint holds, and of what is trained two float32 moments, and a float32 master of smaller weights
        held = {tensor.data_ptr(): tensor.nbytes for tensor in module.state_dict().values()}  # tied weights once
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        moments = sum(weight.numel() * (12 if weight.element_size() < 4 else 8) for weight in trained)
        size = sum(held.values()) + moments
        count = KEPT + 1 - len(checkpoints_in(self.folder))  # the kept ones are there already on a resume
        need_space(self.folder, count * size, f"keeping {KEPT} checkpoints")

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen_to_signals()  # Lightning took the signals after on_fit_start

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.sanity_checking:  # at an epoch's end the evaluation is finished first: its checkpoint is the epoch's
            signals.end_together()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen_to_signals()
        self.last_saved = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if trainer.is_last_batch:  # saved at the epoch's end; here it would skip validation and export on a resume
            return
        is_due = bool(self.every_n_steps and step % self.every_n_steps == 0)
        asked = signals.received_by_any()
        if step > self._step_before and (is_due or asked):  # not in the middle of an accumulation
            self._save(trainer)
        if asked and step == self.last_saved:
            raise Interrupted(asked)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if was_cut_short(trainer):  # the epoch is not over: the last checkpoint in it stays
            return
        if self._is_due(trainer):
            self._save(trainer)
        signals.end_together()

    def _is_due(self, trainer: L.Trainer) -> bool:
        """Whether an epoch that is over is to be saved."""
        if self.every_n_iterations is None:
            return True
        game: Any = trainer.datamodule.game  # type: ignore[attr-defined]
        number = game.ends_iteration(trainer.current_epoch)
        is_last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        is_number = number is not None and (number + 1) % self.every_n_iterations == 0
        return bool(signals.received_by_any() or is_last or is_number)

    def let_go(self) -> None:
        """Give the folder and the signals back."""
        signals.stop_listening()
        super().let_go()

    def _set_later_aside(self) -> None:
        """Checkpoints beyond the one that is continued from are damaged, or of a future that will be another."""
        for path in checkpoints_in(self.folder):
            if int(path.stem.removeprefix("step_")) > self._resumed_from:
                for part in (path, hash_file(path)):
                    if part.exists():
                        part.rename(part.with_name(f"{part.name}.set_aside"))
                say(f"note: the run continues from step {self._resumed_from}; set aside {path}")

    def _listen_to_signals(self) -> None:
        if self._holds:
            signals.listen()

    def _save(self, trainer: L.Trainer) -> None:
        """Save, and only then remove what is older than the two newest."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a real run in the same folder must not continue from it
            return
        refuse_non_finite(trainer.lightning_module)
        self.last_saved = trainer.global_step
        trainer.save_checkpoint(self.folder / f"step_{trainer.global_step:09d}.ckpt", weights_only=False)
        for path in checkpoints_in(self.folder)[KEPT:] if processes.is_first() else ():
            path.unlink()
            hash_file(path).unlink(missing_ok=True)
