"""Several processes of one run, as ``torchrun`` would start them, without the time that imports take."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from helpers import args_of

from spin_lightning import TransformersGenerator, UserError
from spin_lightning.cli.children import Children
from spin_lightning.cli.commands import main
from spin_lightning.types import Response, StageFailed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["games", "several", "spin_lightning.cli.stage_cli"])
#: Whether all is tested that several processes promise, as `make processes` does; else what fits into a minute.
IS_THOROUGH = bool(os.environ.get("ALL_PROCESSES"))
thorough = pytest.mark.skipif(not IS_THOROUGH, reason="a part of `make processes`")
#: A test that hangs is one that fails.
LONGEST_SECONDS = 240.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment_of(rank: int, world: int, port: int, machines: int = 1) -> dict[str, str]:
    """What ``torchrun`` tells a process."""
    machine, local = divmod(rank, each := world // machines)
    return {
        "RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(each),
        "GROUP_RANK": str(machine), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


class Several:
    """The processes of one run, from ``start`` until they have all ended.

    Attributes:
        codes: Their exit codes; minus the number of a signal that killed one.
        printed: What each wrote to stdout and stderr.
    """

    def __init__(
        self, folder: Path, function: Callable[..., Any], *args: Any, world: int = 2, machines: int = 1
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port, number = free_port(), len(list(folder.glob("printed_*_0")))
        self.files = [folder / f"printed_{number}_{rank}" for rank in range(world)]
        self.processes = [
            CONTEXT.Process(
                target=_run, args=(environment_of(rank, world, port, machines), self.files[rank], function, args)
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self, ends_all: bool = False) -> Several:
        """Wait for them; ``ends_all`` terminates the others where one failed, as ``torchrun`` does."""
        end = time.monotonic() + LONGEST_SECONDS
        while ends_all and time.monotonic() < end and any(process.is_alive() for process in self.processes):
            time.sleep(0.1)
            if any(process.exitcode for process in self.processes):
                for process in self.processes:
                    process.terminate()
                break
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not hanging, f"processes {hanging} hang; they printed {self.printed}"
        return self

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    @property
    def printed(self) -> list[str]:
        return [path.read_text(errors="replace") if path.exists() else "" for path in self.files]


def together(folder: Path, function: Callable[..., Any], *args: Any, world: int = 2, machines: int = 1) -> Several:
    """Run a function in several processes of one run, and wait for them."""
    return Several(folder, function, *args, world=world, machines=machines).wait()


# --- a process to which something happens -----------------------------------------------------------------------------

#: Where it happens, in the environment: rank, place, number there, and what.
FATE = "FATE_OF_A_PROCESS"
_seen: dict[str, int] = {}


def meet_fate(place: str) -> None:
    """Be killed, signalled or broken if this is the process, the place and the time for it."""
    _seen[place] = _seen.get(place, 0) + 1
    rank, where, number, what = (os.environ.get(FATE) or "- - 0 -").split()
    own_rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    if (rank, where, int(number)) == (own_rank, place, _seen[place]):
        if what == "broken":
            raise UserError("a plug was pulled. Put it back")
        os.kill(os.getpid(), signal.SIGKILL if what == "killed" else signal.SIGTERM)


class MortalGenerator(TransformersGenerator):
    """Answers slowly, and may meet its fate."""

    def generate(self, *args: Any) -> Iterator[tuple[int, Response]]:
        for item in super().generate(*args):
            meet_fate("generation")
            time.sleep(0.02)
            yield item


class Mortal(L.Callback):
    """May meet its fate in a training step, in validation, or as an iteration ends."""

    def on_train_batch_start(self, *args: Any) -> None:
        meet_fate("training")

    def on_validation_batch_start(self, *args: Any) -> None:
        meet_fate("validation")

    def on_iteration_end(self, *args: Any) -> None:
        meet_fate("export")


def run_command(args: list[str], fate: str = "") -> None:
    """A command line, in a process that may meet its fate."""
    from spin_lightning.cli.commands import main

    os.environ[FATE] = fate
    main(args)


class Forked:
    """In the place of ``Popen``: the command of a stage, in a process that need not import everything."""

    commands: list[list[str]] = []
    #: What is to happen to the stage of a number.
    fates: dict[int, str] = {}

    def __init__(self, command: Sequence[str], start_new_session: bool) -> None:
        assert command[0] == sys.executable and start_new_session
        self.commands.append(list(command))
        fate = self.fates.get(len(self.commands), "")
        self.process = CONTEXT.Process(target=_run_stage, args=(list(command[3:]), fate))
        self.process.start()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)  # type: ignore[arg-type]

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode


def run_here(patch: pytest.MonkeyPatch) -> list[list[str]]:
    """Have the commands of stages run in this process; returns those that did."""
    commands: list[list[str]] = []

    def run(children: Children, command: list[str], what: str, advice: str = "") -> None:
        commands.append(command)
        try:
            main(command[3:])
        except SystemExit as ended:
            raise StageFailed(what, int(ended.code or 0), advice) from None

    patch.setattr(Children, "run", run)
    return commands


def _run_stage(args: list[str], fate: str) -> None:
    import torch

    torch.set_num_threads(1)
    run_command(args, fate)


def flags_of(model: str, rows: str, folder: Path, *more: str) -> list[str]:
    """A small game on the command line, with the callback and the generator that end it where ``FATE`` says."""
    return args_of(
        "fit", model, rows, folder,
        "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=several.Mortal", "--data.generator=several.MortalGenerator",
        "--data.generator.max_new_tokens=5", "--data.val_fraction=0.2", "--data.batch_size=4",
        "--self_play.iterations=2", "--self_play.epochs=1", "--self_play.shard_size=2", "--model.learning_rate=1e-2",
        "--checkpoint.every_n_steps=1", *more,
    )  # fmt: skip


def _run(environment: dict[str, str], printed: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    with printed.open("w") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    try:
        function(*args)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
