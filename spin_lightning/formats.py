"""From the user's file, folder or hub data set to rows: what was asked, and the real answer.

Owns every file kind and column layout that can be read, and all checks of a row. No tokenizer and no model: lengths
are judged later. Texts are kept to the letter, nothing is stripped; of a turn only its role and its text are read.

Nothing is guessed. Columns that fit two formats are an error, and so is a folder without files named after the split,
because a wrong guess would train on a test set. Nothing is silent: whatever is dropped or strange is counted, with the
first places. Rows and lines are counted from 1, as in an editor.
"""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spin_lightning import hub
from spin_lightning.types import Message, Row, UserError

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant", "observation": "tool"}
#: A longer row is a bad row: some tokenizers take minutes for it, and no context holds it.
MAX_ROW_CHARACTERS = 1_000_000
NUM_EXAMPLES = 5


class _BadRow(Exception):
    """Why one row cannot be used: ``kind`` in two words, for counting, and the whole reason.

    ``load_rows`` collects them, so that one message shows them all.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass
class Tally:
    """How often something was met, and the first places where.

    Example:
        >>> tally = Tally()
        >>> tally.add("train.jsonl, line 4")
        >>> tally
        Tally(count=1, first=['train.jsonl, line 4'])
    """

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.first) < NUM_EXAMPLES:
            self.first.append(where)


@dataclass(frozen=True)
class LoadedRows:
    """The rows of one source, the format they were read as, and one sentence that tells a user what was read.

    Attributes:
        places: Where each row is from, as ``train.jsonl, line 4``.
        num_read: Rows in the source, with those that were dropped.
        dropped: The bad rows by kind. Empty unless they are to be dropped.
        noted: What is strange about the rows that were kept: ``exact_duplicates`` repeat an earlier row,
            ``repeated_prompts`` give another answer to an earlier prompt, ``dropped_turns`` go on after the last
            assistant turn; and files with ``byte_order_marks``.
    """

    rows: list[Row]
    format: str
    description: str
    places: list[str]
    num_read: int
    dropped: dict[str, Tally]
    noted: dict[str, Tally]


@dataclass(frozen=True)
class Format:
    """One column layout. ``read`` turns a record into the conversation up to and including the real answer.

    ``ignored`` columns belong to the format but are never read: the opponent writes the losing answer afresh.
    """

    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], list[Message]]
    expected: str
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


# --- One record to one conversation ---------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _listed(values: Iterable[Any]) -> str:
    """The first of many, each cut: a message is for a screen."""
    first = [str(value)[:40] for value in islice(values, 9)]
    return repr(first[:8]) if len(first) < 9 else f"{first[:8]} and more"


def _wrong_type(value: Any, expected: str) -> _BadRow:
    return _BadRow("missing" if value is None else "wrong type", f"{expected}, got {_shown(value)}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(value, f"{what} must be text")
    if "\0" in value:  # ends the text in some tokenizers, and is never meant
        raise _BadRow("NUL character", f"{what} holds a NUL character at character {value.index(chr(0))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, and tokenizers crash on it
        reason = f"{what} holds half of a surrogate pair at character {error.start}"
        raise _BadRow("half a surrogate pair", reason) from None
    return value


def _turns(
    value: Any, column: str, keys: tuple[str, str] = ("role", "content"), roles: Mapping[str, str] = ROLES
) -> list[Message]:
    role_key, text_key = keys
    if not isinstance(value, list):
        raise _wrong_type(value, f"column {column!r} must be a list of turns")
    turns = []
    for number, turn in enumerate(value, 1):
        where = f"turn {number} of {column!r}"
        if not isinstance(turn, dict) or not {role_key, text_key} <= turn.keys():
            got = f"the keys {_listed(turn)}" if isinstance(turn, dict) else _shown(turn)
            raise _BadRow("malformed turn", f"{where} must have {role_key!r} and {text_key!r}, got {got}")
        role = turn[role_key]
        if not isinstance(role, str) or role not in roles:
            raise _BadRow("wrong role", f"{where} has {role_key} {repr(role)[:40]}, expected one of {', '.join(roles)}")
        if turn.get("tool_calls"):
            reason = f"{where} has tool_calls, which are not read: write the call into {text_key!r}"
            raise _BadRow("tool calls", reason)
        turns.append(Message(role=roles[role], content=_text(turn[text_key], where)))
    return turns


def _read_alpaca(record: Mapping[str, Any]) -> list[Message]:
    question = [_text(record["instruction"], "column 'instruction'"), _text(record["input"] or "", "column 'input'")]
    asked = Message(role="user", content="\n".join(part for part in question if part.strip()))
    answer = Message(role="assistant", content=_text(record["output"], "column 'output'"))
    return [*_system(record), asked, answer]


def _read_sharegpt(record: Mapping[str, Any]) -> list[Message]:
    return _system(record) + _turns(record["conversations"], "conversations", ("from", "value"), SHAREGPT_ROLES)


def _system(record: Mapping[str, Any]) -> list[Message]:
    text = _text(record["system"] or "", "column 'system'")
    return [Message(role="system", content=text)] if text.strip() else []


def _read_answer(column: str) -> Callable[[Mapping[str, Any]], list[Message]]:
    """A reader for an answer column (text or turns) with a ``prompt`` column (text, turns or absent)."""

    def read(record: Mapping[str, Any]) -> list[Message]:
        prompt, answer = record["prompt"], record[column]
        if prompt is None or isinstance(prompt, list):
            asked = _turns(prompt or [], "prompt")
        else:
            asked = [Message(role="user", content=_text(prompt, "column 'prompt'"))]
        if not isinstance(answer, list):
            if prompt is None:
                reason = f"column 'prompt' is empty, which is allowed only if {column!r} is a whole conversation"
                raise _BadRow("missing", reason)
            return [*asked, Message(role="assistant", content=_text(answer, f"column {column!r}"))]
        turns = _turns(answer, column)
        if turns and turns[0]["role"] == "assistant":
            return asked + turns
        if isinstance(prompt, list) and turns[: len(asked)] != asked:
            reason = f"{column!r} is a whole conversation, but it does not begin with the turns of 'prompt'"
            raise _BadRow("another prompt", reason)
        return turns  # the whole conversation is in the answer column, a text prompt only repeats its question

    return read


_TEXT_OR_TURNS = "as text or as a list of {role, content} turns"
#: Every readable layout. The order is that of the messages, not of preference: two that fit are an error.
FORMATS: dict[str, Format] = {
    "messages": Format(
        ("messages",),
        lambda record: _turns(record["messages"], "messages"),
        "a list of {role, content} turns with an assistant turn after a user turn",
    ),
    "prompt_completion": Format(
        ("prompt", "completion"), _read_answer("completion"), f"prompt and completion, each {_TEXT_OR_TURNS}"
    ),
    "alpaca": Format(
        ("instruction", "output"),
        _read_alpaca,
        "instruction, input and output as text; input follows the instruction on a new line",
        optional=("input", "system"),
    ),
    "sharegpt": Format(
        ("conversations",),
        _read_sharegpt,
        "a list of {from, value} turns; for {role, content} turns set data.columns: {messages: conversations}",
        optional=("system",),
    ),
    "real_generated": Format(
        ("real",), _read_answer("real"), f"the real answer {_TEXT_OR_TURNS}", ("prompt",), ("generated",)
    ),
    "chosen_rejected": Format(
        ("chosen",), _read_answer("chosen"), f"the chosen answer {_TEXT_OR_TURNS}", ("prompt",), ("rejected",)
    ),
}
#: Stands in when no record has columns at all, so that the records themselves are reported.
_NO_COLUMNS = Format((), lambda record: [], "one object with columns per row")


def _split_last_answer(turns: list[Message]) -> tuple[Row, int]:
    """The row whose real answer is the last assistant turn, and how many turns after it were dropped."""
    size = sum(len(turn["content"]) for turn in turns)
    if size > MAX_ROW_CHARACTERS:
        raise _BadRow("too long", f"has {size:,} characters, but a row may have {MAX_ROW_CHARACTERS:,}")
    answers = [position for position, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise _BadRow("no answer", f"there is no assistant turn, got roles {_listed(turn['role'] for turn in turns)}")
    prompt, real = turns[: answers[-1]], turns[answers[-1]]["content"]
    if not real.strip():
        raise _BadRow("blank answer", "the real answer is blank, there is nothing to learn")
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in prompt):
        raise _BadRow("blank prompt", "the prompt is blank: no user turn with text comes before the real answer")
    return Row(prompt=tuple(prompt), real=real), len(turns) - answers[-1] - 1


# --- One source to records: (where, columns). A line that cannot be parsed is yielded as a _BadRow -------------------


def _decode(data: bytes, offset: int = 0) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, position = data[error.start], offset + error.start
        reason = f"must be UTF-8 text, got byte 0x{byte:02x} at byte offset {position}"
        raise _BadRow("not UTF-8", reason) from None
    return text if offset else text.removeprefix("\ufeff")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    data = path.read_bytes()
    if not data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _read_jsonl(path)
        return
    expected = "Expected a list of objects, or one object per line. Mend that line."
    try:
        records = json.loads(_decode(data))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno} column {error.colno}: not JSON ({error.msg}). {expected}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets without end
        raise UserError(f"{path}: not JSON that can be read ({error}). {expected}") from None
    yield from ((f"{path}, row {number}", record) for number, record in enumerate(records, 1))


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record: Any
            try:
                text = _decode(line, offset)
                record = json.loads(text) if text.strip() else None
            except _BadRow as reason:
                text, record = "?", reason
            except json.JSONDecodeError as error:
                record = _BadRow("not JSON", f"not JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
                record = _BadRow("not JSON", f"not JSON that can be read: {error}")
            offset += len(line)
            if text.strip():
                yield f"{path}, line {number}", record


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses answers above 128 KiB
    # strict: a quote that is never closed is an error, instead of swallowing the rest of the file
    reader = csv.DictReader(io.StringIO(_decode(path.read_bytes()), newline=""), restkey="", strict=True)
    try:
        for number, record in enumerate(reader, 1):
            reason = f"has more cells than the {len(reader.fieldnames or [])} columns of the header"
            is_too_long = isinstance(record.get(""), list)
            yield f"{path}, row {number}", _BadRow("too many cells", reason) if is_too_long else record
    except csv.Error as error:
        raise UserError(
            f"{path}, the record after line {reader.line_num}: not CSV ({error}). Expected commas between "
            "cells, and quotes that are closed and doubled inside a cell. Mend that record."
        ) from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (ValueError, OSError) as error:  # not parquet, a page that does not unpack, text that is not UTF-8
        raise UserError(f"{path} must be a parquet file of UTF-8 text: {error}. Is the download whole?") from None


_FILE_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _read_files(paths: Iterable[Path], marked: Tally) -> Iterator[tuple[str, Any]]:
    for path in paths:
        if path.suffix.lower() not in _FILE_READERS:
            raise UserError(f"{path} must end in one of {', '.join(_FILE_READERS)}. Convert it, or name its files.")
        with path.open("rb") as file:
            if file.read(3) == codecs.BOM_UTF8:
                marked.add(str(path))
        try:
            yield from _FILE_READERS[path.suffix.lower()](path)
        except _BadRow as reason:  # only JSONL can go on behind a byte that is not UTF-8
            raise UserError(f"{path} {reason}. Save it as UTF-8.") from None


def _read_dataset(dataset: Any, source: str) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in dataset.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"{source}, row {number}", dict(zip(batch, values, strict=True))


def _read_hub(source: str, split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, config = source.partition(":")
    hub.is_reachable()  # else the library would try for minutes
    try:
        dataset = datasets.load_dataset(name, config or None, split=split, revision=revision)
    except Exception as error:  # the library raises a dozen types; each is the user's to mend
        raise UserError(
            f"no local file or folder is called {source!r}, and the hub data set could not be read: tried "
            f"load_dataset({name!r}, {config or None!r}, split={split!r}, revision={revision!r}), "
            f"got {type(error).__name__}: {error}\n"
            "Check the network, the name (name:config picks a configuration) and data.split, or give a local file "
            f"or folder ({', '.join(_FILE_READERS)}, or Dataset.save_to_disk)."
        ) from error
    return _read_dataset(dataset, source)


def _read_folder(folder: Path, split: str, marked: Tally) -> tuple[Iterator[tuple[str, Any]], bool]:
    """The records of a folder, and whether the split was used to choose them."""
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        import datasets

        dataset = datasets.load_from_disk(str(folder))
        if isinstance(dataset, datasets.Dataset):
            return _read_dataset(dataset, str(folder)), False
        if split not in dataset:
            raise UserError(f"{folder} has no split {split!r}, it has {sorted(dataset)}. Set data.split to one.")
        return _read_dataset(dataset[split], str(folder)), True
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _FILE_READERS)
    chosen = [path for path in files if path.name.replace(".", "-").startswith(f"{split}-")]
    if not chosen:
        raise UserError(
            f"folder {folder} must hold files of split {split!r}, as {split}.jsonl or {split}-00000-of-00002.parquet, "
            f"got {[path.name for path in files]}. Set data.split, or name the files: '{folder / '*.jsonl'}'."
        )
    return _read_files(chosen, marked), True


def _open_source(
    source: str, split: str, revision: str | None, marked: Tally
) -> tuple[Iterator[tuple[str, Any]], list[str]]:
    """The records of a source, and a note for each setting that has no meaning there. Counts byte order marks."""
    path = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or path.suffix.lower() in _FILE_READERS or glob.has_magic(source)
    if not path.exists() and not looks_local:
        return _read_hub(source, split, revision), []
    notes = [] if revision is None else [f"revision {revision!r} is ignored, it is for the hub"]
    if path.is_dir():
        records, is_split_used = _read_folder(path, split, marked)
    else:
        files = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            hint = f"there is no folder {path.parent}"
            if path.parent.is_dir():
                hint = f"{path.parent} has {_near(path.name, (p.name for p in path.parent.iterdir())) or 'no files'}"
            raise UserError(f"{path} does not exist: {hint}. Correct the path.")
        records, is_split_used = _read_files(files, marked), False
    if not is_split_used and split != "train":
        notes.append(f"split {split!r} is ignored, there are no splits here")
    return records, notes


def _near(name: str, choices: Iterable[str]) -> str:
    """The choices as a list to print, with those that look like the name."""
    choices = sorted(choices)
    close = get_close_matches(name, choices, n=3, cutoff=0.6)
    listed = ", ".join(map(repr, choices[:20])) + (", ..." if len(choices) > 20 else "")
    return f"{listed} (did you mean {' or '.join(map(repr, close))}?)" if close else listed


# --- Columns, and the public function -------------------------------------------------------------------------------


def _choose_format(name: str, columns: Mapping[str, str], found: list[str], source: str) -> str:
    """The one format that fits the columns of the source and the column map."""
    known = {key: {*f.required, *f.optional, *f.ignored} for key, f in FORMATS.items()}
    allowed = set().union(*known.values()) if name == "auto" else known[name]
    for ours, theirs in columns.items():
        if ours not in allowed:
            raise UserError(f"data.columns maps {ours!r}, expected one of {_near(ours, allowed)}. Rename that key.")
        if theirs not in found:
            raise UserError(
                f"data.columns maps {ours!r} to {theirs!r}, but {source} has the columns {_near(theirs, found)}."
                " Correct the name."
            )
    present = {*found, *columns}
    fitting = [key for key in FORMATS if present.issuperset(FORMATS[key].required) and known[key] >= columns.keys()]
    if name in fitting:
        return name
    if name == "auto" and len(fitting) == 1:
        return fitting[0]
    if name == "auto" and fitting:
        raise UserError(
            f"the columns of {source} fit more than one format: {', '.join(fitting)}. It has "
            f"{', '.join(map(repr, found))}. Set data.format to the one to read."
        )
    listed = {name: FORMATS[name]} if name != "auto" else FORMATS
    layouts = "".join(f"\n  {key}: {', '.join(layout.required)}" for key, layout in listed.items())
    raise UserError(
        f"the columns of {source} do not fit: it has {', '.join(map(repr, found))}, expected for{layouts}"
        "\nSay which of your columns is which, for example data.columns: {prompt: question, completion: answer}."
    )


def prompt_key(row: Row) -> tuple[tuple[str, str], ...]:
    """The row's prompt as something to compare and to look up."""
    return tuple((message["role"], message["content"]) for message in row.prompt)


