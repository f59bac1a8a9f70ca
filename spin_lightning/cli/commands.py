"""The table of commands, and ``main``, which runs one of them and ends with its exit code.

``spin-lightning --help`` answers before anything heavy is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NoReturn

from spin_lightning import __version__
from spin_lightning.cli import help_texts
from spin_lightning.terminal import ending_with_its_reader, guard, say

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI


@dataclass(frozen=True)
class Command:
    """What a word on the command line stands for: a stage, or a function.

    Attributes:
        summary: What it does, in a line of the overview.
        stage: Import path of the record of the stage that it runs.
        method: The method of the Trainer that it calls with it.
        function: Where it runs no stage, ``MODULE:NAME`` of what takes the arguments that follow the word.
        reads_configs: Whether files of settings may be among them.
        usage: What may follow the word.
        fits: Whether arguments are as ``usage`` says, as far as ``function`` does not find out itself.
        help: What there is to say about it beyond ``summary``. A stage's settings are listed in any case.
    """

    summary: str
    stage: str | None = None
    method: str = "fit"
    function: str = ""
    reads_configs: bool = False
    usage: str = "--config FILE [--KEY VALUE ...]"
    fits: Callable[[list[str]], bool] = lambda args: True
    help: str = ""


def _folder_is_first(args: list[str]) -> bool:
    return not (args and args[0].startswith("-"))


def _names_one(args: list[str]) -> bool:
    """Whether a run, a model or a file comes first."""
    return bool(args) and _folder_is_first(args)


COMMANDS = {
    "fit": Command("play the game; the same command continues a killed run", "spin_lightning.stages.spin.STAGE"),
    "sft": Command("supervised fine-tuning, the stage before it", "spin_lightning.stages.sft.STAGE"),
    "ppo": Command("reinforcement learning from a reward (PPO, RLOO, GRPO)", "spin_lightning.stages.ppo.STAGE"),
    "dpo": Command("direct preference optimisation on recorded pairs", "spin_lightning.stages.dpo.STAGE"),
    "reward": Command("a reward model of pairs of responses", "spin_lightning.stages.reward.STAGE"),
    "validate": Command("held-out NLL of a model", "spin_lightning.stages.spin.STAGE", "validate"),
    "check": Command(
        "what the data looks like to the game, without loading the model",
        function="spin_lightning.cli.check:main",
        reads_configs=True,
        help=help_texts.CHECK,
    ),
    "plan": Command(
        "what a run will take: memory, disk, updates, time",
        function="spin_lightning.cli.plan:main",
        reads_configs=True,
        help=help_texts.PLAN,
    ),
    "play": Command(
        "fit, each stage of it in processes of its own",
        function="spin_lightning.cli.play:main",
        reads_configs=True,
        usage="[--launcher COMMAND] --config FILE [--KEY VALUE ...]",
        help=help_texts.PLAY,
    ),
    "chain": Command(
        "a line of stages from one file, each from the last one's model",
        function="spin_lightning.cli.chain:main",
        usage="FILE [--output_dir FOLDER] [--STAGE.KEY VALUE ...]",
        fits=_names_one,
        help=help_texts.CHAIN,
    ),
    "slurm": Command(
        "a batch script for a run on a cluster",
        function="spin_lightning.cli.slurm:main",
        usage="[--nodes N] [--gpus-per-node N] [--time D] [--OPTION VALUE ...] -- COMMAND ...",
        help=help_texts.SLURM,
    ),
    "compare": Command(
        "self-play against SFT from one start, over seeds, and a verdict",
        function="spin_lightning.cli.compare:main",
        reads_configs=True,
        help=help_texts.COMPARE,
    ),
    "score": Command(
        "what a reward says of a model's responses, or of the data's",
        function="spin_lightning.cli.score:main",
        reads_configs=True,
        usage="[--config FILE] [--KEY VALUE ...]",
        help=help_texts.SCORE,
    ),
    "evaluate": Command(
        "tasks of lm-evaluation-harness, and your own",
        function="spin_lightning.cli.evaluate:main",
        usage="MODEL [--tasks TASK ...] [--shots N] [--against MODEL] ...",
        fits=_names_one,
        help=help_texts.EVALUATE,
    ),
    "report": Command(
        "one HTML page of a run: curves, responses, health, settings",
        function="spin_lightning.cli.report:main",
        usage="RUN [--output FILE] [--against OTHER] [--samples N]",
        fits=_names_one,
        help=help_texts.REPORT,
    ),
    "chat": Command(
        "talk with a model of any iteration, or with two",
        function="spin_lightning.cli.chat:main",
        usage="RUN [--iteration K] [--against OTHER] [--OPTION VALUE ...]",
        fits=_names_one,
        help=help_texts.CHAT,
    ),
    "pairs": Command(
        "a game's pairs as rows for TRL, axolotl and LLaMA-Factory",
        function="spin_lightning.cli.pairs:main",
        usage="RUN [--iteration K] [--format LAYOUT] [--output FILE] [--drop WHAT ...]",
        fits=_names_one,
        help=help_texts.PAIRS,
    ),
    "push": Command(
        "an exported model to a repository of the hub",
        function="spin_lightning.cli.push:main",
        usage="FOLDER USER/NAME [--private true|false] [--revision BRANCH] [--pairs] [--yes]",
        fits=lambda args: len(args) > 1 and _folder_is_first(args),
        help=help_texts.PUSH,
    ),
    "schema": Command(
        "a JSON Schema of configs, for editors",
        function="spin_lightning.cli.schema:main",
        usage="[STAGE] > FILE",
        fits=lambda args: len(args) < 2 and _folder_is_first(args),
        help=help_texts.SCHEMA,
    ),
    "demo": Command(
        "the whole game on a small real model, on CPU",
        function="spin_lightning.demos.small_model:main",
        usage="[FOLDER [MODEL] [--KEY VALUE ...]]",
        fits=_folder_is_first,
    ),
    "reft": Command(
        "SFT, then PPO with a program's reward, and the control",
        function="spin_lightning.demos.reft:main",
        usage="[FOLDER [MODEL] [--KEY VALUE ...]]",
        fits=_folder_is_first,
    ),
    "lab": Command(
        "the game on a known language, measured exactly",
        function="spin_lightning.demos.known_language:main",
        usage="[FOLDER]",
        fits=lambda args: len(args) < 2 and _folder_is_first(args),
    ),
}
#: The records of the stages, by the word that trains each.
STAGES = {word: command.stage for word, command in COMMANDS.items() if command.stage and command.method == "fit"}

_LINES = "\n".join(f"  {word:<8}  {command.summary}" for word, command in COMMANDS.items())
OVERVIEW = f"""spin-lightning {__version__}: self-play fine-tuning (SPIN) of your own language model

