"""The table of commands, and ``main``, which runs one of them and ends with its exit code.

``spin-lightning --help`` answers before anything heavy is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from spin_lightning import __version__

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
        help: What there is to say about it beyond ``summary``. A stage's settings are listed in any case.
    """

    summary: str
    stage: str | None = None
    method: str = "fit"
    function: Callable[[list[str]], object] | None = None
    usage: str = "--config FILE [--KEY VALUE ...]"
    fits: Callable[[list[str]], bool] = lambda args: True
    help: str = ""


def _run_check(args: list[str]) -> None:
    from spin_lightning.cli.config_files import check_configs

    check_configs(args)
    from spin_lightning.cli.check import main

    main(args)


def _run_plan(args: list[str]) -> None:
    from spin_lightning.cli.config_files import check_configs

    check_configs(args)
    from spin_lightning.cli.plan import main

    main(args)


def _run_play(args: list[str]) -> None:
    from spin_lightning.cli.config_files import check_configs

    check_configs(args)
    from spin_lightning.cli.play import main

    main(args)


def _run_score(args: list[str]) -> None:
    from spin_lightning.cli.config_files import check_configs

    check_configs(args)
    from spin_lightning.cli.score import main

    main(args)


def _run_slurm(args: list[str]) -> None:
    from spin_lightning.cli.slurm import main

    main(args)


def _run_schema(args: list[str]) -> None:
    from spin_lightning.cli.schema import main

    main(args)


def _run_chain(args: list[str]) -> None:
    from spin_lightning.cli.chain import main

    main(args)


def _run_demo(args: list[str]) -> None:
    from spin_lightning.demos.small_model import play

    play(*_with_model(args))


def _run_reft(args: list[str]) -> None:
    from spin_lightning.demos.reft import play

    play(*_with_model(args))


def _with_model(args: list[str]) -> list[str]:
    """What a demo is given, with no model where settings stand in its place."""
    return [args[0], "", *args[1:]] if len(args) > 1 and args[1].startswith("-") else args


def _run_lab(args: list[str]) -> None:
    from spin_lightning.demos.known_language import play

    play(*args)


def _folder_is_first(args: list[str]) -> bool:
    return not (args and args[0].startswith("-"))


_OF_CHECK = """Looks at the data as a run will, in seconds: reads and checks every row, says
which format was detected, counts what is bad, double, too long or cut, and
shows one pair token by token. Of millions of rows, --sample 1000 reads and
checks all, but encodes and counts only as many, chosen by data.seed.

Takes what `spin-lightning fit` takes, or `sft`. Two settings are enough:

  spin-lightning check --data.train_data my_data.jsonl \\
    --model.model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct

What you may want to set, here and in the run:
  --data.columns '{prompt: question, completion: answer}'
                                       your names of the columns
  --data.format messages               where two formats fit
  --data.on_bad_row drop               leave bad rows out, counted, instead of
                                       refusing the data
  --data.max_prompt_tokens 512         rows with longer prompts are left out,
                                       counted
  --data.generator.max_new_tokens 256  cap on the answers; longer real ones are
                                       cut, counted. For sft
                                       --data.max_response_tokens
  --data.prompt_template alpaca        where the model has no chat template

A run writes the same counts to data_report.json in its folder.
Colours are for terminals; NO_COLOR=1 turns them off, FORCE_COLOR=1 on.
The exit code is 0 if a run can begin, else 2."""

_OF_PLAN = """Says before a run what it will read, how many updates it has, what memory each
device needs for training and for generation, and what the run leaves on disk;
and where something does not fit, which settings would help. Reads the data and
the model's config, and no weights: a model of 7B is planned on a laptop.

Takes what `spin-lightning fit` takes, or `sft`, and also:
  --memory 24GiB                       of one device, instead of those here
  --devices 8                          short for --trainer.devices 8
  --rows 50000 --prompt-tokens 200 --response-tokens 250
                                       assume these instead of reading data
  --sample 1000                        of the rows, encode and count only these
  --probe                              load the model, and take the time of a
                                       pass and of some responses
  --price-per-hour 2.50                of one device, for the cost of all that:
                                       with --probe
  --json                               for tools: bytes, tokens and seconds

On a CPU the figures of memory are within 15 % of what was measured; on a GPU
within 10 % of ten measurements on an H200, where a step with compiled layers
takes 5 to 25 % less than is planned. docs/scale.md has the equations,
docs/gpu.md the measurements.
The exit code is 0 if the run could begin, whether or not it fits, else 2."""

