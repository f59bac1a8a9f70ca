"""The rows of any stage: read, checked, held out, encoded and served, real responses alone.

``RowDataModule`` knows nothing of losses, optimisers and sampling.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import lightning as L
from torch.utils.data import DataLoader, DistributedSampler

from spin_lightning.data.encoding import Encoded, Encoder
from spin_lightning.data.formats import Tally, prompt_key
from spin_lightning.data.loader import InTurn, ResumableLoader, ResumableSampler
from spin_lightning.data.report import as_dicts, describe_source, refusal_of, say_noted, spread
from spin_lightning.data.rows import LoadedRows, load_rows
from spin_lightning.data.training_set import PairDataset, TrainingSet
from spin_lightning.models.batches import collate_prompts
from spin_lightning.models.loading import end_ids, end_ids_of, load_tokenizer
from spin_lightning.progress import track
from spin_lightning.runs import processes
from spin_lightning.runs.files import read_json, sha256_of, write_json
from spin_lightning.terminal import say
from spin_lightning.types import Prompt, Row, UserError

T = TypeVar("T")


class RowDataModule(L.LightningDataModule):
    """Prompts and real responses of an SFT data set.

    Args:
        train_data: A file (JSON, JSONL, CSV, TSV, Parquet; also .gz or .zst), a folder, or a hub name. Several: a map
            from each to its weight, such as ``{a.jsonl: 1.0, b.jsonl: 0.5}``: 1 takes all of its rows, 0.5 a random
            half, 2 each row twice.
        val_data: The same, for the held-out NLL. None sets ``val_fraction`` of the training rows aside.
        other_data: The same, of other tasks: rows that are only measured, beside the held-out ones, so that a run says
            what it forgets. None: nothing is.
        val_fraction: Share of the rows held out where ``val_data`` is not given. 0 trains without a held-out NLL.
        format: ``auto`` detects it and says so; else messages, prompt_completion, alpaca, sharegpt, real_generated or
            chosen_rejected.
        columns: Map from the format's column names to those of the data, such as ``{prompt: question}``.
            ``{system: ""}`` leaves a column unread.
        split: Which split of a hub data set or a saved folder.
        data_revision: Commit or tag of a hub data set.
        max_rows: Read no more than this many rows, of each source. None reads all.
        on_bad_row: ``error`` refuses data with bad rows, and shows the first five; ``drop`` leaves them out, counted by
            kind in ``data_report.json`` and on screen. Bad are rows without a real response or a question, with a
            missing or wrong type, an unknown role, a response that is marked as not to be trained on or as undesirable,
            a NUL character, half a surrogate pair, or more than a million characters; in JSONL also lines that are not
            JSON or not UTF-8.
        prompt_template: None uses the tokenizer's chat template. Else ``alpaca``, ``spin``, ``chatml``, a text with
            ``{prompt}``, a Jinja template, or a file with one.
        max_prompt_tokens: Rows with longer prompts are left out, and counted.
        max_response_tokens: Cap on the responses, terminator included: longer real ones are cut there, or left out
            where ``too_long`` is ``drop``, and counted.
        batch_size: Pairs (in SFT: rows) in a batch, over all processes together.
        micro_batch_tokens: Tokens in one forward and backward pass. A batch with more takes several passes whose
            gradients add up: the same gradient in less memory. Raise it on a GPU until its memory is used.
        num_workers: Processes that collate batches.
        seed: Of the order of the batches, of the held-out rows and of the rows that a weight draws; in a game also of
            the responses. Training has no other randomness, so ``seed_everything`` does not change it.
        tokenizer_name_or_path: None takes the model's.

    Raises:
        UserError: A setting is outside its range; or, in ``setup``, the data cannot be used.

    Example:
        >>> data = RowDataModule("train.jsonl", columns={"prompt": "question", "completion": "answer"})
    """

    #: The setting that caps the responses.
    cap_setting = "data.max_response_tokens"
    #: Whether a row has to have two responses, a better and a worse one.
    needs_rejected = False
    #: What is counted of rows with two responses, beside what is of all.
    also_counted: ClassVar[tuple[str, ...]] = ()
    #: Whether ``train_data`` may be a list, with one source an iteration.
    has_iterations = False
    #: What a prompt gives to train on.
    examples_per_prompt = 1

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
        max_response_tokens: int = 256,
        batch_size: int = 8,
        micro_batch_tokens: int = 1024,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer_name_or_path: str | None = None,
        other_data: str | dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        #: What is trained on in the place of the rows as they are; asked whenever a loader is made. None: the rows.
        self.make_training_set: Callable[[], TrainingSet] | None = None
        refuse_below(1, batch_size=batch_size, micro_batch_tokens=micro_batch_tokens)
        refuse_below(1, max_prompt_tokens=max_prompt_tokens, max_response_tokens=max_response_tokens)
        refuse_below(0, num_workers=num_workers)
        if not 0 <= val_fraction < 1:
            raise UserError(
                f"data.val_fraction must be in [0, 1), got {val_fraction!r}. 0.05 holds out one row in twenty."
            )
        if isinstance(train_data, list):
            self._check_list(train_data, val_data, val_fraction)
        if not -(2**63) <= seed < 2**63 - 2**32:  # an epoch's number is added
            raise UserError(f"data.seed must have less than 64 bits, got {seed!r}. Give a smaller one.")
        self.train_data = train_data
        self.val_data = val_data
        self.other_data = other_data
        self.val_fraction = val_fraction
        self.format = format
        self.columns = columns
        self.split = split
        self.data_revision = data_revision
        self.max_rows = max_rows
        self.on_bad_row = on_bad_row
        self.prompt_template = prompt_template
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.batch_size = batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer_name_or_path = tokenizer_name_or_path
        #: Loaded in ``setup``, unless it is set before.
        self.tokenizer: Any = None
        #: The tokens that end a response by the model's own settings. Looked up in ``setup``, unless they are set
        #: before.
        self.end_ids: Sequence[int] | None = None
        #: Encode no more rows than this, chosen by the seed. For a look at the data only.
        self.sample: int | None = None
        #: Whether a row has to have a real response. False in the module or a callback says the same.
        self.needs_real = True
        #: Columns that ``Row.columns`` keeps, beside those that a ``reward`` of the module or of a callback names.
        self.keep_columns: Sequence[str] = ()
        self._began: str | None = None  # when the first process began, if the template asks
        #: The rows of the iteration in progress; where all iterations have the same, those.
        self.prompts: list[Prompt] = []
        self.val_prompts: list[Prompt] = []
        #: The rows of ``other_data``, and after how many batches of a measurement they come. None: they never do.
        self.other_prompts: list[Prompt] = []
        self.num_held_out_batches: int | None = None
        self._of_iterations: list[list[Prompt]] = []  # of a list of sources
        self._as_read: list[Prompt] | None = None  # where real responses were replaced since
        #: What was read, dropped, cut and found strange, in exact counts. Made in ``setup``.
        self.report: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, check and encode the rows: everything about the data that can fail, before a model is loaded."""
        if not self.prompts and processes.is_first():
            self._read_rows()  # before the others, so that one process says what is wrong
        self._began = processes.share(self.encoder.time if self.prompts else None)
        if not self.prompts:
            self._read_rows()
        if processes.world_size() > 1:
            processes.refuse_different(f"{self.hashes_of_rows} {self.held_out_hash}", "the rows")
        if stage == "fit":
            self._refuse_less_than_a_batch()
        if self.other_data is not None and not self.val_prompts:
            raise UserError(
                "data.other_data is measured whenever held-out rows are, and no row is held out. Give data.val_data or "
                "raise data.val_fraction."
            )
        if stage == "validate" and not self.val_prompts:
            raise UserError(
                "no row is held out, so there is nothing to measure. Give data.val_data or raise data.val_fraction."
            )

    def write_report(self, folder: Path) -> None:
        """Write ``data_report.json`` into a run's folder."""
        if processes.is_first():
            write_json(folder / "data_report.json", self.report)

    def read_source(self, source: str | dict[str, float], **needs: Any) -> LoadedRows:
        """The rows of one source, or of a map of several, read as the settings say.

        Args:
            source: As ``data.train_data`` has it.
            needs: What ``load_rows`` is asked for beside the settings, such as ``keep_columns``.

        Raises:
            UserError: They cannot be read.
        """
        return load_rows(
            source,
            split=self.split,
            format=self.format,
            columns=self.columns,
            revision=self.data_revision,
            max_rows=self.max_rows,
            on_bad_row=self.on_bad_row,
            seed=self.seed,
            **needs,
        )

    def _read_rows(self) -> None:
        read = partial(
            self.read_source,
            needs_rejected=self.needs_rejected,
            needs_real=all(getattr(part, "needs_real", True) for part in (self, *self._parts)),
            keep_columns=self._find_columns(),
        )
        sources = self.train_data if isinstance(self.train_data, list) else [self.train_data]
        train, *later = [read(source) for source in sources]
        self.report = {"train_data": describe_source("data", sources[0], train), "val_data": None}
        rows = list(zip(train.places, train.rows, train.times, strict=True))
        if self.val_data is not None:
            val = read(self.val_data)
            self.report["val_data"] = describe_source("held-out data", self.val_data, val)
            val_rows = list(zip(val.places, val.rows, val.times, strict=True))
        else:  # before rows are repeated: all copies of a row are on one side
            rows, val_rows = self._hold_out(rows)
            val_rows = [(where, row, 1) for where, row, _ in val_rows]
        tokenizer = self._load_tokenizer() if self.tokenizer is None else self.tokenizer
        self.encoder = self._make_encoder(tokenizer)
        self.prompts = self._encode_train_rows(rows, sources[0])
        if later:
            self._add_iterations(sources, later)
        self.val_prompts = self._encode_rows(_repeat_rows(val_rows), "held_out")
        if self.other_data is not None:
            other = read(self.other_data, needs_rejected=False, keep_columns=())
            self.report["other_data"] = describe_source("other data", self.other_data, other)
            rows = list(zip(other.places, other.rows, other.times, strict=True))
            self.other_prompts = self._encode_rows(_repeat_rows(rows), "other", needs_rejected=False)
        self.report["prompts_sha256"] = self.prompts_hash
        self.refuse_longer_than(self.encoder.tokenizer.model_max_length, is_of_tokenizer=True)

    def _encode_train_rows(self, rows: list[tuple[str, Row, int]], source: Any) -> list[Prompt]:
        prompts = self._encode_rows(_repeat_rows(rows), "train")
        if not prompts:
            left_out = {name: self.report["train"][name]["count"] for name in self.also_counted}
            if any(left_out.values()):
                counts = ", ".join(f"{name} {count}" for name, count in left_out.items())
                raise UserError(
                    f"all {self.report['train']['rows']} rows of {source} are left out ({counts}, "
                    f"long_prompts {self.report['train']['long_prompts']['count']}), so nothing is left to train on. "
                    f"{self.advice_on_left_out([row for _, row, _ in rows])}"
                )
            raise UserError(
                f"all {self.report['train']['rows']} prompts of {source} are longer than "
                f"max_prompt_tokens={self.max_prompt_tokens}, so nothing is left to train on. Raise "
                "data.max_prompt_tokens."
            )
        return prompts

    # --- rows that differ from iteration to iteration ---------------------------------------------------------------

    def _check_list(self, sources: list[Any], val_data: Any, val_fraction: float) -> None:
        if not self.has_iterations:
            raise UserError(
                f"data.train_data is a list, {sources!r}, which has one source an iteration, and there are none here. "
                "Give one source, or a map from each of several to its weight: {a.jsonl: 1.0, b.jsonl: 0.5}."
            )
        if not sources:
            raise UserError("data.train_data is an empty list. Give one source an iteration.")
        if val_data is None and val_fraction:
            raise UserError(
                "data.train_data is a list with one source an iteration, so no row of one of them is surely held out "
                "from the others. Give data.val_data, or set data.val_fraction: 0."
            )

    def _add_iterations(self, sources: list[Any], later: list[LoadedRows]) -> None:
        """Encode the rows of all iterations but the first. No two prompts have the same id unless they are the same."""
        first = {name: self.report[name] for name in ("train_data", "train")}
        known = {_hash_of(self.prompts): self.prompts}
        reports = [{**first, "prompts_sha256": _hash_of(self.prompts)}]
        for number, (source, loaded) in enumerate(zip(sources[1:], later, strict=True), 1):
            described = describe_source(f"data of iteration {number}", source, loaded)
            rows = list(zip(loaded.places, loaded.rows, loaded.times, strict=True))
            prompts = self._encode_train_rows(rows, source)
            start = sum(map(len, known.values()))
            renumbered = [replace(prompt, prompt_id=start + prompt.prompt_id) for prompt in prompts]
            known.setdefault(sha256 := _hash_of(prompts), renumbered)
            reports.append({"train_data": described, "train": self.report["train"], "prompts_sha256": sha256})
        self._of_iterations = [known[report["prompts_sha256"]] for report in reports]
        self.report |= {**first, "iterations": reports}

    def begin_iteration(self, number: int) -> None:
        """Serve the rows of an iteration, with the real responses that the data have."""
        if self._of_iterations:
            self.prompts = self._of_iterations[min(number, len(self._of_iterations) - 1)]
        elif self._as_read is not None:
            self.prompts = self._as_read

    def replace_real(self, prompts: list[Prompt]) -> None:
        """Serve these until the next iteration begins: the same prompts with other real responses."""
        if self._as_read is None:
            self._as_read = self.prompts
        self.prompts = prompts

    def shorten(self, count: int) -> None:
        """Leave the first prompts only, for a trial."""
        self.prompts = self.prompts[:count]
        self._of_iterations = [prompts[:count] for prompts in self._of_iterations]

    @property
    def rows_move(self) -> bool:
        """Whether iterations may have different rows."""
        return bool(self._of_iterations) or self._as_read is not None

    @property
    def hashes_of_rows(self) -> str | list[str]:
        """Hash of the rows, as they were read: one, or one an iteration."""
        if self._of_iterations:
            return [_hash_of(prompts) for prompts in self._of_iterations]
        return _hash_of(self.prompts if self._as_read is None else self._as_read)

    @property
    def _all_prompts(self) -> list[Prompt]:
        return [prompt for prompts in self._of_iterations or [self.prompts] for prompt in prompts]

    @property
    def _module(self) -> Any:
        return self.trainer.lightning_module if self.trainer is not None else None

    @property
    def _parts(self) -> list[Any]:
        """The module and the callbacks of the run."""
        return [] if self.trainer is None else [self._module, *self.trainer.callbacks]  # type: ignore[attr-defined]

    def _find_columns(self) -> list[str]:
        """The columns that somebody needs: beside one's own those that a reward names, of the module or a callback."""
        rewards = [getattr(part, "reward", None) for part in self._parts]
        named = [column for reward in rewards for column in getattr(reward, "columns", ())]
        return list(dict.fromkeys([*self.keep_columns, *named]))

    def _refuse_less_than_a_batch(self) -> None:
        reports = self.report.get("iterations", [self.report])
        report = min(reports, key=lambda report: report["train"]["prompts"])
        train = report["train"]
        num_prompts = train.get("sample_of", train["prompts"])
        most = num_prompts * self.examples_per_prompt
        if most < self.batch_size:
            lower = f"Set --data.batch_size {most} or less, or give" if most else "Give"
            answers = f" with {self.examples_per_prompt} responses each" if self.examples_per_prompt > 1 else ""
            num_rows = report["train_data"]["rows_kept"]
            refused = train["refused_rows"]["count"]
            of_iteration = f" in iteration {reports.index(report)}" if len(reports) > 1 else ""
            raise UserError(
                f"{num_prompts} rows to train on{answers}{of_iteration} are fewer than data.batch_size "
                f"{self.batch_size}: of {num_rows} rows {num_rows - train['rows']} are held out and "
                f"{train['long_prompts']['count']} have "
                f"prompts that are too long{f', {refused} are refused by the chat template' if refused else ''}. "
                f"{lower} more rows."
            )

    def refuse_longer_than(self, limit: float, is_of_tokenizer: bool = False) -> None:
        """Refuse prompts that leave no room for responses in a context of ``limit`` tokens, the model's or tokenizer's.

        Raises:
            UserError: The longest prompt and the longest response do not fit.
        """
        longest = max(len(prompt.prompt_ids) for prompt in [*self._all_prompts, *self.val_prompts, *self.other_prompts])
        longest += self.max_response_tokens
        if longest > limit:
            takes, mend = f"the model takes {limit}", ""
            if is_of_tokenizer:
                takes = f"the tokenizer's model_max_length is {limit}"
                mend = ", or if the model takes more, raise model_max_length in the tokenizer_config.json of its folder"
            raise UserError(
                f"the longest prompt and its response need {longest} tokens, but {takes}. "
                f"Lower data.max_prompt_tokens or {self.cap_setting}{mend}."
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
        module = self._module
        if module is None:
            raise UserError(
                "data.tokenizer_name_or_path is needed outside of a Trainer. Give the model's name or folder."
            )
        if getattr(module, "has_no_name", False):
            raise UserError(
                f"the model was given as an object that knows no name, {module.model_name_or_path}, so its tokenizer "
                "has to be given too: set data.tokenizer = ..., or data.tokenizer_name_or_path."
            )
        return load_tokenizer(
            module.model_name_or_path, revision=module.revision, trust_remote_code=module.trust_remote_code
        )

    def _make_encoder(self, tokenizer: Any) -> Encoder:
        """An encoder for the model's ends of responses. The date in its prompts stays that of the day the run began."""
        module = self._module
        began = self._began
        for callback in self.trainer.callbacks if self.trainer is not None else []:  # type: ignore[attr-defined]
            if isinstance(folder := getattr(callback, "output_dir", None), str | Path):
                report = read_json(Path(folder) / "data_report.json") or {}
                began = began or report.get("template_time")
        encoder = Encoder(tokenizer, self.prompt_template, None if began is None else _parse_time(began))
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

    def _encode_rows(self, rows: list[tuple[str, Row]], part: str, needs_rejected: bool | None = None) -> list[Prompt]:
        """The rows as ids, without those with long prompts; what is counted goes into the report and on the screen."""
        needs_rejected = self.needs_rejected if needs_rejected is None else needs_rejected
        of_part = {"held_out": "held-out rows", "other": "rows of other tasks"}.get(part, "rows")
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
                *self.also_counted,
            )
        }
        noted |= {"also_trained_on": Tally()} if part == "held_out" else {}
        trained_on = {prompt_key(prompt.row) for prompt in self._all_prompts} if rows and part == "held_out" else set()
        prompts: list[Prompt] = []
        encoded_rows = self.encoder.encode_rows((row for _, row in rows), self.max_response_tokens)
        others: Iterable[Encoded | UserError | None] = repeat(None, len(rows))
        if needs_rejected:
            others = self.encoder.encode_rows((row.swapped for _, row in rows), self.max_response_tokens)
        counted_rows = track(rows, f"encoding {of_part}", len(rows))
        for (where, row), encoded, other in zip(counted_rows, encoded_rows, others, strict=True):
            if isinstance(encoded, UserError) or isinstance(other, UserError):
                noted["refused_rows"].add(f"{where}: {encoded if isinstance(encoded, UserError) else other}")
                continue
            length = len(encoded.prompt_ids)
            if length > self.max_prompt_tokens:
                noted["long_prompts"].add(f"{where}: {length} tokens")
                continue
            if other is not None and (reason := self.reason_to_leave_out(encoded, other)):
                noted[reason].add(where)
                continue
            sides = [(row, encoded)] + ([(row.swapped, other)] if other is not None else [])
            of_rejected = () if other is None else (other.real_ids, other.finish_reason)
            prompt_id = len(prompts)
            prompts.append(
                Prompt(prompt_id, row, encoded.prompt_ids, encoded.real_ids, encoded.finish_reason, *of_rejected)
            )
            for name, is_so in (
                ("cut_answers", encoded.finish_reason == "length"),
                ("empty_answers", len(encoded.real_ids) == 1 and encoded.real_ids[0] in self.encoder.end_ids),
                ("control_tokens", any(self.encoder.has_control_tokens(side) for side, _ in sides)),
                ("template_text", any(self.encoder.has_template_text(side) for side, _ in sides)),
                ("also_trained_on", bool(trained_on) and prompt_key(row) in trained_on),
                ("cut_rejected", other is not None and other.finish_reason == "length"),
                *((name, True) for name in frozenset().union(*(ids.noted for _, ids in sides))),
            ):
                if is_so:
                    noted[name].add(where)
        refused = noted["refused_rows"]
        if refused.count and (self.on_bad_row == "error" or not prompts):
            raise UserError(refusal_of(refused, len(rows)))
        say_noted(noted, "" if part == "train" else f" ({of_part})")
        self.report[part] = {
            "rows": len(rows),
            **sample_of,
            "prompts": len(prompts),
            **as_dicts(noted),
            "prompt_tokens": spread([len(prompt.prompt_ids) for prompt in prompts]),
            "real_tokens": spread([len(prompt.real_ids) for prompt in prompts]),
        }
        if needs_rejected:
            self.report[part]["rejected_tokens"] = spread([len(prompt.rejected_ids or ()) for prompt in prompts])
        return prompts

    def advice_on_left_out(self, rows: Sequence[Row]) -> str:
        """What to do where all rows are left out, as a sentence."""
        return "Give rows with two different responses, or raise data.max_prompt_tokens or max_response_tokens."

    def reason_to_leave_out(self, encoded: Encoded, other: Encoded) -> str | None:
        """Under which name of ``also_counted`` a row with two responses is left out, if it is."""
        return None

    @property
    def prompts_hash(self) -> str:
        """Hash of the iteration's prompts and responses as token ids, and of what else of their rows is used."""
        return _hash_of(self.prompts)

    @property
    def held_out_hash(self) -> str:
        """The same of the held-out rows."""
        return _hash_of(self.val_prompts)

    def train_dataloader(self) -> ResumableLoader:
        """The real responses, or what the module makes of them."""
        if self.make_training_set is not None:
            return self._serve(self.make_training_set())
        return self._make_loader(self.prompts, [prompt.prompt_id for prompt in self.prompts], collate_prompts)

    def _serve(self, training_set: TrainingSet, keeps_prompts_together: bool = False) -> ResumableLoader:
        """What the clock of a run has made."""
        rows = training_set.rows
        prompt_ids = rows["prompt_id"].to_pylist() if rows.num_rows else []
        return self._make_loader(PairDataset(rows), prompt_ids, training_set.collate, keeps_prompts_together)

    def val_dataloader(self) -> list[Any] | DataLoader[Any]:
        return self._beside_other(
            self._make_held_out_loader([prompt for prompt in self.val_prompts if prompt.real_ids], collate_prompts)
        )

    def _beside_other(self, held_out: Any) -> Any:
        """The loader of the held-out rows, and behind it that of the rows of other tasks, where there are any."""
        other = [prompt for prompt in self.other_prompts if prompt.real_ids]
        if not other or not len(held_out):
            return held_out
        self.num_held_out_batches = len(held_out)
        return InTurn(held_out, self._make_held_out_loader(other, collate_prompts))

    def _make_held_out_loader(self, rows: Any, collate: Callable[..., Any]) -> list[Any] | DataLoader[Any]:
        if not len(rows):
            return []
        # every process has all batches, and takes its share of each: Lightning's own sampler would count rows twice
        all_in_order: Any = DistributedSampler(rows, num_replicas=1, rank=0, shuffle=False)
        collate = self._make_collate(collate)
        return DataLoader(rows, batch_size=self.batch_size, sampler=all_in_order, collate_fn=collate)

    def _make_loader(
        self, rows: Any, prompt_ids: list[int], collate: Callable[..., Any], keeps_prompts_together: bool = False
    ) -> ResumableLoader:
        return ResumableLoader(
            rows,
            sampler=ResumableSampler(prompt_ids, self.seed, keeps_prompts_together),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self._make_collate(collate),
        )

    def _make_collate(self, collate: Callable[..., Any]) -> Callable[..., Any]:
        several = {"multiple_of": processes.world_size()} if processes.world_size() > 1 else {}
        return partial(collate, max_tokens=self.micro_batch_tokens, **several)


