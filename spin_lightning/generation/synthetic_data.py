"""The SFT data of a game: rows to prompts, and the loader of this iteration's pairs.

``SyntheticDataModule`` knows nothing of losses and optimisers. The pairs come from the game's clock, which
``train_dataloader`` asks for them: it is the one hook that runs before the loader is built, at the right epoch, on a fresh start
and on a resume. Without a game it serves the real responses alone, for SFT.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol, TypeVar, cast

import lightning as L
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from spin_lightning.data.encoding import Encoder
from spin_lightning.data.formats import Tally, prompt_key
from spin_lightning.data.rows import LoadedRows, load_rows
from spin_lightning.generation import ContinuousGenerator, ResponseGenerator
from spin_lightning.models.batches import collate_prompts
from spin_lightning.models.loading import end_ids, end_ids_of, load_tokenizer
from spin_lightning.progress import track
from spin_lightning.runs.files import read_json, sha256_of, write_json
from spin_lightning.terminal import say
from spin_lightning.types import Prompt, Row, UserError

T = TypeVar("T")
#: What is counted about the rows, in the words of the screen. Its keys are those of ``data_report.json``.
COUNTED = {
    "byte_order_marks": "files that begin with a byte order mark, which is skipped",
    "exact_duplicates": "rows that repeat an earlier row, prompt and real answer; kept",
    "repeated_prompts": "rows with another real answer to an earlier row's prompt; kept",
    "long_prompts": "prompts longer than data.max_prompt_tokens; left out",
    "cut_answers": "real answers longer than data.generator.max_new_tokens; cut there, without a terminator",
    "empty_answers": "real answers that are a terminator and nothing else; kept",
    "refused_rows": "rows that the chat template refuses; left out",
    "control_tokens": "rows that spell control tokens; encoded as text, so that they neither open nor close a turn",
    "template_text": "rows that spell what this chat template writes around turns in plain text, which can pass for a turn",
    "encoded_apart": "answers encoded apart from their prompts, as the chat template writes past answers differently",
    "reasoning_left_out": "real answers whose reasoning_content the chat template does not write; it is left out",
    "no_reasoning": "real answers without reasoning, where the chat template's prompts begin it; they end it at once",
    "tools_left_out": "rows with tools that the chat template does not write; they are left out",
    "turns_left_out": "prompts of which the chat template leaves out a turn's text or tool calls",
    "text_left_out": "real answers whose text beside tool calls the chat template does not write; it is left out",
    "also_trained_on": "held-out prompts that are also trained on; the held-out NLL is too good by them",
}


class Game(Protocol):
    """What the data module asks of the clock: a training set for the epoch that is about to begin."""

    def ensure_iteration(self) -> Any: ...


class SyntheticDataModule(L.LightningDataModule):
    """Prompts and real responses of an SFT data set, and the pairs the opponent makes of them.

    Args:
        train_data: A file (JSON, JSONL, CSV, TSV, Parquet; also .gz or .zst), a folder, or a hub name. Several: a map from each to
            its weight, such as ``{a.jsonl: 1.0, b.jsonl: 0.5}``: 1 takes all of its rows, 0.5 a random half, 2 each row twice.
        val_data: The same, for the held-out NLL. None sets ``val_fraction`` of the training rows aside.
        val_fraction: Share of the rows held out where ``val_data`` is not given. 0 trains without a held-out NLL.
        format: ``auto`` detects it and says so; else messages, prompt_completion, alpaca, sharegpt, real_generated or
            chosen_rejected.
        columns: Map from the format's column names to those of the data, such as ``{prompt: question}``. ``{system: ""}`` leaves a
            column unread.
        split: Which split of a hub data set or a saved folder.
        data_revision: Commit or tag of a hub data set.
        max_rows: Read no more than this many rows, of each source. None reads all.
        on_bad_row: ``error`` refuses data with bad rows, and shows the first five; ``drop`` leaves them out, counted by kind in
            ``data_report.json`` and on screen. Bad are rows without a real answer or a question, with a missing or wrong type, an
            unknown role, an answer that is marked as not to be trained on or as undesirable, a NUL character, half a surrogate
            pair, or more than a million characters; in JSONL also lines that are not JSON or not UTF-8.
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
        seed: Of the answers, of the order of the batches, of the held-out rows and of the rows that a weight draws. The game has no other randomness, so
            ``seed_everything`` does not change it.
        tokenizer_name_or_path: None takes the model's.

    Raises:
        UserError: A setting is outside its range; or, in ``setup``, the data cannot be used.

    Example:
        >>> data = SyntheticDataModule("train.jsonl", columns={"prompt": "question", "completion": "answer"})
    """

    def __init__(
        self,
        train_data: str | dict[str, float],
        val_data: str | dict[str, float] | None = None,
        val_fraction: float = 0.05,
        format: str = "auto",
        columns: dict[str, str] | None = None,
        split: str = "train",
        data_revision: str | None = None,
        max_rows: int | None = None,
        on_bad_row: Literal["error", "drop"] = "error",
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
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise UserError(f"data.{name} must be at least {least}, got {value!r}.")
        if not 0 <= val_fraction < 1:
            raise UserError(
                f"data.val_fraction must be in [0, 1), got {val_fraction!r}. 0.05 holds out one row in twenty."
            )
        if not -(2**63) <= seed < 2**63 - 2**32:  # an epoch's number is added
            raise UserError(f"data.seed must have less than 64 bits, got {seed!r}. Give a smaller one.")
        self.train_data = train_data
        self.val_data = val_data
        self.val_fraction = val_fraction
        self.format = format
        self.columns = columns
        self.split = split
        self.data_revision = data_revision
        self.max_rows = max_rows
        self.on_bad_row = on_bad_row
        self.prompt_template = prompt_template
        self.max_prompt_tokens = max_prompt_tokens
        self.generator = generator if generator is not None else ContinuousGenerator()
        self.generator.check_contract()
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
        #: Loaded in ``setup``, unless it is set before.
        self.tokenizer: Any = None
        #: The tokens that end an answer by the model's own settings. Looked up in ``setup``, unless they are set before.
        self.end_ids: Sequence[int] | None = None
        #: Encode no more rows than this, chosen by the seed. For a look at the data only.
        self.sample: int | None = None
        self.prompts: list[Prompt] = []
        self.val_prompts: list[Prompt] = []
        #: What was read, dropped, cut and found strange, in exact counts. Made in ``setup``.
        self.report: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, check and encode the rows: everything about the data that can fail, before a model is loaded."""
        if not self.prompts:
            self._read()
        if stage == "fit":
            self._refuse_less_than_a_batch()
        if stage == "validate" and not self.val_prompts:
            raise UserError(
                "no row is held out, so there is nothing to measure. Give data.val_data or raise data.val_fraction."
            )

    def write_report(self, folder: Path) -> None:
        """Write ``data_report.json`` into a run's folder."""
        write_json(folder / "data_report.json", self.report)

    def _read(self) -> None:
        read = partial(
            load_rows,
            split=self.split,
            format=self.format,
            columns=self.columns,
            revision=self.data_revision,
            max_rows=self.max_rows,
            on_bad_row=self.on_bad_row,
            seed=self.seed,
        )
        train = read(self.train_data)
        self.report = {"train_data": _describe("data", self.train_data, train), "val_data": None}
        rows = list(zip(train.places, train.rows, train.times, strict=True))
        if self.val_data is not None:
            val = read(self.val_data)
            self.report["val_data"] = _describe("held-out data", self.val_data, val)
            val_rows = list(zip(val.places, val.rows, val.times, strict=True))
        else:  # before rows are repeated: all copies of a row are on one side
            rows, val_rows = self._hold_out(rows)
            val_rows = [(where, row, 1) for where, row, _ in val_rows]
        tokenizer = self._load_tokenizer() if self.tokenizer is None else self.tokenizer
        self.encoder = self._make_encoder(tokenizer)
        self.prompts = self._encode(_repeated(rows), "train")
        if not self.prompts:
            raise UserError(
                f"all {self.report['train']['rows']} prompts of {self.train_data} are longer than max_prompt_tokens={self.max_prompt_tokens}, "
                "so nothing is left to train on. Raise data.max_prompt_tokens."
            )
        self.val_prompts = self._encode(_repeated(val_rows), "held_out")
        self.report["prompts_sha256"] = self.prompts_hash
        self.refuse_longer_than(self.encoder.tokenizer.model_max_length, is_of_tokenizer=True)

    def _refuse_less_than_a_batch(self) -> None:
        num_prompts = self.report["train"].get("sample_of", len(self.prompts))
        if num_prompts * self.answers_per_prompt < self.batch_size:
            answers = f" with {self.answers_per_prompt} answers each" if self.answers_per_prompt > 1 else ""
            train, num_rows = self.report["train"], self.report["train_data"]["rows_kept"]
            refused = train["refused_rows"]["count"]
            raise UserError(
                f"{num_prompts} rows to train on{answers} are fewer than data.batch_size {self.batch_size}: of {num_rows} rows "
                f"{num_rows - train['rows']} are held out and {train['long_prompts']['count']} have prompts that are too long"
                f"{f', {refused} are refused by the chat template' if refused else ''}. "
                "Lower data.batch_size, or give more rows."
            )

    def refuse_longer_than(self, limit: float, is_of_tokenizer: bool = False) -> None:
        """Refuse prompts that leave no room for their answers in a context of ``limit`` tokens: the model's or the tokenizer's.

        Raises:
            UserError: The longest prompt and the longest answer do not fit.
        """
        longest = max(len(prompt.prompt_ids) for prompt in [*self.prompts, *self.val_prompts])
        longest += self.generator.max_new_tokens
        if longest > limit:
            takes, mend = f"the model takes {limit}", ""
            if is_of_tokenizer:
                takes = f"the tokenizer's model_max_length is {limit}"
                mend = ", or if the model takes more, raise model_max_length in the tokenizer_config.json of its folder"
            raise UserError(
                f"the longest prompt and its answer need {longest} tokens, but {takes}. "
                f"Lower data.max_prompt_tokens or data.generator.max_new_tokens{mend}."
            )

    def _hold_out(self, rows: list[T]) -> tuple[list[T], list[T]]:
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
        if getattr(module, "has_no_name", False):
            raise UserError(
                f"the model was given as an object that knows no name, {module.model_name_or_path}, so its tokenizer has to be given "
                "too: set data.tokenizer = ..., or data.tokenizer_name_or_path."
            )
        return load_tokenizer(
            module.model_name_or_path, revision=module.revision, trust_remote_code=module.trust_remote_code
        )

    def _make_encoder(self, tokenizer: Any) -> Encoder:
        """An encoder for the model's ends of answers. The date in its prompts stays that of the day the run began."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        began = None
        for callback in self.trainer.callbacks if self.trainer is not None else []:  # type: ignore[attr-defined]
            if isinstance(folder := getattr(callback, "output_dir", None), str | Path):
                report = read_json(Path(folder) / "data_report.json") or {}
                began = began or report.get("template_time")
        encoder = Encoder(tokenizer, self.prompt_template, None if began is None else _time(began))
        if self.end_ids is None and module is not None:
            model = getattr(module, "policy", None) or module.given_model
            settings = {"revision": module.revision, "trust_remote_code": module.trust_remote_code}
            self.end_ids = (
                end_ids_of(model) if model is not None else end_ids(module.model_name_or_path, tokenizer, **settings)
            )
        encoder.end_at(self.end_ids or ())
        if encoder.time is not None:
            self.report["template_time"] = encoder.time
        return encoder

    def _encode(self, rows: list[tuple[str, Row]], part: str) -> list[Prompt]:
        """The rows as ids, without those with long prompts; what is counted goes into the report and on the screen."""
        sample_of = {}
        if self.sample is not None and self.sample < len(rows):
            sample_of = {"sample_of": len(rows)}
            chosen = sorted(random.Random(f"sample/{self.seed}").sample(range(len(rows)), self.sample))
            say(f"note: of {len(rows)} rows {self.sample} are encoded and counted ({part}), a sample")
            rows = [rows[index] for index in chosen]
        noted = {
            name: Tally()
            for name in (
                "refused_rows",
                "long_prompts",
                "cut_answers",
                "empty_answers",
                "control_tokens",
                "template_text",
                "encoded_apart",
                "reasoning_left_out",
                "no_reasoning",
                "tools_left_out",
                "turns_left_out",
                "text_left_out",
            )
        }
        noted |= {"also_trained_on": Tally()} if part == "held_out" else {}
        trained_on = {prompt_key(prompt.row) for prompt in self.prompts} if rows and part == "held_out" else set()
        prompts: list[Prompt] = []
        encoded_rows = self.encoder.encode_rows((row for _, row in rows), self.generator.max_new_tokens)
        counted_rows = track(rows, "encoding held-out rows" if part == "held_out" else "encoding rows", len(rows))
        for (where, row), encoded in zip(counted_rows, encoded_rows, strict=True):
            if isinstance(encoded, UserError):
                noted["refused_rows"].add(f"{where}: {encoded}")
                continue
            length = len(encoded.prompt_ids)
            if length > self.max_prompt_tokens:
                noted["long_prompts"].add(f"{where}: {length} tokens")
                continue
            prompts.append(Prompt(len(prompts), row, encoded.prompt_ids, encoded.real_ids, encoded.finish_reason))
            for name, is_so in (
                ("cut_answers", encoded.finish_reason == "length"),
                ("empty_answers", len(encoded.real_ids) == 1 and encoded.real_ids[0] in self.encoder.end_ids),
                ("control_tokens", self.encoder.has_control_tokens(row)),
                ("template_text", self.encoder.has_template_text(row)),
                ("also_trained_on", bool(trained_on) and prompt_key(row) in trained_on),
                *((name, True) for name in encoded.noted),
            ):
                if is_so:
                    noted[name].add(where)
        refused = noted["refused_rows"]
        if refused.count and (self.on_bad_row == "error" or not prompts):
            raise UserError(_refusal(refused, len(rows)))
        _print_noted(noted, " (held-out rows)" if part == "held_out" else "")
        self.report[part] = {
            "rows": len(rows),
            **sample_of,
            "prompts": len(prompts),
            **_as_dicts(noted),
            "prompt_tokens": _spread([len(prompt.prompt_ids) for prompt in prompts]),
            "real_tokens": _spread([len(prompt.real_ids) for prompt in prompts]),
        }
        return prompts

    @property
    def prompts_hash(self) -> str:
        """Hash of all training prompts and real responses as token ids."""
        return _hash_of(self.prompts)

    @property
    def held_out_hash(self) -> str:
        """The same of what is held out."""
        return _hash_of(self.val_prompts)

    def train_dataloader(self) -> ResumableLoader:
        """Pairs of the iteration the next epoch belongs to; without a game, the real responses."""
        if self.game is None:
            return self._loader(self.prompts, [prompt.prompt_id for prompt in self.prompts], collate_prompts)
        training_set = self.game.ensure_iteration()
        rows = training_set.rows
        prompt_ids = rows["prompt_id"].to_pylist() if rows.num_rows else []
        return self._loader(PairDataset(rows), prompt_ids, training_set.collate)

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


def _repeated(rows: list[tuple[str, Row, int]]) -> list[tuple[str, Row]]:
    """Each row as often as its source's weight says."""
    return [(where, row) for where, row, times in rows for _ in range(times)]


