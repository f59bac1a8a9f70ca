"""The processes of a run: what they tell each other, and how they end together. One process is the usual case.

All that is asked of ``torch.distributed`` is asked here. Functions marked *together* have to be called by every process
at the same place. They wait for the others as long as it takes, in a group of their own whose time-out is a month: a
process may generate for hours while another has nothing left to do. Where there is one process they do nothing.

Whatever ends one process ends all, and one of them says why: the first that asks ``settle``, which leaves a notice in
the run's folder. The others find the notice, or a broken connection and then the notice, and end without a word.
"""

from __future__ import annotations

import os
import re
import sys
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from spin_lightning import terminal
from spin_lightning.runs.lightning_internals import children_of, let_children_explain, starts_processes
from spin_lightning.types import EndedElsewhere, LostProcess, UserError

T = TypeVar("T")

#: Nobody waits longer than this.
PATIENCE = timedelta(days=30)
#: Seconds that a process with a broken connection waits for the notice of why.
NOTICE_SECONDS = 2.0
#: Seconds that all processes of a machine have to end after one has failed.
LONGEST_FAREWELL = 60.0
#: Seconds that the first process has to end, and what started them to end the others, before another one says the same.
UNMET_SECONDS = 3.0

_patient: dict[str, Any] = {}
_parent = 0
_notice: Path | None = None
_children: list[Any] = []


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes files, and speaks for all.

    Before the processes are connected, what started them has told them by environment variables.
    """
    if dist.is_available() and dist.is_initialized():
        return rank() == 0
    found = {name: int(value) for name, value in os.environ.items() if name in _TOLD and value.isdecimal()}
    if found.get("WORLD_SIZE", 1) > 1:
        return not any(found.get(name, 0) for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
    return not (found.get("SLURM_NTASKS", 1) > 1 and found.get("SLURM_PROCID", 0))


_TOLD = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_NTASKS", "SLURM_PROCID")
terminal.speaks = is_first


def deal(items: Sequence[T]) -> Sequence[T]:
    """This process's share of something that all of them have."""
    return items[rank() :: world_size()]


# --- what they tell each other ----------------------------------------------------------------------------------------


def wait() -> None:
    """Go on when all processes are here. Together."""
    if world_size() > 1:
        dist.barrier(group=_patient_group())


def share(value: T) -> T:
    """The value that the first process gives. Together."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_patient_group())
    return values[0]


def add_up(values: Tensor) -> Tensor:
    """The sum over all processes of numbers of one shape. Together."""
    if world_size() == 1:
        return values
    total = values.detach().to("cpu", torch.float64, copy=True)
    dist.all_reduce(total, group=_patient_group())
    return total.to(values.device, values.dtype)


def join(columns: Tensor) -> Tensor:
    """The columns of all processes side by side, shape ``(R, C)`` in each and ``(R, sum of C)`` together. Together."""
    if world_size() == 1:
        return columns
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, columns.detach().cpu(), group=_patient_group())
    return torch.cat(found, 1).to(columns.device)


def largest(number: int) -> int:
    """The largest of the processes' numbers. Together."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_patient_group())
    return int(found)


def refuse_different(value: str, what: str) -> None:
    """Make sure that all processes have the same. Together.

    Raises:
        UserError: They do not.
    """
    if world_size() == 1:
        return
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=_patient_group())
    if others := [number for number, other in enumerate(found) if other != found[0]]:
        raise UserError(
            f"{what} of process {others[0]} differ from those of process 0, and all processes of a run need the same. "
            "Give every machine the same files and versions, and let no callback change them on one process only."
        )


def _patient_group() -> Any:
    if _patient.get("of") is not dist.group.WORLD:  # another fit in this process has other groups
        _patient.update(of=dist.group.WORLD, group=dist.new_group(backend="gloo", timeout=PATIENCE))
    return _patient["group"]


# --- how they end -----------------------------------------------------------------------------------------------------


def meet(folder: Path, trainer: Any) -> None:
    """Agree on the folder of the run, in which a process that ends leaves its notice. Together.

    Raises:
        UserError: They were started in a way that a run cannot have.
    """
    global _notice, _parent
    refuse_strategy(trainer)
    _notice = None
    if world_size() > 1:
        _notice = folder / f".ended_{share(uuid.uuid4().hex[:8])}"
        _children[:], _parent = children_of(trainer), os.getppid()
        let_children_explain(LONGEST_FAREWELL)


