"""One whole iteration with this package: generate, score, train one epoch, export. A worker of one round."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import lightning as L

import spin_lightning
from benchmarks.fit import fit
from benchmarks.measure import Meter
from benchmarks.worker import Worker
from spin_lightning import Health, SelfPlay, SpinLightningModule, SyntheticDataModule


class Phases(L.Callback):
    """Seconds until the pairs are stored, and from there on."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.seconds: dict[str, float] = {}

    def on_generation_end(self, *args: Any) -> None:
        self.seconds["pairs"] = self.meter.lap()["seconds"]

    def on_iteration_end(self, *args: Any) -> None:
        self.seconds["train"] = self.meter.lap()["seconds"]


def main() -> None:
    worker = Worker()
    settings = worker.settings
    shutil.rmtree(settings["runs"], ignore_errors=True)
    parent = getattr(spin_lightning, settings["generator"])
    generating = Meter()

    class Timed(parent):  # type: ignore[misc,valid-type]
        seconds, tokens = 0.0, 0

        def generate(self, *args: Any) -> Iterator[Any]:
            generating.lap()
            for index, response in super().generate(*args):
                self.tokens += len(response.ids)
                yield index, response
            self.seconds += generating.lap()["seconds"]

    worker.wait()
    phases = Phases()
    generator = Timed(max_new_tokens=settings["max_new_tokens"], batch_size=settings["generation_batch"])
    game = SelfPlay(settings["runs"], iterations=1, epochs=1)
    data = SyntheticDataModule(
        settings["rows"],
        val_fraction=0,
        max_prompt_tokens=8192,
        batch_size=settings["batch_size"],
        generator=generator,
        **settings.get("data", {}),
    )
    module = SpinLightningModule(settings["model"], learning_rate=1e-6)
    updates = fit(module, data, game, Health(), phases, precision=settings["precision"])
    worker.report(
        phases={
            "generate": generator.seconds,
            "score": phases.seconds["pairs"] - generator.seconds,
            "train": phases.seconds["train"],
        },
        tokens=generator.tokens,
        updates=updates,
    )


if __name__ == "__main__":
    main()
