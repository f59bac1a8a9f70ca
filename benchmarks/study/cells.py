"""A cell of the study: a language and student, a number of demonstrations, clean or with wrong ones; all arms in it.

Of each arm the tuning seeds choose three settings of its grid by the same rules, on validation prompts: the least
KL(p_data || p_theta) at temperature 1, the least with the decoding temperature chosen too, and the least forgotten
where three quarters of tuned SFT's gain in KL are reached. With these the confirmation seeds are trained. There each
run's checkpoint, its last or averaged weights and its temperature are chosen on validation prompts once more, and what
is reported comes from test prompts.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.arms import Arm, Config, Stack, train
from benchmarks.study.languages import (
    Digits,
    Language,
    demonstrations,
    draw_prompts,
    prompt_ids,
    response_ids,
    with_slips,
)
from benchmarks.study.measure import METRICS, TEMPERATURES, Retention, TargetDistance
from benchmarks.study.stacked import Layout, StackedAdamW, logits

Record = dict[str, Any]
#: Of a run: updates, then whether the weights are the averaged ones.
Points = Sequence[Sequence[Any]]

CRITERIA = ("kl", "kl, T tuned", "retention")
#: The settings of the light SFT before every arm, on the demonstrations themselves.
LIGHT = Arm("sft", (Config(1e-4),))
LIGHT_UPDATES = 8
#: What was forgotten is compared where this share of tuned SFT's gain in KL is reached.
GAIN_SHARE = 0.75


@dataclass(frozen=True)
class Scale:
    """How much is run. The standard is the study; tests take less."""

    tuning_seeds: tuple[int, ...] = (0, 1)
    seeds: tuple[int, ...] = (10, 11, 12, 13, 14)
    validation_prompts: int = 40
    test_prompts: int = 144
    other_prompts: int = 12
    most_in_stack: int = 16

    def checkpoints(self, rows: int) -> tuple[int, ...]:
        """After how many updates runs on so many demonstrations are measured; the last is their end."""
        early = (4, 8, 16, 24, 32, 48, 64, 96, 128)
        return early + ((192,) if rows >= 256 else ()) + ((288, 384) if rows >= 1024 else ())


@dataclass(frozen=True)
class Cell:
    """Where the arms are compared."""

    language: str
    rows: int
    wrong: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.language}, N={self.rows}{f', {self.wrong:.0%} wrong' if self.wrong else ''}"


#: The whole design, what tells most first.
CELLS = (
    Cell("shift", 64),
    Cell("rules", 64),
    Cell("shift", 64, 0.2),
    Cell("rules", 64, 0.2),
    Cell("shift", 256),
    Cell("rules", 256),
    Cell("shift", 16),
    Cell("rules", 16),
    Cell("shift", 1024),
    Cell("rules", 1024),
    Cell("shift, smaller student", 64),
    Cell("rules, larger student", 64),
    Cell("shift", 256, 0.2),
    Cell("rules", 256, 0.2),
    Cell("shift", 16, 0.2),
    Cell("rules", 16, 0.2),
    Cell("shift", 1024, 0.2),
    Cell("rules", 1024, 0.2),
)


def pretrain(language: Language, held_out: set[Digits]) -> Tensor:
    """The weights before any demonstration, shape ``(P,)``: half of the rows are of the other task."""
    torch.manual_seed(0)
    rng, shape = Random("pretraining"), language.shape
    weights = torch.cat(
        [
            torch.ones(part) if "norm" in name else torch.randn(part).flatten() * 0.08
            for name, part in shape.parts.items()
        ]
    )[None]
    weights.requires_grad_()
    layout = Layout(language.prompt_tokens, 1, language.response_tokens)
    optimizer = StackedAdamW(weights, torch.ones(1))
    half = 32
    for update in range(language.pretraining_updates):
        prompts: list[Digits] = []
        while len(prompts) < 2 * half:
            prompt = tuple(rng.randrange(10) for _ in range(language.length))
            if prompt not in held_out:
                prompts.append(prompt)
        answers = [
            with_slips(language.before.draw(prompt, rng), language.slips, rng)
            if place < half
            else language.other.draw(prompt, rng)
            for place, prompt in enumerate(prompts)
        ]
        asked = torch.cat([prompt_ids(prompts[:half]), prompt_ids(prompts[half:], other=True)])
        given = response_ids(answers)
        said = logits(weights, shape, layout, torch.cat([asked, given[:, :-1]], 1)[None])[0, :, 0]
        torch.nn.functional.cross_entropy(said.flatten(0, 1), given.flatten()).backward()
        part = update / language.pretraining_updates
        optimizer.learning_rate = torch.full((1, 1), 3e-3 * min(1.0, 20 * part + 0.01) * (1 - part))
        optimizer.step()
    return weights.detach()[0]


class Laboratory:
    """One language with its pre-trained student and its prompts.

    Args:
        language: Which.
        scale: How many prompts.
        cache: A folder for pre-trained weights. None: trained anew.
    """

    def __init__(self, language: Language, scale: Scale, cache: Path | None = None) -> None:
        self.language, self.scale = language, scale
        sizes = scale.validation_prompts, scale.test_prompts, scale.other_prompts
        drawn = draw_prompts(language, sum(sizes), "held out")
        validation, test = drawn[: sizes[0]], drawn[sizes[0] : sizes[0] + sizes[1]]
        self.held_out = set(drawn)
        file = cache / f"{hashlib.sha256(repr(language).encode()).hexdigest()[:12]}.pt" if cache else None
        if file is not None and file.exists():
            self.pretrained = torch.load(file)
        else:
            self.pretrained = pretrain(language, self.held_out)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(self.pretrained, file)
        self.validation = TargetDistance(language, validation)
        self.test = TargetDistance(language, test)
        self.retention = Retention(language, drawn[-sizes[2] :], self.pretrained)

    def stack(self, cell: Cell, runs: Sequence[tuple[Config, int]]) -> Stack:
        """Runs with these settings and seeds, each after light SFT on its own demonstrations."""
        seeds = sorted({seed for _, seed in runs})
        data = {seed: demonstrations(self.language, cell.rows, cell.wrong, seed, self.held_out) for seed in seeds}
        prompts = {seed: prompt_ids(data[seed][0]) for seed in seeds}
        answers = {seed: response_ids(data[seed][1]) for seed in seeds}

        def stacked(configs: Sequence[Config], chosen: Sequence[int], start: Tensor) -> Stack:
            asked, given = (torch.stack([ids[seed] for seed in chosen]) for ids in (prompts, answers))
            return Stack(self.language, configs, asked, given, chosen, start)

        light = stacked(LIGHT.grid * len(seeds), seeds, self.pretrained.repeat(len(seeds), 1))
        last: list[Tensor] = []
        train(LIGHT, light, LIGHT_UPDATES, lambda _, weights, __: last.append(weights.clone()))
        starts = dict(zip(seeds, last[-1], strict=True))
        configs, chosen = zip(*runs, strict=True)
        return stacked(configs, chosen, torch.stack([starts[seed] for seed in chosen]))


@dataclass
class Curves:
    """What was measured of a stack on the way: on validation prompts, and what was forgotten.

    Attributes:
        points: Updates, and whether the weights are averaged ones.
        metrics: ``kl``, ``valid``, ...: shape ``(points, S, temperatures)``.
        forgotten: Shape ``(points, S)``.
        weights: Of each point, shape ``(points, S, P)``; None where they were not kept.
    """

    points: list[tuple[int, bool]]
    metrics: dict[str, Tensor]
    forgotten: Tensor
    weights: Tensor | None


def run_stack(
    laboratory: Laboratory, arm: Arm, stack: Stack, checkpoints: Sequence[int], seed: int, keep: bool
) -> Curves:
    """Train, and measure at every checkpoint."""
    start = laboratory.retention.law(stack.start)
    points: list[tuple[int, bool]] = []
    found: list[dict[str, Tensor]] = []
    forgotten: list[Tensor] = []
    kept: list[Tensor] = []

    def watch(updates: int, weights: Tensor, average: Tensor) -> None:
        if updates in checkpoints or updates == 0:
            for is_average in (False, True) if updates >= 8 else (False,):
                these = average if is_average else weights
                points.append((updates, is_average))
                found.append(laboratory.validation.measure(these))
                forgotten.append(laboratory.retention.forgotten(start, these))
                if keep:
                    kept.append(these.clone())

    train(arm, stack, checkpoints[-1], watch, seed)
    metrics = {metric: torch.stack([each[metric] for each in found]) for metric in METRICS}
    return Curves(points, metrics, torch.stack(forgotten), torch.stack(kept) if keep else None)


def best_points(curves: Curves, run: int) -> dict[str, tuple[int, int]]:
    """The point of a run with the least KL at temperature 1, and point and temperature of the least of all."""
    kl = curves.metrics["kl"][:, run]
    return {
        "kl": (int(kl[:, -1].argmin()), len(TEMPERATURES) - 1),
        "kl, T tuned": (int(kl.argmin()) // kl.shape[1], int(kl.argmin()) % kl.shape[1]),
    }


def forgotten_at(points: Points, kl: Sequence[float], forgotten: Sequence[float], gain: float) -> float:
    """What a run had forgotten where KL had fallen by so much for the first time, between checkpoints by a line.

    The less of its last and its averaged weights; infinite where neither gets there.
    """
    level, found = kl[0] - gain, [math.inf]
    for kind in (False, True):
        places = [place for place, (updates, is_average) in enumerate(points) if is_average == kind or not updates]
        for before, after in itertools.pairwise(places):
            if kl[after] <= level:
                share = (kl[before] - level) / (kl[before] - kl[after])
                found.append(forgotten[before] + share * (forgotten[after] - forgotten[before]))
                break
    return min(found)


def score(curves: Curves, run: int, gain: float) -> dict[str, float]:
    """What each criterion makes of a run: the least is the best."""
    scores = {
        name: float(curves.metrics["kl"][point, run, place])
        for name, (point, place) in best_points(curves, run).items()
    }
    kl, forgotten = curves.metrics["kl"][:, run, -1].tolist(), curves.forgotten[:, run].tolist()
    return scores | {"retention": forgotten_at(curves.points, kl, forgotten, gain)}


def tune(laboratory: Laboratory, cell: Cell, arm: Arm, gain: float | None, seed: int) -> Record:
    """Run the grid on the tuning seeds.

    Args:
        laboratory: Of the cell's language.
        cell: Which.
        arm: Which.
        gain: By how many nats KL has to fall where what was forgotten is compared: a share of what
            tuned SFT gains. None: this arm is SFT, which sets it.
        seed: Of sampled responses and dropout.
    """
    began = time.process_time()
    scale = laboratory.scale
    parts: list[tuple[Curves, list[tuple[Config, int]]]] = []
    runs = [(config, seed) for config in arm.grid for seed in scale.tuning_seeds]
    halves = [[run for run in runs if bool(run[0].dropout) == drops] for drops in (False, True)]  # dropout takes time
    for these in (
        half[n : n + scale.most_in_stack] for half in halves for n in range(0, len(half), scale.most_in_stack)
    ):
        stack = laboratory.stack(cell, these)
        parts.append((run_stack(laboratory, arm, stack, scale.checkpoints(cell.rows), seed, keep=False), these))
    if gain is None:
        gains: dict[int, list[float]] = {seed: [] for seed in scale.tuning_seeds}
        for curves, these in parts:
            kl = curves.metrics["kl"][..., -1]
            for place, (_, seed) in enumerate(these):
                gains[seed].append(float(kl[0, place] - kl[:, place].min()))
        gain = sum(max(found) for found in gains.values()) / len(gains) * GAIN_SHARE
    scores: dict[Config, list[dict[str, float]]] = {config: [] for config in arm.grid}
    for curves, these in parts:
        for place, (config, _) in enumerate(these):
            scores[config].append(score(curves, place, gain))
    means = {
        config: {name: sum(each[name] for each in found) / len(found) for name in CRITERIA}
        for config, found in scores.items()
    }
    chosen = {name: min(means, key=lambda config: means[config][name]) for name in CRITERIA}
    return {
        "gain": gain,
        "chosen": {name: asdict(config) for name, config in chosen.items() if means[config][name] < float("inf")},
        "grid": [{**asdict(config), "scores": rounded(means[config])} for config in arm.grid],
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def confirm(laboratory: Laboratory, cell: Cell, arm: Arm, tuned: Record, seed: int) -> Record:
    """Run the chosen settings on the confirmation seeds, and measure what each criterion chooses on test prompts."""
    began = time.process_time()
    scale = laboratory.scale
    wanted = {name: Config(**settings) for name, settings in tuned["chosen"].items()}
    configs = list(dict.fromkeys(wanted.values()))
    runs = [(config, seed) for config in configs for seed in scale.seeds]
    stack = laboratory.stack(cell, runs)
    curves = run_stack(laboratory, arm, stack, scale.checkpoints(cell.rows), seed, keep=True)
    assert curves.weights is not None
    results: dict[str, list[Record]] = {}
    for name in ("kl", "kl, T tuned"):  # what was forgotten at equal gain is read off the runs beside SFT's
        config, results[name] = wanted[name], []
        for seed in scale.seeds:
            run = runs.index((config, seed))
            point, temperature = best_points(curves, run)[name]
            updates, is_average = curves.points[point]
            measured = laboratory.test.measure(curves.weights[point, run][None], [TEMPERATURES[temperature]])
            results[name].append(
                rounded(
                    {
                        **{metric: float(values[0, 0]) for metric, values in measured.items()},
                        "forgotten": float(curves.forgotten[point, run]),
                        "updates": updates,
                        "averaged": is_average,
                        "temperature": TEMPERATURES[temperature],
                        "tokens": updates * arm.tokens_per_update(config, laboratory.language),
                    }
                )
            )
    return {
        "results": results,
        "points": curves.points,
        "runs": [
            {
                **asdict(config),
                "seed": seed,
                "kl": rounded(curves.metrics["kl"][:, run, -1].tolist()),
                "kl, T tuned": rounded(curves.metrics["kl"][:, run].amin(1).tolist()),
                "valid": rounded(curves.metrics["valid"][:, run, -1].tolist()),
                "forgotten": rounded(curves.forgotten[:, run].tolist()),
            }
            for run, (config, seed) in enumerate(runs)
        ],
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def start_of(laboratory: Laboratory, cell: Cell) -> Record:
    """The start of each confirmation seed, on test prompts: at temperature 1, and with a temperature chosen."""
    stack = laboratory.stack(cell, [(LIGHT.grid[0], seed) for seed in laboratory.scale.seeds])
    best = laboratory.validation.measure(stack.start)["kl"].argmin(1)
    measured = laboratory.test.measure(stack.start)
    coverage = laboratory.retention.coverage(laboratory.retention.law(stack.start))
    other = laboratory.retention.forgotten(laboratory.retention.law(laboratory.pretrained[None]), stack.start)

    def rows(place: Callable[[int], int]) -> list[Record]:
        return [
            rounded(
                {metric: float(values[run, place(run)]) for metric, values in measured.items()}
                | {"temperature": TEMPERATURES[place(run)], "forgotten": 0.0, "updates": 0, "tokens": 0}
            )
            for run in range(len(stack.start))
        ]

    return {
        "results": {"kl": rows(lambda _: len(TEMPERATURES) - 1), "kl, T tuned": rows(lambda run: int(best[run]))},
        "coverage": rounded(float(coverage.mean())),
        "forgotten_by_light_sft": rounded(float(other.mean())),
    }


def rounded(value: Any) -> Any:
    """Five significant digits of every number, for files that are read by people; None for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value
