"""What tasks say of a model, kept beside it: each result as soon as it is there, and never asked for twice.

``evaluation.json`` has what a person and the model's card want to know. The folder ``evaluation/`` beside it has a file
for each task, bound to the weights, the questions and how they were asked, with the score of each document: what the
same command skips, and what two models are compared by.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_lightning.models.loading import dtype_name
from spin_lightning.models.model_card import with_evaluation
from spin_lightning.runs.files import read_json, replacing, sha256_of, write_json
from spin_lightning.runs.settings import versions
from spin_lightning.stages.harness import (
    PAPER,
    Asker,
    Found,
    Wanted,
    aggregate,
    fingerprint,
    harness_version,
    load_tasks,
    name_of,
    shots_of,
    weights_of,
)
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: What is written beside a model's summary, and the folder of what it rests on.
RESULTS, PARTS = "evaluation.json", "evaluation"


@dataclass(frozen=True)
class Outcome:
    """What one task, or a group of them, says of a model.

    Attributes:
        name: Of the task.
        entry: What ``evaluation.json`` has of it.
        key: The metric that is reported, as ``name,filter``.
        parts: What each task of the harness in it said, by name.
        weights: What share of the number each of them has.
    """

    name: str
    entry: dict[str, Any]
    key: str
    parts: dict[str, Found]
    weights: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """By how much one model's number is above another's, over the same documents, with its standard error."""

    value: float
    stderr: float | None


class Evaluation:
    """Tasks, and how they are asked.

    Args:
        tasks: Names of lm-evaluation-harness, YAML files, folders of them, or JSONL files of own rows. None: the six
            tasks of the paper.
        shots: Examples before each question, one number or one for each task. None: the paper's, or the task's own.
        limit: Ask the first so many documents of each task only. None: all.
        batch_size: Sequences in one pass.
        chat_template: Ask in messages, by the model's chat template. The paper and the leaderboard do not.

    Raises:
        UserError: A setting is outside its range.
    """

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        shots: int | Sequence[int] | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        chat_template: bool = False,
    ) -> None:
        for name, number in (("limit", limit), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise UserError(f"{name} must be at least 1, got {number!r}. Leave it out for its default.")
        self.tasks = list(PAPER) if tasks is None else list(tasks)
        self.shots, self.limit = shots, limit
        self.batch_size, self.chat_template = batch_size, chat_template
        self._wanted: list[Wanted] = []
        self._hashes: dict[str, str] = {}

    def load(self) -> list[Wanted]:
        """The tasks with their documents, read once.

        Raises:
            UserError: There is no such task, or its documents cannot be had.
        """
        if not self._wanted:
            self._wanted = load_tasks(self.tasks, self.shots)
            self._hashes = {name_of(part): fingerprint(part) for task in self._wanted for part in task.tasks}
        return self._wanted

    def is_complete(self, place: Path, sha256: str) -> bool:
        """Whether a folder has these tasks' results of these weights, asked in this way."""
        kept = read_json(place / RESULTS) or {}
        same = {"limit": self.limit, "chat_template": self.chat_template}
        return kept.get("model_sha256") == sha256 and all(
            same | {"task_sha256": self._hash_of(task)}
            == {name: kept["tasks"].get(task.name, {}).get(name) for name in (*same, "task_sha256")}
            for task in self.load()
        )

    def run(
        self,
        model: Any,
        tokenizer: Any,
        place: Path,
        sha256: str,
        name: str,
        poll: Callable[[], None] = lambda: None,
    ) -> dict[str, Outcome]:
        """Ask what was not asked before, and write it down.

        Args:
            model: A causal language model of ``transformers``, on its device. Its mode and the random numbers of this
                process are left as they are.
            tokenizer: Its own.
            place: The folder that gets ``evaluation.json``.
            sha256: The hash of the model's weights as they are stored.
            name: Of the model, for that file.
            poll: Called after each response; raises to interrupt. Tasks that are over by then are kept.

        Returns:
            What each task says, by its name.
        """
        asker = Asker(model, tokenizer, self.batch_size, self.chat_template, poll)
        outcomes = {}
        for wanted in self.load():
            found = {name_of(part): self._ask(asker, part, place, sha256) for part in wanted.tasks}
            outcome = self._conclude(wanted, found, dtype_name(model.dtype))
            outcomes[wanted.name] = outcome
            _write_entry(place, outcome, sha256, name)
            say(f"  {wanted.name}: {_in_words(outcome.entry)}")
        return outcomes

    def _hash_of(self, wanted: Wanted) -> str:
        return sha256_of([(self._hashes[name_of(part)], shots_of(part)) for part in wanted.tasks])

    def _ask(self, asker: Asker, task: Any, place: Path, sha256: str) -> Found:
        """What a task says, from its file if that is of the same weights, questions and way of asking."""
        binding = {
            "task": name_of(task),
            "task_sha256": self._hashes[name_of(task)],
            "shots": shots_of(task),
            "limit": self.limit,
            "chat_template": self.chat_template,
            "model_sha256": sha256,
            "tokenizer_sha256": asker.tokenizer_sha256,
            "dtype": dtype_name(asker.model.dtype),
            "lm_eval": harness_version(),
        }
        words = re.sub(r"[^\w.-]", "_", name_of(task))[:80]
        path = place / PARTS / f"{words}-{sha256_of(binding)[:12]}.json"
        kept = read_json(path)
        if kept is not None and kept.get("binding") == binding:
            return Found(
                {key: (value, error) for key, (value, error) in kept["metrics"].items()},
                **{key: kept[key] for key in ("shots", "version", "hashes", "scores")},
            )
        found = asker.ask(task, self.limit)
        write_json(path, {"binding": binding, **vars(found)})
        return found

    def _conclude(self, wanted: Wanted, found: dict[str, Found], dtype: str) -> Outcome:
        metrics = aggregate(wanted, found)
        if not metrics:
            raise UserError(f"the task {wanted.name!r} gives no number for a model. Leave it out.")
        key = wanted.metric if wanted.metric in metrics else next(iter(metrics))
        value, error = metrics[key]
        shots = sorted({part.shots for part in found.values()})
        entry = {
            "metric": key.removesuffix(",none"),
            "value": value,
            "stderr": error,
            "shots": shots[0] if len(shots) == 1 else shots,
            "documents": sum(len(part.hashes) for part in found.values()),
            "limit": self.limit,
            "chat_template": self.chat_template,
            "dtype": dtype,
            "lm_eval": harness_version(),
            "version": next(iter(found.values())).version if wanted.group is None else wanted.group.version,
            "task_sha256": self._hash_of(wanted),
            "metrics": {name.removesuffix(",none"): list(both) for name, both in metrics.items()},
        }
        if wanted.group is not None:
            entry["tasks"] = {name: part.metrics.get(key, (None, None))[0] for name, part in found.items()}
        return Outcome(wanted.name, entry, key, found, weights_of(wanted, found))