_OF_PLAY = """The game of `spin-lightning fit`, with the same settings, folder and results.
Each iteration has two stages, each in processes of its own that end with it:
  generate   the opponent answers, and both answers are scored
  train      the policy trains on them and is exported
So training and generation never hold memory at the same time, and may be
started in different ways. The same command continues a killed run, at any
stage; fit and play continue each other's.

Takes what `spin-lightning fit` takes, and also:
  --launcher 'torchrun --nproc_per_node 8'
                                       starts the stage that trains: it takes
                                       the place of python in
                                       `python -m spin_lightning fit`
  --generate-launcher '...'            the same for the stage that generates.
                                       Left out, that is one process if there is
                                       a --launcher, else what the trainer's
                                       settings say

One stage alone: spin-lightning fit --self_play.stage generate, or train.
A stage that fails ends it with its exit code. SIGTERM, SIGINT and SIGUSR1 go to
the stage, and end both where the run can be continued."""

_OF_SCORE = """A reward says what each response is worth; everything is kept in a folder, and
the same command continues where it was killed: no judge is asked twice.

  spin-lightning score \\
    --model.model_name_or_path runs/mine/policy \\
    --data.train_data held_out.jsonl \\
    --data.answers_per_prompt 4 \\
    --score.reward NumberMatch \\
    --score.output_dir runs/mine_scored

The sections model and data are those of `spin-lightning fit`, and a config of
it can be given; all rows of data.train_data are scored (data.val_fraction 0).

  --score.reward NumberMatch           1 for the right final number, 0.1 for
                                       another, 0 for none; also TextMatch,
                                       FunctionReward, ModelReward, JudgeReward,
                                       SumOfRewards, or a class path of yours
  --score.reward.pattern equals        a setting of that reward; all of them:
                                       --score.reward.help NumberMatch
  --score.output_dir runs/score        where everything is kept
  --score.against MODEL                the win rate against another model
  --score.part held_out                the rows that fit sets aside for its NLL
  --score.right_from 1.0               the reward of a right one, for pass@k
  --score.best_from 1.0                leave worse ones out of best.jsonl
  --score.shard_size 64                prompts that a kill asks about again
  --data.answers_per_prompt 4          responses to each prompt; 0 scores the
                                       responses of the data instead
  --data.generator.temperature 0       the most likely response, and no sample
  --data.generator.max_new_tokens 256  cap on the responses
  --trainer.accelerator gpu            and --trainer.precision bf16-true

Results:
  summary.json   mean and its error, pass@k, best of n, win rate
  best.jsonl     the best response to each prompt: rows for `spin-lightning sft`
  pairs.jsonl    chosen, rejected, preference, margin: for `dpo` and `reward`
  responses/ rewards/ against/ comparisons/
                 tables in Parquet, with what made them in *_manifest.json

docs/score.md and docs/rewards.md have more."""

_OF_SLURM = """Prints a batch script for a SLURM cluster:

  spin-lightning slurm --nodes 2 --gpus-per-node 8 --time 24:00:00 -- \\
    play --config run.yaml > run.sbatch
  sbatch run.sbatch

Before `--`, what the job asks for; each further option goes to #SBATCH as it
is, such as --partition gpu or --account mine:
  --nodes 1
  --gpus-per-node 1
  --time 24:00:00
After it, a command of this package that trains: fit, play, sft, dpo, reward or
ppo. Its processes are one for each GPU, started by srun; trainer.num_nodes and
trainer.devices are added. The run's folder has to be on a disk that all nodes
see.

Five minutes before its time is over the job is sent SIGUSR1: the run saves what
it has and ends, and the script queues the job again, which continues it."""

