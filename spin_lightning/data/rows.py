"""The rows of one source or of several: checked, counted, or one error that shows what is wrong.

Nothing is silent: whatever is dropped, unread or strange is counted, with the first places.
"""

from __future__ import annotations

import gc
import random
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spin_lightning.data.formats import (
    COLUMNS_THAT_MATTER,
    COMMON_COLUMNS,
    FORMATS,
    NO_COLUMNS,
    NUM_EXAMPLES,
    PREFERENCE_FORMATS,
    PROMPT_FORMATS,
    BadRow,
    Format,
    Reading,
    Tally,
    answer_key,
    choose_format,
    is_verdict,
    near,
    preference_of,
    prompt_key,
    read_row,
    shown,
)
from spin_lightning.data.sources import open_source
from spin_lightning.progress import track
from spin_lightning.types import Row, UserError

#: No source's rows are taken more often.
MAX_WEIGHT = 1000


@dataclass(frozen=True)
class LoadedRows:
    """The rows of a source, the format they were read as, and one sentence that tells a user what was read.

    Attributes:
        places: Where each row is from, as ``train.jsonl, line 4``.
        num_read: Rows in the source, with those that were dropped.
        dropped: The bad rows by kind. Empty unless they are to be dropped.
        noted: What is strange about the rows that were kept: ``exact_duplicates`` repeat an earlier row,
            ``repeated_prompts`` give another response to an earlier prompt, ``dropped_turns`` go on after the real
            response; and files with ``byte_order_marks``.
        unused_keys: The rows whose turns have a key without effect, by that key.
        notes: What else a user should see in a line of its own.
        times: How often each row is to be taken: more than once only in a source with a weight.
        parts: Of several sources each one's name, weight, and rows as they were read, with how often each is taken.
    """

    rows: list[Row]
    format: str
    description: str
    places: list[str]
    num_read: int
    dropped: dict[str, Tally]
    noted: dict[str, Tally]
    unused_keys: dict[str, Tally] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    parts: list[tuple[str, float, LoadedRows]] = field(default_factory=list)


def load_rows(
    source: str | Mapping[str, float],
    *,
    split: str = "train",
    format: str = "auto",
    columns: dict[str, str] | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
    on_bad_row: Literal["error", "drop"] = "error",
    seed: int = 0,
    needs_rejected: bool = False,
    needs_real: bool = True,
    keep_columns: Collection[str] = (),
) -> LoadedRows:
    """Every row of a file, folder or hub data set, checked, or one error that shows what is wrong with them.

    Files are read where they lie, without a copy in a cache.

    Args:
        source: A .json, .jsonl, .csv, .tsv or .parquet file (all but Parquet also with .gz or .zst behind), a glob of
            them, a folder with files named after the split or made by ``save_to_disk``, or a hub name, as ``name`` or
            ``name:config``. What exists here comes first. Several sources: a map from each to its weight, the share of
            its rows that is taken: 1 all of them, 0.5 a random half, 2 each row twice.
        split: Which split of a folder or a hub data set. A single file has none.
        format: A key of :data:`FORMATS`, or ``"auto"``: the one format whose required columns are all there.
        columns: From our column names to the user's, as ``{"prompt": "question", "completion": "answer"}``. With it,
            ``"auto"`` considers only formats that know every name on the left. ``""`` leaves a column unread.
        revision: Branch, tag or commit of a hub data set.
        max_rows: Read only the first rows, of several sources those of each.
        on_bad_row: ``error`` refuses a source with bad rows, and shows the first five; ``drop`` leaves them out, and
            counts them. A file that cannot be read on behind its mistake is refused in any case.
        seed: Of the rows that are drawn where a weight is not a whole number.
        needs_rejected: Whether a row has to have two responses. If not, the one that is not preferred is not read.
        needs_real: Whether a row has to have a real response. If not, a prompt alone is a row too.
        keep_columns: Columns of the data that ``Row.columns`` keeps, by their names there.

    Returns:
        The rows in the order of the source, or of the sources. Turns after the real response are dropped, and counted
        in ``description``, which also names the columns that are not used. Duplicates are kept, and counted.

    Raises:
        UserError: The source is missing, empty or unreadable, no format or more than one fits, or rows are bad.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "train.jsonl")
        >>> _ = path.write_text('{"question": "1 + 1?", "answer": "2"}')
        >>> loaded = load_rows(str(path))
        >>> loaded.rows[0].prompt, loaded.rows[0].real
        (({'role': 'user', 'content': '1 + 1?'},), '2')
        >>> loaded.description.replace(str(path), "train.jsonl")
        "read 1 row of train.jsonl as 'prompt_completion': columns prompt (yours: question), completion (yours: answer)"
        >>> load_rows({str(path): 3.0}).times
        [3]
    """
    formats = PREFERENCE_FORMATS if needs_rejected else FORMATS if needs_real else PROMPT_FORMATS
    if format != "auto" and format not in formats:
        raise UserError(f"data.format must be 'auto' or one of {near(format, formats)}, got {format!r}.")
    if max_rows is not None and max_rows < 1:
        raise UserError(f"data.max_rows must be at least 1, or absent to read all rows, got {max_rows}.")
    if on_bad_row not in ("error", "drop"):
        raise UserError(f"data.on_bad_row must be 'error' or 'drop', got {on_bad_row!r}.")
    settings = (split, format, columns or {}, revision, max_rows, on_bad_row, formats, needs_real, keep_columns)
    with _pause_collector():
        if isinstance(source, str | Path) and not re.fullmatch(r"\{.*\}|\[.*\]", str(source)):
            loaded = _load_source(str(source), *settings)
            loaded.noted.update(_find_repeats(loaded.places, loaded.rows))
            return loaded
        weights = _checked_weights(source)
        return _mix_sources(
            [(str(name), weight, _load_source(str(name), *settings)) for name, weight in weights.items()], seed
        )


