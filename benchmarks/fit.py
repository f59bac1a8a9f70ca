"""The ``Trainer`` of every contender that is this package: its clock and what is watched, and nothing else."""

from __future__ import annotations

from typing import Any

import lightning as L

from spin_lightning.stages.clock import IterationClock


def fit(
    module: L.LightningModule, data: Any, clock: IterationClock, *callbacks: L.Callback, precision: str = "bf16-true"
) -> int:
    """Play all iterations of a clock on one device, without logs, checkpoints and displays; returns the updates."""
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=clock.total_epochs,
        reload_dataloaders_every_n_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, *callbacks],
    )
    trainer.fit(module, data)
    return trainer.global_step
