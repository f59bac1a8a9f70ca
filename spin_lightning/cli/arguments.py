"""Arguments of commands that take a few flags and no config file."""

from __future__ import annotations

from argparse import ArgumentParser
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from spin_lightning.types import UserError

if TYPE_CHECKING:
    import torch


class Arguments(ArgumentParser):
    """A parser whose refusals are ``UserError``, with the flag that may have been meant.

    Args:
        word: The command.

    Example:
        >>> parser = Arguments("push")
        >>> _ = parser.add_argument("--private", type=as_bool, nargs="?", const=True, default=True)
        >>> parser.parse_args(["--private", "false"]).private
        False
    """

    def __init__(self, word: str) -> None:
        super().__init__(prog=f"spin-lightning {word}", add_help=False, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments.

        Raises:
            UserError: They are not as they should be.
        """
        found, others = self.parse_known_args(args, namespace)
        if others:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = get_close_matches(others[0].partition("=")[0], flags, 1)
            hint = f"Did you mean {close[0]}?" if close else f"{self.prog} --help shows what there is."
            raise UserError(f"{self.prog} has no {others[0]!r}. {hint}")
        return found

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}. {self.prog} --help shows what there is.")


def as_bool(text: str) -> bool:
    """What a flag with true or false says."""
    if text.lower() not in ("true", "false", "yes", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "yes")


as_bool.__name__ = "true or false"  # argparse puts it into its message


def find_device(name: str | None) -> torch.device:
    """The device of ``--device``, after something was put there. None: a GPU where there is one.

    Raises:
        UserError: It cannot be used.
    """
    import torch  # not every command with few flags loads a model

    chosen = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(chosen)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {chosen!r} cannot be used: {reason}. Leave it out, or give cpu.") from None
    return device
