"""A folder that holds runs: a chain's, a demo's, or any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin_lightning.reports.record import (
    Iteration,
    Record,
    as_dict,
    as_number,
    find_kind,
    read_run,
    read_verdict,
    runs_in,
)
from spin_lightning.reports.tables import MOST_ROWS, Table
from spin_lightning.reports.texts import clean, percent, show, show_time
from spin_lightning.runs.files import read_json
from spin_lightning.runs.redaction import redacted
from spin_lightning.types import UserError

#: What chains, comparisons and demos write beside their runs.
OF_SEVERAL = ("chain.json", "comparison.json", "results.json")
#: Runs of a folder that have a section each.
MOST_RUNS = 12


def is_several(folder: Path) -> bool:
    """Whether a folder is not of a run itself, but has some in it."""
    if not folder.is_dir() or not runs_in(folder):
        return False
    return any((folder / name).is_file() for name in OF_SEVERAL) or not find_kind(folder)


class Several:
    """The runs in a folder: that of self-play first, if it has a control, else in the order of a chain or of names.

    Args:
        folder: Where they are.

    Attributes:
        records: Of the runs that have a section each.
        headline: What came out, in sentences, where the folder tells.
        tables: By title.
    """

    def __init__(self, folder: Path) -> None:
        chain = as_dict(_read(folder / "chain.json").get("stages"))
        order = {name: place for place, name in enumerate(chain)}
        records, unread = [], []
        for path in sorted(runs_in(folder), key=lambda path: order.get(path.name, len(order))):
            try:
                records.append(read_run(path))
            except UserError as error:
                unread.append(str(error))
        controls = [record for record in records if record.name.startswith("control") and record.kind == "sft"]
        kept = [record for record in records if record not in controls] or records
        if controls:
            kept.sort(key=lambda record: record.kind not in ("fit", "ppo"))  # a stable sort
        self._control = {"continued SFT": _join(controls)} if controls else {}
        self.records = kept[:MOST_RUNS]
        self.headline = _say_result(folder)
        self.tables = {**_table_of_chain(chain), **_table_of_demo(folder)}
        for record in self.records[:1]:
            record.missing += [*unread, *(f"{other.name}: give its own folder." for other in kept[MOST_RUNS:])]

    def against(self, record: Record) -> dict[str, Record]:
        """What a run is compared with: self-play with its control."""
        return self._control if record.kind == "fit" else {}


def _join(controls: Sequence[Record]) -> Record:
    """Runs of which each starts where the one before ended, as one."""
    joined = Record(controls[-1].folder, kind="sft", start=controls[0].start, result=controls[-1].result)
    updates = 0.0
    for record in controls:
        for name, points in record.metrics.items():
            joined.metrics.setdefault(name, []).extend((step + updates, value) for step, value in points)
        updates += record.updates
        joined.iterations.append(Iteration(len(joined.iterations), record.folder, as_dict(record.result), {}, {}))
    return joined


def _say_result(folder: Path) -> list[str]:
    if verdict := read_verdict(folder):
        return [clean(sentence) for sentence in verdict]
    results = _read(folder / "results.json")
    spin = [as_dict(found) for name, found in results.items() if name.startswith("SPIN")]
    control = [as_dict(found) for name, found in results.items() if name.startswith("control")]
    if not spin or not control:
        return []
    ours, theirs = as_number(spin[-1].get("nll")), as_number(control[-1].get("nll"))
    if ours is None or theirs is None:
        return []
    better, worse = ("self-play", "continued SFT") if ours < theirs else ("continued SFT", "self-play")
    return [
        f"At the same number of updates {better} has the lower held-out NLL: {min(ours, theirs):.3f} against "
        f"{max(ours, theirs):.3f} of {worse}. Exact answers: {percent(spin[-1].get('exact'))} of self-play, "
        f"{percent(control[-1].get('exact'))} of continued SFT. It is one run of each, so a "
        "small difference may be chance: spin-lightning compare plays several seeds."
    ]


def _table_of_chain(chain: Mapping[str, Any]) -> dict[str, Table]:
    rows = []
    for name, stage in chain.items():
        found = as_dict(stage)
        nll, reward = (" → ".join(show(v) for v in found.get(key) or () if v is not None) for key in ("nll", "reward"))
        cells = [
            name,
            found.get("stage"),
            show(found.get("updates")),
            show_time(found.get("seconds") or 0.0),
            nll,
            reward,
        ]
        state = "over" if "updates" in found else "not over"
        rows.append([clean(str(cell if cell is not None else "-")) for cell in [*cells, state]])
    header = ["stage", "command", "updates", "time", "held-out NLL", "held-out reward", ""]
    return {"Stages": Table(header, rows)} if rows else {}


def _table_of_demo(folder: Path) -> dict[str, Table]:
    rows = []
    for name, result in _read(folder / "results.json").items():
        found = as_dict(result)
        numbers = [show(found.get("nll")), percent(found.get("exact")), show(found.get("updates"))]
        rows.append([clean(str(name)), *numbers, show_time(found.get("seconds") or 0.0)])
    header = ["model", "held-out NLL", "exact answers", "updates", "time"]
    return {"The same questions to every model": Table(header, rows[:MOST_ROWS])} if rows else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return as_dict(redacted(read_json(path)))
    except (UserError, OSError):
        return {}
