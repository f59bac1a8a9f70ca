"""Commands of this package in processes of their own, one after another: what ``play`` and ``chain`` have in common."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from spin_lightning.types import Interrupted, StageFailed, UserError

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Children:
    """Runs one command after another; signals are handed on to the one that runs, and end both."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Children:
        self._before = {number: signal.signal(number, self._hand_on) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], what: str, advice: str = "") -> None:
        """Run a command to its end.

        Args:
            command: The program and its arguments.
            what: What to call it where it fails.
            advice: What else may be done where it was refused, as a sentence.

        Raises:
            StageFailed: It failed.
            Interrupted: A signal was received.
        """
        # a session of its own: Ctrl-C in the terminal reaches it once, from here
        if not self._received:
            with subprocess.Popen(command, start_new_session=True) as self._process:
                if self._received:  # while it was started
                    self._process.send_signal(self._received)
                code = self._process.wait()
            self._process = None
        if self._received:
            raise Interrupted(self._received)
        if code:
            raise StageFailed(what, code, advice)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
        if self._process is not None:
            self._process.send_signal(number)


def command_of(args: Sequence[str], launcher: Sequence[str] | None = None) -> list[str]:
    """A command of this package as a process is started with it.

    Args:
        args: The word and what follows it.
        launcher: What takes the place of ``python``. None: this interpreter.
    """
    return [*(launcher or (sys.executable,)), "-m", "spin_lightning", *args]


def read_launcher(name: str, value: str) -> tuple[str, ...]:
    """The words of what takes the place of ``python``, the first one the path of a program.

    Args:
        name: Of the setting, for what is said of it.
        value: As a user gives it.

    Raises:
        UserError: It is no command, or names no program.
    """
    example = "Give what takes the place of python in `python -m spin_lightning fit`: 'torchrun --nproc_per_node 8'."
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise UserError(f"{name} must be a command, got {value!r}: {error}. {example}") from None
    if not words:
        raise UserError(f"{name} must be a command, got {value!r}. {example}")
    beside = str(Path(sys.executable).parent)  # torchrun of an environment that is not activated
    found = shutil.which(words[0]) or shutil.which(words[0], path=beside)
    if found is None:
        raise UserError(f"{name}: there is no program {words[0]!r}. {example}")
    return (found, *words[1:])


def refuse_several(word: str, where: str) -> None:
    """Refuse that a command which starts processes itself was started several times.

    Args:
        word: The command.
        where: Where a launcher is given instead.

    Raises:
        UserError: It was.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"{word} starts the processes of a stage itself, and was started several times (WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']!r}). Start it once, and give what starts processes as {where}."
        )
