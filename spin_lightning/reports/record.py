"""What a run's folder tells, read without trusting it: a file that is missing or damaged is named, and never an error.

Knows the files that runs write and nothing of what made them, so it needs neither a model nor a trainer.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from spin_lightning.runs.files import iteration_folders, read_json
from spin_lightning.runs.redaction import redacted
from spin_lightning.types import UserError

#: The kinds of runs: what its settings begin with, the file that is written last, and what it does, in words.
KINDS: dict[str, tuple[str, str, str]] = {
    "fit": ("self_play.", "game.json", "self-play fine-tuning (SPIN)"),
    "ppo": ("rollouts.", "rollouts.json", "reinforcement learning from a reward"),
    "reward": ("model.centring", "summary.json", "a reward model"),
    "dpo": ("export.shard_size", "summary.json", "direct preference optimisation (DPO)"),
    "sft": ("model.max_updates", "summary.json", "supervised fine-tuning (SFT)"),
    "score": ("score.", "summary.json", "responses scored by a reward"),
}
#: What an iteration of token-level self-play has in the place of pairs.
LAWS = "laws_manifest.json"
Points = list[tuple[float, float]]
T = TypeVar("T")


@dataclass
class Iteration:
    """An iteration as its folder has it.

    Attributes:
        number: From 0.
        folder: Where it is.
        summary: What ``summary.json`` says; empty while it is not over.
        statistics: What was counted of its pairs or responses.
        binding: What its pairs or responses depend on: hashes and sampling.
    """

    number: int
    folder: Path
    summary: dict[str, Any]
    statistics: dict[str, Any]
    binding: dict[str, Any]


@dataclass
class Record:
    """A run as its folder has it.

    Attributes:
        folder: Of the run.
        kind: One of ``KINDS``; empty where nothing tells.
        settings: By section, as ``config.yaml`` has them, or as ``run.json`` has them; without secrets.
        recorded: What ``run.json`` says: settings by name, changes, versions.
        start: Metrics of the model that it started from, ``val/nll`` among them.
        result: What was written last. None: the run is not over.
        iterations: In their order.
        metrics: What was logged, by name, as points (step, value).
        data: What ``data_report.json`` says.
        remarks: Iteration, or None, and sentence.
        evaluations: By where they belong to, such as ``iteration 0``.
        missing: What cannot be told, and why, in sentences.
    """

    folder: Path
    kind: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    recorded: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    iterations: list[Iteration] = field(default_factory=list)
    metrics: dict[str, Points] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    remarks: list[tuple[int | None, str]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the folder is called."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def model(self) -> str:
        """The model that was trained or asked, as it was named."""
        named = as_dict(self.settings.get("model")).get("model_name_or_path")
        return str(named or as_dict(self.recorded.get("settings")).get("model.model_name_or_path") or "a model")

    @property
    def by_token(self) -> bool:
        """Whether it is a game whose loss is told token by token, so that it has no pairs."""
        return any((iteration.folder / LAWS).is_file() for iteration in self.iterations)

    @property
    def summaries(self) -> list[dict[str, Any]]:
        """Those of the iterations that are over, or of the run where it has none."""
        if self.iterations:
            return [iteration.summary for iteration in self.iterations if iteration.summary]
        return [self.result] if self.result else []

    @property
    def updates(self) -> int:
        """Optimiser steps so far, as far as summaries and logs tell."""
        told = sum(int(as_number(summary.get("updates")) or 0) for summary in self.summaries)
        logged = max((points[-1][0] + 1 for name, points in self.metrics.items() if name == "loss"), default=0)
        return max(told, int(logged))

    def try_to(self, what: str, make: Callable[[], T], default: Any) -> T:
        """What can be made of files that may hold anything; where that fails, it is named and the default taken."""
        try:
            return make()
        except Exception as error:  # of files that something else wrote or broke: a report shows the rest
            self.missing.append(f"{what}: the files do not allow it ({type(error).__name__}: {str(error)[:200]})")
            return default  # type: ignore[no-any-return]


def read_run(folder: Path) -> Record:
    """Read what a run left in its folder so far.

    Raises:
        UserError: There is no such folder, or nothing in it that a run writes.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {str(folder)!r}. Give the folder of a run, such as that of --self_play.output_dir."
        )
    record = Record(folder)
    record.settings = redacted(record.try_to("config.yaml", lambda: _read_yaml(folder / "config.yaml"), {}))
    record.recorded = redacted(_read(record, folder / "run.json"))
    record.kind = find_kind(folder)
    if not record.kind:
        raise UserError(
            f"{str(folder)!r} holds nothing that tells what was trained in it: no config.yaml, run.json or result of a "
            "run. Give the folder of a run, a chain or a demo."
        )
    record.start = _read(record, folder / "start.json")
    record.data = redacted(_read(record, folder / "data_report.json"))
    record.metrics = record.try_to("logs/*/metrics.csv", lambda: read_metrics(folder / "logs"), {})
    for name, value in record.start.items():
        if (number := as_number(value)) is not None and name in record.metrics and record.metrics[name][0][0] > 0:
            record.metrics[name].insert(0, (0.0, number))  # measured before anything was logged
    record.iterations = list(_read_iterations(record))
    result = folder / KINDS[record.kind][1]
    record.result = _read(record, result) or None
    played, why = as_dict(record.result).get("iterations"), str(as_dict(record.result).get("ended_because"))
    is_whole = record.kind == "fit" and why.startswith("all ")
    if is_whole and isinstance(played, list) and len(played) < len(record.iterations):
        record.result = None  # of a game that was over, and was given more iterations since
    record.remarks = record.try_to("health.json", lambda: list(_read_remarks(record)), [])
    for path in sorted({folder / "evaluation.json", *folder.glob("*/evaluation.json")}):
        if path.is_file():
            where = "the run" if path.parent == folder else path.parent.name.replace("_", " ")
            record.evaluations[where] = _read(record, path)
    record.missing += _name_missing(record)
    return record


