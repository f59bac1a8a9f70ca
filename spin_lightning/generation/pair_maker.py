"""Makes the pairs of one iteration: the opponent answers, both responses are scored, shards are written.

Shard after shard, each independent of all others, so that an interrupted run redoes at most one. What decides a
shard's content is in the store's binding; nothing else may.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import nn

from spin_lightning.data.encoding import Encoder
from spin_lightning.generation.base import Player, ResponseGenerator, opened, seed_of
from spin_lightning.generation.pair_store import PairStore, own_shards
from spin_lightning.generation.responding import Responder
from spin_lightning.models.batches import pack_rows
from spin_lightning.models.forward_paths import forward_path_of
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.models.modes import compute_dtype, evaluating
from spin_lightning.progress import Phase, progress, track
from spin_lightning.runs import processes
from spin_lightning.types import Prompt

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
        rank: Given rows of pairs, one for each response, and what the real responses are known to be worth, by prompt:
            the rows to keep, with what a reward says of both sides. None: all, as they are.
        keeps_real: Whether the rows that are kept have the real responses of the data.
        judged: Pairs of an earlier iteration with the same real responses, which a reward was asked about there.
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
    rank: Callable[[list[dict[str, Any]], Mapping[int, float | None]], list[dict[str, Any]]] | None = None
    keeps_real: bool = True
    judged: PairStore | None = None

    def __post_init__(self) -> None:
        self._responder = Responder(self.generator, self.encoder, self.model, self.poll)

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
        of_earlier = {source: own_shards(earlier[source], source) for source in sources}
        names = [*(self._shard_name(self.iteration, start) for start in starts), *itertools.chain(*of_earlier.values())]
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
            for source, all_shards in of_earlier.items():
                shards = processes.deal(all_shards)
                for name in track(shards, f"scoring the pairs of iteration {source}", len(shards), "shards"):
                    if not store.has_shard(name):
                        self.poll()
                        store.write_shard(name, self._rescore(name, earlier[source], store))
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
        for index, response in self._responder.respond([prompt.prompt_ids for prompt, _ in wanted], seeds):
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
        if self.rank is not None:
            rows = self.rank(rows, self._read_real_rewards(prompts))
        return self._score_rows(rows)

    def _rescore(self, name: str, earlier: PairStore, store: PairStore) -> list[dict[str, Any]]:
        """Rows of an earlier iteration as this one's opponent sees them."""
        rows = earlier.read_shard(name).to_pylist()
        if not (self.keeps_real and _have_same_rows(earlier, store)):
            return self._score_rows(rows, is_sampled=False)
        # the real responses are the same, and scored already
        own_name = self._shard_name(self.iteration, int(name.removesuffix(".parquet").rpartition("-")[2]))
        own = store.read_shard(own_name, ["prompt_id", "opponent_real_log_prob", "initial_real_log_prob"])
        known = {row.pop("prompt_id"): row for row in own.to_pylist()}
        return self._score_rows([{**row, **known[row["prompt_id"]]} for row in rows], ["generated"], is_sampled=False)

    def _score_rows(
        self, rows: list[dict[str, Any]], sides: Sequence[str] = ("real", "generated"), is_sampled: bool = True
    ) -> list[dict[str, Any]]:
        """Add the players' log-probs. ``is_sampled``: this opponent's sampler gave those of the generated side."""
        players = {"opponent": self.model} | ({"initial": self.initial} if self.initial is not None else {})
        add = partial(add_log_probs, micro_batch_tokens=self.micro_batch_tokens, poll=self.poll)
        for player, model in players.items():
            rest = rows
            if player == "opponent" and is_sampled:
                compared = list(dict.fromkeys(row["prompt_id"] for row in rows))[:NUM_COMPARED]
                first = [row for row in rows if row["prompt_id"] in compared]
                rest = [row for row in rows if row["prompt_id"] not in compared]
                add(player, model, first, sides)
                if _is_exact(model) and all(
                    map(_sampler_agrees, first)
                ):  # then a pass over the generated responses would find what is known
                    for row in rest:
                        row["opponent_generated_log_prob"] = row["generated_log_prob"]
                    add(player, model, rest, ["real"])
                    continue
            add(player, model, rest, sides)
        return rows

    def _read_real_rewards(self, prompts: Sequence[Prompt]) -> dict[int, float | None]:
        """What the real responses to these prompts were said to be worth in an earlier iteration."""
        if self.judged is None:
            return {}
        name = self._shard_name(self.judged.binding["iteration"], prompts[0].prompt_id - self.prompts[0].prompt_id)
        table = self.judged.read_shard(name, ["prompt_id", "real_reward"])
        return dict(zip(table["prompt_id"].to_pylist(), table["real_reward"].to_pylist(), strict=True))

    def _read_first_responses(
        self, prompts: Sequence[Prompt], earlier: Mapping[int, PairStore]
    ) -> dict[tuple[int, int], list[int]]:
        if not self.initial_responses or self.iteration == 0:
            return {}
        table = earlier[0].read_shard(
            self._shard_name(0, prompts[0].prompt_id), ["prompt_id", "answer", "generated_ids"]
        )
        return {(row["prompt_id"], row["answer"]): row["generated_ids"] for row in table.to_pylist()}


def add_log_probs(
    player: str,
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    sides: Sequence[str],
    micro_batch_tokens: int,
    poll: Callable[[], None],
) -> None:
    """Add a player's log-probs to rows of pairs: each prompt once, however many responses it has.

    Args:
        player: ``opponent`` or ``initial``, whose columns ``PLAYER_SIDE_log_prob`` are filled.
        model: The player.
        rows: As the pair store has them, with ``prompt_id``, ``prompt_ids`` and ``SIDE_ids``.
        sides: Of ``real`` and ``generated`` those that are scored.
        micro_batch_tokens: Tokens in one pass.
        poll: Called before each pass; raises to interrupt.
    """
    device = next(model.parameters()).device
    with progress("scoring", len(rows), "pairs") as phase:
        for indices, batch, places in pack_rows(rows, [f"{side}_ids" for side in sides], micro_batch_tokens):
            poll()
            values = response_log_probs(model, move_data_to_device(batch, device)).tolist()
            for index, place in zip(indices, places.tolist(), strict=True):
                for side, response in zip(sides, place, strict=True):
                    rows[index][f"{player}_{side}_log_prob"] = values[response]
            phase.advance(len(indices), tokens=len(batch.input_ids))


def _have_same_rows(store: PairStore, other: PairStore) -> bool:
    """Whether two iterations have the same prompts and real responses."""
    return bool(store.binding.get("prompts_sha256") == other.binding.get("prompts_sha256"))


def own_pairs(table: pa.Table, iteration: int) -> pa.Table:
    """The pairs whose responses were generated in this iteration."""
    return table.filter(pc.equal(table["iteration"], iteration))


def _is_exact(model: nn.Module) -> bool:
    return torch.finfo(compute_dtype(next(model.parameters()).device, model)).bits >= 32


def _sampler_agrees(row: Mapping[str, Any]) -> bool:
    difference = abs(row["generated_log_prob"] - row["opponent_generated_log_prob"])
    return bool(difference <= SAMPLER_TOLERANCE * len(row["generated_ids"]))
