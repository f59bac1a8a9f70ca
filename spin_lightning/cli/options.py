"""What commands without a stage share: options, whose refusals are sentences, and output into a pipe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

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


@contextmanager
def ending_with_its_reader() -> Iterator[None]:
    """End quietly where whoever reads the standard output has had enough, as ``head`` has."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again as it ends
        sys.exit(141)  # that of SIGPIPE
