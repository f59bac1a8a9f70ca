"""Reinforcement learning by this package, an iteration a round: responses, rewards, reference, and updates on them."""

from __future__ import annotations

import shutil
from typing import Any

import lightning as L

import spin_lightning
from benchmarks.fit import fit
from benchmarks.worker import Worker
from spin_lightning import FunctionReward, PpoLightningModule, Rollouts, SyntheticDataModule


class Turns(L.Callback):
    """One round an iteration."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def on_iteration_start(self, *args: Any) -> None:
        self.worker.wait()

    def on_iteration_end(self, trainer: Any, module: Any, iteration: int, summary: dict[str, Any]) -> None:
        found = summary["pairs"]
        self.worker.report(reward=found["reward/mean"], mean_length=found["completions/mean_length"])


def main() -> None:
    worker = Worker()
    settings = worker.settings
    shutil.rmtree(settings["runs"], ignore_errors=True)
    rollouts = Rollouts(
        settings["runs"],
        reward=FunctionReward("benchmarks.rl_reward:digits"),
        iterations=settings["iterations"],
        prompts=settings["prompts"],
        eval_every=0,
    )
    responses = settings["prompts"] * settings["answers_per_prompt"]
    generator = spin_lightning.ContinuousGenerator(settings["max_new_tokens"], batch_size=responses)
    data = SyntheticDataModule(
        settings["rows"],
        val_fraction=0,
        answers_per_prompt=settings["answers_per_prompt"],
        history=0,
        batch_size=responses // settings["updates"],
        generator=generator,
    )
    advantage = getattr(spin_lightning, settings["advantage"])()
    module = PpoLightningModule(settings["model"], beta=settings["beta"], advantage=advantage, learning_rate=1e-6)
    fit(module, data, rollouts, Turns(worker))


if __name__ == "__main__":
    main()
