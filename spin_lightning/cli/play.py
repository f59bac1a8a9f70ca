"""``spin-lightning play``: the game of ``fit``, each stage of an iteration in processes of its own.

A stage is the command ``fit`` with ``self_play.stage``; it knows from the run's folder whether there is anything to do
for it. So this loop only guesses which one is next, and a wrong guess costs the time that a model takes to load.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from spin_lightning.cli.stage_cli import parse_settings
from spin_lightning.runs.files import read_json, run_folder
from spin_lightning.stages.iteration import find_place, iteration_folder
from spin_lightning.stages.spin import STAGE
from spin_lightning.terminal import say
from spin_lightning.types import Interrupted, StageFailed, UserError

#: What one process is told that is to generate alone, whatever the settings say of training.
_ALONE = ("--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


@dataclass(frozen=True)
class Options:
    """What this command has beside the settings of ``fit``: what takes the place of ``python`` in a stage's command.

    Attributes:
        launcher: For the stage that trains, such as ``torchrun --nproc_per_node 8``. None: ``python``.
        generate_launcher: For the stage that generates. None: ``python``, and one process if there is a ``launcher``.
    """

    launcher: tuple[str, ...] | None = None
    generate_launcher: tuple[str, ...] | None = None

    def command(self, stage: str, args: Sequence[str]) -> list[str]:
        """The command of a stage."""
        launcher = self.launcher if stage == "train" else self.generate_launcher
        alone = _ALONE if self.launcher and not launcher else ()
        ours = ["-m", "spin_lightning", "fit", *args, *alone, f"--self_play.stage={stage}"]
        return [*(launcher or (sys.executable,)), *ours]


def main(args: list[str]) -> None:
    """Play a game to its end, or continue it.

    Args:
        args: The arguments of ``fit``, and this command's own.

    Raises:
        UserError: An option or a setting cannot be used here.
        StageFailed: A stage did.
        Interrupted: A signal was received. The stage in progress has ended too.
    """
    options, args = take_options(args)
    settings = parse_settings("fit", args)
    refuse_unplayable(settings)
    folder = run_folder(settings.self_play.output_dir, "self_play.output_dir")
    with _Stages() as stages:
        is_over, fruitless = _is_over(folder, settings), False
        iteration, stage = find_next(folder)
        while True:
            before = _look(folder)
            stages.run(options.command(stage, args), f"the stage {stage} of iteration {iteration}")
            if is_over or _is_over(folder, settings):
                return
            if _look(folder) != before:
                fruitless = False
                iteration, stage = find_next(folder)
            elif fruitless:
                say(
                    "neither stage came to its end: something stops them, such as a callback. The same command "
                    "continues."
                )
                return
            else:
                fruitless, stage = True, "train" if stage == "generate" else "generate"


def take_options(args: Sequence[str]) -> tuple[Options, list[str]]:
    """This command's own options, and the arguments without them.

    Raises:
        UserError: One has no value, or names no program.

    Example:
        >>> take_options(["--config", "run.yaml"])
        (Options(launcher=None, generate_launcher=None), ['--config', 'run.yaml'])
    """
    taken: dict[str, Any] = {}
    rest: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        flag, equals, value = arg.partition("=")
        if flag in ("--launcher", "--generate-launcher"):
            taken[flag[2:].replace("-", "_")] = _read_launcher(flag, value if equals else next(remaining, ""))
        else:
            rest.append(arg)
    return Options(**taken), rest


def _read_launcher(flag: str, value: str) -> tuple[str, ...]:
    example = "Give what takes the place of python in `python -m spin_lightning fit`: 'torchrun --nproc_per_node 8'."
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise UserError(f"{flag} must be a command, got {value!r}: {error}. {example}") from None
    if not words:
        raise UserError(f"{flag} must be a command, got {value!r}. {example}")
    beside = str(Path(sys.executable).parent)  # torchrun of an environment that is not activated
    found = shutil.which(words[0]) or shutil.which(words[0], path=beside)
    if found is None:
        raise UserError(f"{flag}: there is no program {words[0]!r}. {example}")
    return (found, *words[1:])


def refuse_unplayable(settings: Any) -> None:
    """Refuse settings of ``fit`` that play cannot be played with.

    Raises:
        UserError: There is one.
    """
    refused = {
        "self_play.stage": (settings.self_play.stage, "It says which stage is next by itself"),
        "ckpt_path": (settings.ckpt_path, "Each stage continues from the newest checkpoint"),
        "trainer.fast_dev_run": (settings.trainer.fast_dev_run, "A trial has no stages"),
        "trainer.max_time": (settings.trainer.max_time, "Each stage would have as much time, and be begun again"),
    }
    for name, (value, why) in refused.items():
        if value:
            raise UserError(f"{name} cannot be {value!r} with play. {why}. Leave it out, or use spin-lightning fit.")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "play starts the processes of a stage itself, and was started several times (WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']!r}). Start it once, and give what starts processes as --launcher."
        )


def find_next(folder: Path) -> tuple[int, str]:
    """Which iteration and stage is next, as far as names and summaries in a run's folder tell.

    Example:
        >>> find_next(Path("/no/run/is/here"))
        (0, 'generate')
    """
    number, updates = find_place(folder)
    if updates < 0:  # exported, and killed before its checkpoint was written
        return number - 1, "train"
    pairs = read_json(iteration_folder(folder, number) / "pairs_manifest.json")
    return number, "train" if updates or (pairs and pairs["complete"]) else "generate"


def _look(folder: Path) -> dict[Path, int]:
    """What changes in a run's folder when a stage comes to its end."""
    names = ("summary.json", "pairs_manifest.json")
    return {path: path.stat().st_mtime_ns for name in names for path in folder.glob(f"iteration_*/{name}")}


def _is_over(folder: Path, settings: Any) -> bool:
    result = read_json(folder / STAGE.over_file)
    return result is not None and STAGE.is_over(result, settings)


class _Stages:
    """Runs one command after another; signals are handed on to the one that runs, and end both."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stages:
        self._before = {number: signal.signal(number, self._hand_on) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], what: str) -> None:
        """Run a command to its end.

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
            raise StageFailed(what, code)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
        if self._process is not None:
            self._process.send_signal(number)