def find_kind(folder: Path) -> str:
    """What was done in a folder, by the settings, and where there are none by the file that was written last.

    Returns:
        One of ``KINDS``. Empty: nothing tells.
    """
    probe = Record(folder)
    recorded = as_dict(_read(probe, folder / "run.json").get("settings"))
    settings = probe.try_to("config.yaml", lambda: _read_yaml(folder / "config.yaml"), {})
    named = {str(key) for key in recorded}
    named |= {f"{section}.{key}" for section, found in settings.items() for key in as_dict(found)}
    for kind, (mark, _, _) in KINDS.items():
        if any(name.startswith(mark) for name in named):
            return kind
    for kind in ("fit", "ppo"):
        if (folder / KINDS[kind][1]).is_file():
            return kind
    summary = _read(probe, folder / "summary.json")
    marks = {"pass_at": "score", "val_longer_wins": "reward", "epoch_metrics": "dpo", "updates": "sft"}
    return next((kind for mark, kind in marks.items() if mark in summary), "")


def read_verdict(folder: Path) -> list[str]:
    """The sentence of a comparison over seeds that was made in a folder, if there is one."""
    try:
        verdict = as_dict(read_json(folder / "comparison.json")).get("verdict")
    except (UserError, OSError):
        return []
    sentence = as_dict(verdict).get("sentence", verdict)
    return [sentence] if isinstance(sentence, str) else []


