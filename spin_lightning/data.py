"""The SFT data of a game: rows to prompts, and the loader of this iteration's pairs.

``SyntheticDataModule`` knows nothing of losses and optimisers. The pairs come from the game's clock, which
``train_dataloader`` asks for them: it is the one hook that runs before the loader is built, at the right epoch, on a fresh start
and on a resume. Without a game it serves the real responses alone, for SFT.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol, cast

import lightning as L
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm.auto import tqdm

from spin_lightning.batches import collate_pairs, collate_prompts
from spin_lightning.encoding import Encoder
from spin_lightning.files import sha256_of
from spin_lightning.formats import load_rows
from spin_lightning.generation import ContinuousGenerator, ResponseGenerator
from spin_lightning.models import load_tokenizer
from spin_lightning.types import Prompt, Row, UserError


class Game(Protocol):
    """What the data module asks of the clock: a training set for the epoch that is about to begin."""

    def ensure_iteration(self) -> pa.Table: ...


class SyntheticDataModule(L.LightningDataModule):
    """Prompts and real responses of an SFT data set, and the pairs the opponent makes of them.

    Args:
        train_data: A file (JSON, JSONL, CSV, Parquet), a folder saved by ``datasets``, or a hub name.
        val_data: The same, for the held-out NLL. None sets ``val_fraction`` of the training rows aside.
        val_fraction: Share of the rows held out where ``val_data`` is not given. 0 trains without a held-out NLL.
        format: ``auto`` detects it and says so; else messages, prompt_completion, alpaca, sharegpt, real_generated or
            chosen_rejected.
        columns: Map from the format's column names to those of the data, such as ``{prompt: question}``.
        split: Which split of a hub data set or a saved folder.
        data_revision: Commit or tag of a hub data set.
        max_rows: Read no more than this many rows. None reads all.
        prompt_template: None uses the tokenizer's chat template. Else ``alpaca``, ``spin``, ``chatml``, a text with ``{prompt}``,
            a Jinja template, or a file with one.
        max_prompt_tokens: Rows with longer prompts are left out, and counted.
        generator: What answers the prompts: a class path with its settings. Its ``max_new_tokens`` also caps the real responses.
        answers_per_prompt: K, how many answers the opponent gives to each prompt in each iteration.
        history: How many earlier iterations' pairs are trained on beside the new ones. The paper: 1.
        batch_size: Pairs (in SFT: rows) in a batch.
        micro_batch_tokens: Tokens in one forward and backward pass. A batch with more takes several passes whose gradients add up:
            the same gradient in less memory. Raise it on a GPU until its memory is used.
        keep_prompts_together: Put all pairs of a prompt next to each other, so that a batch computes the prompt and its real response
            once. Pays with ``answers_per_prompt`` above 1; costs variety, as a batch then holds fewer prompts: raise ``batch_size`` with it.
        num_workers: Processes that collate batches.
        seed: Of the answers, of the order of the batches and of the held-out rows. The game has no other randomness, so
            ``seed_everything`` does not change it.
        tokenizer_name_or_path: None takes the model's.

    Raises:
        UserError: A setting is outside its range; or, in ``setup``, the data cannot be used.

    Example:
        >>> data = SyntheticDataModule("train.jsonl", columns={"prompt": "question", "completion": "answer"})
    """

    def __init__(
        self,
        train_data: str,
        val_data: str | None = None,
        val_fraction: float = 0.05,
        format: str = "auto",
        columns: dict[str, str] | None = None,
        split: str = "train",
        data_revision: str | None = None,
        max_rows: int | None = None,
        prompt_template: str | None = None,
        max_prompt_tokens: int = 512,
        generator: ResponseGenerator | None = None,
        answers_per_prompt: int = 1,
        history: int = 1,
        batch_size: int = 8,
        micro_batch_tokens: int = 2048,
        keep_prompts_together: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer_name_or_path: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("answers_per_prompt", answers_per_prompt, 1),
            ("history", history, 0),
            ("batch_size", batch_size, 1),
            ("micro_batch_tokens", micro_batch_tokens, 1),
            ("max_prompt_tokens", max_prompt_tokens, 1),
        ):
            if value < least:
                raise UserError(f"data.{name} must be at least {least}, got {value!r}.")
        if not 0 <= val_fraction < 1:
            raise UserError(
                f"data.val_fraction must be in [0, 1), got {val_fraction!r}. 0.05 holds out one row in twenty."
            )
        self.train_data = train_data
        self.val_data = val_data
        self.val_fraction = val_fraction
        self.format = format
        self.columns = columns
        self.split = split
        self.data_revision = data_revision
        self.max_rows = max_rows
        self.prompt_template = prompt_template
        self.max_prompt_tokens = max_prompt_tokens
        self.generator = generator if generator is not None else ContinuousGenerator()
        self.answers_per_prompt = answers_per_prompt
        self.history = history
        self.batch_size = batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.keep_prompts_together = keep_prompts_together
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer_name_or_path = tokenizer_name_or_path
        #: The clock of the game, set by the SelfPlay callback. None: plain SFT.
        self.game: Game | None = None
        self.prompts: list[Prompt] = []
        self.val_prompts: list[Prompt] = []

    def setup(self, stage: str | None = None) -> None:
        """Read, check and encode the rows: everything about the data that can fail, before a model is loaded."""
        if self.prompts:
            return
        read = partial(
            load_rows,
            split=self.split,
            format=self.format,
            columns=self.columns,
            revision=self.data_revision,
            max_rows=self.max_rows,
        )
        train = read(self.train_data)
        print(f"data: {train.description}")
        rows = list(train.rows)
        if self.val_data is not None:
            val = read(self.val_data)
            print(f"held-out data: {val.description}")
            val_rows = list(val.rows)
        else:
            rows, val_rows = self._hold_out(rows)
        self.encoder = Encoder(self._load_tokenizer(), self.prompt_template)
        self.prompts = self._encode(rows, "prompts")
        self.val_prompts = self._encode(val_rows, "held-out prompts")
        if not self.prompts:
            raise UserError(
                f"all {len(rows)} prompts of {self.train_data} are longer than max_prompt_tokens={self.max_prompt_tokens}, "
                "so nothing is left to train on. Raise data.max_prompt_tokens."
            )
        self.refuse_longer_than(self.encoder.tokenizer.model_max_length)
        if self.encoder.num_separate:
            print(
                f"note: {self.encoder.num_separate} answers are encoded apart from their prompts, as the chat template writes past answers differently."
            )

    def refuse_longer_than(self, limit: float) -> None:
        """Refuse prompts that leave no room for their answers in a context of ``limit`` tokens.

        Raises:
            UserError: The longest prompt and the longest answer do not fit.
        """
        longest = max(len(prompt.prompt_ids) for prompt in self.prompts) + self.generator.max_new_tokens
        if longest > limit:
            raise UserError(
                f"the longest prompt and its answer need {longest} tokens, but the model takes {limit}. "
                "Lower data.max_prompt_tokens or data.generator.max_new_tokens."
            )

    def _hold_out(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        count = round(len(rows) * self.val_fraction)
        if self.val_fraction and not count:
            count = min(1, len(rows) - 1)
        chosen = set(random.Random(f"held-out/{self.seed}").sample(range(len(rows)), count))
        held_out = [row for index, row in enumerate(rows) if index in chosen]
        return [row for index, row in enumerate(rows) if index not in chosen], held_out

    def _load_tokenizer(self) -> Any:
        if self.tokenizer_name_or_path is not None:
            return load_tokenizer(self.tokenizer_name_or_path)
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if module is None:
            raise UserError(
                "data.tokenizer_name_or_path is needed outside of a Trainer. Give the model's name or folder."
            )
        return load_tokenizer(
            module.model_name_or_path, revision=module.revision, trust_remote_code=module.trust_remote_code
        )

    def _encode(self, rows: list[Row], what: str) -> list[Prompt]:
        prompts: list[Prompt] = []
        for row in tqdm(rows, desc=f"encoding {what}", unit="row", disable=len(rows) < 5000):
            prompt = self.encoder.encode(len(prompts), row, self.generator.max_new_tokens)
            if len(prompt.prompt_ids) <= self.max_prompt_tokens:
                prompts.append(prompt)
        cut = sum(prompt.real_finish_reason == "length" for prompt in prompts)
        if len(prompts) < len(rows):
            print(
                f"note: {len(rows) - len(prompts)} of {len(rows)} {what} are longer than {self.max_prompt_tokens} tokens and left out."
            )
        if cut:
            print(
                f"note: {cut} of {len(prompts)} real answers are longer than {self.generator.max_new_tokens} tokens and cut there, without a terminator."
            )
        return prompts

    @property
    def prompts_hash(self) -> str:
        """Hash of all training prompts and real responses as token ids."""
        return sha256_of([[prompt.prompt_ids, prompt.real_ids] for prompt in self.prompts])

    def train_dataloader(self) -> ResumableLoader:
        """Pairs of the iteration the next epoch belongs to; without a game, the real responses."""
        if self.game is None:
            return self._loader(self.prompts, [prompt.prompt_id for prompt in self.prompts], collate_prompts)
        table = self.game.ensure_iteration()
        prompt_ids = table["prompt_id"].to_pylist() if table.num_rows else []
        return self._loader(PairDataset(table), prompt_ids, collate_pairs)

    def val_dataloader(self) -> list[Any] | DataLoader[Prompt]:
        if not self.val_prompts:
            return []
        collate = partial(collate_prompts, max_tokens=self.micro_batch_tokens)
        return DataLoader(self.val_prompts, batch_size=self.batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def _loader(self, rows: Any, prompt_ids: list[int], collate: Any) -> ResumableLoader:
        return ResumableLoader(
            rows,
            sampler=ResumableSampler(prompt_ids, self.seed, self.keep_prompts_together),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=partial(collate, max_tokens=self.micro_batch_tokens),
        )


class PairDataset(Dataset[dict[str, Any]]):
    """The rows of a pair table, by position; ids stay in Arrow's memory until a batch asks for them."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        (row,) = self.table.slice(index, 1).to_pylist()
        return {**row, "pair_id": index}