def refuse_strategy(trainer: Any) -> None:
    """Refuse a trainer's strategy if a run would not learn with it what it learns in one process.

    Raises:
        UserError: It is neither one device nor DDP in processes that run the same command.
    """
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    if starts_processes(trainer):
        why = "starts its processes by spawn or fork, of which no error and no signal comes back"
    elif isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
        return
    else:
        why = _REFUSED.get(name, "has not been tried with this package")
    raise UserError(f"trainer.strategy {name} {why}. {_TAKEN}")


def refuse_strategy_by_name(chosen: str) -> None:
    """Refuse a strategy that a run cannot have before Lightning gives advice on how to have it.

    Args:
        chosen: A word that Lightning knows, or a class path.

    Raises:
        UserError: It is one of those.
    """
    word = chosen.rpartition(".")[2]
    name = next((name for prefix, name in _FAMILIES.items() if f"{word}_".startswith(prefix)), word)
    if name in _REFUSED:
        raise UserError(f"trainer.strategy {chosen!r} {_REFUSED[name]}. {_TAKEN}")


_TAKEN = (
    "Set trainer.strategy: ddp for several devices, fsdp2 for weights that one device does not hold, or auto with "
    "trainer.devices: 1."
)
#: How the words of Lightning's strategies begin.
_FAMILIES = {"fsdp_": "FSDPStrategy", "deepspeed_": "DeepSpeedStrategy"}
_REFUSED = {
    "FSDPStrategy": "shards weights in a form that the passes of a batch do not go through (fsdp2 does)",
    "ModelParallelStrategy": "leaves it open how weights are sharded (fsdp2 does it)",
    "DeepSpeedStrategy": "shards optimiser and weights out of sight of checkpoints and exports, and has not been run",
}


def end_if_another_did() -> None:
    """Call this where nothing would be lost and the others are not waited for.

    Raises:
        EndedElsewhere: Another process has left its notice.
        LostProcess: Another process of this machine is gone.
    """
    if _notice is None:
        return
    if _notice.exists():
        raise EndedElsewhere(_read_notice()[1])
    is_orphan = os.environ.get("LOCAL_RANK", "0") != "0" and os.getppid() != _parent
    if is_orphan or any(child.poll() for child in _children):
        raise LostProcess


def settle(error: Exception) -> Exception:
    """What this process ends with: its error if it is the first to end, else ``EndedElsewhere``. May be repeated."""
    if isinstance(error, EndedElsewhere) or (is_first() and world_size() == 1):
        return error
    if _is_broken_connection(error):
        lost = LostProcess()
        lost.__cause__ = error
        error = lost
    if _notice is None:  # before they met: what the first one ends with, others mostly do too
        if not is_first():
            if isinstance(error, LostProcess):
                return EndedElsewhere(error.exit_code)
            time.sleep(UNMET_SECONDS)
        return error
    end = time.monotonic() + NOTICE_SECONDS * isinstance(error, LostProcess)
    while not _notice.exists() and time.monotonic() < end:
        time.sleep(0.05)
    try:
        _notice.parent.mkdir(parents=True, exist_ok=True)
        with _notice.open("x", encoding="utf-8") as stream:
            stream.write(f"{rank()} {getattr(error, 'exit_code', 1)}\n")
    except FileExistsError:
        who, code = _read_notice()
        if who != rank():
            return EndedElsewhere(code)
    except OSError:  # a full disk: then more than one may speak
        pass
    return error


def leave(exit_code: int) -> NoReturn:
    """End this process without a word: the first one with the exit code that the run has, the others with 0."""
    sys.exit(exit_code if is_first() else 0)


def forget_notices(folder: Path) -> None:
    """Remove what earlier runs in a folder left. For the process that holds the folder."""
    for left_over in folder.glob(".ended_*"):
        if left_over != _notice:
            left_over.unlink(missing_ok=True)


def _read_notice() -> tuple[int, int]:
    """Which process ended first, and its exit code."""
    assert _notice is not None
    for _ in range(20):
        if len(words := _notice.read_text(encoding="utf-8").split()) == 2:
            return int(words[0]), int(words[1])
        time.sleep(0.05)  # it is being written
    return -1, 1


def _is_broken_connection(error: BaseException) -> bool:
    words = r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|TCPStore|ProcessGroup"
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(re.search(words, str(error))))
