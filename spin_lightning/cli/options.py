"""Options of a command without a stage, read by ``argparse``, with its refusals as sentences."""

from __future__ import annotations

import argparse
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