def load_rows(
    source: str,
    *,
    split: str = "train",
    format: str = "auto",
    columns: dict[str, str] | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
    on_bad_row: Literal["error", "drop"] = "error",
) -> LoadedRows:
    """Every row of a file, folder or hub data set, checked, or one error that shows what is wrong with them.

    Files are read where they lie, without a copy in a cache.

    Args:
        source: A .json, .jsonl, .csv or .parquet file, a glob of them, a folder with files named after the split or
            made by ``save_to_disk``, or a hub name, as ``name`` or ``name:config``. What exists here comes first.
        split: Which split of a folder or a hub data set. A single file has none.
        format: A key of :data:`FORMATS`, or ``"auto"``: the one format whose required columns are all there.
        columns: From our column names to the user's, as ``{"prompt": "question", "completion": "answer"}``. With it,
            ``"auto"`` considers only formats that know every name on the left.
        revision: Branch, tag or commit of a hub data set.
        max_rows: Read only the first rows.
        on_bad_row: ``error`` refuses a source with bad rows, and shows the first five; ``drop`` leaves them out, and
            counts them. A file that cannot be read on behind its mistake is refused in any case.

    Returns:
        The rows in the order of the source. Turns after the last assistant turn are dropped, and counted in
        ``description``, which also names the columns that are not used. Duplicates are kept, and counted.

    Raises:
        UserError: The source is missing, empty or unreadable, no format or more than one fits, or rows are bad.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "train.jsonl")
        >>> _ = path.write_text('{"question": "1 + 1?", "answer": "2"}')
        >>> loaded = load_rows(str(path), columns={"prompt": "question", "completion": "answer"})
        >>> loaded.rows
        [Row(prompt=({'role': 'user', 'content': '1 + 1?'},), real='2')]
        >>> loaded.description.replace(str(path), "train.jsonl")
        "read 1 row of train.jsonl as 'prompt_completion': columns prompt (yours: question), completion (yours: answer)"
    """
    columns = columns or {}
    if format != "auto" and format not in FORMATS:
        raise UserError(f"data.format must be 'auto' or one of {_near(format, FORMATS)}, got {format!r}.")
    if max_rows is not None and max_rows < 1:
        raise UserError(f"data.max_rows must be at least 1, or absent to read all rows, got {max_rows}.")
    if on_bad_row not in ("error", "drop"):
        raise UserError(f"data.on_bad_row must be 'error' or 'drop', got {on_bad_row!r}.")
    noted = {name: Tally() for name in ("byte_order_marks", "dropped_turns", "exact_duplicates", "repeated_prompts")}
    records, notes = _open_source(source, split, revision, noted["byte_order_marks"])
    taken = list(islice(records, max_rows))
    if not taken:
        raise UserError(f"{source} must hold at least one row, got none. Is it the right file and split?")

    found = list(dict.fromkeys(column for _, record in taken if isinstance(record, dict) for column in record))
    layout, read_as = _NO_COLUMNS, "objects with columns"
    if found:
        format = _choose_format(format, columns, found, source)
        layout = FORMATS[format]
    origin = {ours: columns.get(ours, ours) for ours in layout.required + layout.optional}
    used = [
        ours if origin[ours] == ours else f"{ours} (yours: {origin[ours]})" for ours in origin if origin[ours] in found
    ]
    if used:
        read_as = f"{format!r}: column{'s' * (len(used) > 1)} {', '.join(used)}"

    rows: list[Row] = []
    places: list[str] = []
    bad = Tally()
    dropped: dict[str, Tally] = {}
    first_places: dict[Any, str] = {}  # of each prompt, and of each row
    for where, record in taken:
        try:
            if isinstance(record, _BadRow):
                raise record
            if not isinstance(record, dict):
                raise _BadRow("not an object", f"must be an object with columns, got {_shown(record)}")
            turns = layout.read({ours: record.get(theirs) for ours, theirs in origin.items()})
            row, num_dropped_turns = _split_last_answer(turns)
        except _BadRow as reason:
            bad.add(f"{where}: {reason}")
            dropped.setdefault(reason.kind, Tally()).add(f"{where}: {reason}")
            continue
        prompt = prompt_key(row)
        if earlier := first_places.get((prompt, row.real)):
            noted["exact_duplicates"].add(f"{where} repeats {earlier}")
        elif earlier := first_places.get(prompt):
            noted["repeated_prompts"].add(f"{where} asks as {earlier} did")
        first_places.setdefault(prompt, where)
        first_places.setdefault((prompt, row.real), where)
        if num_dropped_turns:
            noted["dropped_turns"].add(where)
        rows.append(row)
        places.append(where)
    if bad.count and (on_bad_row == "error" or not rows):
        more = f"\n  and {bad.count - len(bad.first)} more" if bad.count > len(bad.first) else ""
        shown = "".join(f"\n  {example}" for example in bad.first)
        cure = ", or set data.on_bad_row: drop to leave them out" if rows else ""
        raise UserError(
            f"{bad.count} of {len(taken)} rows of {source} cannot be read as {read_as}{shown}{more}"
            f"\nExpected {layout.expected}. Mend or remove these rows{cure}."
        )

    ignored = [columns.get(ours, ours) for ours in layout.ignored]
    unused = [column for column in found if column not in origin.values() and column not in ignored]
    parts = [f"read {len(rows)} row{'s' * (len(rows) > 1)} of {source} as {read_as}"]
    parts += [f"column {c!r} is ignored: the opponent answers afresh" for c in ignored if c in found]
    parts += [f"not used: {', '.join(map(repr, unused))}"] if unused else []
    num_shortened = noted["dropped_turns"].count
    parts += [f"{num_shortened} had turns after the last assistant turn, which were dropped"] if num_shortened else []
    parts += [f"{bad.count} of {len(taken)} rows are bad and were dropped"] if bad.count else []
    parts += [f"stopped at max_rows={max_rows}"] if max_rows == len(taken) else []
    return LoadedRows(rows, format, "; ".join(parts + notes), places, len(taken), dropped, noted)
