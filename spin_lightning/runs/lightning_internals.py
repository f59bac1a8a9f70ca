"""Two questions about a trainer that several callbacks ask."""

from __future__ import annotations

from typing import Any


def was_cut_short(trainer: Any) -> bool:
    """Whether the epoch that is ending was stopped before its last batch, as ``max_time`` does: it is not over."""
    return bool(trainer.should_stop and not trainer.is_last_batch)


def starting_metrics(trainer: Any) -> dict[str, float]:
    """Held-out metrics of the model a run starts from, after the sanity check.

    Empty where there are none to compare with: on a resume, or if the check did not go over all held-out rows.
    """
    data = trainer.datamodule
    if trainer.global_step or trainer.num_sanity_val_steps * data.batch_size < len(data.val_prompts):
        return {}
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
