"""``python -m benchmarks.study``: does self-play beat tuned SFT, and does it forget less? Exact, on small languages.

Every finished part is appended to ``results.jsonl`` in the folder; the same command continues where it stopped. At the
end, and with ``--render`` alone, the numbers go to ``docs/when_self_play_helps.json``, the pictures beside it, and the
tables into ``docs/when-self-play-helps.md``.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from pathlib import Path

import torch

from benchmarks.study import report
from benchmarks.study.arms import ARMS
from benchmarks.study.cells import CELLS, Cell, Laboratory, Record, Scale, confirm, start_of, tune
from benchmarks.study.languages import LANGUAGES

FOLDER = Path(".bench/study")
Key = tuple[str, str, str]


def read(file: Path) -> dict[Key, Record]:
    """The finished parts, by cell, arm and phase. A line that a kill has cut is left out."""
    found: dict[Key, Record] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["cell"], record["arm"], record["phase"]] = record
    return found


def run_cell(cell: Cell, laboratory: Laboratory, file: Path, arms: tuple[str, ...] = tuple(ARMS)) -> None:
    """What is not finished of a cell: the starts, then of each arm its tuning and its confirmation. SFT comes first."""
    done = read(file)

    def keep(arm: str, phase: str, record: Record) -> None:
        began = {"cell": cell.name, "arm": arm, "phase": phase}
        done[cell.name, arm, phase] = began | record
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        with file.open("a", encoding="utf-8") as stream:
            stream.write("\n" * (not text.endswith("\n") and bool(text)) + json.dumps(began | record) + "\n")
        print(time.strftime("%H:%M:%S"), cell.name, arm, phase, record.get("cpu_seconds", ""), flush=True)

    if (cell.name, "start", "confirm") not in done:
        keep("start", "confirm", start_of(laboratory, cell))
    for name in arms:
        for phase in ("tune", "confirm"):
            if (cell.name, name, phase) in done:
                continue
            seed = zlib.crc32(f"{cell.name}/{name}/{phase}".encode())
            if phase == "tune":
                gain = None if name == "SFT" else done[cell.name, "SFT", "tune"]["gain"]
                record = tune(laboratory, cell, ARMS[name], gain, seed)
            else:
                record = confirm(laboratory, cell, ARMS[name], done[cell.name, name, "tune"], seed)
            keep(name, phase, record)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of what is finished, and of pre-trained weights")
    parser.add_argument("--cell", action="append", help="run this one alone, such as 'shift, N=64'; may be repeated")
    parser.add_argument("--render", action="store_true", help="write numbers, pictures and tables of what is finished")
    parser.add_argument("--list", action="store_true", help="say which cells there are, and which are finished")
    settings = parser.parse_args()
    names = {cell.name: cell for cell in CELLS}
    file = settings.folder / "results.jsonl"
    if unknown := set(settings.cell or ()) - set(names):
        parser.error(f"no such cell: {sorted(unknown)}. There are {list(names)}")
    if settings.list:
        for name in names:
            parts = sum(cell == name for cell, _, _ in read(file))
            print(f"{name}: {parts} of {1 + 2 * len(ARMS)} parts finished")
        return
    if not settings.render:
        torch.set_num_threads(1)
        settings.folder.mkdir(parents=True, exist_ok=True)
        laboratories: dict[str, Laboratory] = {}
        for cell in (names[name] for name in settings.cell or names):
            if cell.language not in laboratories:
                laboratories[cell.language] = Laboratory(LANGUAGES[cell.language], Scale(), settings.folder)
            run_cell(cell, laboratories[cell.language], file)
    if parts := list(read(file).values()):
        report.keep(parts)
    report.render()


if __name__ == "__main__":
    main()
