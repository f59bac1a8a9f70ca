"""One checkpoint a run, replaced in one step: at each epoch's end, and every so many steps if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from spin_lightning.callbacks.progress import was_cut_short
from spin_lightning.files import replacing
from spin_lightning.types import UserError

LAST = "last.ckpt"


def checkpoint_folder(output_dir: Path | str) -> str:
    """Where the run in a folder keeps its checkpoint."""
    return str(Path(output_dir) / "checkpoints")


def last_checkpoint(output_dir: Path | str) -> str | None:
    """The checkpoint that the run in a folder can be continued from, or None."""
    path = Path(checkpoint_folder(output_dir)) / LAST
    return str(path) if path.exists() else None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it, and moves it there: a crash leaves the old one whole.

    Lightning's own writer stages in $TMPDIR; across file systems a kill in the middle destroys both. Of use to any
    Lightning project: ``Trainer(plugins=[AtomicCheckpointIO()])``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


class RunCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run's folder, from which the same command continues.

    Args:
        dirpath: Folder of the checkpoint. None: ``checkpoints`` in the SelfPlay callback's ``output_dir``.
        every_n_steps: Also save after this many optimiser steps. None: only at the end of each epoch.
    """

    def __init__(self, dirpath: str | None = None, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(
                f"checkpoint.every_n_steps must be at least 1, got {every_n_steps!r}. Leave it out to save at epoch ends only."
            )
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.last_saved = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.dirpath is None:
            game = getattr(trainer.datamodule, "game", None)  # type: ignore[attr-defined]
            if game is None:
                raise UserError(
                    "RunCheckpoint needs a dirpath where there is no SelfPlay callback. Give RunCheckpoint(dirpath=...)."
                )
            self.dirpath = checkpoint_folder(game.output_dir)

    @property
    def path(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath) / LAST

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last_saved = trainer.global_step  # else a resumed run would save in the middle of an accumulation

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if trainer.is_last_batch:  # saved at the epoch's end; here it would skip validation and export on a resume
            return
        if self.every_n_steps and step and step % self.every_n_steps == 0 and step != self.last_saved:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if was_cut_short(trainer):  # the epoch is not over: the last checkpoint in it stays
            return
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a real run in the same folder must not continue from it
            return
        self.last_saved = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)
