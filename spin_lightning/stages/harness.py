"""lm-evaluation-harness: its tasks by name or file, and what they say of a model that is in memory.

Everything that is asked of ``lm_eval`` is in this file. Nothing is kept here, and nothing is changed: the model has the
mode it had, and random numbers go on as if nobody had asked.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from spin_lightning.models import hub
from spin_lightning.models.loading import tokenizer_state
from spin_lightning.models.modes import evaluating
from spin_lightning.progress import progress
from spin_lightning.runs.files import sha256_of
from spin_lightning.stages.own_tasks import make_task
from spin_lightning.types import UserError

#: The tasks of the paper and of the Open LLM Leaderboard that it used: shots, the metric that is reported, and the
#: harness's folder. arXiv:2401.01335, section 6.1.
PAPER = {
    "arc_challenge": (25, "acc_norm,none", "arc"),
    "truthfulqa_mc2": (0, "acc,none", "truthfulqa"),
    "winogrande": (5, "acc,none", "winogrande"),
    "gsm8k": (5, "exact_match,strict-match", "gsm8k"),
    "hellaswag": (10, "acc_norm,none", "hellaswag"),
    "mmlu": (5, "acc,none", "mmlu"),
}
#: What the harness draws its few-shot examples from.
_SEED = 1234
#: Draws for the standard error of a metric that is no mean.
_BOOTSTRAPS = 1000
#: Readers of ``datasets`` that need no hub.
_LOCAL_READERS = ("json", "csv", "parquet", "text", "arrow", "xml")


@dataclass(frozen=True)
class Wanted:
    """A task that was asked for: one of the harness, or several that it makes one number of.

    Attributes:
        name: Of the task or the group.
        tasks: Objects of the harness.
        group: That object of the harness, which aggregates them; None for a task alone.
        metric: The one that is reported, as ``name,filter``. None: the task's first.
    """

    name: str
    tasks: tuple[Any, ...]
    group: Any = None
    metric: str | None = None


@dataclass(frozen=True)
class Found:
    """What a task of the harness says of a model.

    Attributes:
        metrics: Value and standard error of each ``name,filter``; no error where the harness has none.
        shots: Examples before each question.
        version: Of the task.
        hashes: Of the documents, in their order.
        scores: What each document adds to a metric that is a mean over documents, by ``name,filter``.
    """

    metrics: dict[str, tuple[float, float | None]]
    shots: int
    version: Any
    hashes: list[str]
    scores: dict[str, list[float]]


def check_harness() -> None:
    """Make sure that the harness is installed.

    Raises:
        UserError: It is not.
    """
    if find_spec("lm_eval") is None or find_spec("accelerate") is None:
        raise UserError("this needs the package lm-eval. Install it: pip install 'spin-lightning[eval]'.")


def harness_version() -> str:
    """The version of lm-evaluation-harness that is installed."""
    return version("lm_eval")


def load_tasks(names: Sequence[str], shots: int | Sequence[int] | None = None) -> list[Wanted]:
    """Tasks with their documents.

    Args:
        names: A task, group or tag of the harness; a YAML file of a task or a folder of such; or a JSONL file of own
            rows (``own_tasks``).
        shots: Examples before each question, one number or one for each name. None: the paper's for its six tasks, else
            the task's own.

    Raises:
        UserError: There is no such task, or its documents cannot be had; the message names all of those.
    """
    check_harness()
    if not names:
        raise UserError("no task is named. Leave tasks out for the paper's six, or name some: --tasks arc_challenge.")
    counts = _as_counts(shots, len(names))
    wanted: list[Wanted] = []
    missing: dict[str, str] = {}
    with _apart(), progress("reading the tasks", len(names), "tasks") as phase:
        for name, count in zip(names, counts, strict=True):
            try:
                found = _load(name)
            except UserError:
                raise
            except Exception as error:  # of code and data of others, which has no end
                reason = (str(error).strip().splitlines() or [""])[0][:300]
                missing[name] = f"{type(error).__name__}: {reason}"
                continue
            for task in found:
                own = count if count is not None else PAPER.get(task.name, (None,))[0]
                for part in task.tasks:
                    _set_shots(part, own)
                    _refuse_few_rows(name, part)
            wanted += found
            phase.advance()
    if missing:
        raise UserError(_explain_missing(missing))
    doubled = [name for name in (task.name for task in wanted) if [task.name for task in wanted].count(name) > 1]
    if doubled:
        raise UserError(f"two tasks are called {doubled[0]!r}. Give one of them another name, or leave it out.")
    return wanted


def _refuse_few_rows(name: str, task: Any) -> None:
    """Make sure that a file of own rows, which are each other's examples, has enough of them."""
    if Path(name).suffix == ".jsonl" and 0 < shots_of(task) >= (rows := len(task.eval_docs)):
        raise UserError(
            f"--shots {shots_of(task)} needs at least {shots_of(task) + 1} rows in {name!r}, which has {rows}: the "
            f"examples before a question are other rows. Give --shots {rows - 1}, or more rows."
        )


