"""Plays the known language: SPIN at several betas, continued SFT at equal updates, and tuned SFT, all measured exactly.

Every arm is one ``Trainer.fit`` with the package's own modules, data module, callback and loader. This file runs and
watches them; ``arms`` holds the settings, ``report`` says what follows from the numbers.

How the start is made: a transformer is trained on the same rules in other proportions, as pre-training does, and then
lightly by SFT on the arms' own rows, as SPIN asks. No training row has a held-out prompt; all distances are held-out.

What may surprise: best values, of SPIN and of SFT alike, are chosen on the prompts they are reported on. SFT averages
over responses (``average="response"``), the scale of SPIN's gradient at beta 2; AdamW all but ignores the scale. All
arms keep a constant learning rate without warm-up: SPIN's schedule restarts in each iteration and SFT's would not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers

from spin_lightning import __version__
from spin_lightning.data.encoding import Encoder
from spin_lightning.demos.arms import Arm, Point, Result, Scale, Settings
from spin_lightning.demos.language import RULES, ExactDistance, save_start, write_rows
from spin_lightning.demos.report import conclusions, draw, table
from spin_lightning.generation import TransformersGenerator
from spin_lightning.generation.pair_store import PairStore
from spin_lightning.generation.synthetic_data import SyntheticDataModule
from spin_lightning.models.loading import load_policy, load_tokenizer
from spin_lightning.runs.files import refuse_links, run_folder, write_json
from spin_lightning.stages.clock import SelfPlay
from spin_lightning.stages.export import ExportPolicy
from spin_lightning.stages.sft import SftLightningModule
from spin_lightning.stages.spin import SpinLightningModule
from spin_lightning.terminal import say
from spin_lightning.types import UserError


class Watch(L.Callback):
    """Measures exactly, at each iteration's end in a game and after given numbers of updates in SFT; counts tokens.

    Args:
        distance: What to measure.
        after: Numbers of updates after which SFT is measured. A game needs none.
    """

    def __init__(self, distance: ExactDistance, after: Sequence[int] = ()) -> None:
        self.distance = distance
        self.after = set(after)
        self.points: list[Point] = []
        self.tokens = {"generated": 0, "scored": 0, "trained": 0}
        self.identical_shares: list[float] = []
        self.stopped_because: str | None = None
        self.started = time.monotonic()
        self.measuring = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(pl_module, 0)

    def on_generation_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, iteration: int, pairs: PairStore, report: dict[str, Any]
    ) -> None:
        table = pairs.read(["iteration", "prompt_id", "prompt_ids", "real_ids", "generated_ids"])
        scored_prompts = set()
        for row in table.to_pylist():
            asked, answered = len(row["prompt_ids"]), len(row["generated_ids"])
            self.tokens["generated"] += asked + answered if row["iteration"] == iteration else 0
            self.tokens["scored"] += asked + answered
            if (
                row["prompt_id"] not in scored_prompts
            ):  # a real response is scored once, whatever the responses to its prompt
                scored_prompts.add(row["prompt_id"])
                self.tokens["scored"] += asked + len(row["real_ids"])
        self.identical_shares.append(report["identical_share"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.tokens["trained"] += sum(
            len(part.input_ids) for part in (getattr(each, "responses", each) for each in batch)
        )
        if trainer.global_step in self.after:
            self._measure(pl_module, trainer.global_step)

    def on_iteration_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, iteration: int, summary: dict[str, Any]
    ) -> None:
        self._measure(pl_module, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        game = getattr(trainer.datamodule, "game", None)  # type: ignore[attr-defined]
        self.stopped_because = game.stopped_because if game is not None else None

    def _measure(self, module: Any, updates: int) -> None:
        began = time.monotonic()
        distance = self.distance(module.policy)
        self.measuring += time.monotonic() - began
        seconds = time.monotonic() - self.started - self.measuring
        self.points.append(Point(updates, distance, sum(self.tokens.values()), seconds))


class Laboratory:
    """One language, one lightly fine-tuned model, and the arms that start from it.

    Args:
        folder: For data and runs. What an earlier laboratory left there is removed.
        settings: Sizes and settings.

    Attributes:
        held_out: The prompts that no row has.
        encoder: How prompts and responses become tokens.
        before: The pre-trained model's distance.
        start: Folder of the model that all arms start from.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        shutil.rmtree(folder, ignore_errors=True)
        language, seed = settings.language, settings.seed
        self.held_out = held_out = language.draw_prompts(settings.held_out_prompts, seed)
        prompts = language.draw_prompts(language.num_prompts - len(held_out), seed + 1, without=held_out)
        self.rows = language.rows(prompts[: settings.many.num_rows], seed + 2)
        random = save_start(language, folder / "random", seed, hidden_size=settings.hidden_size)
        self.encoder = Encoder(load_tokenizer(random))
        self.distance = ExactDistance(language, held_out, self.encoder)

        other = replace(language, probabilities=settings.pretraining_law).rows(prompts, seed + 3)
        data = self._data("pretraining", other, Scale(len(other), 1, 1, 1, settings.pretraining_batch_size))
        pretrained = self._prepare(
            "pretrained", random, settings.pretraining_learning_rate, data, settings.pretraining_updates
        )
        self.before = self.distance(load_policy(pretrained))
        data = self._data("many", self.rows, settings.many)
        self.start = self._prepare("start", pretrained, settings.sft_learning_rate, data, settings.sft_updates)

    def spin(self, arm: Arm) -> Result:
        """Play one game."""
        assert arm.beta is not None
        scale = self.settings.scale(arm.regime)
        watch = Watch(self.distance)
        module = SpinLightningModule(
            self.start, beta=arm.beta, learning_rate=arm.learning_rate, lr_schedule="constant", warmup_ratio=0.0
        )
        run = self.folder / "runs" / f"{arm.regime}_beta_{arm.beta:g}_lr_{arm.learning_rate:g}"
        game = SelfPlay(str(run), scale.iterations, scale.epochs, shard_size=4096)
        _fit(module, self._data(arm.regime, self.rows, scale), game, [watch])
        return Result(arm, watch.points, watch.tokens, watch.identical_shares, watch.stopped_because)

    def sft(self, arm: Arm, measure_after: Sequence[int]) -> Result:
        """Continue SFT on the same rows, measured after these numbers of updates, and over with the largest."""
        watch = Watch(self.distance, measure_after)
        module = SftLightningModule(
            self.start, arm.learning_rate, average="response", lr_schedule="constant", warmup_ratio=0.0
        )
        _fit(module, self._data(arm.regime, self.rows, self.settings.scale(arm.regime)), max(measure_after), [watch])
        return Result(arm, watch.points, watch.tokens, [], None)

    def _prepare(self, name: str, model: str, learning_rate: float, data: SyntheticDataModule, updates: int) -> str:
        module = SftLightningModule(model, learning_rate, average="response")
        _fit(module, data, updates, [ExportPolicy(str(self.folder / name))])
        return str(self.folder / name / "policy")

    def _data(self, name: str, rows: list[dict[str, Any]], scale: Scale) -> SyntheticDataModule:
        return SyntheticDataModule(
            write_rows(self.folder / "data" / f"{name}.jsonl", rows[: scale.num_rows]),
            val_fraction=0.0,
            generator=TransformersGenerator(self.settings.language.response_tokens, batch_size=1024),
            answers_per_prompt=scale.answers_per_prompt,
            history=0,
            batch_size=scale.batch_size,
            seed=self.settings.seed,
        )


