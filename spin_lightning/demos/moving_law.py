"""A law that changes while the game is played, measured exactly: ``python -m spin_lightning.demos.moving_law FOLDER``.

The laboratory's language and start. The rows of the first three iterations follow its law, most responses sorted; those
of the last three another one, most responses reversed, to the same prompts. A second way to move a target needs no
other rows: a reward that likes reversed responses, and the best of four by it in the place of the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L

from spin_lightning.demos.arms import Settings
from spin_lightning.demos.known_language import Laboratory, quiet
from spin_lightning.demos.language import ExactDistance, write_rows
from spin_lightning.generation import TransformersGenerator
from spin_lightning.generation.synthetic_data import SyntheticDataModule
from spin_lightning.rewards.base import Answer, Reward
from spin_lightning.runs.files import run_folder, write_json
from spin_lightning.stages.best_as_real import BestAsReal
from spin_lightning.stages.clock import SelfPlay
from spin_lightning.stages.spin import SpinLightningModule
from spin_lightning.terminal import say

#: Probabilities of sorted, reversed and copied after the law has changed.
NEW_LAW = (0.3, 0.6, 0.1)


class IsReversed(Reward):
    """1 for the digits of the prompt in reverse, else 0."""

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [float(answer.text == answer.prompt[-1]["content"][::-1]) for answer in answers]


@dataclass(frozen=True)
class Where:
    """Where a policy is, in nats a response from each law; and the probability of its reversed response."""

    old: float
    new: float
    is_reversed: float


class Follow(L.Callback):
    """Measures before the first iteration and after each."""

    def __init__(self, distances: Sequence[ExactDistance]) -> None:
        self.distances = distances
        self.points: list[Where] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(pl_module)

    def on_iteration_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._measure(pl_module)

    def _measure(self, module: Any) -> None:
        old, new, only_reversed = (distance(module.policy) for distance in self.distances)
        self.points.append(Where(old.kl, new.kl, only_reversed.validity))


def play(folder: str | Path = "runs/moving_law", *, settings: Settings | None = None) -> dict[str, list[Where]]:
    """Play the games, print where each policy was after each iteration, and write ``moving_law.json``.

    Args:
        folder: Where it goes. ``work`` in it holds the runs, and is made anew.
        settings: None: the laboratory's standard ones.

    Returns:
        The points of each game, the first one before its first iteration.
    """
    folder, settings = run_folder(folder, "the laboratory's FOLDER"), settings or Settings()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "moving_law.log"
    language, scale = settings.language, settings.many
    changed = replace(language, probabilities=NEW_LAW)
    with quiet(log):
        laboratory = Laboratory(folder / "work", settings)
        prompts = [row["messages"][0]["content"] for row in laboratory.rows]
        data = laboratory.folder / "data"
        old = write_rows(data / "old.jsonl", laboratory.rows)
        new = write_rows(data / "new.jsonl", changed.rows(prompts, settings.seed + 4))
    held_out, encoder = laboratory.held_out, laboratory.encoder
    laws = (language, changed, replace(language, probabilities=(0.0, 1.0, 0.0)))
    distances = [ExactDistance(law, held_out, encoder) for law in laws]
    games: dict[str, tuple[list[Any], int, Sequence[L.Callback]]] = {
        "the law stays": ([old] * 6, 0, []),
        "it changes": ([old] * 3 + [new] * 3, 0, []),
        "it changes, history 1": ([old] * 3 + [new] * 3, 1, []),
        "best of 4 from iteration 3": ([old] * 6, 0, [BestAsReal(IsReversed(), responses=4, first_iteration=3)]),
    }
    found = {}
    for name, (sources, history, callbacks) in games.items():
        follow = Follow(distances)
        with quiet(log):
            game = SelfPlay(str(folder / "work" / name.replace(" ", "_")), 6, scale.epochs, shard_size=4096)
            module = SpinLightningModule(
                laboratory.start, beta=1.0, learning_rate=1e-4, lr_schedule="constant", warmup_ratio=0.0
            )
            rows: Any = SyntheticDataModule(
                sources,
                val_fraction=0.0,
                generator=TransformersGenerator(language.response_tokens, batch_size=1024),
                history=history,
                batch_size=scale.batch_size,
                seed=settings.seed,
            )
            L.Trainer(
                callbacks=[game, *callbacks, follow],
                max_epochs=game.total_epochs,
                reload_dataloaders_every_n_epochs=1,
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_checkpointing=False,
                enable_model_summary=False,
            ).fit(module, rows)
        found[name] = follow.points
        for title, values in (
            ("KL(old law, policy)", [point.old for point in follow.points]),
            ("KL(new law, policy)", [point.new for point in follow.points]),
            ("p(reversed)", [point.is_reversed for point in follow.points]),
        ):
            say(f"{name if title.startswith('KL(old') else '':<27}{title:<21}" + "".join(f"{v:8.3f}" for v in values))
    write_json(folder / "moving_law.json", {name: [vars(point) for point in points] for name, points in found.items()})
    return found


if __name__ == "__main__":
    play(*sys.argv[1:2])
