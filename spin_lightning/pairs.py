"""Makes the pairs of one iteration: the opponent answers, both answers are scored, shards are written.

Shard after shard, each independent of all others, so that an interrupted run redoes at most one. What decides a
shard's content is in the store's binding; nothing else may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn
from tqdm.auto import tqdm

from spin_lightning.encoding import Encoder, pad_sequences
from spin_lightning.generation import ResponseGenerator, seed_of
from spin_lightning.log_probs import response_log_probs
from spin_lightning.pair_store import PairStore
from spin_lightning.types import Prompt


@dataclass
class PairMaker:
    """What an opponent needs to answer and to score, for one iteration.

    Attributes:
        model: The opponent. Put into evaluation mode while it works, and back afterwards.
        initial: The opponent of iteration 0, where the loss asks for its log-probs, else None.
        initial_responses: Whether each pair also carries the answer of iteration 0.
        numerics: A context with the precision of a training step.
        poll: Called between responses; raises to interrupt.
    """

    model: nn.Module
    encoder: Encoder
    generator: ResponseGenerator
    prompts: Sequence[Prompt]
    iteration: int
    answers_per_prompt: int
    seed: int
    batch_size: int
    opponent_sha256: str
    numerics: Callable[[], AbstractContextManager[Any]]
    poll: Callable[[], None]
    initial: nn.Module | None = None
    initial_responses: bool = False
    shard_size: int = 256

    def make(self, store: PairStore, earlier: Mapping[int, PairStore], history: int) -> list[str]:
        """Fill a store with this iteration's pairs and those of the last ``history`` iterations, re-scored.

        Returns:
            The names of the shards, in their order.
        """
        names = []
        starts = range(0, len(self.prompts), self.shard_size)
        done = [store.has_shard(self._name(self.iteration, start)) for start in starts]
        total = len(self.prompts) * self.answers_per_prompt
        with (
            torch.no_grad(),
            self.numerics(),
            _evaluating(self.model),
            tqdm(
                total=total, desc=f"iteration {self.iteration}: answers", unit="answer", disable=all(done)
            ) as progress,
        ):
            for start, is_done in zip(starts, done, strict=True):
                prompts = self.prompts[start : start + self.shard_size]
                if is_done:
                    progress.update(len(prompts) * self.answers_per_prompt)
                else:
                    store.write_shard(self._name(self.iteration, start), self._new_pairs(prompts, earlier, progress))
                names.append(self._name(self.iteration, start))
            for source in range(self.iteration - 1, max(-1, self.iteration - 1 - history), -1):
                for start in tqdm(starts, desc=f"iteration {self.iteration}: scoring iteration {source}", unit="shard"):
                    name = self._name(source, start)
                    if not store.has_shard(name):
                        self.poll()
                        store.write_shard(name, self._rescored(earlier[source].read_shard(name), store, start))
                    names.append(name)
        return names

    @staticmethod
    def _name(source: int, start: int) -> str:
        return f"iteration_{source}-{start:09d}.parquet"

    def _new_pairs(
        self, prompts: Sequence[Prompt], earlier: Mapping[int, PairStore], progress: Any
    ) -> list[dict[str, Any]]:
        wanted = [(prompt, answer) for prompt in prompts for answer in range(self.answers_per_prompt)]
        seeds = [seed_of(self.seed, self.iteration, prompt.prompt_id, answer) for prompt, answer in wanted]
        responses: dict[int, Any] = {}
        tokens = 0
        answers = self.generator.generate(
            self.model,
            [prompt.prompt_ids for prompt, _ in wanted],
            seeds,
            self.encoder.terminator_id,
            self.encoder.pad_id,
        )
        for index, response in answers:
            self.poll()
            responses[index] = response
            tokens += len(response.ids)
            progress.update()
            elapsed = progress.format_dict["elapsed"]
            progress.set_postfix_str(f"{tokens / max(elapsed, 1e-9):.0f} tokens/s", refresh=False)
        progress.set_postfix_str("scoring", refresh=True)
        first_answers = self._first_answers(prompts, earlier)
        rows = []
        for index, (prompt, answer) in enumerate(wanted):
            response = responses[index]
            asked = list(prompt.row.prompt)
            real = {"role": "assistant", "content": prompt.row.real}
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
        return self._scored(rows)

    def _rescored(self, table: pa.Table, store: PairStore, start: int) -> list[dict[str, Any]]:
        """Rows of an earlier iteration as this iteration's opponent sees them. It has scored the real responses already."""
        own = store.read_shard(
            self._name(self.iteration, start), ["prompt_id", "opponent_real_log_prob", "initial_real_log_prob"]
        )
        known = {row.pop("prompt_id"): row for row in own.to_pylist()}
        return self._scored([{**row, **known[row["prompt_id"]]} for row in table.to_pylist()], generated_only=True)

    def _scored(self, rows: list[dict[str, Any]], generated_only: bool = False) -> list[dict[str, Any]]:
        players = {"opponent": self.model} | ({"initial": self.initial} if self.initial is not None else {})
        for player, model in players.items():
            if not generated_only:  # one pass a prompt, however many answers it has
                unique = {row["prompt_id"]: row for row in rows}
                log_probs = dict(zip(unique, self._score(model, list(unique.values()), "real_ids"), strict=True))
                for row in rows:
                    row[f"{player}_real_log_prob"] = log_probs[row["prompt_id"]]
            for row, log_prob in zip(rows, self._score(model, rows, "generated_ids"), strict=True):
                row[f"{player}_generated_log_prob"] = log_prob
        return rows

    def _score(self, model: nn.Module, rows: Sequence[Mapping[str, Any]], side: str) -> list[float]:
        device = next(model.parameters()).device
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["prompt_ids"]) + len(rows[index][side]))
        log_probs = [0.0] * len(rows)
        for batch in _batches(order, 2 * self.batch_size):  # as many sequences as a training batch has
            self.poll()
            padded = pad_sequences(
                [rows[i]["prompt_ids"] for i in batch], [rows[i][side] for i in batch], self.encoder.pad_id
            )
            values = response_log_probs(
                model, padded.input_ids.to(device), padded.attention_mask.to(device), padded.response_mask.to(device)
            )
            for index, value in zip(batch, values.tolist(), strict=True):
                log_probs[index] = value
        return log_probs

    def _first_answers(
        self, prompts: Sequence[Prompt], earlier: Mapping[int, PairStore]
    ) -> dict[tuple[int, int], list[int]]:
        if not self.initial_responses or self.iteration == 0:
            return {}
        table = earlier[0].read_shard(self._name(0, prompts[0].prompt_id), ["prompt_id", "answer", "generated_ids"])
        return {(row["prompt_id"], row["answer"]): row["generated_ids"] for row in table.to_pylist()}


def own_pairs(table: pa.Table, iteration: int) -> pa.Table:
    """The pairs whose responses were generated in this iteration."""
    return table.filter(pc.equal(table["iteration"], iteration))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