def main(args: list[str]) -> None:
    """``spin-lightning lab``: the folder, which may be left out."""
    play(*args)


def play(folder: str | Path = "runs/lab", *, settings: Settings | None = None) -> dict[str, Any]:
    """Run the laboratory: print its table and what follows, and write ``laboratory.json`` and ``laboratory.png``.

    Args:
        folder: Where these two files go. ``work`` in it holds the runs and their log, and is made anew.
        settings: None: the standard ones.

    Returns:
        What ``laboratory.json`` holds.

    Raises:
        UserError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the laboratory draws its picture with the package 'matplotlib'. Install spin-lightning[lab].")
    folder, settings = run_folder(folder, "the laboratory's FOLDER"), settings or Settings()
    refuse_links(folder, r"work|laboratory\.\w+")
    log = folder / "laboratory.log"
    folder.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    began = time.monotonic()
    rules = ", ".join(f"{rule} {p:g}" for rule, p in zip(RULES, settings.language.probabilities, strict=True))
    say(f"language: {settings.language.num_prompts} prompts of {settings.language.length} digits; answers: {rules}")
    with quiet(log):
        laboratory = Laboratory(folder / "work", settings)
    results = _run(laboratory, settings, log)
    said = conclusions(results)
    report = {
        "command": _command(),
        "versions": {
            "spin_lightning": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lightning": L.__version__,
            "python": platform.python_version(),
        },
        "device": f"cpu, {os.cpu_count()} cores, 1 thread",
        "settings": asdict(settings),
        "prompts_measured": settings.held_out_prompts,
        "pretrained": asdict(laboratory.before),
        "results": [
            {
                **asdict(result),
                "name": result.arm.name,
                "best": asdict(result.best),
                "last": asdict(result.last),
            }
            for result in results
        ],
        "conclusions": said,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(folder / "laboratory.json", report)
    draw(results, settings, folder / "laboratory.png")
    say("\n" + table(results))
    measured = f"averaged over {settings.held_out_prompts} held-out prompts"
    say(f"\nKL(p_data, p_theta) in nats, TV and validity from 0 to 1: exact, {measured}. SFT tuned: as it was stopped.")
    say("tokens: generated from, scored and trained on; a trained token costs about three of the others.\n")
    say("\n".join(said))
    say(f"\n{report['seconds']:.0f} s. Picture, numbers and log: {folder}/laboratory.png, .json, .log")
    return report


def _run(laboratory: Laboratory, settings: Settings, log: Path) -> list[Result]:
    """All arms, the games of a regime before its SFT, which takes its number of updates from them."""
    results: list[Result] = []
    for arm in sorted(settings.arms, key=lambda arm: arm.beta is None):
        with quiet(log):
            if arm.beta is not None:
                result = laboratory.spin(arm)
            else:
                games = [other for other in results if other.arm.beta is not None and other.arm.regime == arm.regime]
                if not games:
                    raise UserError(
                        f"the SFT arm of the regime {arm.regime!r} has no SPIN arm to take its updates from. Add one."
                    )
                longest = max(games, key=lambda game: game.last.updates)
                ends = [point.updates for point in longest.points[1:]]
                early = [ends[0] * quarter // 4 for quarter in (1, 2, 3)]  # so that early stopping may be early
                result = laboratory.sft(arm, sorted({*early, *ends, *(game.last.updates for game in games)} - {0}))
        results.append(result)
        kls = " ".join(f"{point.distance.kl:.3f}" for point in result.points)
        say(f"{arm.regime} rows, {arm.name}: KL {kls}")
    return results


def _command() -> str:
    program = Path(sys.argv[0]).name
    return " ".join(["spin-lightning" if program == "__main__.py" else program, *sys.argv[1:]])


def _fit(
    module: L.LightningModule, data: SyntheticDataModule, length: SelfPlay | int, watchers: Sequence[L.Callback]
) -> None:
    """One bare ``Trainer.fit``: of a game, or of so many updates."""
    game = length if isinstance(length, SelfPlay) else None
    trainer = L.Trainer(
        callbacks=[*([game] if game else []), *watchers],
        max_epochs=game.total_epochs if game else -1,
        max_steps=-1 if isinstance(length, SelfPlay) else length,
        reload_dataloaders_every_n_epochs=1 if game else 0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send the output of many small runs to a log, and compute on one thread: the matrices are too small for two."""
    logger = logging.getLogger("lightning.pytorch")
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        with (
            log.open("a", encoding="utf-8") as stream,
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
        ):
            yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)
