"""TRL's training step: the real ``DPOTrainer.train()`` with the settings it is given.

A worker, in an environment of its own. Only the rendering of text is left out, because the token ids are given; it is
no part of a step anyway.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback, TrainerState
from trl import DPOConfig, DPOTrainer

from benchmarks.measure import ON_GPU
from benchmarks.worker import Worker
from benchmarks.workload import read_pairs


class GivenIds(DPOTrainer):
    """A DPOTrainer whose data set has token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


class Turns(TrainerCallback):
    """One round a training step, the first so many apart. What the trainer fetched ahead of a step belongs to it."""

    def __init__(self, worker: Worker, updates_before: int) -> None:
        self.worker, self.updates_before = worker, updates_before

    def on_step_begin(self, args: Any, state: TrainerState, *more: Any, **kwargs: Any) -> None:
        if state.global_step >= self.updates_before:
            self.worker.wait()

    def on_step_end(self, args: Any, state: TrainerState, *more: Any, **kwargs: Any) -> None:
        if state.global_step > self.updates_before:
            self.worker.report()


def make_trainer(
    model: str, pairs: list[dict[str, Any]], output_dir: str, settings: dict[str, Any], callbacks: list[TrainerCallback]
) -> DPOTrainer:
    """TRL's trainer as its users make it, with these settings over its defaults."""
    config = DPOConfig(
        output_dir=output_dir,
        use_cpu=not ON_GPU,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
        num_train_epochs=1,
        **settings,
    )
    return GivenIds(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=callbacks,
    )


def main() -> None:
    worker = Worker()
    settings = worker.settings
    before = read_pairs(settings["before"]) if "before" in settings else []
    trainer = make_trainer(
        settings["model"],
        before + read_pairs(settings["workload"]),
        str(Path(settings["runs"]) / "trl"),
        settings["trl"],
        [Turns(worker, settings.get("updates_before", 0))],
    )
    trainer.train()


if __name__ == "__main__":
    main()