def runs_in(folder: Path) -> list[Path]:
    """The folders of runs directly inside a folder, in the order of their names."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    names = ("config.yaml", "run.json", *{file for _, file, _ in KINDS.values()})
    return [path for path in inside if any((path / name).is_file() for name in names)]


def read_metrics(folder: Path) -> dict[str, Points]:
    """What the CSV loggers of a run and its resumes kept: for each metric its points, a step once.

    A resume logs into a file of its own, and takes the place of what was logged from its first step on.
    """
    found: dict[str, dict[float, float]] = {}
    versions = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: (len(path.parent.name), path.parent.name))
    for path in versions:
        of_file: dict[str, dict[float, float]] = {}
        with path.open(encoding="utf-8", errors="replace", newline="") as stream:
            rows = csv.reader(line.replace("\0", "") for line in stream)
            header = next(rows, [])
            place = header.index("step") if "step" in header else -1
            names = [name for name in header if name not in ("step", "epoch")]
            columns = [of_file.setdefault(name, {}) for name in names]
            places = [header.index(name) for name in names]
            for row in rows:
                if place < 0 or len(row) != len(header) or (step := as_number(row[place])) is None:
                    continue  # the last row of a killed run may be cut
                for column, cell in zip(columns, places, strict=True):
                    if (text := row[cell]) and (value := _as_float(text)) is not None:
                        column[step] = value
        begins = min((min(column) for column in of_file.values() if column), default=math.inf)
        for name in {**found, **of_file}:
            kept = {step: value for step, value in found.get(name, {}).items() if step < begins}
            found[name] = {**kept, **of_file.get(name, {})}
    return {name: sorted(column.items()) for name, column in found.items() if column}


def _read(record: Record, path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none; what is damaged is named."""
    try:
        value = read_json(path)
    except (UserError, OSError, RecursionError) as error:
        record.missing.append(f"{_relative(record, path)} cannot be read ({str(error)[:120]}).")
        return {}
    if value is not None and not isinstance(value, dict):
        record.missing.append(f"{_relative(record, path)} does not hold what a run writes there.")
    return as_dict(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return as_dict(yaml.safe_load(path.read_text(encoding="utf-8", errors="replace")))


def _read_iterations(record: Record) -> Iterator[Iteration]:
    folders = iteration_folders(record.folder)
    if not folders and record.kind == "dpo":
        folders = {0: record.folder}
    for number, folder in folders.items():
        summary = _read(record, folder / "summary.json")
        manifest: dict[str, Any] = {}
        for name in ("pairs_manifest.json", "answers_manifest.json", LAWS):
            if (folder / name).is_file():
                manifest = _read(record, folder / name)
        statistics = as_dict(summary.get("pairs")) or as_dict(manifest.get("statistics"))
        yield Iteration(number, folder, summary, statistics, as_dict(manifest.get("binding")))


def _read_remarks(record: Record) -> Iterator[tuple[int | None, str]]:
    for remark in _read(record, record.folder / "health.json").get("remarks", ()):
        number = remark.get("iteration")
        yield (number if isinstance(number, int) else None), redacted(str(remark["sentence"]))


def _name_missing(record: Record) -> Iterator[str]:
    """What a run of its kind usually has, and this one has not."""
    if record.kind == "score":
        return
    if not record.metrics:
        yield "curves of updates: there are no logs/*/metrics.csv, which Lightning's CSVLogger writes."
    if not record.recorded:
        yield "versions and the settings that a resume is compared with: there is no run.json."
    if not record.data:
        yield "what was read of the data: there is no data_report.json, so training did not begin."
    if not as_number(record.start.get("val/nll")) and record.kind in ("fit", "sft", "dpo", "ppo"):
        yield (
            "the held-out NLL of the model it started from: there is no start.json with it, so no row was held out, "
            "or trainer.num_sanity_val_steps was not -1."
        )


def _relative(record: Record, path: Path) -> str:
    return path.relative_to(record.folder).as_posix()


def as_dict(value: Any) -> dict[str, Any]:
    """The value if it is a dict, else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def as_number(value: Any) -> float | None:
    """The value as a number, if it is one; it may be NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    return _as_float(value)


def _as_float(value: float | str) -> float | None:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