usage: spin-lightning COMMAND ...

{_LINES}

A first run on your own data: JSON, JSONL, CSV, Parquet or a hub name; messages,
prompt/completion, alpaca, ShareGPT ...

  spin-lightning fit \\
    --model.model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
    --data.train_data my_data.jsonl \\
    --self_play.output_dir runs/mine

What you will want to set; a list has one value an iteration:
  --model.beta 1.0                     scale of the loss, or a list
  --model.learning_rate 1e-5           peak of the schedule, or a list
  --model.loss SpaceLoss               another loss; your own by its import path
  --self_play.iterations 3             how often the policy is the next opponent
  --self_play.epochs 2                 passes over the pairs in each iteration
  --data.generator.max_new_tokens 256  cap on both answers
  --data.answers_per_prompt 1          the opponent's answers to each prompt
  --data.generator VLLMGenerator --data.generator.python .vllm/bin/python
                                       vLLM gives them: docs/vllm.md
  --model.adapter.r 16                 train a LoRA adapter of that rank instead
  --trainer.precision bf16-mixed       or bf16-true, with float32 master weights
  --trainer.devices 2 --trainer.strategy ddp
                                       or fsdp2 for weights that one device does
                                       not hold

  spin-lightning fit --help            each setting in a sentence
  spin-lightning fit --print_config    all settings, as a file to start from
  spin-lightning fit --config FILE     settings from such a file

