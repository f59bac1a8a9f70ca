"""A file, folder or hub data set to records: what lies where, and how it is written.

Owns every file kind. A record is an object with columns, as it was written; a line that cannot be read is yielded as a
``BadRow``, so that it is counted like any other. A file that cannot be read on behind its mistake is an error.

Nothing is guessed: a folder must have files named after the split, or no file named after any, because a wrong guess
would train on a test set. Rows and lines are counted from 1, as in an editor.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from spin_lightning.data.formats import BadRow, Tally, fits, is_turn, near, shown
from spin_lightning.models import hub
from spin_lightning.runs.files import is_url
from spin_lightning.runs.settings import SETTINGS
from spin_lightning.types import UserError

Records = Iterator[tuple[str, Any]]
#: A file with one of these words in its name is not a nameless part of the data.
SPLIT_WORDS = set("train training test testing val valid validation dev eval evaluation holdout heldout".split())
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}


@dataclass
class Source:
    """One source, opened.

    Attributes:
        records: Where each record is from, as ``train.jsonl, line 4``, and the record or why it cannot be read.
        notes: What a user should know about how it was read. Complete when the records are read, as is the next.
        byte_order_marks: The files that begin with one.
    """

    records: Records = field(default_factory=lambda: iter(()))
    notes: list[str] = field(default_factory=list)
    byte_order_marks: Tally = field(default_factory=Tally)


# --- Files ----------------------------------------------------------------------------------------------------------


def _decode(data: bytes, offset: int = 0) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, position = data[error.start], offset + error.start
        reason = f"must be UTF-8 text, got byte 0x{byte:02x} at byte offset {position}"
        raise BadRow("not UTF-8", reason) from None
    return text if offset else text.removeprefix("\ufeff")


def _read_json(file: BinaryIO, path: Path, source: Source, key: str) -> Records:
    """Objects one a line, or one JSON document of them, or objects that each take several lines."""
    start, filled = [], []  # up to the second line that is not blank
    for line in file:
        start.append(line)
        filled += [line] if line.strip() else []
        if len(filled) == 2:
            break
    if filled and (key or _is_document(filled)):
        yield from _read_document(_decode(b"".join(start) + file.read()), path, source, key)
    else:
        yield from _read_lines(chain(start, file), path)


def _is_document(lines: list[bytes]) -> bool:
    """Whether the first lines are a value that goes on over lines, or one that is alone in its file."""
    text = lines[0].removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").strip()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return text[:1] in ("[", "{") and error.pos >= len(text)
    except RecursionError:
        return len(lines) == 1
    except ValueError:
        return False
    return len(lines) == 1 and isinstance(value, list | dict)


def _read_lines(lines: Iterable[bytes], path: Path) -> Records:
    offset = 0
    name = str(path)
    for number, line in enumerate(lines, 1):
        record: Any
        try:
            text = _decode(line, offset)
            record = json.loads(text.rstrip()) if text.strip() else None  # so that a column is on this line
        except BadRow as reason:
            text, record = "?", reason
        except json.JSONDecodeError as error:
            record = BadRow("not JSON", f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
            record = BadRow("not JSON", f"not JSON that can be read: {error}")
        offset += len(line)
        if text.strip():
            yield f"{name}, line {number}", record


def _read_document(text: str, path: Path, source: Source, key: str) -> Records:
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")

    def after_blanks(start: int) -> int:
        return blank.match(text, start).end()  # type: ignore[union-attr]  # it matches everywhere

    values: list[tuple[int, Any]] = []
    expected = "Expected a list of objects, or one object per line. Mend that line."
    position = after_blanks(0)
    try:
        while position < len(text):
            value, end = decoder.raw_decode(text, position)
            values.append((position, value))
            position = after_blanks(end)
            if isinstance(values[0][1], list) and position < len(text):
                raise json.JSONDecodeError("Extra data", text, position)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno} column {error.colno}: not JSON ({error.msg}). {expected}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets without end
        raise UserError(f"{path}: not JSON that can be read ({error}). {expected}") from None
    first = values[0][1]
    if key or isinstance(first, list):
        is_object = isinstance(first, dict) and len(values) == 1
        records = first.get(key) if is_object else None if key else first
        if not isinstance(records, list):
            has = f"an object with {near(key, first)}" if is_object else f"{len(values)} values, {shown(first)} first"
            raise UserError(f"{path} must be one JSON object with a list under {key!r}, got {has}. Correct the name.")
        yield from ((f"{path}, row {number}", record) for number, record in enumerate(records, 1))
    elif len(values) == 1 and isinstance(first, dict):
        yield from _read_object(first, path, source)
    else:
        line, before = 1, 0
        for position, value in values:
            line, before = line + text.count("\n", before, position), position
            yield f"{path}, line {line}", value


def _read_object(value: dict[str, Any], path: Path, source: Source) -> Records:
    """The records under the one key of an object; or the object, where it is a row itself."""
    lists = [
        name
        for name, items in value.items()
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items)
    ]
    is_packed = bool(value) and all(isinstance(items, list | dict) and items for items in value.values())
    if fits(list(value)):
        is_row = bool(lists) or len(value) == 1 or not is_packed  # else it is written column by column
    else:
        is_row = any(is_turn(value[name][0]) for name in lists) or not (is_packed or lists)
    if is_row:
        yield f"{path}, line 1", value
    elif len(value) == 1 and lists:
        source.notes.append(f"its rows are the list under {lists[0]!r}")
        yield from ((f"{path}, row {number}", record) for number, record in enumerate(value[lists[0]], 1))
    else:
        keys = ", ".join(map(repr, islice(value, 8))) + (", ..." if len(value) > 8 else "")
        flags = " or ".join(f"'{path}:{name}'" for name in lists[:8])
        cure = f"To read a list in it, name its key behind the file: --data.train_data {flags}."
        if not lists:
            cure = "Write it so; with pandas: to_json(path, orient='records', lines=True)."
        raise UserError(
            f"{path} is one JSON object with the keys {keys}; expected a list of objects, or one object per line. "
            f"{cure}"
        )


def _read_csv(delimiter: str) -> Callable[[BinaryIO, Path, Source, str], Records]:
    def read(file: BinaryIO, path: Path, source: Source, key: str) -> Records:
        csv.field_size_limit(2**31 - 1)  # the default refuses responses above 128 KiB
        text = _decode(file.read())
        separator_line = re.match(r"sep=(.)\r?\n", text)  # what spreadsheets are told in a first line
        text = text[separator_line.end() :] if separator_line else text
        widths = {separator: _header_width(text, separator) for separator in (delimiter, *DELIMITERS)}
        used = delimiter if widths[delimiter] > 1 else max(widths, key=lambda separator: widths[separator])
        if used != delimiter:
            source.notes.append(f"its cells are separated by {DELIMITERS[used]}")
        rows = _csv_rows(text, used)
        number = line = 0
        try:
            header: list[str] = next((row for row in rows if row), [])
            doubled = sorted({name for name in header if name and header.count(name) > 1})
            if doubled:
                raise UserError(
                    f"{path} must have columns of different names, but {', '.join(map(repr, doubled))} stands more "
                    f"than once in its header {header}, so it is unknown which one is meant. Rename or remove one of "
                    "them."
                )
            line = rows.line_num
            for row in rows:
                line = rows.line_num
                if not row:
                    continue
                number += 1
                record: Any = dict(zip(header, [*row, *[None] * (len(header) - len(row))], strict=False))
                if any(row[len(header) :]):
                    record = BadRow("too many cells", f"has more cells than the {len(header)} columns of the header")
                yield f"{path}, row {number}", record
        except csv.Error as error:
            raise UserError(
                f"{path}, the record after line {line}: not CSV ({error}). Expected {DELIMITERS[used]} between "
                "cells, and quotes that are closed and doubled inside a cell. Mend that record."
            ) from None

    return read


def _csv_rows(text: str, delimiter: str) -> Any:
    # strict: a quote that is never closed is an error, instead of swallowing the rest of the file
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


def _header_width(text: str, delimiter: str) -> int:
    try:
        return len(next((row for row in _csv_rows(text, delimiter) if row), []))
    except csv.Error:
        return 0


def _read_parquet(file: BinaryIO, path: Path, source: Source, key: str) -> Records:
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (ValueError, OSError) as error:  # not parquet, a page that does not unpack, text that is not UTF-8
        raise UserError(f"{path} must be a parquet file of UTF-8 text: {error}. Is the download whole?") from None


def _open_zst(path: Path) -> BinaryIO:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


_READERS: dict[str, Callable[[BinaryIO, Path, Source, str], Records]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv(","),
    ".tsv": _read_csv("\t"),
    ".parquet": _read_parquet,
}
_OPENERS: dict[str, Callable[[Path], BinaryIO]] = {
    "": lambda path: path.open("rb"),
    ".gz": lambda path: cast(BinaryIO, gzip.GzipFile(path)),
    ".zst": _open_zst,
}
#: How files begin that are something else than their name says.
_MARKS = {
    codecs.BOM_UTF16_LE: "UTF-16 text. Save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text. Save it as UTF-8",
    b"\x1f\x8b": "a gzip file. Let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "a Zstandard file. Let its name end in .zst",
    b"PK\x03\x04": "a zip file or a spreadsheet. Unpack it, or save it as CSV",
    b"PAR1": "a Parquet file. Let its name end in .parquet",
    b"version https://git-lfs": "a pointer of Git LFS instead of the data. Run: git lfs pull",
}
_FILE_KINDS = f"{', '.join(_READERS)} (all but Parquet also with .gz or .zst behind)"


def _kind_of(path: Path) -> tuple[str, str]:
    """How a file is written and how it is packed, by its name: ``(".jsonl", ".gz")``. Empty where it cannot be read."""
    packed = path.suffix.lower() if path.suffix.lower() in _OPENERS else ""
    kind = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    return (kind, packed) if kind in _READERS and not (packed and kind == ".parquet") else ("", "")


def _read_files(paths: Iterable[Path], source: Source, key: str = "") -> Records:
    for path in paths:
        kind, packed = _kind_of(path)
        if not kind:
            raise UserError(f"{path} must end in one of {_FILE_KINDS}. Convert it, or name its files.")
        try:
            with _OPENERS[packed](path) as file:
                beginning = cast(Any, file).peek(64)[:64]
                if beginning.startswith(codecs.BOM_UTF8):
                    source.byte_order_marks.add(str(path))
                for mark, what in _MARKS.items():
                    if beginning.startswith(mark) and (mark, kind) != (b"PAR1", ".parquet"):
                        raise UserError(f"{path} must hold what its name says, got {what}.")
                yield from _READERS[kind](file, path, source, key)
        except BadRow as reason:  # only JSONL can go on behind a byte that is not UTF-8
            raise UserError(f"{path} {reason}. Save it as UTF-8.") from None
        except (EOFError, zlib.error, OSError) as error:
            whole = " Is the download whole?" if packed else " May it be read?"
            raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}.{whole}") from None


# --- Data sets and folders ------------------------------------------------------------------------------------------


def _read_dataset(dataset: Any, name: str) -> Records:
    number = 0
    for batch in dataset.with_format(None).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"{name}, row {number}", dict(zip(batch, values, strict=True))


def _read_hub(source: str, split: str, revision: str | None) -> Records:
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
            f"or folder ({', '.join(_READERS)}, or Dataset.save_to_disk)."
        ) from error
    return _read_dataset(dataset, source)


def _read_folder(folder: Path, split: str, source: Source) -> tuple[Records, bool]:
    """The records of a folder, and whether the split was used to choose them."""
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        import datasets

        dataset = datasets.load_from_disk(str(folder))
        if isinstance(dataset, datasets.Dataset):
            return _read_dataset(dataset, str(folder)), False
        if split not in dataset:
            raise UserError(f"{folder} has no split {split!r}, it has {sorted(dataset)}. Set data.split to one.")
        return _read_dataset(dataset[split], str(folder)), True
    files = sorted(path for path in folder.iterdir() if _kind_of(path)[0] and path.is_file())
    chosen = [path for path in files if path.name.replace(".", "-").startswith(f"{split}-")]
    if chosen:
        return _read_files(chosen, source), True
    if (folder / SETTINGS).exists():
        raise UserError(
            f"{folder} is the folder of a run, and no data. Give rows; those that a game made of its prompts are "
            f"written by: spin-lightning pairs {folder} --output pairs.jsonl"
        )
    is_named = any(SPLIT_WORDS & _words_in(path) for path in files)
    if files and split == "train" and not is_named and len({_kind_of(path) for path in files}) == 1:
        source.notes.append(f"no file in it is named after a split: read all {len(files)}, {_name_span(files)}")
        return _read_files(files, source), True
    inside = [
        path for path in sorted(folder.iterdir()) if path.is_dir() and any(_kind_of(file)[0] for file in path.iterdir())
    ]
    named = [path for path in files if split in _words_in(path)]
    cure = f", or name one: --data.train_data '{(named or files or inside)[0]}'" if files or inside else ""
    raise UserError(
        f"folder {folder} must hold files of split {split!r}, as {split}.jsonl or {split}-00000-of-00002.parquet, "
        f"got {[path.name for path in files]}. Set data.split{cure}."
    )


def _words_in(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.name.lower()))


def _name_span(files: list[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].name} to {files[-1].name}"


def open_source(name: str, split: str, revision: str | None) -> Source:
    """Open a file, a glob of files, a folder or a hub data set.

    Args:
        name: Its path or its name on the hub. ``file.json:key`` is the list under a key of a JSON object.
        split: Which split of a folder or a hub data set.
        revision: Branch, tag or commit of a hub data set.

    Returns:
        Its records, which are read as they are asked for, and a note for each setting that has no meaning there.

    Raises:
        UserError: It does not exist, or cannot be read; also while the records are read.
    """
    if not name.strip() or is_url(name):
        raise UserError(
            f"data are files on this machine or the name of a data set on the hub, got {name!r}. Download them first, "
            "or give a name as HuggingFaceH4/ultrachat_200k."
        )
    source, path, key = Source(), Path(name), ""
    try:
        path = path.expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long; a user that nobody knows
        raise UserError(f"{name!r} is no name of data: {error}. Give another one.") from None
    base, _, behind = name.rpartition(":")
    if behind and not path.exists() and _kind_of(Path(base))[0] in (".json", ".jsonl", ".ndjson"):
        path, key = Path(base).expanduser(), behind
    if not path.exists() and not (looks_local(name) or looks_local(str(path))):
        source.records = _read_hub(name, split, revision)
        return source
    if revision is not None:
        source.notes.append(f"revision {revision!r} is ignored, it is for the hub")
    if path.is_dir():
        source.records, is_split_used = _read_folder(path, split, source)
    else:
        files = [path] if path.exists() else [Path(found) for found in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            hint = f"there is no folder {path.parent}"
            if path.parent.is_dir():
                hint = f"{path.parent} has {near(path.name, (p.name for p in path.parent.iterdir())) or 'no files'}"
            raise UserError(f"{path} does not exist: {hint}. Correct the path.")
        source.records, is_split_used = _read_files(files, source, key), False
    if not is_split_used and split != "train":
        source.notes.append(f"split {split!r} is ignored, there are no splits here")
    return source


def names_in(sources: Any) -> list[str]:
    """The names of data in a setting: one, a map of several, or a list."""
    if isinstance(sources, list):
        return [name for source in sources for name in names_in(source)]
    return [sources] if isinstance(sources, str) else [str(name) for name in sources or ()]


def looks_local(name: str) -> bool:
    """Whether a name can only be that of data on this machine, whether or not they are there.

    Example:
        >>> looks_local("rows.jsonl"), looks_local("HuggingFaceH4/ultrachat_200k")
        (True, False)
    """
    return name.startswith((".", "/", "~")) or bool(_kind_of(Path(name))[0]) or glob.has_magic(name)
