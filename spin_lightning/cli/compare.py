"""``spin-lightning compare``: arms from one start on one data set, over seeds, and which of them is better.

An arm with a seed is a run of its own: a command of this package in a process of its own, in a folder of its own, as in
a chain. So is each measurement. What is over is skipped, so that the same command goes on after a kill.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import yaml

from spin_lightning.cli import score
from spin_lightning.cli.chain import Line
from spin_lightning.cli.chain_file import Chain, Step
from spin_lightning.cli.check import make_object
from spin_lightning.cli.children import Children, command_of
from spin_lightning.cli.compare_file import Arm, Asked, merged, read_comparison
from spin_lightning.cli.compare_report import describe, write_report
from spin_lightning.cli.compute import passes_of, updates_for
from spin_lightning.cli.measure import Wanted
from spin_lightning.data.module import RowDataModule
from spin_lightning.data.rows import load_rows
from spin_lightning.runs.files import hold, read_json, replacing, write_json
from spin_lightning.terminal import say
from spin_lightning.types import Row, StageFailed, UserError

#: The exit code of numbers that are NaN or infinite, and of a bug: such an arm is left out, and the others go on.
_FAILED = 1
#: How often an arm that keeps its best weights is measured.
MEASUREMENTS = 16
_SOURCES = ("data.train_data", "data.val_data", "data.other_data")


class _Stopped(Exception):
    """A run ended before it was over, without an error."""


def main(args: list[str]) -> None:
    """Play all arms to their end, or go on with them; measure them, and say which is better.

    Args:
        args: Config files, and settings that go over them.

    Raises:
        UserError: A file or a setting cannot be used. What the settings say is found before anything starts.
        StageFailed: An arm was refused, or could not write.
        Interrupted: A signal was received. The arm in progress has ended too.
    """
    if args[:1] == ["--measure"]:
        from spin_lightning.cli.measure import main as measure

        return measure(args[1], args[2:])
    asked = read_comparison(args)
    with tempfile.TemporaryDirectory() as scratch, Children() as children:
        lock = hold(asked.comparison.output_dir)
        try:
            Race(asked, Path(scratch), children).run()
        finally:
            lock.release()


class Runs(Line):
    """The runs of a comparison, and what its folder knows of them."""

    word: ClassVar[str] = "compare"
    runs_are: ClassVar[str] = "arm"
    whole_is: ClassVar[str] = "a comparison"


class Race:
    """A comparison in progress.

    Args:
        asked: What is to be compared.
        scratch: A folder for settings, which may hold secrets.
        children: Runs the commands.
    """

    def __init__(self, asked: Asked, scratch: Path, children: Children) -> None:
        self.asked, self.scratch, self.children = asked, scratch, children
        self.comparison = asked.comparison
        self.folder = self.comparison.output_dir
        self.data = self.folder / "data"
        self.start = self._own("model.model_name_or_path")
        if not isinstance(self.start, str):
            raise UserError(
                f"compare starts every arm from one model, model.model_name_or_path, got {self.start!r}. Give its name "
                "or folder."
            )
        self.other: str | None = None
        self.failed: dict[str, str] = {}
        self.done = 0

    def _own(self, key: str, default: Any = None) -> Any:
        """A setting of the command line or the config, as YAML has it."""
        given = [value for name, value in self.asked.flags if name == key]
        if given:
            return yaml.safe_load(given[-1])
        section, _, name = key.partition(".")
        return (self.asked.common.get(section) or {}).get(name, default)

    # --- before anything starts -----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Write the rows, and parse the settings of every arm."""
        common = {
            section: {key: value for key, value in (settings or {}).items() if f"{section}.{key}" not in _SOURCES}
            if isinstance(settings, Mapping)
            else settings
            for section, settings in self.asked.common.items()
        }
        flags = tuple((key, value) for key, value in self.asked.flags if key not in _SOURCES)
        self._write_rows(common, flags)
        first, *rest = range(self.comparison.seeds)
        self.steps = {
            (arm.name, seed, rate): self._make_step(arm, seed, rate)
            for seed in (first, *rest)
            for arm in self.comparison.arms
            for rate in arm.learning_rates or (None,)
        }
        measurements = [self._make_measurement("start", None)]
        measurements += [self._make_measurement(step.name, step) for step in self.steps.values()]
        steps = (*self.steps.values(), *measurements)
        self.runs = Runs(Chain(self.asked.file, self.folder, common, flags, steps))
        self._check(first, measurements)

    def _check(self, first: int, measurements: Sequence[Step]) -> None:
        """Parse the settings of each arm once: with other seeds and learning rates they differ in numbers alone."""
        parsed: dict[str, str] = {}
        for (name, seed, _), step in self.steps.items():
            if seed == first:
                parsed.setdefault(name, step.name)
        some = [step for step in self.steps.values() if step.name in parsed.values()]
        self.runs.check(self.scratch, [*some, measurements[0]])
        for (name, _, _), step in self.steps.items():
            self.runs.settings[step.name] = self.runs.settings[parsed[name]]
        for step in measurements:
            self.runs.settings[step.name] = self.runs.settings[measurements[0].name]

    def _write_rows(self, common: Mapping[str, Any], flags: Sequence[tuple[str, str]]) -> None:
        """The rows as files in one format: to train on, to choose by, and to report on; and those of other tasks.

        Raises:
            UserError: They are missing, too few, or others than this comparison began with.
        """
        step = Step("rows", "score", (), None, {"data": {"train_data": "rows"}, "score": self._score_section()})
        line = Runs(Chain(self.asked.file, self.folder, common, tuple(flags), (step,)))
        with _quiet():
            settings = score.parse(line.args_of(step, self.scratch, must_exist=False)[1:])
        data: RowDataModule = make_object("spin_lightning.generation.synthetic_data.SyntheticDataModule", settings.data)
        sources = [self._own(key) for key in _SOURCES]
        if not sources[0] or isinstance(sources[0], list):
            raise UserError(f"compare trains on one source of rows, data.train_data, got {sources[0]!r}.")
        reward = self.comparison.reward

        def read(source: Any) -> list[list[Row]]:  # each row as often as its source's weight says
            loaded = data.read_source(
                source, keep_columns=() if reward is None or source is sources[2] else reward.columns
            )
            times = loaded.times or [1] * len(loaded.rows)
            return [[row] * count for row, count in zip(loaded.rows, times, strict=True)]

        train = read(sources[0])
        val_fraction = self._own("data.val_fraction", 0.05)
        if sources[1]:
            held_out = read(sources[1])
        else:
            count = max(2, round(len(train) * val_fraction)) if val_fraction else 0
            chosen = set(random.Random(f"held-out/{data.seed}").sample(range(len(train)), min(count, len(train))))
            held_out = [row for place, row in enumerate(train) if place in chosen]
            train = [row for place, row in enumerate(train) if place not in chosen]
        if len(held_out) < 2 or not train:
            raise UserError(
                f"compare needs held-out rows to choose by and others to report on, got {len(held_out)}. Give "
                "data.val_data or raise data.val_fraction."
            )
        half = set(random.Random(f"compare/{data.seed}").sample(range(len(held_out)), len(held_out) // 2))
        parts = {
            "train": train,
            "choose": [row for place, row in enumerate(held_out) if place in half],
            "report": [row for place, row in enumerate(held_out) if place not in half],
        }
        if sources[2]:
            parts["other"] = read(sources[2])
            self.other = str(self.data / "other.jsonl")
        self.base_seed = int(data.seed)
        self.counts = {name: sum(map(len, rows)) for name, rows in parts.items()}
        for name, rows in parts.items():
            _write_once(self.data / f"{name}.jsonl", list(chain.from_iterable(rows)))
        self.row_tokens = self._measure_rows(settings)

    def _measure_rows(self, settings: Any) -> float:
        """Mean tokens of a row that is trained on, by the tokenizer of the start."""
        settings.data.train_data, settings.data.val_data, settings.data.val_fraction = (
            str(self.data / "train.jsonl"),
            None,
            0.0,
        )
        settings.data.format, settings.data.columns, settings.data.max_rows = "messages", None, None
        with _quiet():
            scoring = make_object("spin_lightning.stages.scoring.Scoring", settings.score)
            prompts = score.read_rows(settings, scoring).prompts
        return sum(len(prompt.prompt_ids) + len(prompt.real_ids) for prompt in prompts) / len(prompts)

    def _score_section(self) -> dict[str, Any]:
        return {"reward": self.asked.reward or {"class_path": "spin_lightning.TextMatch"}}

    def _make_step(self, arm: Arm, seed: int, rate: float | None, updates: int | None = None) -> Step:
        """The run of an arm with a seed."""
        common_rate = self._own("model.learning_rate")
        own: dict[str, Any] = {"model": {"model_name_or_path": self.start}}
        if arm.word == "sft" and isinstance(common_rate, list):
            own["model"]["learning_rate"] = common_rate[0]
        if "train_data" not in (arm.settings.get("data") or {}):
            own["data"] = {
                "train_data": str(self.data / "train.jsonl"),
                "val_data": str(self.data / "choose.jsonl"),
                **{"format": "messages", "columns": None, "split": "train", "data_revision": None, "max_rows": None},
            }
        own = merged(own, arm.settings)
        own = merged(own, {"seed_everything": self.base_seed + seed, "data": {"seed": self.base_seed + seed}})
        if rate is not None:
            own = merged(own, {"model": {"learning_rate": rate}})
        if arm.like is not None:
            own = merged(own, {"model": {"max_updates": updates or 1}, "trainer": {"max_epochs": -1}})
        if (own.get("export") or {}).get("keep") == "best" and "val_check_interval" not in (own.get("trainer") or {}):
            total = own["model"].get("max_updates")
            common = self._own("trainer.accumulate_grad_batches", 1)
            batches = (own.get("trainer") or {}).get("accumulate_grad_batches", common)
            every = {
                "check_val_every_n_epoch": None,
                "val_check_interval": max(1, (total or 1) // MEASUREMENTS) * batches,
            }
            own = merged(own, {"trainer": every}) if total else own
        tried = "" if rate is None else f"-{rate:g}"
        return Step(f"{arm.name}{tried}-seed_{seed}", arm.word, arm.configs, None, own)

    def _make_measurement(self, name: str, step: Step | None) -> Step:
        model = self.start
        if step is not None:
            record = Runs(Chain(self.asked.file, self.folder, {}, (), (step,))).records[step.name]
            model = str(record.exported(self.folder / step.name))
        own = {
            "model": {"model_name_or_path": model, **({} if step is None else {"adapter": None, "revision": None})},
            "data": {
                "train_data": str(self.data / "report.jsonl"),
                **{"val_data": None, "val_fraction": 0.0, "format": "messages", "columns": None, "split": "train"},
                **{"data_revision": None, "max_rows": None, "seed": self.base_seed},
                "answers_per_prompt": self.comparison.samples,
            },
            "score": self._score_section(),
        }
        return Step(f"measured-{name}", "score", (), None, own)

    # --- the arms -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Play, measure and report."""
        self._prepare()
        arms, seeds = self.comparison.arms, self.comparison.seeds
        self.total = seeds * len(arms) + sum(max(0, len(arm.learning_rates) - 1) for arm in arms)
        say(
            f"{len(arms)} arms with {seeds} seed{'s' * (seeds != 1)}: {self.counts['train']} rows to train on, "
            f"{self.counts['choose']} held-out ones to choose settings and checkpoints by, {self.counts['report']} "
            "others to report on"
        )
        self._measure("start", "the start")
        with suppress(_Stopped):
            for seed in range(seeds):
                for arm in arms:
                    self._play_arm(arm, seed)
        self._conclude()

    def _play_arm(self, arm: Arm, seed: int) -> None:
        updates = None
        if arm.like is not None:
            updates = self._updates_like(arm, seed)
            if updates is None:
                self.failed[f"{arm.name}, seed {seed}"] = f"{arm.like} has no result"
                self.done += 1
                return
        rates: Sequence[float | None] = arm.learning_rates or (None,)
        if len(rates) > 1 and seed > 0:
            chosen = self._chosen_rate(arm)
            rates = () if chosen is None else (chosen,)
        for rate in rates:
            step = self._make_step(arm, seed, rate, updates)
            self.runs.change(step)
            self._play(arm, step, seed, rate)
        if seed == 0 and len(rates) > 1:
            chosen = self._chosen_rate(arm)
            if chosen is None:
                self.failed[f"{arm.name}, seed 0"] = "no learning rate has a result"
                return
            say(f"{arm.name}: of the learning rates {', '.join(f'{rate:g}' for rate in rates)} the best is {chosen:g}")
            rates = (chosen,)
        for rate in rates:
            name = self.steps[arm.name, seed, rate].name
            if self.runs.is_over(self._step(name)):
                self._measure(name, f"{arm.name}, seed {seed}")

    def _step(self, name: str) -> Step:
        return next(step for step in self.runs.chain.steps if step.name == name)

    def _play(self, arm: Arm, step: Step, seed: int, rate: float | None) -> None:
        self.done += 1
        tried = "" if rate is None else f", learning rate {rate:g}"
        label = f"{arm.name}, seed {seed}"
        kept = self.runs.kept(step)
        if kept.get("failed_sha256") == self.runs.settings_hash(step) and self.runs.folder_of(step).is_dir():
            self.failed[f"{label}{tried}"] = kept["failed"]
            say(f"\n{label}{tried}: {kept['failed']} before. Removing {self.runs.folder_of(step)} has it tried again.")
            return
        heading = f"run {self.done} of {self.total}: {label}{tried} ({step.word})"
        try:
            is_over = self.runs.play(step, heading, self.scratch, self.children)
        except StageFailed as error:
            if error.exit_code != _FAILED:
                raise
            why = "NaN or infinite numbers, or an error"
            self.runs.keep(step, {"failed": why, "failed_sha256": self.runs.settings_hash(step)})
            self.failed[f"{label}{tried}"] = why
            say(f"note: {label}{tried} failed ({why}, see above). The other arms go on without it.")
            return
        if not is_over:
            say(f"{label} ended before it is over (a time limit, perhaps). The same command continues.")
            raise _Stopped
        # nothing needs what a run that is over would have been continued from
        shutil.rmtree(self.runs.folder_of(step) / "checkpoints", ignore_errors=True)

    def _chosen_rate(self, arm: Arm) -> float | None:
        """Of the learning rates that were tried with the first seed, the one with the lowest NLL to choose by."""
        found = {}
        for rate in arm.learning_rates:
            step = self._step(self.steps[arm.name, 0, rate].name)
            nll = (self.runs.kept(step).get("nll") or [None, None])[1]
            if self.runs.is_over(step) and nll is not None and nll == nll:
                found[rate] = nll
        return min(found, key=lambda rate: found[rate], default=None)

    def _updates_like(self, arm: Arm, seed: int) -> int | None:
        """How many updates an arm gets: as many as another, or so many that their passes take as many tokens."""
        like = next(other for other in self.comparison.arms if other.name == arm.like)
        rate = None if not like.learning_rates else self._chosen_rate(like)
        name = self.steps[like.name, seed, rate].name if not like.learning_rates or rate is not None else None
        if name is None or not self.runs.is_over(self._step(name)):
            return None
        step = self._step(name)
        updates = int(self.runs.kept(step)["updates"])
        if arm.shares == "updates":
            return updates
        passes = passes_of(step.word, self.runs.folder_of(step))
        if passes is None:
            raise UserError(
                f"equal_compute of the arm {arm.name!r} needs the tokens of {like.name}, which are not known."
            )
        settings = self.runs.settings[self.steps[arm.name, seed, (arm.learning_rates or (None,))[0]].name]
        batches = settings.trainer.accumulate_grad_batches
        return updates_for(passes, self.counts["train"], self.row_tokens, settings.data.batch_size, batches)

    # --- and what became of them ----------------------------------------------------------------------------------

    def _measure(self, name: str, what: str) -> None:
        step = self._make_measurement(name, None if name == "start" else self._step(name))  # of what it exported
        self.runs.change(step)
        laws = self.folder / "measured-start" / "laws.safetensors"
        wanted = Wanted(self.comparison.temperatures, str(laws), name == "start", self.other)
        key = json.dumps([wanted.as_json, self.runs.settings_hash(step)])
        if self.runs.is_over(step) and self.runs.kept(step).get("measured") == key:
            return
        say(f"\nmeasuring {what}")
        args = self.runs.args_of(step, self.scratch)[1:]
        command = command_of(["compare", "--measure", wanted.as_json, *args])
        self.children.run(
            command, f"the measurement of {what}", f"Removing {self.runs.folder_of(step)} has it made anew."
        )
        self.runs.keep(step, {"measured": key})

    def _results(self) -> Iterator[tuple[Arm, int, dict[str, Any]]]:
        for arm in self.comparison.arms:
            rate = self._chosen_rate(arm) if arm.learning_rates else None
            for seed in range(self.comparison.seeds):
                if arm.learning_rates and rate is None:
                    continue
                step = self._step(self.steps[arm.name, seed, rate].name)
                found = self._read(step.name)
                if found is None:
                    continue
                kept = self.runs.kept(step)
                cost = {
                    "updates": kept["updates"],
                    "seconds": kept["seconds"],
                    "token_passes": passes_of(step.word, self.runs.folder_of(step)),
                    "nll_to_choose_by": kept["nll"][1],
                    "run": step.name,
                    **({} if rate is None else {"learning_rate": rate}),
                }
                if arm.learning_rates and seed == 0:  # the search belongs to what the arm cost
                    others = [self._step(self.steps[arm.name, 0, other].name) for other in arm.learning_rates]
                    cost["search_updates"] = sum(self.runs.kept(other).get("updates") or 0 for other in others)
                yield arm, seed, {**found, **cost}

    def _read(self, name: str) -> dict[str, Any] | None:
        step = self._step(f"measured-{name}")
        return read_json(self.folder / step.name / "summary.json") if self.runs.kept(step).get("measured") else None

    def _conclude(self) -> None:
        arms: dict[str, Any] = {arm.name: {"stage": arm.word, "seeds": {}} for arm in self.comparison.arms}
        for arm, seed, found in self._results():
            arms[arm.name]["seeds"][str(seed)] = found
        result = {
            "start": {"model": self.start, **(self._read("start") or {})},
            "arms": arms,
            "rows": self.counts,
            "failed": self.failed,
            "temperatures": list(self.comparison.temperatures),
            "samples": self.comparison.samples,
            "reward": None if self.comparison.reward is None else self.comparison.reward.name,
        }
        lines = describe(result)
        write_json(self.folder / "comparison.json", result)
        write_report(self.folder, result, lines)
        say("\n" + "\n".join(lines))
        say(f"\nMore is in {self.folder}: comparison.json, comparison.html, comparison.svg, and each run's folder.")


def _write_once(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as conversations, or make sure that those that are there are these.

    Raises:
        UserError: They are others, or cannot be written so that they are read back the same.
    """
    lines = [
        json.dumps(
            {
                **row.columns,
                "messages": [*row.prompt, row.real_turn],
                **({"tools": list(row.tools)} if row.tools else {}),
            },
            ensure_ascii=False,
        )
        for row in rows
    ]
    text = "".join(f"{line}\n" for line in lines)
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{path} holds other rows than the data has now: this comparison began with those. Give the data it "
                "began with, or set compare.output_dir to another folder."
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    columns = rows[0].columns if rows else {}
    if [(row.prompt, row.real_turn) for row in load_rows(str(path), format="messages", keep_columns=columns).rows] != [
        (row.prompt, row.real_turn) for row in rows
    ]:
        path.unlink()
        raise UserError(
            f"the rows of {path.stem} cannot be written as conversations. Give them in the format messages."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """What is read over here, each command says."""
    with redirect_stdout(io.StringIO()):
        yield