def _describe(what: str, source: str | dict[str, float], loaded: LoadedRows) -> dict[str, Any]:
    """Say what was read and what is strange about it; the same as part of the report."""
    for line in loaded.description.splitlines():
        say(f"{what}: {line}")
    for note in loaded.notes:
        say(f"note: {note}")
    for key, tally in itertools.islice(loaded.unused_keys.items(), 20):
        say(f"note: {key!r} inside turns has no effect: in {tally.count} rows, the first {tally.first[0]}")
    for kind, tally in loaded.dropped.items():
        say(f"note: bad rows that were dropped, {kind}: {tally.count}, the first {tally.first[0]}")
    _print_noted(loaded.noted)
    return {
        "source": source if isinstance(source, str) else {str(name): weight for name, weight in source.items()},
        "format": loaded.format,
        "description": loaded.description,
        "rows_read": loaded.num_read,
        "rows_kept": sum(loaded.times),
        "rows_dropped": sum(tally.count for tally in loaded.dropped.values()),
        "dropped": _as_dicts(loaded.dropped),
        "notes": loaded.notes,
        "unused_turn_keys": [{"key": key, **asdict(tally)} for key, tally in loaded.unused_keys.items()],
        "sources": [
            {
                "source": name,
                "weight": weight,
                "format": part.format,
                "rows_read": part.num_read,
                "rows_kept": len(part.rows),
                "rows_taken": sum(part.times),
            }
            for name, weight, part in loaded.parts
        ],
        **_as_dicts(loaded.noted),
    }