def refuse_below(least: int, **settings: int) -> None:
    """Refuse settings of the data that are less than they may be.

    Raises:
        UserError: One is.
    """
    for name, value in settings.items():
        if value < least:
            raise UserError(f"data.{name} must be at least {least}, got {value!r}.")


def _repeat_rows(rows: list[tuple[str, Row, int]]) -> list[tuple[str, Row]]:
    """Each row as often as its source's weight says."""
    return [(where, row) for where, row, times in rows for _ in range(times)]


def _parse_time(text: Any) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise UserError(
            f"template_time in the run's data_report.json must be a time such as '2026-01-31T12:00:00', got {text!r}. "
            "Restore the file from a copy, or use another output_dir."
        ) from None


def _hash_of(prompts: list[Prompt]) -> str:
    return sha256_of([[prompt.prompt_ids, prompt.real_ids, *_further_data_of(prompt)] for prompt in prompts])


def _further_data_of(prompt: Prompt) -> list[Any]:
    """What a row has beside prompt and real response; nothing, in most."""
    row = prompt.row
    of_pair = [] if prompt.rejected_ids is None else [prompt.rejected_ids, row.preference, row.margin]
    return [*of_pair, *([json.dumps(row.columns, sort_keys=True, default=str)] if row.columns else [])]
