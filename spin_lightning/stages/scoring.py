"""``Scoring``: responses of a model or of the data, what a reward says of them, and the rows that follow from it.

Responses, rewards and comparisons are three tables of shards, each bound to what made it; a run that is killed makes
again at most the shard in progress, so no judge is asked twice about what it has said.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import pyarrow as pa
import torch

from spin_lightning.data.preferences import PreferenceDataModule
from spin_lightning.generation.base import Player, opened, seed_of
from spin_lightning.generation.responding import Responder
from spin_lightning.generation.synthetic_data import SyntheticDataModule
from spin_lightning.models.modes import compute_dtype, evaluating
from spin_lightning.models.rope import refuse_crossing
from spin_lightning.models.saving import save_model, weights_hash
from spin_lightning.progress import Phase, progress
from spin_lightning.rewards.base import (
    Answer,
    Reward,
    check_reward,
    make_answer,
    preferred,
    preferred_by_order,
    refuse_without_real,
    scored_with_parts,
    settings_kept,
)
from spin_lightning.rewards.conclusions import (
    Group,
    best_rows,
    describe_rewards,
    describe_wins,
    pair_rows,
    unjudged_of,
    why_no_best,
    why_no_pairs,
    why_unjudged,
)
from spin_lightning.runs import signals
from spin_lightning.runs.files import hold, read_json, refuse_links, replacing, run_folder, write_json
from spin_lightning.runs.shards import MESSAGES, ShardStore, find_differing
from spin_lightning.types import Prompt, UserError

#: Prompts in a shard of responses, at least: with fewer, slots that are free early stay empty.
LEAST_TOGETHER = 256

_KEY = [("prompt_id", pa.int64()), ("answer", pa.int32())]


class ResponseStore(ShardStore):
    """Responses to the prompts, of one model or of the data."""

    schema = pa.schema(
        [
            *_KEY,
            ("prompt", MESSAGES),
            ("response", pa.string()),
            ("real", pa.string()),
            ("response_ids", pa.list_(pa.int32())),
            ("finish_reason", pa.string()),
            ("seed", pa.int64()),
        ]
    )
    rows_are: ClassVar[str] = "responses"


class RewardStore(ShardStore):
    """What the reward said of each response."""

    schema = pa.schema(
        [
            *_KEY,
            ("reward", pa.float64()),  # null: cannot be judged
            ("rewards", pa.map_(pa.string(), pa.float64())),  # of a sum, by name
            ("over_next", pa.float64()),  # probability that it is better than the prompt's next response
        ]
    )
    rows_are: ClassVar[str] = "rewards"


class ComparisonStore(ShardStore):
    """The probability that a response is better than the other model's, shown before it and behind it."""

    schema = pa.schema([*_KEY, ("shown_first", pa.float64()), ("shown_second", pa.float64())])
    rows_are: ClassVar[str] = "comparisons"


class ComparedPairs(SyntheticDataModule):
    """Rows with two responses each, to be compared by a reward."""

    needs_rejected = True
    also_counted: ClassVar[tuple[str, ...]] = PreferenceDataModule.also_counted


Store = TypeVar("Store", bound=ShardStore)


@dataclass(frozen=True)
class Players:
    """How models are loaded and computed with.

    Attributes:
        load: The model of the settings, or the one of a name, on its device; and the folder where the same weights
            lie, if there is one.
        numerics: A context with the precision of their passes.
        name: Of the model of the settings.
        trust_remote_code: Whether code that comes with a model may run.
    """

    load: Callable[[str | None], tuple[Any, Path | None]]
    numerics: Callable[[], AbstractContextManager[Any]]
    name: str
    trust_remote_code: bool = False


