"""The data of a game: the rows of any stage, and the pairs the opponent makes of them.

The pairs come from the game's clock, which ``train_dataloader`` asks for them: it is the one hook that runs before the
loader is built, at the right epoch, on a fresh start and on a resume. Without a game it serves the real responses
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from torch.utils.data import Dataset

from spin_lightning.data.loader import ResumableLoader
from spin_lightning.data.module import RowDataModule, refuse_below
from spin_lightning.generation import ContinuousGenerator, ResponseGenerator
from spin_lightning.types import UserError


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


class SyntheticDataModule(RowDataModule):
    """Prompts and real responses of an SFT data set, and the pairs the opponent makes of them.

    Takes every setting of ``RowDataModule`` too.

    Args:
        train_data: A file (JSON, JSONL, CSV, TSV, Parquet; also .gz or .zst), a folder, or a hub name. Several: a map
            from each to its weight, such as ``{a.jsonl: 1.0, b.jsonl: 0.5}``: 1 takes all of its rows, 0.5 a random
            half, 2 each row twice. A target that moves: a list with one source, or such a map, an iteration.
        val_data: One source or such a map, for the held-out NLL. None sets ``val_fraction`` of the training rows aside.
        generator: What answers the prompts, with its settings: ``ContinuousGenerator``, ``TransformersGenerator``,
            ``VLLMGenerator``, ``OpenAIGenerator``, or the class path of your own. Its ``max_new_tokens`` also caps the
            real responses.
        answers_per_prompt: K, how many responses the opponent gives to each prompt in each iteration.
        history: How many earlier iterations' pairs are trained on beside the new ones. The paper: 1.
        keep_prompts_together: Put all pairs of a prompt next to each other, so that a batch computes the prompt and its
            real response once. Pays with ``answers_per_prompt`` above 1; costs variety, as a batch then holds fewer
            prompts: raise ``batch_size`` with it.
        max_response_tokens: None, or the generator's ``max_new_tokens``: one cap for real and generated responses.

    Raises:
        UserError: A setting is outside its range; or, in ``setup``, the data cannot be used.

    Example:
        >>> data = SyntheticDataModule("train.jsonl", generator=ContinuousGenerator(max_new_tokens=128), batch_size=16)
        >>> data.max_response_tokens
        128
    """

    cap_setting = "data.generator.max_new_tokens"
    has_iterations = True

    def __init__(
        self,
        train_data: str | dict[str, float] | list[str | dict[str, float]],
        val_data: str | dict[str, float] | None = None,
        generator: ResponseGenerator | None = None,
        answers_per_prompt: int = 1,
        history: int = 1,
        keep_prompts_together: bool = False,
        max_response_tokens: int | None = None,
        **rows: Any,
    ) -> None:
        generator = generator if generator is not None else ContinuousGenerator()
        if not isinstance(generator, ResponseGenerator):
            raise UserError(
                f"data.generator must be a ResponseGenerator, got {generator!r}. "
                "Of the settings, give all but the data by name."
            )
        generator.check_contract()
        if max_response_tokens not in (None, generator.max_new_tokens):
            raise UserError(
                f"data.max_response_tokens is {max_response_tokens!r}, and data.generator.max_new_tokens "
                f"{generator.max_new_tokens!r}: real and generated responses are cut at one length, or their lengths "
                "would give the generated ones away. Set data.generator.max_new_tokens alone."
            )
        source: Any = train_data  # the base takes a list of a class that has iterations
        super().__init__(source, val_data, max_response_tokens=generator.max_new_tokens, **rows)
        refuse_below(1, answers_per_prompt=answers_per_prompt)
        refuse_below(0, history=history)
        self.generator = generator
        self.answers_per_prompt = self.examples_per_prompt = answers_per_prompt
        self.history = history
        self.keep_prompts_together = keep_prompts_together
        #: The clock of the game, set by the SelfPlay callback. None: plain SFT.
        self.game: Game | None = None

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit":
            self.generator.check_ready()
        self.max_response_tokens = self.generator.max_new_tokens  # of another generator, perhaps, than at first
        super().setup(stage)

    def teardown(self, stage: str) -> None:
        self.generator.shut_down()

    def on_exception(self, exception: BaseException) -> None:
        self.generator.shut_down()

    def train_dataloader(self) -> ResumableLoader:
        """Pairs of the iteration the next epoch belongs to; without a game, the real responses."""
        if self.game is None:
            if isinstance(self.train_data, list):
                raise UserError("data.train_data is a list with one source an iteration, and nothing plays iterations.")
            return super().train_dataloader()
        training_set = self.game.ensure_iteration()
        rows = training_set.rows
        prompt_ids = rows["prompt_id"].to_pylist() if rows.num_rows else []
        return self._make_loader(PairDataset(rows), prompt_ids, training_set.collate, self.keep_prompts_together)


class PairDataset(Dataset[dict[str, Any]]):
    """The rows of a pair table, by position; ids stay in Arrow's memory until a batch asks for them."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        (row,) = self.table.slice(index, 1).to_pylist()
        return {**row, "pair_id": index}
