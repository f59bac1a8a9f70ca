"""Responses to the same prompts through a run, side by side, with what differs marked word by word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from spin_lightning.reports.record import Record, as_dict
from spin_lightning.runs.files import read_json
from spin_lightning.terminal import printable

#: Characters of a prompt and of a response that are shown, after what cannot be shown was replaced.
MOST_CHARACTERS = 1200
#: Iterations that are shown side by side: the first, the last, and some between.
MOST_ITERATIONS = 5
#: Rows of a table that are looked at: the first ones.
ROWS_READ = 512

#: Share of words that two texts have in common, below which they are not compared word by word.
LEAST_ALIKE = 0.4
#: A prompt: its last turn as it is shown, how many came before, and all of them.
Key = tuple[str, int, str]
#: A stretch of a response: whether it is in both texts, in this one alone, in the other one alone; or all of it is new.
Mark = tuple[Literal["same", "added", "missing", "new"], str]


@dataclass
class Column:
    """A response to a prompt.

    Attributes:
        label: Whose it is, such as ``real`` or ``iteration 0``.
        marks: Its text, with what differs from what it is compared with.
        note: What else is known of it: cut, its reward.
    """

    label: str
    marks: list[Mark]
    note: str = ""


@dataclass
class Card:
    """A prompt with its responses.

    Attributes:
        prompt: Its last turn.
        before: How many turns came before that.
        columns: The responses.
    """

    prompt: str
    before: int
    columns: list[Column] = field(default_factory=list)


def collect(record: Record, most: int) -> tuple[list[Card], str]:
    """Prompts with the responses of the iterations to them, and a sentence on what is marked.

    Args:
        record: Of the run.
        most: How many prompts.
    """
    if record.kind == "score":
        return _of_scores(record, most), "The best and the worst responses by their rewards."
    if record.kind == "ppo":
        names = [name for name in ("held_out", "answers") if any((i.folder / name).is_dir() for i in record.iterations)]
        tables = _tables(record, names[0], ["prompt", "answer", "response", "finish_reason", "reward"]) if names else {}
        which = "held-out prompts, answered with the most likely response" if names[:1] == ["held_out"] else "prompts"
        return (
            _side_by_side({name: _first_answers(rows, "response") for name, rows in tables.items()}, {}, most),
            f"The same {which} through the run. Marked is what differs from the iteration before.",
        )
    sides = next((i.statistics["sides"] for i in record.iterations if "sides" in i.statistics), None)
    if record.kind == "dpo" or sides:
        left, right = sides or ("chosen", "rejected")
        tables = _tables(record, "pairs", ["prompt", "answer", "chosen", "rejected", "iteration"])
        cards = []
        for rows in list(tables.values())[-1:]:
            for row in rows[:most]:
                prompt, better, worse = _prompt(row), _text(row["chosen"]), _text(row["rejected"])
                columns = [Column(left, [("same", better)]), Column(right, compare(better, worse))]
                cards.append(Card(*prompt[:2], columns))
        return cards, f"Pairs that were trained on. Marked is what differs from the {left} response."
    columns_read = ["prompt", "answer", "chosen", "rejected", "generated_finish_reason", "iteration"]
    tables = _tables(record, "pairs", columns_read)
    real = {_prompt(row): _text(row["chosen"]) for rows in tables.values() for row in rows}
    found = {name: _first_answers(rows, "rejected") for name, rows in tables.items()}
    return (
        _side_by_side(found, real, most),
        "The opponent of each iteration, which is the policy that the iteration before has left, answers the same "
        "prompts; the policy of the last iteration has answered none. Marked is what differs from the real response.",
    )


def compare(reference: str, text: str) -> list[Mark]:
    """The text word by word: what it shares with the reference, what it adds, and what it lacks.

    Where the two have little in common all of it is new: word by word nobody could read it.

    Example:
        >>> compare("The sum is 7.", "The sum is 9.")
        [('same', 'The sum is '), ('missing', '7'), ('added', '9'), ('same', '.')]
    """
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", side) for side in (reference, text))
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    alike = sum(not token.isspace() for kind, _, _, start, end in blocks if kind == "equal" for token in b[start:end])
    words = sum(not token.isspace() for token in a + b)
    if reference.strip() and text.strip() and 2 * alike < LEAST_ALIKE * words:
        return [("new", text)]
    marks: list[Mark] = []
    missing, added = "", ""
    for kind, a_from, a_to, b_from, b_to in blocks:
        shared = "".join(b[b_from:b_to])
        if kind == "equal" and (shared.strip() or not (missing or added) or b_to == len(b)):
            marks += _changed(missing, added)
            marks.append(("same", shared))
            missing, added = "", ""
        else:  # a space alone between changes is part of them
            missing, added = missing + "".join(a[a_from:a_to]), added + shared
    return marks + _changed(missing, added)


def _changed(missing: str, added: str) -> list[Mark]:
    marks: list[Mark] = [("missing", missing), ("added", added)]
    return [mark for mark in marks if mark[1]]


def shown(text: Any, most: int = MOST_CHARACTERS) -> str:
    """A text of others as a page can show it: without characters that are obeyed, and cut where it is long."""
    whole = str(text or "")
    cut = printable(whole[:most].replace("\r\n", "\n").replace("\t", "    "))
    if len(whole) <= most and len(cut) <= most:
        return cut
    return f"{cut[:most]} … ({len(whole):,} characters)"


def _side_by_side(found: dict[str, dict[Key, tuple[str, str]]], real: dict[Key, str], most: int) -> list[Card]:
    """Cards of the prompts that most tables have, in the order of the first one."""
    names = _spread(list(found))
    counts: dict[Key, int] = {}
    for name in names:
        for prompt in found[name]:
            counts[prompt] = counts.get(prompt, 0) + 1
    chosen = sorted(counts, key=lambda prompt: -counts[prompt])[:most]  # a stable sort
    cards = []
    for prompt in chosen:
        card = Card(*prompt[:2])
        reference = real.get(prompt)
        if reference is not None:
            card.columns.append(Column("real", [("same", reference)] if reference else []))
        for name in names:
            if prompt not in found[name]:
                continue
            text, note = found[name][prompt]
            card.columns.append(Column(name, [("same", text)] if reference is None else compare(reference, text), note))
            reference = reference if prompt in real else text
        cards.append(card)
    return cards


def _spread(names: Sequence[str]) -> list[str]:
    if len(names) <= MOST_ITERATIONS:
        return list(names)
    return [names[round(place * (len(names) - 1) / (MOST_ITERATIONS - 1))] for place in range(MOST_ITERATIONS)]


def _first_answers(rows: Iterable[dict[str, Any]], column: str) -> dict[Key, tuple[str, str]]:
    """The first response to each prompt, and what is known of it."""
    found: dict[Key, tuple[str, str]] = {}
    for row in rows:
        reason = row.get("finish_reason", row.get("generated_finish_reason"))
        notes = ["cut at the length cap"] * (reason == "length")
        notes += [f"reward {row['reward']:.3g}"] if row.get("reward") is not None else []
        found.setdefault(_prompt(row), (_text(row[column]), ", ".join(notes)))
    return found


def _tables(record: Record, name: str, columns: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The first rows that each iteration's own opponent or policy has given, by the iteration's name."""
    chosen = _spread([str(i.number) for i in record.iterations if (i.folder / name).is_dir()])
    found = {}
    for iteration in record.iterations:
        if str(iteration.number) not in chosen or not (iteration.folder / name).is_dir():
            continue
        label = f"iteration {iteration.number}"
        make = partial(_read_rows, iteration.folder, name, columns, iteration.number)
        rows = record.try_to(f"responses of {label}", make, [])
        if rows:
            found[label] = rows
    return found


