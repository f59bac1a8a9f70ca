"""Batches by tokens: prompts with all their responses laid end to end, cut into passes of about equal size.

Pairs that share a prompt share its tokens, and those of every response they have in common. The order of a batch's
rows decides nothing but the order of its sums. Where a response token is predicted, one place before it, is said here
and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from spin_lightning.types import (
    PairBatch,
    PairLogProbs,
    Prompt,
    ResponseBatch,
    RolloutBatch,
    TokenBatch,
    TokenLaws,
    TokenLogProbs,
)

Ids = Sequence[int]


def pack(groups: Sequence[tuple[Ids, Sequence[Ids]]]) -> ResponseBatch:
    """Prompts, each with its responses, in one row without padding.

    A response to an empty prompt is scored from its second token on: nothing predicts the first.

    Example:
        >>> batch = pack([([5, 6], [[7, 2], [8]]), ([9], [[2]])])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist()
        ([5, 6, 7, 2, 8, 9, 2], [0, 1, 2, 3, 2, 0, 1])
        >>> batch.scored.tolist(), batch.predictors.tolist(), batch.response_index.tolist()
        ([2, 3, 4, 6], [1, 2, 1, 5], [0, 0, 1, 2])
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    for prompt, responses in groups:
        input_ids += prompt
        position_ids += range(len(prompt))
        for response in responses:
            input_ids += response
            position_ids += range(len(prompt), len(prompt) + len(response))
    lengths = tuple((len(prompt), *map(len, responses)) for prompt, responses in groups)
    scored: list[int] = []
    predictors: list[int] = []
    response_index: list[int] = []
    for index, (prompt_length, places) in enumerate(sequences(lengths)):
        predicting, predicted = shifted(prompt_length, places)
        predictors += predicting
        scored += predicted
        response_index += [index] * len(predicted)
    return ResponseBatch(
        torch.tensor(input_ids),
        torch.tensor(position_ids),
        torch.tensor(scored, dtype=torch.long),
        torch.tensor(predictors, dtype=torch.long),
        torch.tensor(response_index, dtype=torch.long),
        torch.tensor([length for _, *of_responses in lengths for length in of_responses]),
        lengths,
    )


