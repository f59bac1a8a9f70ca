"""What commands without a stage share: options, whose refusals are sentences, and output into a pipe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NoReturn

from spin_lightning.types import UserError


class Options(argparse.ArgumentParser):
    """A parser of a command's options. Its help is that of the table of commands.

    Args:
        word: The command.
    """

    def __init__(self, word: str) -> None:
        super().__init__(prog=f"spin-lightning {word}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Raises:
            UserError: In any case.
        """
        raise UserError(f"{message}. {self.prog} --help shows the options.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options; of an unknown one it is said which may have been meant.

        Raises:
            UserError: They are not as they should be.
        """
        found, others = self.parse_known_args(args, namespace)
        if others:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = get_close_matches(others[0].partition("=")[0], flags, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            self.error(f"unrecognized arguments: {' '.join(others)}{hint}")
        return found


def as_bool(text: str) -> bool:
    """What an option with true or false says.

    Example:
        >>> as_bool("false")
        False
    """
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


@contextmanager
def ending_with_its_reader() -> Iterator[None]:
    """End quietly where whoever reads the standard output has had enough, as ``head`` has."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again as it ends
        sys.exit(141)  # that of SIGPIPE
