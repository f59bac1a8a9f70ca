"""Makes the pairs of one iteration: the opponent answers, both responses are scored, shards are written.

Shard after shard, each independent of all others, so that an interrupted run redoes at most one. What decides a
shard's content is in the store's binding; nothing else may.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import nn

from spin_lightning.data.encoding import Encoder
from spin_lightning.generation.base import Player, ResponseGenerator, opened, seed_of
from spin_lightning.generation.pair_store import PairStore
from spin_lightning.models.batches import pack_rows
from spin_lightning.models.forward_paths import forward_path_of
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.models.modes import compute_dtype, evaluating
from spin_lightning.progress import Phase, progress, track
from spin_lightning.runs import processes
from spin_lightning.terminal import say
from spin_lightning.types import Prompt, Response, UserError

#: The sampler's own log-probs are taken where they agree with a scoring pass this closely, in nats a token, on a
#: shard's first prompts. In float32 they do; in bfloat16 they are not asked, as decoding rounds otherwise than a whole
#: pass, and answers that are certain would agree by chance.
SAMPLER_TOLERANCE = 1e-4
NUM_COMPARED = 4


@dataclass
class PairMaker:
    """What an opponent needs to answer and to score, for one iteration.

    Attributes:
        opponent: Who responds. Its model is put into evaluation mode while it works, and back afterwards.
        initial: The opponent of iteration 0, where the loss asks for its log-probs, else None.
        initial_responses: Whether each pair also carries the response of iteration 0.
        numerics: A context with the precision of a training step.
        poll: Called between responses; raises to interrupt.
    """

    opponent: Player
    encoder: Encoder
    generator: ResponseGenerator
    prompts: Sequence[Prompt]
    iteration: int
    answers_per_prompt: int
    seed: int
    micro_batch_tokens: int
    opponent_sha256: str
    numerics: Callable[[], AbstractContextManager[Any]]
    poll: Callable[[], None]
    initial: nn.Module | None = None
    initial_responses: bool = False
    shard_size: int = 256
    #: Responses that are asked for at once: fewer after memory ran out.
    most_at_once: int = field(default=sys.maxsize, init=False)

    @property
    def model(self) -> nn.Module:
        """The opponent's model."""
        model: nn.Module = self.opponent.model
        return model

    def make(self, store: PairStore, earlier: Mapping[int, PairStore], history: int) -> list[str]:
        """Fill a store with this iteration's pairs and those of the last ``history`` iterations, re-scored.

        Of several processes each makes its share of the shards.

        Returns:
            The names of all shards, in their order.
        """
        starts = range(0, len(self.prompts), self.shard_size)
        sources = range(self.iteration - 1, max(-1, self.iteration - 1 - history), -1)
        names = [self._shard_name(source, start) for source in (self.iteration, *sources) for start in starts]
        own = processes.deal(starts)
        done = [store.has_shard(self._shard_name(self.iteration, start)) for start in own]
        total = sum(len(self.prompts[start : start + self.shard_size]) for start in own) * self.answers_per_prompt
        with (
            torch.no_grad(),
            self.numerics(),
            evaluating(self.model),
            opened(self.generator, self.opponent) if processes.largest(not all(done)) else nullcontext(),
            progress("answering", total, "responses") as phase,
        ):
            forward_path_of(self.model)  # before the first response, so that all are computed alike
            for start, is_done in zip(own, done, strict=True):
                prompts = self.prompts[start : start + self.shard_size]
                if is_done:
                    phase.skip(len(prompts) * self.answers_per_prompt)
                else:
                    store.write_shard(
                        self._shard_name(self.iteration, start), self._make_pairs(prompts, earlier, phase)
                    )
            for source in sources:
                for start in track(own, f"scoring the pairs of iteration {source}", len(own), "shards"):
                    name = self._shard_name(source, start)
                    if not store.has_shard(name):
                        self.poll()
                        store.write_shard(name, self._rescore(earlier[source].read_shard(name), store, start))
        return names

    @staticmethod
    def _shard_name(source: int, start: int) -> str:
        return f"iteration_{source}-{start:09d}.parquet"

    def _make_pairs(
        self, prompts: Sequence[Prompt], earlier: Mapping[int, PairStore], phase: Phase
    ) -> list[dict[str, Any]]:
        wanted = [(prompt, answer) for prompt in prompts for answer in range(self.answers_per_prompt)]
        seeds = [seed_of(self.seed, self.iteration, prompt.prompt_id, answer) for prompt, answer in wanted]
        responses: dict[int, Any] = {}
        for index, response in self._generate_all([prompt.prompt_ids for prompt, _ in wanted], seeds):
            self.poll()
            responses[index] = response
            phase.advance(1, tokens=len(response.ids))
        first_answers = self._read_first_responses(prompts, earlier)
        rows = []
        for index, (prompt, answer) in enumerate(wanted):
            response = responses[index]
            asked = [{"role": turn["role"], "content": turn["content"]} for turn in prompt.row.prompt]
            extras = prompt.row.real_extras  # for people to read, they are what the template made of them
            text = self.encoder.decode(prompt.real_ids) if extras else prompt.row.real
            real = {"role": "assistant", "content": text}
            generated = {"role": "assistant", "content": self.encoder.decode(response.ids)}
            initial_ids = (
                first_answers.get((prompt.prompt_id, answer), response.ids) if self.initial_responses else None
            )
            rows.append(
                {
                    "iteration": self.iteration,
                    "prompt_id": prompt.prompt_id,
                    "answer": answer,
                    "prompt": asked,
                    "chosen": [real],
                    "rejected": [generated],
                    "real": [*asked, real],
                    "generated": [*asked, generated],
                    "prompt_ids": prompt.prompt_ids,
                    "real_ids": prompt.real_ids,
                    "generated_ids": response.ids,
                    "real_finish_reason": prompt.real_finish_reason,
                    "generated_finish_reason": response.finish_reason,
                    "generated_log_prob": response.log_prob,
                    "initial_ids": initial_ids,
                    "opponent_sha256": self.opponent_sha256,
                    "seed": seeds[index],
                }
            )
        return self._score_rows(rows)

    def _generate_all(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[tuple[int, Response]]:
        """The opponent's responses.

        Where memory runs out, those that are missing are asked for again, half as many at a time: a response depends on
        its prompt and its seed alone.
        """
        missing = dict.fromkeys(range(len(prompts)))
        while missing:
            asked = list(itertools.islice(missing, self.most_at_once))
            try:
                for number, response in self._generate([prompts[i] for i in asked], [seeds[i] for i in asked]):
                    if asked[number] not in missing:
                        raise self._make_error(f"answered prompt {number} twice")
                    del missing[asked[number]]
                    yield asked[number], response
                if unanswered := sum(index in missing for index in asked):
                    raise self._make_error(f"gave {len(asked) - unanswered} answers to {len(asked)} prompts")
                continue
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                together = min(self.most_at_once, self.generator.batch_size)
                if not _is_out_of_memory(error) or together == 1:
                    raise
                self.most_at_once = together // 2
                why = str(error).partition("\n")[0][:120] or type(error).__name__
            # outside of the handler, whose traceback holds on to the memory
            torch.cuda.empty_cache()
            say(f"note: out of memory in generation ({why}); going on with {self.most_at_once} prompts at a time")

    def _generate(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[tuple[int, Response]]:
        """What the generator yields, each response checked."""
        ends = self.encoder.end_ids
        answers = self.generator.generate(prompts, seeds, ends[0] if len(ends) == 1 else ends, self.encoder.pad_id)
        if not isinstance(answers, Iterable):
            raise self._make_error(f"gave {type(answers).__name__} instead of answers one by one")
        for answer in answers:
            yield self._check_response(answer, len(prompts))

    def _check_response(self, answer: Any, num_asked: int) -> tuple[int, Response]:
        """What a generator yielded, if it is what it has to be.

        Raises:
            UserError: It is not. The message names the generator and what is wrong.
        """
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Response)):
            raise self._make_error(
                f"yielded {_describe(answer)} instead of a pair of a prompt's number and its Response"
            )
        number, response = answer
        if type(number) is not int or not 0 <= number < num_asked:
            raise self._make_error(f"yielded an answer to prompt {number!r}, and there are {num_asked} prompts")
        ids, ends, cap = response.ids, self.encoder.end_ids, self.generator.max_new_tokens
        if not isinstance(ids, list) or not ids or any(type(token) is not int for token in ids):
            raise self._make_error(f"gave {_describe(ids)} as ids, which must be a list of at least one int")
        rows = len(self.model.get_input_embeddings().weight)  # type: ignore[operator]
        if not 0 <= min(ids) <= max(ids) < rows:
            raise self._make_error(f"gave the ids {min(ids)} to {max(ids)}, and the model has rows for 0 to {rows - 1}")
        if len(ids) > cap:
            raise self._make_error(f"gave an answer of {len(ids)} tokens, and max_new_tokens is {cap}")
        if any(token in ends for token in ids[:-1]):
            raise self._make_error("gave an answer with the token that ends one before its last place")
        if response.finish_reason != ("stop" if ids[-1] in ends else "length"):
            raise self._make_error(
                f"gave the finish_reason {response.finish_reason!r} to an answer that ends with token {ids[-1]}; it is "
                f"'stop' if and only if that is one of {list(ends)}, else 'length'"
            )
        if not isinstance(response.log_prob, float | int) or not math.isfinite(response.log_prob):
            raise self._make_error(
                f"gave {response.log_prob!r} as log_prob, which must be a finite number of nats (a model with NaN "
                "or infinite weights gives none)"
            )
        return number, response

    def _make_error(self, what: str) -> UserError:
        kind = type(self.generator)
        return UserError(
            f"the generator {kind.__module__}.{kind.__qualname__} {what}. Mend its generate method; "
            "ResponseGenerator.generate says what it has to yield."
        )

    def _rescore(self, table: pa.Table, store: PairStore, start: int) -> list[dict[str, Any]]:
        """Rows of an earlier iteration as this one's opponent sees them. It has scored the real responses already."""
        own = store.read_shard(
            self._shard_name(self.iteration, start), ["prompt_id", "opponent_real_log_prob", "initial_real_log_prob"]
        )
        known = {row.pop("prompt_id"): row for row in own.to_pylist()}
        return self._score_rows([{**row, **known[row["prompt_id"]]} for row in table.to_pylist()], generated_only=True)

    def _score_rows(self, rows: list[dict[str, Any]], generated_only: bool = False) -> list[dict[str, Any]]:
        players = {"opponent": self.model} | ({"initial": self.initial} if self.initial is not None else {})
        sides = ["generated"] if generated_only else ["real", "generated"]
        for player, model in players.items():
            rest = rows
            if player == "opponent" and not generated_only:
                compared = list(dict.fromkeys(row["prompt_id"] for row in rows))[:NUM_COMPARED]
                first = [row for row in rows if row["prompt_id"] in compared]
                rest = [row for row in rows if row["prompt_id"] not in compared]
                self._add_log_probs(player, model, first, sides)
                if _is_exact(model) and all(
                    map(_sampler_agrees, first)
                ):  # then a pass over the generated responses would find what is known
                    for row in rest:
                        row["opponent_generated_log_prob"] = row["generated_log_prob"]
                    self._add_log_probs(player, model, rest, ["real"])
                    continue
            self._add_log_probs(player, model, rest, sides)
        return rows

    def _add_log_probs(
        self, player: str, model: nn.Module, rows: Sequence[dict[str, Any]], sides: Sequence[str]
    ) -> None:
        """Add a player's log-probs to the rows: each prompt once, however many responses it has."""
        device = next(model.parameters()).device
        with progress("scoring", len(rows), "pairs") as phase:
            for indices, batch, places in pack_rows(rows, [f"{side}_ids" for side in sides], self.micro_batch_tokens):
                self.poll()
                values = response_log_probs(model, move_data_to_device(batch, device)).tolist()
                for index, place in zip(indices, places.tolist(), strict=True):
                    for side, response in zip(sides, place, strict=True):
                        rows[index][f"{player}_{side}_log_prob"] = values[response]
                phase.advance(len(indices), tokens=len(batch.input_ids))

    def _read_first_responses(
        self, prompts: Sequence[Prompt], earlier: Mapping[int, PairStore]
    ) -> dict[tuple[int, int], list[int]]:
        if not self.initial_responses or self.iteration == 0:
            return {}
        table = earlier[0].read_shard(
            self._shard_name(0, prompts[0].prompt_id), ["prompt_id", "answer", "generated_ids"]
        )
        return {(row["prompt_id"], row["answer"]): row["generated_ids"] for row in table.to_pylist()}


def _describe(value: Any) -> str:
    """What something is, in few words."""
    if isinstance(value, list | tuple):
        return (
            f"a {type(value).__name__} of "
            f"{', '.join(dict.fromkeys(type(item).__name__ for item in value)) or 'nothing'}"
        )
    return type(value).__name__


def own_pairs(table: pa.Table, iteration: int) -> pa.Table:
    """The pairs whose responses were generated in this iteration."""
    return table.filter(pc.equal(table["iteration"], iteration))


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in words)


def _is_exact(model: nn.Module) -> bool:
    return torch.finfo(compute_dtype(next(model.parameters()).device, model)).bits >= 32


def _sampler_agrees(row: Mapping[str, Any]) -> bool:
    difference = abs(row["generated_log_prob"] - row["opponent_generated_log_prob"])
    return bool(difference <= SAMPLER_TOLERANCE * len(row["generated_ids"]))