def _refusal(refused: Tally, num_rows: int) -> str:
    cure = ", or set data.on_bad_row: drop to leave them out" if refused.count < num_rows else ""
    return f"{refused.count} of {num_rows} rows cannot be encoded{refused.listed()}\nMend or remove these rows{cure}."


def _time(text: Any) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise UserError(
            f"template_time in the run's data_report.json must be a time such as '2026-01-31T12:00:00', got {text!r}. "
            "Restore the file from a copy, or use another output_dir."
        ) from None


def _print_noted(noted: dict[str, Tally], suffix: str = "") -> None:
    for name, tally in noted.items():
        if tally.count and name in COUNTED:
            say(f"note: {COUNTED[name]}{suffix}: {tally.count}, the first {tally.first[0]}")


def _as_dicts(tallies: dict[str, Tally]) -> dict[str, Any]:
    return {name: asdict(tally) for name, tally in tallies.items()}


def _spread(lengths: Sequence[int]) -> dict[str, float] | None:
    """Median, the least number that 90 % do not exceed, and the most. None of nothing.

    Example:
        >>> _spread([1, 2, 3, 40])
        {'median': 2.5, 'p90': 40, 'most': 40}
    """
    if not lengths:
        return None
    ranked = sorted(lengths)
    return {"median": median(ranked), "p90": ranked[-(len(ranked) // 10) - 1], "most": ranked[-1]}


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


def _hash_of(prompts: list[Prompt]) -> str:
    return sha256_of([[prompt.prompt_ids, prompt.real_ids] for prompt in prompts])