Commented examples are in the folder configs/.
"""


def main(args: list[str] | None = None) -> None:
    """Run the command line. What the user can mend ends with a sentence instead of a traceback.

    Exit codes:

    - 0: done
    - 1: a bug, or NaN or infinite numbers
    - 2: wrong usage, settings or data
    - 75: a disk that is full or cannot be written, or a judge that does not reply, to be tried again
    - 130 and 143: ended by a signal, to be continued by the same command
    - 141: nobody reads the output any more
    """
    args = list(sys.argv[1:] if args is None else args)
    with ending_with_its_reader():
        _run_command(args)


def _run_command(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(OVERVIEW)
        return
    if args[0] == "--version":
        print(__version__)
        return
    if args[0] not in COMMANDS:
        close = get_close_matches(args[0].lower(), COMMANDS, 1)
        _end_with(
            f"there is no command {args[0]!r}; the commands are {', '.join(COMMANDS)}."
            + (
                f" Did you mean {close[0]}?"
                if close
                else " The command comes first: spin-lightning COMMAND --KEY VALUE ..."
            )
        )
    word, command = args[0], COMMANDS[args[0]]
    if {"-h", "--help", "--help=all"} & set(args) and not (command.stage and "--help=all" in args):
        print(_print_help(word))
        return
    args = ["--help" if arg == "--help=all" else arg for arg in args]  # of the parser, with everything
    if not command.fits(args[1:]):
        print(f"usage: spin-lightning {word} {command.usage}", file=sys.stderr)
        sys.exit(2)
    from spin_lightning.runs.files import STORAGE_ERRORS
    from spin_lightning.types import (
        EndedElsewhere,
        Interrupted,
        LostProcess,
        NonFiniteError,
        RewardUnavailable,
        StageFailed,
        StorageError,
        UserError,
    )

    guard()
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # where classes of the user's own are; behind the installed packages
    try:
        if command.function:
            if command.reads_configs:
                from spin_lightning.cli.config_files import check_configs

                check_configs(args[1:])
            resolve_name(command.function)(args[1:])
        else:
            run(args)
    except Exception as raised:
        from spin_lightning.runs import processes

        error = processes.settle(raised)
        if isinstance(error, EndedElsewhere):
            processes.leave(error.exit_code)
        said = (UserError, StorageError, NonFiniteError, RewardUnavailable, LostProcess, Interrupted, StageFailed)
        if isinstance(error, said):
            _end_with(str(error), error.exit_code, "" if isinstance(error, Interrupted) else "error: ")
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:  # of a logger, say
            _end_with(f"{error}. Mend that, and run the same command again.", StorageError.exit_code)
        raise
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # which Lightning turns into 1
            sys.exit(130)
        if type(stop).__name__ == "SIGTERMException":  # Lightning's own, without a code
            sys.exit(143)
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def _print_help(word: str) -> str:
    command = COMMANDS[word]
    if command.stage is not None:
        from spin_lightning.cli.short_help import page

        return page(word, command.usage, command.summary, command.stage)
    summary = f"{command.summary[0].upper()}{command.summary[1:]}."
    return "\n\n".join(filter(None, (f"usage: spin-lightning {word} {command.usage}", summary, command.help)))


def _end_with(message: str, exit_code: int = 2, kind: str = "error: ") -> NoReturn:
    from spin_lightning.runs.redaction import redacted

    say(f"spin-lightning: {kind}{redacted(message)}", file=sys.stderr, from_any=True)  # it quotes settings
    sys.exit(exit_code)


def run(args: list[str]) -> LightningCLI | None:
    """Run a command that runs a stage, such as ``fit`` or ``sft``; errors are raised.

    Returns:
        The finished command line object, with ``trainer``, ``model`` and ``datamodule``. None if the run was over
        already.
    """
    from spin_lightning.cli.config_files import check_configs

    check_configs(args)
    from spin_lightning.cli.settings_errors import explaining_plugins, explaining_settings
    from spin_lightning.cli.stage_cli import RunIsOver, StageCLI
    from spin_lightning.progress import display

    was_on = display.is_on
    try:
        with explaining_settings(), explaining_plugins():
            return StageCLI(args[0], args[1:])
    except RunIsOver:
        return None
    finally:
        display.is_on = was_on  # trainer.enable_progress_bar is of this run


def config_folder() -> Path:
    """Where the shipped configs are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"