def _in_words(entry: Mapping[str, Any]) -> str:
    error = "" if entry["stderr"] is None else f" +- {entry['stderr']:.4f}"
    return f"{entry['metric']} {entry['value']:.4f}{error} ({entry['shots']} shots, {entry['documents']} documents)"


def _write_entry(place: Path, outcome: Outcome, sha256: str, name: str) -> None:
    """Put a task's result into ``evaluation.json``. Results of other weights are not kept beside it."""
    kept = read_json(place / RESULTS) or {}
    if kept and kept.get("model_sha256") != sha256:
        say(
            f"note: {place / RESULTS} was of other weights, and is of these now. {place / PARTS} still has what it "
            "rested on."
        )
        kept = {}
    results = {
        "model": name,
        "model_sha256": sha256,
        "dtype": outcome.entry["dtype"],
        "tasks": {**kept.get("tasks", {}), outcome.name: outcome.entry},
        "versions": {"lm_eval": harness_version(), **versions()},
        **({"against": kept["against"]} if "against" in kept else {}),
    }
    if results != kept:
        write_json(place / RESULTS, results)


def place_of(model: Path) -> Path:
    """Where the results of a model in a folder are kept: beside the summary of what trained it, else in the folder.

    Example:
        >>> place_of(Path("/no/such/policy")).as_posix()
        '/no/such/policy'
    """
    is_exported = model.name in ("policy", "adapter") and (model.parent / "summary.json").exists()
    return model.parent if is_exported else model


def difference(ours: Outcome, others: Outcome) -> Difference | None:
    """By how much our number is above another model's, with the error of the mean of the documents' differences.

    Of a group it is the mean of its tasks' differences, each with the weight that it has in the group's number.

    Returns:
        None where the number is no mean over documents, or the documents differ.
    """
    value, variance = 0.0, 0.0
    for name, part in ours.parts.items():
        other, key = others.parts.get(name), ours.key
        if other is None or other.hashes != part.hashes or key not in part.scores or key not in other.scores:
            return None
        gaps = [one - two for one, two in zip(part.scores[key], other.scores[key], strict=True)]
        mean = sum(gaps) / len(gaps)
        value += ours.weights[name] * mean
        spread = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) if len(gaps) > 1 else math.inf
        variance += ours.weights[name] ** 2 * spread / len(gaps)
    return Difference(value, math.sqrt(variance) if math.isfinite(variance) else None)


def compare(
    ours: Mapping[str, Outcome], others: Mapping[str, Outcome], place: Path, name: str, sha256: str
) -> dict[str, Difference | None]:
    """The paired differences of all tasks, which are also written into ``evaluation.json``.

    Args:
        ours: What tasks say of the model whose results are in ``place``.
        others: What they say of the other one.
        place: Folder with ``evaluation.json``.
        name: Of the other model.
        sha256: Of its weights.
    """
    found = {task: difference(outcome, others[task]) for task, outcome in ours.items()}
    kept = read_json(place / RESULTS)
    kept["against"] = {
        "model": name,
        "model_sha256": sha256,
        "tasks": {
            task: {"value": others[task].entry["value"], "difference": gap.value, "stderr": gap.stderr}
            for task, gap in found.items()
            if gap is not None
        },
    }
    write_json(place / RESULTS, kept)
    return found


def update_card(model: Path, results: Mapping[str, Any] | None) -> None:
    """Put the results of ``evaluation.json`` into the README of a model's folder, if there is one. In one step.

    Nothing else of the folder is touched.
    """
    path = model / "README.md"
    if not results or not path.is_file():
        return
    before = path.read_text(encoding="utf-8")
    try:
        card = with_evaluation(before, results)
    except ValueError as error:
        say(f"note: {path} is left as it is: {error}.")
        return
    if card != before:
        with replacing(path) as temporary:
            temporary.write_text(card, encoding="utf-8")
