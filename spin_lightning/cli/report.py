"""``spin-lightning report``: one HTML file that says what happened in a run."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

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


def parse(args: Sequence[str]) -> Namespace:
    """The arguments.

    Raises:
        UserError: They cannot be used.

    Example:
        >>> parse(["runs/mine", "--against", "runs/sft"]).against[0].as_posix()
        'runs/sft'
    """
    parser = ArgumentParser("spin-lightning report", allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--against", type=Path, action="append", default=[])
    parser.add_argument("--samples", type=int, default=8)
    try:
        given, unknown = parser.parse_known_args(args)
    except (ArgumentError, SystemExit) as error:
        raise UserError(f"{error}. Give it as: spin-lightning report RUN [--output FILE].") from None
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}. spin-lightning report --help shows the options.")
    if given.samples < 0:
        raise UserError(f"--samples must be 0 or more, got {given.samples!r}.")
    for name in ("run", "output"):
        if (path := getattr(given, name)) is not None:
            setattr(given, name, path.expanduser())
    given.against = [path.expanduser() for path in given.against]
    return given
