"""What the laboratory runs and what it keeps: arms, their scale, and the points measured on the way. Records only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from spin_lightning.demos.language import Distance, Language

Regime = Literal["many", "few"]
REGIMES: tuple[Regime, ...] = get_args(Regime)


@dataclass(frozen=True)
class Arm:
    """One run: a method with its settings.

    Args:
        regime: Which rows it trains on: the many or the few.
        learning_rate: Of AdamW, constant.
        beta: SPIN's. None: continued SFT, with as many updates as the regime's longest game.
    """

    regime: Regime
    learning_rate: float
    beta: float | None = None

    @property
    def name(self) -> str:
        """What tables and pictures call it: method, beta and learning rate."""
        method = f"SPIN beta {self.beta:g}" if self.beta is not None else "SFT"
        return f"{method}, lr {self.learning_rate:g}"


@dataclass(frozen=True)
class Scale:
    """How much a regime trains.

    Args:
        num_rows: Rows of the SFT data set, each with a prompt of its own.
        answers_per_prompt: K, responses of the opponent to each prompt in each iteration.
        iterations: Of a game.
        epochs: Passes over the pairs in each iteration.
        batch_size: Pairs, or in SFT rows, in an update.
    """

    num_rows: int
    answers_per_prompt: int
    iterations: int
    epochs: int
    batch_size: int


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers. The standard values take about two minutes on two CPU cores.

    Args:
        language: The distribution to learn.
        hidden_size: Width of the transformer.
        seed: Of the weights, the rows, the responses and the batches.
        held_out_prompts: Prompts that no row has, on which every distance is averaged.
        pretraining_law: Probabilities of the rules sorted, reversed and copied before SFT.
        sft_updates: Updates of the light SFT that ends with the model all arms start from.
        many: The regime with many rows.
        few: The regime with few rows, the first of the many.
        arms: What is run. SFT is compared with SPIN at the same learning rate; tuned SFT is the best point of all
            SFT arms of a regime.
    """

    language: Language = field(default_factory=lambda: Language(digits="01234567"))
    hidden_size: int = 64
    seed: int = 0
    held_out_prompts: int = 400
    pretraining_law: tuple[float, float, float] = (0.2, 0.2, 0.6)
    pretraining_updates: int = 600
    pretraining_learning_rate: float = 3e-3
    pretraining_batch_size: int = 64
    sft_updates: int = 8
    sft_learning_rate: float = 1e-4
    many: Scale = Scale(num_rows=1024, answers_per_prompt=1, iterations=4, epochs=2, batch_size=32)
    few: Scale = Scale(num_rows=64, answers_per_prompt=4, iterations=8, epochs=8, batch_size=64)
    arms: tuple[Arm, ...] = (
        Arm("many", 1e-4, beta=0.1),
        Arm("many", 1e-4, beta=1.0),
        Arm("many", 1e-4, beta=5.0),
        Arm("many", 3e-5, beta=0.1),
        Arm("many", 3e-4, beta=0.1),
        Arm("many", 3e-4, beta=5.0),
        Arm("many", 1e-4),
        Arm("many", 3e-5),
        Arm("many", 3e-4),
        Arm("few", 3e-5, beta=5.0),
        Arm("few", 1e-4, beta=5.0),
        Arm("few", 1e-5, beta=5.0),
        Arm("few", 3e-5),
        Arm("few", 1e-4),
        Arm("few", 1e-5),
        Arm("few", 3e-4),
    )

    def scale(self, regime: Regime) -> Scale:
        """How much is trained on few rows, or on many."""
        return self.many if regime == "many" else self.few


@dataclass(frozen=True)
class Point:
    """A policy at one moment of an arm.

    Attributes:
        updates: Optimiser steps so far.
        distance: From p_data, on the held-out prompts.
        tokens: Processed so far, padding apart: in generation and scoring (forward) and in training (also backward).
        seconds: Of the whole fit so far, without measuring.
    """

    updates: int
    distance: Distance
    tokens: int
    seconds: float


@dataclass
class Result:
    """What an arm did: its points from start to end, and the tokens it cost by kind."""

    arm: Arm
    points: list[Point]
    tokens: dict[str, int]
    identical_shares: list[float]
    stopped_because: str | None

    @property
    def start(self) -> Point:
        """The policy before the first update."""
        return self.points[0]

    @property
    def best(self) -> Point:
        """The policy with the smallest KL divergence from the data."""
        return min(self.points, key=lambda point: point.distance.kl)

    @property
    def last(self) -> Point:
        """The policy after the last update."""
        return self.points[-1]

    @property
    def rise(self) -> float:
        """How far KL rose again after its best value, in nats."""
        return self.last.distance.kl - self.best.distance.kl