class Scoring:
    """Has a reward judge the responses to the prompts of the data, and keeps what it said.

    Args:
        output_dir: Folder of the run. The same command continues a killed one.
        reward: What judges the responses: ``NumberMatch``, ``TextMatch``, ``FunctionReward``, ``ModelReward``,
            ``JudgeReward``, ``SumOfRewards``, or the class path of your own.
        against: Another model, by name or folder. It answers the same prompts with the same random numbers, and the
            reward says whose responses are better.
        part: Which rows: ``train``, or ``held_out``, those that a game with the same data settings sets aside.
        right_from: A response is right if its reward is at least this: what pass@k counts. None: 1 where all rewards
            are within [0, 1]; of others, as a reward model's, nothing is right or wrong.
        best_from: Leave out of ``best.jsonl`` the prompts whose best response has a lower reward. None: no prompt.
        shard_size: Prompts in one shard of rewards: the most that a judge is asked again after a kill. Shards of
            responses have at least 256, as several are generated together.

    Raises:
        UserError: A setting is outside its range.
    """

    def __init__(
        self,
        reward: Reward,
        output_dir: str = "runs/score",
        against: str | None = None,
        part: Literal["train", "held_out"] = "train",
        right_from: float | None = None,
        best_from: float | None = None,
        shard_size: int = 64,
    ) -> None:
        if shard_size < 1:
            raise UserError(f"score.shard_size must be at least 1, got {shard_size!r}.")
        if part not in ("train", "held_out"):
            raise UserError(f"score.part must be 'train' or 'held_out', got {part!r}.")
        for name, value in (("right_from", right_from), ("best_from", best_from)):
            if value is not None and not math.isfinite(value):
                raise UserError(f"score.{name} must be a finite number, got {value!r}.")
        check_reward(reward)
        self.reward, self.against, self.part = reward, against, part
        self.output_dir = run_folder(output_dir, "score.output_dir")
        self.right_from, self.best_from, self.shard_size = right_from, best_from, shard_size

    def run(
        self,
        players: Players,
        data: SyntheticDataModule,
        answers_per_prompt: int,
        others: SyntheticDataModule | None = None,
    ) -> dict[str, Any]:
        """Score the responses, or go on where a killed run was.

        Args:
            players: Give the models.
            data: With its rows read.
            answers_per_prompt: Responses of the model to each prompt. 0: those of the data.
            others: The same rows, read for the tokenizer of ``against``.

        Returns:
            What ``summary.json`` holds.

        Raises:
            UserError: Something cannot be scored, or the folder holds what other settings made.
            RewardUnavailable: A judge does not reply. What is finished is kept.
        """
        prompts = self.prompts_of(data)
        if not prompts:
            raise UserError(f"there are no {self.part} rows. Give data.val_data, or raise data.val_fraction.")
        if not self.reward.compares:  # else it compares the responses to a prompt with each other
            refuse_without_real(self.reward, prompts)
        refuse_links(
            self.output_dir, r"served(\.partial)?|(responses|rewards|against|comparisons)(_manifest\.json)?|\w+\.jsonl?"
        )
        lock = hold(self.output_dir)
        signals.listen()
        try:
            self._prompts = {prompt.prompt_id: prompt for prompt in prompts}
            if answers_per_prompt:
                responses = _Maker(self, players, data, answers_per_prompt).make("responses", None)
            else:
                responses = self._take_recorded(data)
            theirs = None
            if self.against is not None:
                theirs = self._make_others(players, others or data, answers_per_prompt)
            try:
                rewards = self._score(responses)
                comparisons = None if theirs is None else self._compare(responses, theirs)
            finally:
                self.reward.close()
            return self._conclude(players, responses, rewards, comparisons, answers_per_prompt)
        finally:
            signals.stop_listening()
            lock.release()

    def prompts_of(self, data: SyntheticDataModule) -> list[Prompt]:
        """The prompts of the part that is scored."""
        return data.prompts if self.part == "train" else data.val_prompts

    def _make_others(self, players: Players, data: SyntheticDataModule, answers_per_prompt: int) -> ResponseStore:
        if not answers_per_prompt:
            raise UserError("score.against compares responses of models. Set data.answers_per_prompt to 1 or more.")
        asked = [prompt.row.prompt for prompt in self.prompts_of(data)]
        if asked != [prompt.row.prompt for prompt in self._prompts.values()]:
            raise UserError(
                f"by its own tokenizer and template other rows are too long for {self.against} than for "
                f"{players.name}. Raise data.max_prompt_tokens, so that both are asked the same."
            )
        return _Maker(self, players, data, answers_per_prompt).make("against", self.against)

    # --- the tables ----------------------------------------------------------------------------------------------

    def open(self, kind: type[Store], name: str, binding: Mapping[str, Any]) -> Store:
        """A table of the run, begun or continued. One that others began and left empty begins anew.

        Raises:
            UserError: It holds what something else made.
        """
        folder = self.output_dir / name
        manifest = folder.with_name(f"{name}_manifest.json")
        kept = read_json(manifest)
        if kept is not None and (differing := find_differing(binding, kept["binding"])):
            if kept["shards"]:
                raise UserError(
                    f"the {kind.rows_are} in {folder} were made by something else than this run; what differs: "
                    f"{', '.join(differing)}. Use another score.output_dir, or remove {name}/ and {manifest.name} to "
                    "have them made again."
                )
            manifest.unlink()
        return kind(folder, binding)

    def fill(
        self,
        store: ShardStore,
        make: Callable[[Sequence[Prompt], Phase], list[dict[str, Any]]],
        phase: Phase,
        per_prompt: int,
        prompts: Sequence[Prompt] = (),
    ) -> None:
        """Make the shards that are missing, and finish the table."""
        names, prompts, size = [], prompts or list(self._prompts.values()), store.binding["shard_size"]
        for start in range(0, len(prompts), size):
            names.append(name := _shard_name(start))
            own = prompts[start : start + size]
            if store.has_shard(name):
                phase.skip(len(own) * per_prompt)
            else:
                signals.end_if_asked()
                store.write_shard(name, make(own, phase))
        store.finish(names)

    def _take_recorded(self, data: SyntheticDataModule) -> ResponseStore:
        """The responses of the data in the place of a model's."""
        binding = {**self._rows_of(data), "answers_per_prompt": 0, "recorded": 1 + data.needs_rejected}
        store = self.open(ResponseStore, "responses", binding)

        def take(prompts: Sequence[Prompt], phase: Phase) -> list[dict[str, Any]]:
            rows = []
            for prompt in prompts:
                row = prompt.row
                sides = [(row.real, row.real_finish_reason)]
                sides += [(row.rejected, row.rejected_finish_reason)] if row.rejected is not None else []
                for number, (text, finish_reason) in enumerate(sides):
                    rows.append(_row_of(prompt, number, text, finish_reason) | {"real": None})
                phase.advance(1)
            return rows

        if not store.is_complete:
            with progress("reading responses", len(self._prompts), "rows") as phase:
                self.fill(store, take, phase, 1)
        return store

    def _rows_of(self, data: SyntheticDataModule) -> dict[str, Any]:
        sha256 = data.prompts_hash if self.part == "train" else data.held_out_hash
        size = self.shard_size * math.ceil(LEAST_TOGETHER / self.shard_size)
        return {"prompts_sha256": sha256, "encoding_sha256": data.encoder.fingerprint, "shard_size": size}

    def _score(self, responses: ResponseStore) -> RewardStore:
        said = {"reward": settings_kept(self.reward), "shard_size": self.shard_size}
        binding = {"responses_sha256": responses.sha256, **said}
        store = self.open(RewardStore, "rewards", binding)

        def score(prompts: Sequence[Prompt], phase: Phase) -> list[dict[str, Any]]:
            rows = self._read(responses, prompts)
            # a reward that compares has nothing to compare these with but each other
            alone = [row for row in rows if self.reward.compares and row["real"] is None]
            asked = [row for row in rows if not self.reward.compares or row["real"] is not None]
            values, parts = scored_with_parts(self.reward, self._answers(asked))
            for number, (row, value) in enumerate(zip(asked, values, strict=True)):
                row["reward"] = value
                row["rewards"] = [(name, of_part[number]) for name, of_part in parts.items()]
            pairs = [
                (first, second)
                for _, group in groupby(alone, lambda row: row["prompt_id"])
                for first, second in _in_twos(list(group))
            ]
            firsts, seconds = [first for first, _ in pairs], [second for _, second in pairs]
            for row, value in zip(firsts, preferred(self.reward, *map(self._answers, (firsts, seconds))), strict=True):
                row["over_next"] = value
            phase.advance(len(rows))
            return rows

        if not store.is_complete:
            total = sum(shard["rows"] for shard in responses.manifest["shards"])
            with progress("asking the reward", total, "responses") as phase:
                self.fill(store, score, phase, total // len(self._prompts))
        return store

    def _compare(self, responses: ResponseStore, others: ResponseStore) -> ComparisonStore:
        binding = {
            "responses_sha256": responses.sha256,
            "against_sha256": others.sha256,
            "reward": settings_kept(self.reward),
            "shard_size": self.shard_size,
        }
        store = self.open(ComparisonStore, "comparisons", binding)

        def compare(prompts: Sequence[Prompt], phase: Phase) -> list[dict[str, Any]]:
            ours, theirs = self._read(responses, prompts), self._read(others, prompts)
            found = preferred_by_order(self.reward, self._answers(ours), self._answers(theirs))
            phase.advance(len(ours))
            return [
                {**row, **dict(zip(("shown_first", "shown_second"), pair or (None, None), strict=True))}
                for row, pair in zip(ours, found, strict=True)
            ]

        if not store.is_complete:
            total = sum(shard["rows"] for shard in responses.manifest["shards"])
            with progress("comparing", total, "pairs") as phase:
                self.fill(store, compare, phase, total // len(self._prompts))
        return store

    def _read(self, store: ShardStore, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """The rows of some prompts, which one shard holds."""
        first, last, size = prompts[0].prompt_id, prompts[-1].prompt_id, store.binding["shard_size"]
        table = store.read_shard(_shard_name(first - first % size))
        return [row for row in table.to_pylist() if first <= row["prompt_id"] <= last]

    def _answers(self, rows: Iterable[Mapping[str, Any]]) -> list[Answer]:
        answers = []
        for row in rows:
            prompt = self._prompts[row["prompt_id"]]
            answer = make_answer(prompt, row["response_ids"], row["response"], row["finish_reason"])
            answers.append(replace(answer, real=row["real"]))
        return answers

    # --- and what follows from them ------------------------------------------------------------------------------

    def _conclude(
        self,
        players: Players,
        responses: ResponseStore,
        rewards: RewardStore,
        comparisons: ComparisonStore | None,
        answers_per_prompt: int,
    ) -> dict[str, Any]:
        compares, found = self.reward.compares, rewards.read().to_pylist()
        rows = [{**response, **said} for response, said in zip(responses.read().to_pylist(), found, strict=True)]
        groups = [list(group) for _, group in groupby(rows, lambda row: row["prompt_id"])]
        best = list(best_rows(groups, self._prompts, self.best_from))
        pairs = list(pair_rows(groups, self._prompts, compares))
        summary = {
            "model": players.name if answers_per_prompt else None,
            "reward": settings_kept(self.reward),
            "prompts": len(groups),
            "responses": len(rows),
            "answers_per_prompt": answers_per_prompt,
            **describe_rewards(groups, self.right_from, compares),
            "against": None,
            "best_rows": len(best),
            "pair_rows": len(pairs),
        }
        if reasons := self._explain(groups, len(best), len(pairs)):
            summary["reasons"] = reasons
        if comparisons is not None:
            summary["against"] = {"model": self.against, **describe_wins(comparisons.read().to_pylist(), compares)}
        _write_lines(self.output_dir / "best.jsonl", best)
        _write_lines(self.output_dir / "pairs.jsonl", pairs)
        write_json(self.output_dir / "summary.json", summary)  # last: where it is, all is there
        return summary

    def _explain(self, groups: Sequence[Group], best: int, pairs: int) -> dict[str, str]:
        """Why something is missing, by the key of the summary that says how much there is of it."""
        reasons, unjudged = {}, [row for group in groups for row in unjudged_of(group)]
        if unjudged:
            whole = [row for row in unjudged if self.reward.judges_cut or row["finish_reason"] == "stop"]
            why = [why_unjudged(unjudged, self.reward.judges_cut)]
            why += [self.reward.explain_none(self._answers(whole))] if whole else []
            reasons["unjudged"] = "; ".join(filter(None, why))
        if not best:
            reasons["best_rows"] = why_no_best(groups, self.best_from, self.reward.compares)
        if not pairs:
            reasons["pair_rows"] = why_no_pairs(groups, self.reward.compares)
        return reasons


class _Maker:
    """Has models respond, one after the other, so that one is in memory at a time."""

    def __init__(self, scoring: Scoring, players: Players, data: SyntheticDataModule, answers_per_prompt: int) -> None:
        self.scoring, self.players, self.data, self.per_prompt = scoring, players, data, answers_per_prompt

    def make(self, folder: str, name: str | None) -> ResponseStore:
        """The responses of a model, made where they are missing."""
        scoring, data, per_prompt = self.scoring, self.data, self.per_prompt
        prompts = scoring.prompts_of(data)
        model, lies = self.players.load(name)
        try:
            data.refuse_longer_than(getattr(model.config, "max_position_embeddings", math.inf))
            refuse_crossing(model, [len(prompt.prompt_ids) for prompt in prompts], data.generator.max_new_tokens)
            with self.players.numerics():
                dtype = compute_dtype(next(model.parameters()).device, model)
            binding = {
                **scoring._rows_of(data),
                "model_sha256": weights_hash(model),
                "sampling": data.generator.sampling,
                "answers_per_prompt": per_prompt,
                "seed": data.seed,
                "dtype": str(dtype),
                **({"engine": engine} if (engine := data.generator.engine) else {}),
            }
            store = scoring.open(ResponseStore, folder, binding)
            if not store.is_complete:
                total = len(prompts) * per_prompt
                with (
                    torch.no_grad(),
                    self.players.numerics(),
                    evaluating(model),
                    self._served(model, lies) as player,
                    opened(data.generator, player),
                    progress("answering", total, "responses") as phase,
                ):
                    responder = Responder(data.generator, data.encoder, model, signals.end_if_asked)
                    scoring.fill(store, partial(self._respond, responder), phase, per_prompt, prompts)
            return store
        finally:
            data.generator.shut_down()

    def _respond(self, responder: Responder, prompts: Sequence[Prompt], phase: Phase) -> list[dict[str, Any]]:
        wanted = [(prompt, answer) for prompt in prompts for answer in range(self.per_prompt)]
        seeds = [seed_of(self.data.seed, 0, prompt.prompt_id, answer) for prompt, answer in wanted]
        rows: dict[int, dict[str, Any]] = {}
        for number, response in responder.respond([prompt.prompt_ids for prompt, _ in wanted], seeds):
            (prompt, answer), text = wanted[number], self.data.encoder.decode(response.ids)
            row = _row_of(prompt, answer, text, response.finish_reason)
            rows[number] = row | {"response_ids": response.ids, "seed": seeds[number]}
            phase.advance(1, tokens=len(response.ids))
        return [rows[number] for number in range(len(wanted))]

    @contextmanager
    def _served(self, model: Any, lies: Path | None) -> Iterator[Player]:
        """The model as a player, in a folder too where the generator reads it from one."""
        if lies is not None or not self.data.generator.needs_folder:
            yield Player(model, lies)
            return
        folder, encoder = self.scoring.output_dir / "served", self.data.encoder
        trusted = self.players.trust_remote_code
        save_model(model, encoder.tokenizer, folder, "# Scored\n", encoder.end_ids, trust_remote_code=trusted)
        try:
            yield Player(model, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _shard_name(first: int) -> str:
    return f"prompts-{first:09d}.parquet"


def _row_of(prompt: Prompt, answer: int, text: str, finish_reason: str) -> dict[str, Any]:
    return {
        "prompt_id": prompt.prompt_id,
        "answer": answer,
        "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in prompt.row.prompt],
        "response": text,
        "real": prompt.row.real if prompt.row.has_real else None,
        "response_ids": None,
        "finish_reason": finish_reason,
    }


def _in_twos(rows: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(rows[::2], rows[1::2], strict=False)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
