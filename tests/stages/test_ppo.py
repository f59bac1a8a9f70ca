"""Iterations of PPO on a tiny model: what is stored, what is trained on, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from games import Recorder, read
from helpers import QUIET

from spin_lightning import (
    AtomicCheckpointIO,
    ContinuousGenerator,
    Health,
    PpoLightningModule,
    Reward,
    Rollouts,
    RunCheckpoint,
    SyntheticDataModule,
)
from spin_lightning.generation.answer_store import AnswerStore
from spin_lightning.rewards.base import Answer


class Vowels(Reward):
    """The share of vowels; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        self.asked += len(answers)
        return [sum(letter in "aeiou01" for letter in answer.text) / max(1, len(answer.text)) for answer in answers]


class Run:
    """A run as a user would write it, with small settings; ``play()`` begins or continues it."""

    def __init__(
        self,
        model: Any,
        rows: str,
        folder: Path,
        *,
        module: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        rollouts: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        checkpoint: dict[str, Any] | None = None,
        callbacks: Sequence[L.Callback] = (),
        last: Sequence[L.Callback] = (),
    ) -> None:
        self.reward = Vowels()
        self.module = PpoLightningModule(model, **{"learning_rate": 1e-2, **(module or {})})
        of_data: dict[str, Any] = {
            "batch_size": 4,
            "val_fraction": 0.2,
            "answers_per_prompt": 2,
            "generator": ContinuousGenerator(max_new_tokens=6),
        }
        self.data = SyntheticDataModule(rows, **{**of_data, **(data or {})})
        of_clock = {"reward": self.reward, "iterations": 3, "prompts": 3, "epochs": 2, "shard_size": 2, "eval_every": 2}
        self.rollouts = Rollouts(str(folder), **{**of_clock, **(rollouts or {})})
        self.recorder, self.health = Recorder(), Health()
        settings: dict[str, Any] = {
            **QUIET,
            "max_epochs": self.rollouts.total_epochs,
            "reload_dataloaders_every_n_epochs": 1,
            "num_sanity_val_steps": -1,
            "check_val_every_n_epoch": 4,
            "plugins": [AtomicCheckpointIO()],
            "callbacks": [
                *callbacks,
                self.rollouts,
                self.recorder,
                RunCheckpoint(**(checkpoint or {})),
                *last,
                self.health,
            ],
        }
        self.trainer = L.Trainer(**{**settings, **(trainer or {})})

    def play(self) -> Run:
        self.trainer.fit(self.module, self.data, ckpt_path=self.rollouts.last_checkpoint)
        return self


def answers_of(folder: Path, iteration: int) -> list[dict[str, Any]]:
    return AnswerStore(folder / f"iteration_{iteration}" / "answers").read().to_pylist()


@pytest.fixture(scope="module")
def plain(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One ordinary run, for the tests that only look at what it left behind."""
    folder = tmp_path_factory.mktemp("ppo") / "run"
    run = Run(model, rows, folder).play()
    run.folder = folder  # type: ignore[attr-defined]
    return run


def test_a_run_leaves_its_responses_and_its_policy(plain: Any) -> None:
    over = read(plain.folder / "rollouts.json")
    assert over["ended_because"] == "all 3 iterations were played"
    table = answers_of(plain.folder, 1)
    assert len(table) == 6 and {row["answer"] for row in table} == {0, 1}
    print(over["iterations"][1], over["held_out"])
