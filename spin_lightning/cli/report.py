"""``spin-lightning report``: one HTML file that says what happened in a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin_lightning.cli.arguments import Arguments
from spin_lightning.reports.page import write_report
from spin_lightning.terminal import say
from spin_lightning.types import UserError


def main(args: list[str]) -> None:
    """Write the report of a run, and say where it is.

    Args:
        args: The run's folder, and options.

    Raises:
        UserError: They cannot be used, or there is no run.
        StorageError: The file cannot be written.
    """
    given = parse(args)
    path = write_report(given.run, given.output, given.against, given.samples)
    say(f"the report is in {path} ({path.stat().st_size / 1000:,.0f} kB): open it in a browser")


def parse(args: Sequence[str]) -> Any:
    """The arguments.

    Raises:
        UserError: They cannot be used.

    Example:
        >>> parse(["runs/mine", "--against", "runs/sft"]).against[0].as_posix()
        'runs/sft'
    """

    def path(text: str) -> Path:
        return Path(text).expanduser()

    parser = Arguments("report")
    parser.add_argument("run", type=path)
    parser.add_argument("--output", type=path)
    parser.add_argument("--against", type=path, action="append", default=[])
    parser.add_argument("--samples", type=int, default=8)
    given = parser.parse_args(args)
    if given.samples < 0:
        raise UserError(f"--samples must be 0 or more, got {given.samples!r}.")
    return given