def _as_counts(shots: int | Sequence[int] | None, count: int) -> list[int | None]:
    given: list[int | None] = [shots] * count if shots is None or isinstance(shots, int) else list(shots)
    if len(given) == 1:
        given *= count
    if len(given) != count:
        raise UserError(f"shots must be one number or one for each of the {count} tasks, got {len(given)}.")
    if bad := [number for number in given if number is not None and number < 0]:
        raise UserError(f"shots must be at least 0, got {bad[0]!r}.")
    return given


def _load(name: str) -> list[Wanted]:
    path = Path(name).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        return [Wanted(path.stem, (_manage([]).load([make_task(path)])["tasks"][path.stem],))]
    if path.is_dir():
        manager = _manage([path])
        names = sorted(manager.all_groups) or sorted(manager.all_subtasks)
        if not names:
            raise UserError(f"the folder {name!r} has no YAML file of a task.")
        _ask_hub([str((manager.task_index[own].cfg or {}).get("dataset_path", "")) for own in names])
        return [task for own in names for task in _as_wanted(own, manager.load([own]))]
    if path.suffix in (".yaml", ".yml") and path.is_file():
        source = re.search(r"^dataset_path:\s*['\"]?([^\s'\"#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        _ask_hub([source[1] if source else ""])
        loaded = _manage([]).load([str(path)])
        return _as_wanted(next(iter(loaded.get("groups") or loaded["tasks"])), loaded)
    if path.suffix in (".jsonl", ".yaml", ".yml", ".json"):
        expected = "is none of JSONL or YAML" if path.exists() else f"does not exist (looked at {path.absolute()})"
        raise UserError(f"the task {name!r} {expected}. Give a .jsonl file of rows, a .yaml file, or a task's name.")
    manager = _manage_named(name)
    _ask_hub([name])
    return _as_wanted(name, manager.load([name]))


def _manage(folders: Sequence[Path]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)


def _manage_named(name: str) -> Any:
    """Where a task of the harness is known. Only for names beyond the paper's are all its 15,000 files read."""
    import lm_eval.tasks

    root = Path(str(lm_eval.tasks.__file__)).parent
    if name in PAPER:
        manager = _manage([root / PAPER[name][2]])
        if name in manager.all_tasks:
            return manager
    with progress("reading the names of all tasks"):
        manager = lm_eval.tasks.TaskManager()
    if name not in manager.all_tasks:
        close = get_close_matches(name, manager.all_tasks, 3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "lm-eval ls tasks prints all names."
        raise UserError(
            f"lm-evaluation-harness {harness_version()} has no task {name!r}, and no file or folder is called so. "
            f"{hint}"
        )
    return manager


def _ask_hub(sources: Sequence[str]) -> None:
    """Look whether the hub answers, where a task may read from there: the library would try for minutes."""
    if any(source not in _LOCAL_READERS and not (source and Path(source).exists()) for source in sources):
        hub.is_reachable()


def _as_wanted(name: str, loaded: Mapping[str, Any]) -> list[Wanted]:
    """A group with a number of its own as one; of others each task."""
    metric = PAPER[name][1] if name in PAPER else None
    group = (loaded.get("groups") or {}).get(name)
    if group is not None and group.has_aggregation:
        return [Wanted(name, tuple(group.get_all_tasks()), group, metric)]
    return [
        Wanted(own, (task,), None, PAPER[own][1] if own in PAPER else None) for own, task in loaded["tasks"].items()
    ]


def _set_shots(task: Any, count: int | None) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"the task {name_of(task)!r} runs code that a model writes, which is not done here.")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"the task {name_of(task)!r} asks about images or sound, and this is for text.")
    own = task.get_config("num_fewshot")
    if own == 0 and count:  # the harness keeps to it too: its prompt has examples in it
        raise UserError(f"the task {name_of(task)!r} is asked with 0 shots, got {count}. Leave shots out.")
    task.set_config(key="num_fewshot", value=(own or 0) if count is None else count)