_OF_CHAIN = """Runs the stages of a file in order, each from the model that the last one has
exported, and prints what each gained: updates, time, held-out NLL and reward.
The same command continues a chain that was killed, in whatever stage.

  output_dir: runs/line            # each stage has a folder of its name in it
  common:                          # for all stages that have these settings
    data: {train_data: rows.jsonl, val_data: held_out.jsonl}
    trainer: {precision: bf16-true}
  stages:
    - sft:                         # the word, and settings as in its config
        model: {model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct}
    - fit:                         # starts from runs/line/sft/policy
        config: spin.yaml          # a file of settings, beside this one
        self_play: {iterations: 2}
    - fit:
        name: again                # a word that is there twice needs names
        model: {model_name_or_path: {from: sft}}

Where a setting is a path, {from: STAGE} is the model that a stage before this
one has exported, and {from: STAGE, path: NAME} a file or folder in its run's
folder. What is said last wins: a config, common, the stage, its flags.

  --sft.model.learning_rate 1e-5       over what the file says
  --common.trainer.accelerator cpu     the same for all stages without their own
  launcher: torchrun --nproc_per_node 8
                                       in a stage: takes the place of python

All settings and files are looked at before the first stage starts. A stage that
is over is skipped; where the file has changed since, its command says whether
it may be. A stage that fails ends the chain with its exit code, a signal ends
both where they can be continued."""

_OF_SCHEMA = """Prints a JSON Schema by which an editor completes the settings of a config as it
is written, shows what each is, and marks what a run would refuse: a wrong name,
a text for a number, a number out of its range.

  spin-lightning schema > spin-lightning.schema.json
                                       of all stages, known by their sections,
                                       and of the files of chain
  spin-lightning schema fit > fit.schema.json
                                       of one: fit, sft, ppo, dpo, reward,
                                       score; or chain

Then the first line of a config says where the schema is:

  # yaml-language-server: $schema=spin-lightning.schema.json

docs/settings.md shows it in VS Code and PyCharm."""

COMMANDS = {
    "fit": Command("play the game; the same command continues a killed run", "spin_lightning.stages.spin.STAGE"),
    "sft": Command("supervised fine-tuning, the stage before it", "spin_lightning.stages.sft.STAGE"),
    "ppo": Command("reinforcement learning from a reward (PPO, RLOO, GRPO)", "spin_lightning.stages.ppo.STAGE"),
    "dpo": Command("direct preference optimisation on recorded pairs", "spin_lightning.stages.dpo.STAGE"),
    "reward": Command("a reward model of pairs of responses", "spin_lightning.stages.reward.STAGE"),
    "validate": Command("held-out NLL of a model", "spin_lightning.stages.spin.STAGE", "validate"),
    "check": Command(
        "what the data looks like to the game, without loading the model", function=_run_check, help=_OF_CHECK
    ),
    "plan": Command("what a run will take: memory, disk, updates, time", function=_run_plan, help=_OF_PLAN),
    "play": Command(
        "fit, each stage of it in processes of its own",
        function=_run_play,
        usage="[--launcher COMMAND] --config FILE [--KEY VALUE ...]",
        help=_OF_PLAY,
    ),
    "score": Command(
        "what a reward says of a model's responses, or of the data's",
        function=_run_score,
        usage="[--config FILE] [--KEY VALUE ...]",
        help=_OF_SCORE,
    ),
    "schema": Command(
        "a JSON Schema of configs, for editors",
        function=_run_schema,
        usage="[STAGE] > FILE",
        fits=lambda args: len(args) < 2 and _folder_is_first(args),
        help=_OF_SCHEMA,
    ),
    "slurm": Command(
        "a batch script for a run on a cluster",
        function=_run_slurm,
        usage="[--nodes N] [--gpus-per-node N] [--time D] [--OPTION VALUE ...] -- COMMAND ...",
        help=_OF_SLURM,
    ),
    "chain": Command(
        "a line of stages from one file, each from the last one's model",
        function=_run_chain,
        usage="FILE [--output_dir FOLDER] [--STAGE.KEY VALUE ...]",
        fits=lambda args: bool(args) and _folder_is_first(args),
        help=_OF_CHAIN,
    ),
    "demo": Command(
        "the whole game on a small real model, on CPU",
        function=_run_demo,
        usage="[FOLDER [MODEL] [--KEY VALUE ...]]",
        fits=_folder_is_first,
    ),
    "reft": Command(
        "SFT, then PPO with a program's reward, and the control",
        function=_run_reft,
        usage="[FOLDER [MODEL] [--KEY VALUE ...]]",
        fits=_folder_is_first,
    ),
    "lab": Command(
        "the game on a known language, measured exactly",
        function=_run_lab,
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
    from spin_lightning.terminal import guard
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
        if command.function is not None:
            command.function(args[1:])
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
    from spin_lightning.terminal import say

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
