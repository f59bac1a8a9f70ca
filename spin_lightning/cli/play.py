"""``spin-lightning play``: the game of ``fit``, each stage of an iteration in processes of its own.

A stage is the command ``fit`` with ``self_play.stage``; it knows from the run's folder whether there is anything to do
for it. So this loop only guesses which one is next, and a wrong guess costs the time that a model takes to load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_lightning.cli.children import Children, command_of, read_launcher, refuse_several
from spin_lightning.cli.stage_cli import parse_settings
from spin_lightning.runs.files import read_json, run_folder
from spin_lightning.stages.iteration import TABLES, find_place, iteration_folder
from spin_lightning.stages.spin import STAGE
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: What one process is told that is to generate alone, whatever the settings say of training.
_ALONE = ("--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")


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
        return command_of(["fit", *args, *alone, f"--self_play.stage={stage}"], launcher)


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
    with Children() as children:
        is_over, fruitless = _is_over(folder, settings), False
        iteration, stage = find_next(folder)
        while True:
            before = _look(folder)
            children.run(options.command(stage, args), f"the stage {stage} of iteration {iteration}")
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
            taken[flag[2:].replace("-", "_")] = read_launcher(flag, value if equals else next(remaining, ""))
        else:
            rest.append(arg)
    return Options(**taken), rest


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
    refuse_several("play", "--launcher")


def find_next(folder: Path) -> tuple[int, str]:
    """Which iteration and stage is next, as far as names and summaries in a run's folder tell.

    Example:
        >>> find_next(Path("/no/run/is/here"))
        (0, 'generate')
    """
    number, updates = find_place(folder)
    if updates < 0:  # exported, and killed before its checkpoint was written
        return number - 1, "train"
    paths = (iteration_folder(folder, number) / f"{table}_manifest.json" for table in TABLES)
    is_made = any((manifest := read_json(path)) and manifest["complete"] for path in paths)
    return number, "train" if updates or is_made else "generate"


def _look(folder: Path) -> dict[Path, int]:
    """What changes in a run's folder when a stage comes to its end."""
    names = ("summary.json", *(f"{table}_manifest.json" for table in TABLES))
    return {path: path.stat().st_mtime_ns for name in names for path in folder.glob(f"iteration_*/{name}")}


def _is_over(folder: Path, settings: Any) -> bool:
    result = read_json(folder / STAGE.over_file)
    return result is not None and STAGE.is_over(result, settings)