def _explain_missing(missing: Mapping[str, str]) -> str:
    named = ", ".join(repr(name) for name in missing)
    if not hub.is_reachable():
        listed = "".join(f"\n  {name}: {reason}" for name, reason in missing.items())
        return (
            f"the data of {named} are not in the local cache, and the hub cannot be asked (no network, or "
            "HF_HUB_OFFLINE is set). Run the same command once where there is a network, with --limit 1, and bring "
            f"its cache here (HF_HOME, ~/.cache/huggingface); or give tasks of your own: --tasks my_rows.jsonl.{listed}"
        )
    listed = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    return f"tasks that cannot be loaded: {listed}. Mend that, or leave them out of tasks."


def fingerprint(task: Any) -> str:
    """A hash of what a task asks and of whom: its settings, but for the shots, and its documents."""
    config = {name: value for name, value in task.dump_config().items() if name not in ("num_fewshot", "metadata")}
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(config.items(), key=lambda item: item[0])))
    documents = [sha256_of(repr(sorted(dict(document).items()))) for document in task.eval_docs]
    return sha256_of([text, documents])


def shots_of(task: Any) -> int:
    """How many examples stand before each question of a task."""
    return int(task.get_config("num_fewshot") or 0)


class Asker:
    """A model in memory, as the harness asks it. It is lent: nothing of it or its tokenizer is changed.

    Args:
        model: A causal language model of ``transformers``.
        tokenizer: Its own.
        batch_size: Sequences in one pass.
        chat_template: Whether questions are asked as messages, by the tokenizer's template.
        poll: Called after each response; raises to interrupt.

    Raises:
        UserError: The template is asked for, and there is none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 8,
        chat_template: bool = False,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        if chat_template and not tokenizer.chat_template:
            raise UserError("chat_template is on, and the model's tokenizer has none. Leave it off.")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.chat_template, self.poll = batch_size, chat_template, poll

    @cached_property
    def tokenizer_sha256(self) -> str:
        """The hash of what makes ids of a question: the tokenizer, and its template if that is applied."""
        return sha256_of(
            [tokenizer_state(self.tokenizer), self.tokenizer.chat_template if self.chat_template else None]
        )

    def ask(self, task: Any, limit: int | None = None) -> Found:
        """What a task says of the model. The same each time.

        Args:
            task: An object of the harness.
            limit: Ask the first so many documents only. None: all.
        """
        with _apart(), evaluating(self.model), torch.no_grad():
            import lm_eval.evaluator  # which draws a random number

            task.set_fewshot_seed(_SEED)
            random.seed(0)
            np.random.seed(_SEED)
            torch.manual_seed(_SEED)
            lm = self._make_lm()
            total = len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
            with progress(f"asking {name_of(task)}", unit="requests") as phase:
                lm.set_cache_hook(_Counter(phase, self.poll))
                found: Any = lm_eval.evaluator.evaluate(
                    lm,
                    {"tasks": {name_of(task): task}},
                    limit=total,
                    bootstrap_iters=_BOOTSTRAPS,
                    apply_chat_template=self.chat_template,
                    fewshot_as_multiturn=self.chat_template,
                )
            task._instances = None  # the requests, with all their texts
        return _read_found(found, task)

    def _make_lm(self) -> Any:
        from lm_eval.models.huggingface import HFLM

        model = self.model
        model.tie_weights = lambda *args, **kwargs: None  # they are tied, and stay the ones that are trained
        try:
            return HFLM(
                pretrained=model,
                backend="causal",
                tokenizer=copy.deepcopy(self.tokenizer),  # which is given a padding token
                batch_size=self.batch_size,
            )
        finally:
            del model.tie_weights


class _Counter:
    """Told by the harness of each request that it has the response to."""

    def __init__(self, phase: Any, poll: Callable[[], None]) -> None:
        self.phase, self.poll = phase, poll

    def add_partial(self, *of_request: Any) -> None:
        self.phase.advance()
        self.poll()


def _read_found(found: Mapping[str, Any], task: Any) -> Found:
    name = name_of(task)
    results, samples = found["results"][name], found["samples"][name]
    metrics = {
        key: (float(value), _as_error(results.get(f"{key.replace(',', '_stderr,', 1)}")))
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    scores: dict[str, list[float]] = {key: [] for key in metrics}
    hashes: dict[int, str] = {}
    for sample in samples:
        hashes[sample["doc_id"]] = sample["doc_hash"]
        for key in metrics:
            metric, _, filtered = key.partition(",")
            if filtered == sample["filter"] and isinstance(sample.get(metric), int | float | np.number):
                scores[key].append(float(sample[metric]))
    # of a metric that is no mean over documents, as a perplexity, they say nothing about differences
    means = {
        key: values
        for key, values in scores.items()
        if len(values) == len(hashes) and math.isclose(sum(values) / len(values), metrics[key][0], abs_tol=1e-9)
    }
    return Found(metrics, int(found["n-shot"][name]), found["versions"][name], list(hashes.values()), means)


def _as_error(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def aggregate(wanted: Wanted, found: Mapping[str, Found]) -> dict[str, tuple[float, float | None]]:
    """The metrics of a group, as the harness makes them of those of its tasks; those of a task alone as they are.

    Args:
        wanted: The group.
        found: What each of its tasks said, by name.
    """
    if wanted.group is None:
        return found[name_of(wanted.tasks[0])].metrics
    parts: dict[str, Any] = {}
    for name, part in found.items():
        parts[name] = {"sample_len": len(part.hashes)}
        for key, (value, error) in part.metrics.items():
            parts[name] |= {key: value, key.replace(",", "_stderr,", 1): "N/A" if error is None else error}
    with _apart():
        results = wanted.group.aggregate(parts)
    return {
        key: (float(value), _as_error(results.get(key.replace(",", "_stderr,", 1))))
        for key, value in results.items()
        if "," in key and "_stderr," not in key
    }


def weights_of(wanted: Wanted, found: Mapping[str, Found]) -> dict[str, float]:
    """What share of a group's number each of its tasks has; 1 for a task alone."""
    sizes = {name: len(part.hashes) for name, part in found.items()}
    configs = [] if wanted.group is None else wanted.group.aggregate_metric_list
    if any(config.weight_by_size for config in configs):
        return {name: size / sum(sizes.values()) for name, size in sizes.items()}
    return {name: 1 / len(sizes) for name in sizes}


def _without_bar(bar: Any, *args: Any, **kwargs: Any) -> Any:
    return bar(*args, **{**kwargs, "disable": True})


def name_of(task: Any) -> str:
    """The name of an object of the harness, whose own ``task_name`` draws random numbers."""
    return str(task.config.task)


@contextmanager
def _apart() -> Iterator[None]:
    """Without the harness's bars, remarks and processes, and with random numbers of its own."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    places: list[Any] = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    bars = [place.tqdm for place in places]
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    alone = os.environ.get("DISABLE_MULTIPROC")
    for place, bar in zip(places, bars, strict=True):
        place.tqdm = partial(_without_bar, bar)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with isolate_rng():
            yield
    finally:
        for place, bar in zip(places, bars, strict=True):
            place.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = alone
