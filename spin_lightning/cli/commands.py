"""The table of commands, and ``main``, which runs one of them and ends with its exit code.

``spin-lightning --help`` answers before anything heavy is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from spin_lightning.version import __version__

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI


@dataclass(frozen=True)
class Command:
    """What a word on the command line stands for: a stage, or a function.

    Attributes:
        summary: What it does, in a line of the overview.
        stage: Import path of the record of the stage that it runs.
        method: The method of the Trainer that it calls with it.
        function: Where it runs no stage: takes the arguments that follow the word.
        usage: What may follow the word.
        fits: Whether arguments are as ``usage`` says, as far as ``function`` does not find out itself.
    """

    summary: str
    stage: str | None = None
    method: str = "fit"
    function: Callable[[list[str]], object] | None = None
    usage: str = "--config FILE [--KEY VALUE ...]"
    fits: Callable[[list[str]], bool] = lambda args: True


def _check(args: list[str]) -> None:
    from spin_lightning.cli.check import main

    main(args)


def _demo(args: list[str]) -> None:
    from spin_lightning.demos.small_model import play

    play(*args)


def _lab(args: list[str]) -> None:
    from spin_lightning.demos.known_language import play

    play(*args)


def _folder_is_first(args: list[str]) -> bool:
    return not (args and args[0].startswith("-"))


COMMANDS = {
    "fit": Command("play the game; the same command continues a killed run", "spin_lightning.stages.spin.STAGE"),
    "sft": Command("supervised fine-tuning, the stage before it", "spin_lightning.stages.sft.STAGE"),
    "validate": Command("held-out NLL of a model", "spin_lightning.stages.spin.STAGE", "validate"),
    "check": Command("what the data looks like to the game, without loading the model", function=_check),
    "demo": Command(
        "the whole game on a small real model, on CPU",
        function=_demo,
        usage="[FOLDER [MODEL [--KEY VALUE ...]]]",
        fits=_folder_is_first,
    ),
    "lab": Command(
        "the game on a known language, measured exactly",
        function=_lab,
        usage="[FOLDER]",
        fits=lambda args: len(args) < 2 and _folder_is_first(args),
    ),
}
#: The records of the stages, by the word that trains each.
STAGES = {word: command.stage for word, command in COMMANDS.items() if command.stage and command.method == "fit"}

_LINES = [(f"  spin-lightning {word} {command.usage}", command.summary) for word, command in COMMANDS.items()]
_COMMANDS = "\n".join(f"{line:<{max(len(line) for line, _ in _LINES)}}  {summary}" for line, summary in _LINES)
OVERVIEW = f"""spin-lightning {__version__}: self-play fine-tuning (SPIN) of your own language model

{_COMMANDS}

A first run on your own data (JSON, JSONL, CSV, Parquet or a hub name; messages, prompt/completion, alpaca, ShareGPT ...):

  spin-lightning fit \\
    --model.model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
    --data.train_data my_data.jsonl \\
    --self_play.output_dir runs/mine

What you will want to set:
  --model.beta 1.0                    scale of the loss; one value, or a list with one value an iteration
  --model.learning_rate 1e-5          peak of each iteration's schedule; one value or a list
  --model.loss SpaceLoss              another loss; your own by its import path
  --self_play.iterations 3            how many times the policy becomes the next opponent
  --self_play.epochs 2                passes over the pairs in each iteration
  --data.generator.max_new_tokens 256 cap on both answers
  --data.answers_per_prompt 1         how many answers the opponent gives to each prompt
  --trainer.precision bf16-mixed      or bf16-true (with float32 master weights)

  spin-lightning fit --help           every setting
  spin-lightning fit --print_config   all settings with their values, as a file to start from
Commented examples are in the folder configs/.
"""


def main(args: list[str] | None = None) -> None:
    """Run the command line. What the user can mend ends with a sentence instead of a traceback.

    Exit codes: 0 done; 1 a bug, or numbers that are not finite; 2 wrong usage, settings or data; 75 a disk that is full or
    cannot be written, to be tried again; 130 and 143 ended by a signal, to be continued by the same command.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(OVERVIEW)
        return
    if args[0] == "--version":
        print(__version__)
        return
    if args[0] not in COMMANDS:
        close = get_close_matches(args[0].lower(), COMMANDS, 1)
        _end(
            f"there is no command {args[0]!r}; the commands are {', '.join(COMMANDS)}."
            + (
                f" Did you mean {close[0]}?"
                if close
                else " The command comes first: spin-lightning COMMAND --KEY VALUE ..."
            )
        )
    command = COMMANDS[args[0]]
    if not command.fits(args[1:]):
        print(f"usage: spin-lightning {args[0]} {command.usage}", file=sys.stderr)
        sys.exit(0 if {"-h", "--help"} & set(args) else 2)
    from spin_lightning.runs.files import STORAGE_ERRORS
    from spin_lightning.terminal import guard
    from spin_lightning.types import Interrupted, NonFiniteError, StorageError, UserError

    guard()
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # where classes of the user's own are; behind the installed packages
    try:
        if command.function is not None:
            command.function(args[1:])
        else:
            run(args)
    except (UserError, StorageError, NonFiniteError, Interrupted) as error:
        _end(str(error), error.exit_code, "" if isinstance(error, Interrupted) else "error: ")
    except OSError as error:  # of a logger, say
        if error.errno not in STORAGE_ERRORS:
            raise
        _end(f"{error}. Mend that, and run the same command again.", StorageError.exit_code)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # which Lightning turns into 1
            sys.exit(130)
        if type(stop).__name__ == "SIGTERMException":  # Lightning's own, without a code
            sys.exit(143)
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def _end(message: str, exit_code: int = 2, kind: str = "error: ") -> NoReturn:
    from spin_lightning.runs.redaction import redacted
    from spin_lightning.terminal import say

    say(f"spin-lightning: {kind}{redacted(message)}", file=sys.stderr)  # it quotes settings
    sys.exit(exit_code)


def run(args: list[str]) -> LightningCLI | None:
    """Run a command that runs a stage, such as ``fit`` or ``sft``; errors are raised.

    Returns:
        The finished command line object, with ``trainer``, ``model`` and ``datamodule``. None if the run was over already.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from spin_lightning.cli.settings_errors import explaining_plugins, explaining_settings
    from spin_lightning.cli.stage_cli import RunIsOver, StageCLI

    try:
        with explaining_settings(), explaining_plugins():
            return StageCLI(args[0], args[1:])
    except RunIsOver:
        return None


def config_folder() -> Path:
    """Where the shipped configs are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"
