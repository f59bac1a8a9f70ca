"""Two questions about a trainer that several callbacks ask."""

from __future__ import annotations

from typing import Any


def was_cut_short(trainer: Any) -> bool:
    """Whether the epoch that is ending was stopped before its last batch, as ``max_time`` does: it is not over."""
    return bool(trainer.should_stop and not trainer.is_last_batch)


def measured_everything(trainer: Any) -> bool:
    """Whether the sanity check went over all held-out rows, so that its NLL is one to compare with."""
    data = trainer.datamodule
    return bool(trainer.num_sanity_val_steps * data.batch_size >= len(data.val_prompts))