def _read_rows(folder: Path, name: str, columns: list[str], number: int) -> list[dict[str, Any]]:
    shards = as_dict(read_json(folder / f"{name}_manifest.json")).get("shards") or []
    files = [str(as_dict(shard).get("file")) for shard in shards]
    names = [file for file in files if re.fullmatch(r"[\w-]+\.parquet", file)]
    rows: list[dict[str, Any]] = []
    for file in names or sorted(path.name for path in (folder / name).glob("*.parquet")):
        path = folder / name / file
        if path.is_symlink() or not path.is_file():
            continue
        with pq.ParquetFile(path) as parquet:
            kept = [column for column in columns if column in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(batch_size=64, columns=kept):
                rows += [row for row in batch.to_pylist() if row.get("iteration") in (None, number)]
                if len(rows) >= ROWS_READ:
                    return rows[:ROWS_READ]
    return rows


def _of_scores(record: Record, most: int) -> list[Card]:
    responses = record.try_to("responses", lambda: _read_rows(record.folder, "responses", _OF_RESPONSES, 0), [])
    rewards = record.try_to("rewards", lambda: _read_rows(record.folder, "rewards", _OF_REWARDS, 0), [])
    worth = {(row["prompt_id"], row["answer"]): row["reward"] for row in rewards}
    judged = [(worth.get((row["prompt_id"], row["answer"])), row) for row in responses]
    ranked = sorted(((reward, row) for reward, row in judged if reward is not None), key=lambda item: -item[0])
    chosen = ranked if len(ranked) <= most else [*ranked[: (most + 1) // 2], *ranked[-(most // 2) :]]
    cards = []
    for reward, row in chosen:
        real, response = shown(row.get("real")), shown(row["response"])
        columns = [Column("real", [("same", real)])] if real else []
        marks: list[Mark] = compare(real, response) if real else [("same", response)]
        cards.append(Card(*_prompt(row)[:2], [*columns, Column("response", marks, f"reward {reward:.3g}")]))
    return cards


_OF_RESPONSES = ["prompt_id", "answer", "prompt", "response", "real"]
_OF_REWARDS = ["prompt_id", "answer", "reward"]


def _prompt(row: dict[str, Any]) -> Key:
    turns = row.get("prompt") or [{"content": ""}]
    return shown(turns[-1].get("content"), 600), len(turns) - 1, repr(turns)


def _text(turns: Any) -> str:
    """What was said in a response's turns."""
    return shown("\n".join(str(turn.get("content") or "") for turn in turns or ()))
