"""``spin-lightning slurm``: a batch script that runs a command of this package on a SLURM cluster.

One process for each GPU, started by ``srun``, from whose variables Lightning knows the others and where they meet: on
the first node.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from spin_lightning.cli.chain_file import read_chain
from spin_lightning.cli.commands import STAGES
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: Commands that a job may run.
WORDS = (*STAGES, "play", "chain")
#: Seconds before the job's time is over in which the run is asked to end.
NOTICE_SECONDS = 300
#: A job's time as ``sbatch`` takes it: minutes, minutes:seconds, hours:minutes:seconds, or days-hours and so on.
_TIME = r"(\d+-)?\d+(:\d+){0,2}"


def main(args: list[str]) -> None:
    """Print the script.

    Args:
        args: What the job asks for, ``--``, and the command.

    Raises:
        UserError: There is no command, or an option is outside its range.
    """
    say(make_script(args).removesuffix("\n"), wraps=False)


def make_script(args: Sequence[str]) -> str:
    """The script as text.

    Raises:
        UserError: There is no command, or an option is outside its range.

    Example:
        >>> print(make_script(["--nodes", "2", "--", "fit", "--config", "run.yaml"]).splitlines()[2])
        #SBATCH --nodes=2
    """
    asked, word, settings = _split(args)
    options = {"nodes": "1", "gpus-per-node": "1", "time": "24:00:00", **_read_options(asked)}
    for name in ("nodes", "gpus-per-node"):
        if not re.fullmatch(r"[1-9]\d*", options[name]):
            raise UserError(f"--{name} must be a whole number, at least 1, got {options[name]!r}.")
    if not re.fullmatch(_TIME, options["time"]):
        raise UserError(
            f"--time must be minutes, hours:minutes:seconds or days-hours, as sbatch takes it, got {options['time']!r}."
        )
    options["ntasks-per-node"] = options["gpus-per-node"]
    ours = {
        "signal": f"USR1@{NOTICE_SECONDS}",  # to all processes that srun started
        "requeue": "",
        "open-mode": "append",
        "job-name": "spin-lightning",
        "output": "spin-lightning-%j.log",
    }
    directives = [f"#SBATCH --{name}={value}".rstrip("=") for name, value in ({**ours, **options}).items()]
    directives.sort(key=lambda line: "--nodes" not in line)
    of_trainer = {"trainer.num_nodes": options["nodes"], "trainer.devices": options["gpus-per-node"]}
    flags = [f"--{name}={value}" for name, value in of_trainer.items()]
    python = "srun --kill-on-bad-exit=1 python"
    if word == "chain":  # it starts its stages one after the other, and so runs beside them
        flags = []
        for step in read_chain(settings).steps:
            if step.word == "score":
                flags.append(f"--{step.name}.launcher=srun --kill-on-bad-exit=1 --nodes=1 --ntasks=1 python")
            else:
                flags.append(f"--{step.name}.launcher={python}")
                flags += [f"--{step.name}.{name}={value}" for name, value in of_trainer.items()]
        start = ["python", "-m", "spin_lightning", "chain"]
    elif word == "play":
        start = ["python", "-m", "spin_lightning", "play", "--launcher", python, "--generate-launcher", python]
    else:
        start = [*python.split(), "-m", "spin_lightning", word]
    return _SCRIPT.format(directives="\n".join(directives), command=shlex.join([*start, *settings, *flags]))


_SCRIPT = """\
#!/bin/bash
# Made by `spin-lightning slurm`. The same script continues a run that was ended or killed.
{directives}

# activate your environment here

{command}
code=$?
# 143: the run saved what it has, as the job's time is nearly over
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _split(args: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """What the job asks for, the command, and its settings.

    Raises:
        UserError: There is no command that a job can run.
    """
    place = args.index("--") if "--" in args else len(args)
    word, settings = next(iter(args[place + 1 :]), ""), list(args[place + 2 :])
    if word not in WORDS:
        raise UserError(
            f"what the job runs must follow `--`, one of {', '.join(WORDS)} with its settings, got {word!r}: "
            "spin-lightning slurm --nodes 2 --gpus-per-node 8 -- play --config run.yaml"
        )
    if not settings:
        what, example = ("file", "line.yaml") if word == "chain" else ("settings", "--config run.yaml")
        raise UserError(f"{word} needs its {what}: spin-lightning slurm -- {word} {example}")
    for setting in settings:
        name = setting.partition("=")[0]
        if word == "chain" and name.endswith((".launcher", ".trainer.devices", ".trainer.num_nodes")):
            raise UserError(f"{name} follows from --nodes and --gpus-per-node of the job. Leave it out.")
        if name in ("--launcher", "--generate-launcher", "--trainer.devices", "--trainer.num_nodes"):
            raise UserError(f"{name} follows from --nodes and --gpus-per-node of the job. Leave it out.")
    return list(args[:place]), word, settings


def _read_options(asked: Sequence[str]) -> dict[str, str]:
    """The options of ``sbatch``, by name.

    Raises:
        UserError: One has no value, or is one that the script needs otherwise.
    """
    options: dict[str, str] = {}
    remaining = iter(asked)
    for arg in remaining:
        match = re.fullmatch(r"--([a-z][a-z-]*)(?:=(.*))?", arg)
        if match is None:
            raise UserError(f"an option of the job must look like --partition gpu, got {arg!r}.")
        value = match[2] if match[2] is not None else next(remaining, "")
        if not value or value.startswith("--") or not value.isprintable():
            raise UserError(f"--{match[1]} needs a value, got {value!r}.")
        if match[1] in ("ntasks", "ntasks-per-node", "signal"):
            raise UserError(f"--{match[1]} is the script's own: one process for each GPU, and a signal before the end.")
        options[match[1]] = value
    return options