@contextmanager
def _pause_collector() -> Iterator[None]:
    """Rows are made by the hundred thousand and stay: looking for cycles among them takes half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# --- One source -----------------------------------------------------------------------------------------------------


def _load_source(
    name: str,
    split: str,
    format: str,
    columns: dict[str, str],
    revision: str | None,
    max_rows: int | None,
    on_bad_row: str,
    formats: Mapping[str, Format],
    needs_real: bool,
    keep_columns: Collection[str],
) -> LoadedRows:
    source = open_source(name, split, revision)
    taken = list(track(islice(source.records, max_rows), "reading rows"))
    if not taken:
        raise UserError(f"{name} must hold at least one row, got none. Is it the right file and split?")
    objects = [record for _, record in taken if isinstance(record, dict)]
    found = list(dict.fromkeys(column for record in objects for column in record))
    layout, reading = NO_COLUMNS, Reading(format, {})
    if found:
        reading = choose_format(format, columns, found, name, objects[0], formats)
        layout = formats[reading.format]
        label = reading.origin.get("label")
        if label is not None and not is_verdict(record.get(label) for record in objects):
            del reading.origin["label"]
    if missing := [column for column in keep_columns if column not in found]:
        raise UserError(
            f"the reward needs the columns {', '.join(map(repr, missing))}, but {name} has "
            f"{near(missing[0], found) or 'none'}. Add them to the data, or give the reward other names."
        )
    read_as = _describe_reading(reading, found)

    rows: list[Row] = []
    places: list[str] = []
    bad = Tally()
    dropped: dict[str, Tally] = {}
    unused_keys: dict[str, Tally] = {}
    shortened = Tally()
    swapped = 0
    absent = dict.fromkeys((*layout.required, *layout.optional))
    for where, record in track(taken, "checking rows", len(taken)):
        try:
            if isinstance(record, BadRow):
                raise record
            if not isinstance(record, dict):
                raise BadRow("not an object", f"must be an object with columns, got {shown(record)}")
            named = {ours: record.get(theirs) for ours, theirs in reading.origin.items()}
            for ours, value in named.items():
                if isinstance(value, float) and value != value:  # how pandas writes that there is nothing
                    named[ours] = None
            row, num_dropped_turns, unused = read_row(layout, {**absent, **named}, needs_real)
        except (BadRow, RecursionError) as error:
            reason = error if isinstance(error, BadRow) else BadRow("too deep", "holds lists in lists without end")
            bad.add(f"{where}: {reason}")
            dropped.setdefault(reason.kind, Tally()).add(f"{where}: {reason}")
            continue
        if num_dropped_turns:
            shortened.add(where)
        for key in unused:
            unused_keys.setdefault(key, Tally()).add(where)
        if keep_columns:
            row = replace(row, columns={column: record.get(column) for column in keep_columns})
        swapped += layout.rejected is not None and preference_of(named) < 0.5
        rows.append(row)
        places.append(where)
    if bad.count and (on_bad_row == "error" or not rows):
        cure = ", or set data.on_bad_row: drop to leave them out" if rows else ""
        raise UserError(
            f"{bad.count} of {len(taken)} rows of {name} cannot be read as {read_as}{bad.listed()}"
            f"\nExpected {layout.expected}. Mend or remove these rows{cure}."
        )

    ignored = [columns.get(ours, ours) for ours in layout.ignored]
    used_columns = {*reading.origin.values(), *ignored, *keep_columns}
    unused_columns = [column for column in found if column not in used_columns]
    parts = [f"read {len(rows)} row{'s' * (len(rows) > 1)} of {name} as {read_as}"]
    parts += [f"column {c!r} is ignored: the opponent answers afresh" for c in ignored if c in found]
    parts += [f"kept for the reward: {', '.join(map(repr, keep_columns))}"] if keep_columns else []
    parts += [f"{swapped} prefer the second answer, which was made the first"] if swapped else []
    parts += [f"not used: {', '.join(map(repr, unused_columns))}"] if unused_columns else []
    parts += [f"{shortened.count} had turns after the real answer, which were dropped"] if shortened.count else []
    parts += [f"{bad.count} of {len(taken)} rows are bad and were dropped"] if bad.count else []
    parts += [f"stopped at max_rows={max_rows}"] if max_rows == len(taken) else []
    matter = {*COLUMNS_THAT_MATTER, *COMMON_COLUMNS}.union(*COMMON_COLUMNS.values()) - columns.keys()
    notes = [
        f"column {column!r} of {name} is not read; what it says is neither in the prompts nor in the answers"
        for column in unused_columns
        if column in matter
    ]
    noted = {"byte_order_marks": source.byte_order_marks, "dropped_turns": shortened}
    description = "; ".join(parts + source.notes)
    times = [1] * len(rows)
    return LoadedRows(rows, reading.format, description, places, len(taken), dropped, noted, unused_keys, notes, times)


def _describe_reading(reading: Reading, found: list[str]) -> str:
    """The format and its columns, in words."""
    used = [
        ours if theirs == ours else f"{ours} (yours: {theirs})"
        for ours, theirs in reading.origin.items()
        if theirs in found
    ]
    return f"{reading.format!r}: column{'s' * (len(used) > 1)} {', '.join(used)}" if used else "objects with columns"


def _find_repeats(places: list[str], rows: list[Row]) -> dict[str, Tally]:
    """Rows that repeat an earlier one, and rows that only ask the same."""
    repeats = {"exact_duplicates": Tally(), "repeated_prompts": Tally()}
    first_places: dict[Any, str] = {}  # of each prompt, and of each row
    for where, row in zip(places, rows, strict=True):
        prompt = prompt_key(row)
        whole = (prompt, answer_key(row))
        if earlier := first_places.get(whole):
            repeats["exact_duplicates"].add(f"{where} repeats {earlier}")
        elif earlier := first_places.get(prompt):
            repeats["repeated_prompts"].add(f"{where} asks as {earlier} did")
        first_places.setdefault(prompt, where)
        first_places.setdefault(whole, where)
    return repeats


# --- Several sources ------------------------------------------------------------------------------------------------


def _checked_weights(weights: Any) -> Mapping[str, float]:
    example = "{a.jsonl: 1.0, b.jsonl: 0.5}"
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(
            f"data.train_data and data.val_data must be one source, or a map from each of several to its weight, as "
            f"{example}; got {shown(weights)}."
        )
    for name, weight in weights.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (is_number and 0 < weight <= MAX_WEIGHT):
            raise UserError(
                f"the weight of {name!r} must be a number above 0 and at most {MAX_WEIGHT}, got {weight!r}. 1 takes "
                f"all of its rows, 0.5 half of them, 2 each row twice: {example}."
            )
    return weights


def _mix_sources(parts: list[tuple[str, float, LoadedRows]], seed: int) -> LoadedRows:
    """The sources one after the other, of each the share of its rows that its weight says."""
    rows, places, times, shares, described = [], [], [], [], []
    for position, (_, weight, part) in enumerate(parts):
        how_often = _count_shares(len(part.rows), weight, f"share/{seed}/{position}")  # wherever the source lies
        shares.append(how_often)
        taken = [index for index, often in enumerate(how_often) if often]
        rows += [part.rows[index] for index in taken]
        places += [part.places[index] for index in taken]
        times += [how_often[index] for index in taken]
        described.append(f"{part.description}; weight {weight:g}: {sum(how_often)} taken")
    loaded = [part for _, _, part in parts]
    return LoadedRows(
        rows,
        ", ".join(dict.fromkeys(part.format for part in loaded)),
        "\n".join(described),
        places,
        sum(part.num_read for part in loaded),
        _add_tallies([part.dropped for part in loaded]),
        _add_tallies([part.noted for part in loaded]) | _find_repeats(places, rows),
        _add_tallies([part.unused_keys for part in loaded]),
        [note for part in loaded for note in part.notes],
        times,
        [(name, weight, replace(part, times=often)) for (name, weight, part), often in zip(parts, shares, strict=True)],
    )


def _count_shares(num_rows: int, weight: float, seed: str) -> list[int]:
    """How often each row is taken: the whole part of the weight, and once more for a random share of the rows.

    Example:
        >>> _count_shares(4, 2.0, "seed"), sum(_count_shares(4, 1.5, "seed")), sum(_count_shares(4, 0.25, "seed"))
        ([2, 2, 2, 2], 6, 1)
    """
    whole, share = divmod(weight, 1)
    count = round(num_rows * share)
    chosen = set(random.Random(seed).sample(range(num_rows), max(count, 1) if weight < 1 else count))
    return [int(whole) + (index in chosen) for index in range(num_rows)]


def _add_tallies(counts: list[dict[str, Tally]]) -> dict[str, Tally]:
    """The tallies of several sources under the same names."""
    total: dict[str, Tally] = {}
    for name, tally in (item for tallies in counts for item in tallies.items()):
        before = total.get(name, Tally())
        total[name] = Tally(before.count + tally.count, [*before.first, *tally.first][:NUM_EXAMPLES])
    return total