def shifted(prompt_length: int, places: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The one-token shift: where the response tokens of a sequence are predicted, and where they stand.

    A token is predicted at the place before it in its own sequence. Nothing predicts the first token of a sequence, so
    it is not scored where there is no prompt.

    Args:
        prompt_length: Tokens of the prompt.
        places: Where the tokens of the prompt and of its response stand, in any layout.

    Example:
        >>> shifted(2, [0, 1, 4, 5]), shifted(0, range(3))
        (([1, 4], [4, 5]), (range(0, 2), range(1, 3)))
    """
    first = max(prompt_length, 1)
    return places[first - 1 : -1], places[first:]


def sequences(lengths: Iterable[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
    """For each response of a layout the length of its prompt, and the places of its prompt's tokens and its own.

    Args:
        lengths: For each prompt its length and then those of its responses, as ``ResponseBatch.lengths`` has them.
    """
    start = 0
    for prompt_length, *of_responses in lengths:
        prompt = range(start, start + prompt_length)
        start += prompt_length
        for length in of_responses:
            yield prompt_length, [*prompt, *range(start, start + length)]
            start += length


def pack_rows(
    rows: Sequence[Mapping[str, Any]], sides: Sequence[str], max_tokens: int, multiple_of: int = 1
) -> list[tuple[list[int], ResponseBatch, torch.Tensor]]:
    """Rows of ids, grouped by prompt and cut into passes of at most ``max_tokens`` where their length allows.

    Args:
        rows: Each with ``prompt_id``, ``prompt_ids`` and the columns named in ``sides``.
        sides: The columns that hold the responses.
        max_tokens: Tokens in one pass. A row that is longer by itself gets a pass of its own.
        multiple_of: The number of passes is a multiple of this, where there are enough prompts: each of so many
            processes has as many.

    Returns:
        For each pass: which rows are in it, their batch, and for every row and side the index of its response in the
        batch, shape ``(rows, sides)``.
    """
    groups: list[_Group] = []
    open_groups: dict[int, _Group] = {}
    for index, row in enumerate(rows):
        group = open_groups.get(row["prompt_id"])
        if group is None or group.tokens + group.extra(row, sides) > max_tokens:
            group = open_groups[row["prompt_id"]] = _Group(row["prompt_ids"])
            groups.append(group)
        group.add(index, row, sides)
    return [_join_rows(part) for part in _balance_parts(groups, max_tokens, multiple_of)]


class _Group:
    """Rows of one prompt, and the distinct responses among them."""

    def __init__(self, prompt_ids: Ids) -> None:
        self.prompt_ids = prompt_ids
        self.responses: dict[tuple[int, ...], int] = {}
        self.rows: list[int] = []
        self.indices: list[list[int]] = []
        self.tokens = len(prompt_ids)

    def extra(self, row: Mapping[str, Any], sides: Sequence[str]) -> int:
        return sum(len(ids) for ids in {tuple(row[side]) for side in sides} - self.responses.keys())

    def add(self, index: int, row: Mapping[str, Any], sides: Sequence[str]) -> None:
        self.tokens += self.extra(row, sides)
        self.rows.append(index)
        self.indices.append([self.responses.setdefault(tuple(row[side]), len(self.responses)) for side in sides])


def _balance_parts(groups: list[_Group], max_tokens: int, multiple_of: int) -> list[list[_Group]]:
    """As few parts as keep within the limit, of about equal size: the longest group first, to the lightest part."""
    if not groups:
        return []
    order = sorted(range(len(groups)), key=lambda index: -groups[index].tokens)
    fewest = math.ceil(sum(group.tokens for group in groups) / max_tokens)
    fewest = math.ceil(fewest / multiple_of) * multiple_of
    for count in (*range(fewest, len(groups), multiple_of), len(groups)):
        parts: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for index in order:
            lightest = loads.index(min(loads))
            parts[lightest].append(index)
            loads[lightest] += groups[index].tokens
        if max(loads) <= max_tokens or count == len(groups):
            break
    return [[groups[index] for index in part] for part in sorted(map(sorted, parts))]


def _join_rows(groups: list[_Group]) -> tuple[list[int], ResponseBatch, torch.Tensor]:
    offsets = [0, *accumulate(len(group.responses) for group in groups)]
    rows = [row for group in groups for row in group.rows]
    indices = [
        [offset + i for i in row] for offset, group in zip(offsets, groups, strict=False) for row in group.indices
    ]
    batch = pack([(group.prompt_ids, list(group.responses)) for group in groups])
    return rows, batch, torch.tensor(indices)


def collate_prompts(prompts: Sequence[Prompt], max_tokens: int, multiple_of: int = 1) -> list[ResponseBatch]:
    """Prompts with their real responses: what SFT trains on and what the held-out NLL is measured on."""
    rows = [
        {"prompt_id": number, "prompt_ids": prompt.prompt_ids, "real_ids": prompt.real_ids}
        for number, prompt in enumerate(prompts)
    ]
    return [batch for _, batch, _ in pack_rows(rows, ["real_ids"], max_tokens, multiple_of)]


def collate_pairs(pairs: Sequence[Mapping[str, Any]], max_tokens: int, multiple_of: int = 1) -> list[PairBatch]:
    """Pairs, as the pair store's columns name them, in as many passes as ``max_tokens`` and ``multiple_of`` ask for."""
    sides = ["real_ids", "generated_ids"] + (["initial_ids"] if pairs[0].get("initial_ids") is not None else [])
    return [
        _make_pair_batch([pairs[row] for row in rows], batch, *indices.unbind(1))
        for rows, batch, indices in pack_rows(pairs, sides, max_tokens, multiple_of)
    ]


def collate_laws(rows: Sequence[Mapping[str, Any]], max_tokens: int, multiple_of: int = 1) -> list[TokenBatch]:
    """Real responses with the opponent's next-token laws, in as many passes as the limits ask for.

    Args:
        rows: Each of a prompt of its own, with ``prompt_id``, ``prompt_ids`` and ``real_ids``; and as bytes of 32-bit
            numbers, one of each response token, ``real_log_probs`` and ``law_rest``, and k of each, ``law_ids`` and
            ``law_log_probs``.
        max_tokens: Tokens in one pass.
        multiple_of: As in :func:`pack_rows`.
    """
    return [
        TokenBatch(responses, _read_laws([rows[index] for index in indices]))
        for indices, responses, _ in pack_rows(rows, ["real_ids"], max_tokens, multiple_of)
    ]


def _read_laws(rows: Sequence[Mapping[str, Any]]) -> TokenLogProbs:
    def numbers(name: str, dtype: torch.dtype) -> torch.Tensor:
        joined = bytearray(b"".join(row[name] for row in rows))
        return torch.frombuffer(joined, dtype=dtype) if joined else torch.empty(0, dtype=dtype)

    real, rest = numbers("real_log_probs", torch.float32), numbers("law_rest", torch.float32)
    ids, log_probs = numbers("law_ids", torch.int32), numbers("law_log_probs", torch.float32)
    k = len(ids) // max(1, len(rest))
    return TokenLogProbs(real, TokenLaws(ids.view(len(rest), k).long(), log_probs.view(len(rest), k), rest))


def collate_rollouts(rows: Sequence[Mapping[str, Any]], max_tokens: int, multiple_of: int = 1) -> list[RolloutBatch]:
    """Sampled responses in as many passes as ``max_tokens`` and ``multiple_of`` ask for.

    Those whose advantages are all 0 are not computed, unless a critic learns from them; they are counted.

    Args:
        rows: Each with ``prompt_id``, ``prompt_ids``, ``response_ids`` and a list with one number a token, or None, of
            ``log_probs``, ``advantages``, ``values``, ``returns`` and ``sampler_log_probs``.
        max_tokens: Tokens in one pass.
        multiple_of: As in :func:`pack_rows`.
    """
    taught = [row for row in rows if row["returns"] is not None or any(row["advantages"])] or rows[:1]
    batches = []
    for indices, responses, places in pack_rows(taught, ["response_ids"], max_tokens, multiple_of):
        starts = responses.response_lengths.cumsum(0) - responses.response_lengths
        own = places[:, 0]
        spans = zip(starts[own].tolist(), responses.response_lengths[own].tolist(), strict=True)
        tokens = torch.cat([torch.arange(start, start + length) for start, length in spans])
        lengths = responses.response_lengths[own]

        def flat(name: str, rows: Sequence[Mapping[str, Any]] = [taught[index] for index in indices]) -> Any:
            if any(row[name] is None for row in rows):
                return None
            return torch.tensor([value for row in rows for value in row[name]], dtype=torch.float32)

        columns = {name: flat(name) for name in ("log_probs", "advantages", "values", "returns", "sampler_log_probs")}
        counts = len(indices), int(lengths.sum())
        batches.append(
            RolloutBatch(responses, tokens, lengths, **columns, num_responses=counts[0], num_tokens=counts[1])
        )
    batches[0].num_responses += len(rows) - len(taught)
    batches[0].num_tokens += sum(len(row["response_ids"]) for row in rows) - sum(
        len(row["response_ids"]) for row in taught
    )
    return batches


def _make_pair_batch(
    pairs: list[Mapping[str, Any]],
    responses: ResponseBatch,
    real: torch.Tensor,
    generated: torch.Tensor,
    initial_response: torch.Tensor | None = None,
) -> PairBatch:
    def stored(player: str) -> PairLogProbs:
        of_real, of_generated = (
            torch.tensor([pair.get(f"{player}_{side}_log_prob", math.nan) for pair in pairs], dtype=torch.float32)
            for side in ("real", "generated")
        )
        lengths = responses.response_lengths
        return PairLogProbs(of_real, of_generated, lengths[real], lengths[generated])

    initial = stored("initial") if pairs[0].get("initial_real_log_prob") is not None else None
    pair_ids = torch.tensor([pair["pair_id"] for pair in pairs])
    preference, margin = (
        torch.tensor([pair[name] for pair in pairs], dtype=torch.float32) if pairs[0].get(name) is not None else None
        for name in ("preference", "margin")
    )
    stored_log_probs = stored("opponent")
    return PairBatch(
        responses, real, generated, initial_response, stored_log_probs, initial, pair_ids, preference, margin
    )
