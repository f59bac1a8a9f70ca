"""What ``compare`` measures of one model, in a process of its own: held-out NLL, rewards by temperature, retention.

``spin-lightning compare --measure WHAT ...``, where WHAT is a ``Wanted`` as JSON, and what follows are settings of
``score``. Responses and rewards are stored as ``score`` stores them, so that a killed measurement goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from spin_lightning.cli import score
from spin_lightning.cli.check import make_object
from spin_lightning.cli.quiet import silence_libraries
from spin_lightning.cli.settings_errors import explaining_plugins, explaining_settings
from spin_lightning.models.batches import pack
from spin_lightning.models.modes import evaluating
from spin_lightning.progress import track
from spin_lightning.rewards.base import Reward, SumOfRewards
from spin_lightning.rewards.program import TextMatch
from spin_lightning.runs.files import read_json, write_json
from spin_lightning.stages.retention import StartLaws, measure
from spin_lightning.stages.scoring import Players, RewardStore, Scoring
from spin_lightning.types import Prompt, ResponseBatch, UserError

#: What every response is asked first.
EXACT = "exact_match"


@dataclass(frozen=True)
class Wanted:
    """What to measure beside the settings of ``score``.

    Attributes:
        temperatures: Of the responses; at 0 there is one to a prompt, at others as many as ``data.answers_per_prompt``.
        laws: A file with the next-token laws of the model that training started from.
        is_start: Whether the model is that one, and the file is to be written.
        other_data: Rows of other tasks, or None.
    """

    temperatures: tuple[float, ...]
    laws: str
    is_start: bool = False
    other_data: str | None = None

    @property
    def as_json(self) -> str:
        """As the command line takes it."""
        return json.dumps(asdict(self))


def main(wanted: str, args: Sequence[str]) -> None:
    """Measure a model, and write ``summary.json`` into ``score.output_dir``.

    Args:
        wanted: A ``Wanted`` as JSON.
        args: Settings of ``score``.

    Raises:
        UserError: They cannot be used, or the folder holds what other settings made.
        RewardUnavailable: A judge does not reply.
    """
    silence_libraries()
    given = json.loads(wanted)
    what = Wanted(**{**given, "temperatures": tuple(given["temperatures"])})
    with explaining_settings(), explaining_plugins():
        settings = score.parse(args)
        samples = settings.data.answers_per_prompt
        scoring: Scoring = make_object("spin_lightning.stages.scoring.Scoring", settings.score)
        reward = with_exact_match(scoring.reward)
        fabric = score.make_fabric(settings.trainer)
        scoring.reward = reward
        data = score.read_rows(settings, scoring)
        load = score.Loader(settings, fabric, data, None)
        loaded: list[Any] = []

        def load_once(name: str | None) -> tuple[Any, Path | None]:
            if not loaded:
                loaded.append(load(name))
            model, lies = loaded[0]
            return model, lies

        players = Players(
            load_once, fabric.autocast, settings.model.model_name_or_path, settings.model.trust_remote_code
        )
        found: dict[str, Any] = {"rewards": {}}
        for temperature in what.temperatures:
            data.generator.temperature = temperature
            folder = scoring.output_dir / f"temperature_{temperature:g}"
            Scoring(reward, str(folder), shard_size=scoring.shard_size).run(
                players, data, samples if temperature else 1
            )
            found["rewards"][f"{temperature:g}"] = _read_rewards(folder)
        model, _ = load_once(None)
        others: list[Prompt] = []
        if what.other_data is not None:
            settings.data.train_data, scoring.reward = what.other_data, TextMatch()  # which reads no column
            others = score.read_rows(settings, scoring).prompts
        most = settings.data.micro_batch_tokens
        with torch.no_grad(), fabric.autocast(), evaluating(model):
            batches = list(_batches(data.prompts, most))
            laws = _laws_of_start(Path(what.laws), what.is_start, model, batches, data.prompts_hash, fabric.to_device)
            found |= measure_nll(model, batches, fabric.to_device, laws)
            if others:
                other = measure_nll(model, _batches(others, most), fabric.to_device)
                found |= {"other_nll": other["nll"], "other_nll_per_token": other["nll_per_token"]}
    write_json(scoring.output_dir / "summary.json", {"model": players.name, "rows": len(data.prompts), **found})


def with_exact_match(reward: Reward) -> SumOfRewards:
    """A reward that asks for an exact match first, and then what the given one asks, so that each is stored."""
    return SumOfRewards({EXACT: TextMatch()} | ({} if type(reward) is TextMatch else {reward.name: reward}))


def _read_rewards(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each reward the mean over prompts, and that of each prompt."""
    rows = RewardStore(folder / "rewards").read().to_pylist()
    found = {}
    for name in dict(rows[0]["rewards"]):
        by_row = []
        for _, group in groupby(rows, lambda row: row["prompt_id"]):
            values = [value for row in group if (value := dict(row["rewards"])[name]) is not None]
            by_row.append(fmean(values) if values else None)
        known = [value for value in by_row if value is not None]
        found[name] = {
            "mean": fmean(known) if known else None,
            "by_row": by_row,
        }
    summary = read_json(folder / "summary.json")
    return {**found, "responses": {"cut_share": summary["cut_share"], "mean_tokens": summary["mean_tokens"]}}


def _batches(prompts: Sequence[Prompt], most: int) -> Iterator[ResponseBatch]:
    """The real responses in the order of their prompts, in passes of at most so many tokens."""
    held: list[Any] = []
    tokens = 0
    for prompt in prompts:
        size = len(prompt.prompt_ids) + len(prompt.real_ids)
        if held and tokens + size > most:
            yield pack(held)
            held, tokens = [], 0
        if prompt.real_ids:
            held.append((prompt.prompt_ids, [prompt.real_ids]))
            tokens += size
    if held:
        yield pack(held)


def _laws_of_start(
    path: Path, is_start: bool, model: Any, batches: Sequence[ResponseBatch], of: str, move: Callable[[Any], Any]
) -> StartLaws:
    """The next-token laws of the start, which it writes itself."""
    laws = StartLaws(math.inf)
    if is_start:
        for batch in track(batches, "measuring", len(batches), "passes"):
            laws.add(model, move(batch))
        laws.save(path, of)
    laws.load(path, of)
    if not len(laws):
        raise UserError(
            f"{path} does not have the next-token laws of the start on these rows. Remove {path.parent} to have it "
            "measured again."
        )
    return laws


def measure_nll(
    model: Any, batches: Iterable[ResponseBatch], move: Callable[[Any], Any], laws: StartLaws | None = None
) -> dict[str, Any]:
    """NLL of the real responses, in nats a response and a token, and of each row; and the KL to laws that are given.

    Args:
        model: In evaluation mode, without gradients.
        batches: The rows.
        move: Brings a batch to the model.
        laws: Those of the model that training started from.
    """
    found: list[float] = []
    divergences: list[float] = []
    tokens = 0
    for batch in map(move, track(batches := list(batches), "measuring", len(batches), "passes")):
        log_probs, of_tokens = measure(model, batch, None if laws is None else laws.of(batch))
        found += (-log_probs).double().tolist()
        divergences += [] if of_tokens is None else of_tokens.double().tolist()
        tokens += int(batch.response_lengths.sum())
    kl = {"kl_to_start": fmean(divergences)} if divergences else {}
    return {"nll": fmean(found), "nll_per_token": sum(found) / tokens, "nll_by_row": found, **kl}
