"""What an iteration trains on, as the clock hands it to the data module that serves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from torch.utils.data import Dataset


@dataclass(frozen=True)
class TrainingSet:
    """What an iteration trains on.

    Attributes:
        rows: One row of the table is one unit of ``data.batch_size``; a column ``prompt_id`` tells which belong
            together. No row at all: there is nothing left to train on.
        collate: Makes a batch of some rows: ``collate(rows, max_tokens=...)`` gives a list of passes of about that
            size. Where a run has several processes it is also given ``multiple_of=...``, their number, which the number
            of passes should be a multiple of.
        report: What a person should know before training on it, kept in the iteration's summary and handed to
            callbacks.
        metrics: What of it goes to the loggers.
        sentence: The same in words. Empty: nothing is said.
        if_empty: Why a table without rows ends the run.
    """

    rows: pa.Table
    collate: Callable[..., list[Any]]
    report: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    sentence: str = ""
    if_empty: str = "there is nothing left to train on"


#: When a run is over.
NOTHING = TrainingSet(pa.table({}), lambda rows, max_tokens: [])


class Game(Protocol):
    """What the data module asks of the clock: the training set of the epoch that is about to begin."""

    def ensure_iteration(self) -> TrainingSet:
        """The training set of the epoch about to begin, made if it is not there yet."""
        ...


class PairDataset(Dataset[dict[str, Any]]):
    """The rows of a pair table, by position; ids stay in Arrow's memory until a batch asks for them."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        (row,) = self.table.slice(index, 1).to_pylist()
        return {**row, "pair_id": index}
