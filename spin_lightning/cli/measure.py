"""What ``compare`` measures of one model, in a process of its own: held-out NLL, rewards by temperature, retention.

``spin-lightning compare --measure WHAT ...``, where WHAT is a ``Wanted`` as JSON, and what follows are settings of
``score``. Responses and rewards are stored as ``score`` stores them, so that a killed measurement goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from spin_lightning.cli import score
from spin_lightning.cli.check import make_object
from spin_lightning.cli.quiet import silence_libraries
from spin_lightning.cli.settings_errors import explaining_plugins, explaining_settings
from spin_lightning.models.batches import pack
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.models.modes import evaluating
from spin_lightning.models.token_laws import TokenLaws, coarse_kl, laws_of, top_laws
from spin_lightning.progress import track
from spin_lightning.rewards.base import Reward, SumOfRewards
from spin_lightning.rewards.program import TextMatch
from spin_lightning.runs.files import read_json, replacing, sha256_of, write_json
from spin_lightning.stages.scoring import Players, RewardStore, Scoring
from spin_lightning.types import Prompt, ResponseBatch

#: What every response is asked first.
EXACT = "exact_match"
#: Tokens of a law that are kept one by one.
TOKENS_OF_A_LAW = 64


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
            found |= measure_nll(model, data.prompts, most, fabric.to_device)
            laws = Path(what.laws)
            if what.is_start:
                _write_laws(laws, model, data.prompts, most, fabric.to_device)
            found["kl_to_start"] = _kl_to(laws, model, data.prompts, most, fabric.to_device)
            if others:
                other = measure_nll(model, others, most, fabric.to_device)
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
            "by_row": by_row if len(known) == len(by_row) else [],
        }
    summary = read_json(folder / "summary.json")
    return {**found, "responses": {"cut_share": summary["cut_share"], "mean_tokens": summary["mean_tokens"]}}


def _batches(prompts: Sequence[Prompt], most: int, move: Callable[[Any], Any]) -> Iterator[ResponseBatch]:
    """The real responses in the order of their prompts, in passes of at most so many tokens."""
    held: list[Any] = []
    tokens = 0
    for prompt in track(prompts, "measuring", len(prompts), "rows"):
        size = len(prompt.prompt_ids) + len(prompt.real_ids)
        if held and tokens + size > most:
            yield move(pack(held))
            held, tokens = [], 0
        held.append((prompt.prompt_ids, [prompt.real_ids]))
        tokens += size
    if held:
        yield move(pack(held))


def measure_nll(model: Any, prompts: Sequence[Prompt], most: int, move: Callable[[Any], Any]) -> dict[str, Any]:
    """NLL of the real responses, in nats a response and a token, and of each row.

    Args:
        model: In evaluation mode, without gradients.
        prompts: The rows.
        most: Tokens in a pass.
        move: Brings a batch to the model.
    """
    found: list[float] = []
    tokens = 0
    for batch in _batches([prompt for prompt in prompts if prompt.real_ids], most, move):
        found += (-response_log_probs(model, batch)).double().tolist()
        tokens += int(batch.response_lengths.sum())
    return {"nll": fmean(found), "nll_per_token": sum(found) / tokens, "nll_by_row": found}


def _write_laws(path: Path, model: Any, prompts: Sequence[Prompt], most: int, move: Callable[[Any], Any]) -> None:
    laws = [top_laws(model, batch, TOKENS_OF_A_LAW) for batch in _batches(prompts, most, move)]
    tensors = {
        name: torch.cat([getattr(law, name) for law in laws]).cpu().contiguous()
        for name in ("ids", "log_probs", "rest")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"real_sha256": _hash_of(prompts)})


def _kl_to(path: Path, model: Any, prompts: Sequence[Prompt], most: int, move: Callable[[Any], Any]) -> float:
    """KL of the model to the one whose laws are in a file, in nats a token of the real responses."""
    start, first, total = TokenLaws(**load_file(path)), 0, 0.0
    for batch in _batches(prompts, most, move):
        part = move(
            replace(
                start,
                **{
                    name: getattr(start, name)[first : first + len(batch.scored)]
                    for name in ("ids", "log_probs", "rest")
                },
            )
        )
        total += float(coarse_kl(laws_of(model, batch, part.ids), part).double().sum())
        first += len(batch.scored)
    return total / first


def _hash_of(prompts: Sequence[Prompt]) -> str:
    return sha256_of([[prompt.prompt_ids, prompt.real_ids] for prompt in prompts])