class ResumableSampler(DistributedSampler[Any]):
    """An order that is a pure function of (seed, epoch), and can begin in its middle.

    Being a ``DistributedSampler``, it is told the epoch by Lightning, and neither replaced nor wrapped.

    Args:
        prompt_ids: The prompt of every row.
        seed: Of the order.
        keeps_prompts_together: Shuffle prompts instead of rows; the rows of one prompt follow each other.
    """

    start = 0

    def __init__(self, prompt_ids: list[int], seed: int, keeps_prompts_together: bool) -> None:
        super().__init__(cast(Any, prompt_ids), num_replicas=1, rank=0, seed=seed)
        self.groups: dict[int, list[int]] = {}
        for index, prompt_id in enumerate(prompt_ids):
            self.groups.setdefault(prompt_id if keeps_prompts_together else index, []).append(index)

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        groups = list(self.groups.values())
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        return itertools.islice((index for group in order for index in groups[group]), start, None)


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning's checkpoints can resume in the middle of an epoch, without making what was served."""

    served = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert isinstance(self.sampler, ResumableSampler) and self.batch_size
        self.served = self.sampler.start // self.batch_size
        for batch in super().__iter__():
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served % len(self) if len(self) else 0, "batch_size": self.batch_size or 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert isinstance(self.sampler, ResumableSampler) and self.batch_size
        if state["served"] and state["batch_size"] != self.batch_size:
            raise UserError(
                f"the run stopped in the middle of an epoch with data.batch_size {state['batch_size']}, got {self.batch_size}: rows would "
                "be trained on twice or never. Continue with the batch size the run began with."
            )
        self.sampler.start = state["served"] * self.batch_size
