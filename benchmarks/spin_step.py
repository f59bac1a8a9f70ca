"""Our training step, inside a real game: SelfPlay, SyntheticDataModule, Trainer.fit. A worker.

The opponent's responses are those of the workload, so that every contender trains on the same pairs; everything behind
them is the package as its users run it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.fit import fit
from benchmarks.worker import Worker
from benchmarks.workload import read_pairs
from spin_lightning import Health, ResponseGenerator, SelfPlay, SpinLightningModule, SyntheticDataModule
from spin_lightning.types import Response

Ids = list[int]


class WorkloadAnswers(ResponseGenerator):
    """An opponent that says what the workload makes it say."""

    def __init__(self, folder: str) -> None:
        super().__init__(max_new_tokens=4096)
        self.answers: dict[tuple[int, ...], list[Ids]] = {}
        for pair in read_pairs(folder):
            self.answers.setdefault(tuple(pair["prompt_ids"]), []).append(pair["rejected_ids"])

    def generate(
        self, prompts: Sequence[Ids], seeds: Sequence[int], terminator_id: int, pad_id: int
    ) -> Iterator[tuple[int, Response]]:
        given = {prompt: iter(answers) for prompt, answers in self.answers.items()}
        for index, prompt in enumerate(prompts):
            yield index, Response(next(given[tuple(prompt)]), "stop", 0.0)


class Turns(L.Callback):
    """One round a training step."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def on_train_batch_start(self, *args: Any) -> None:
        self.worker.wait()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.worker.report(loss=float(outputs["loss"]), pairs=sum(map(len, batch)), passes=len(batch))


def main() -> None:
    worker = Worker()
    settings = worker.settings
    folder = Path(settings["workload"])
    workload = json.loads((folder / "pairs.json").read_text())
    runs = Path(settings["runs"])
    shutil.rmtree(runs, ignore_errors=True)
    game = SelfPlay(str(runs), iterations=1, epochs=settings.get("epochs", 1))
    data = SyntheticDataModule(
        str(folder / "rows.jsonl"),
        val_fraction=0,
        max_prompt_tokens=8192,
        batch_size=workload["batch_size"],
        generator=WorkloadAnswers(str(folder)),
        **settings.get("data", {}),
    )
    module = SpinLightningModule(settings["model"], learning_rate=1e-6, **settings.get("module", {}))
    fit(module, data, game, Health(), Turns(worker), precision=settings["precision"])


if __name__ == "__main__":
    main()
