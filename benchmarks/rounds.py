"""The referee's side: every contender a resident process of its own, and rounds in which they take turns.

Taking turns (A B A B, not A A B B) spreads whatever else the machine does over all of them. A contender that fails is
reported as failed, with the last line it said, and the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).absolute().parent.parent
BENCH = ROOT / ".bench"

#: A contender that takes longer to load, or for a round, has failed.
LONGEST_MINUTES = 60

#: What glibc is told in every contender's process: what ours tells it in ``models/cpu_memory.py``.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(8 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}


@dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    Attributes:
        name: What tables call it.
        module: Which file of ``benchmarks`` does it.
        settings: What that file is told.
        environment: Which folder of ``.bench`` it runs in; empty for the interpreter that runs this.
    """

    name: str
    module: str
    settings: dict[str, Any] = field(default_factory=dict)
    environment: str = ""

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return BENCH / self.environment / "bin" / "python" if self.environment else Path(sys.executable)


class Resident:
    """A contender's process."""

    def __init__(self, contender: Contender, threads: int, variables: Mapping[str, str]) -> None:
        self.contender = contender
        self.log = BENCH / "logs" / f"{contender.name.replace(' ', '_').replace('/', '-')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if not contender.python.exists():
            raise Failed(
                f"{contender.python} does not exist. Run: make bench, which installs it (vllm: make bench-vllm)"
            )
        command = [str(contender.python), "-m", f"benchmarks.{contender.module}", json.dumps(contender.settings)]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
        kept = {**ALLOCATOR, "TORCHINDUCTOR_CACHE_DIR": str(BENCH / "compiled")}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            cwd=ROOT,
            env={**os.environ, **quiet, **kept, "OMP_NUM_THREADS": str(threads), **variables},
        )
        self._read()  # that it is ready

    def round(self, is_last: bool = False) -> dict[str, Any]:
        """Let it work one round, and wait until it is ready for the next one."""
        with contextlib.suppress(BrokenPipeError):  # it died waiting, which the next line finds out
            pipe(self.process.stdin).write("go\n")
            pipe(self.process.stdin).flush()
        sample = self._read()
        if not is_last:
            self._read()
        return sample

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.process.kill()

        watchdog = threading.Timer(LONGEST_MINUTES * 60, give_up)
        watchdog.start()
        line = pipe(self.process.stdout).readline()
        watchdog.cancel()
        if not line:
            code = self.process.wait()
            if late.is_set():
                raise Failed(f"no answer in {LONGEST_MINUTES} minutes ({self.log.name})")
            if code < 0:
                raise Failed(f"killed by signal {-code}{', as when memory runs out' if code == -9 else ''}")
            said = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise Failed(f"{said[-1] if said else 'it ended without a word'} ({self.log.name})")
        message: dict[str, Any] = json.loads(line)
        return message


class Failed(Exception):
    """A contender cannot go on; the message says why."""


def play(
    contenders: Sequence[Contender],
    rounds: int,
    warm_up: int = 1,
    threads: int = 1,
    variables: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Let contenders take turns, printing how it goes.

    Args:
        contenders: Who takes turns, in this order in every round.
        rounds: Rounds that count.
        warm_up: Rounds before those that count.
        threads: ``OMP_NUM_THREADS`` of every contender.
        variables: More of the environment of every contender.

    Returns:
        One record a contender: name, settings, samples, and why it failed if it did.
    """
    records = [
        {"name": contender.name, "settings": contender.settings, "environment": contender.environment, "samples": []}
        for contender in contenders
    ]
    residents: dict[str, Resident] = {}
    try:
        for contender, record in zip(contenders, records, strict=True):
            print(f"  starting {contender.name}", flush=True)
            try:
                residents[contender.name] = Resident(contender, threads, variables or {})
            except Failed as error:
                _fail(record, error)
        for number in range(warm_up + rounds):
            started = time.monotonic()
            for record in records:
                if (resident := residents.get(record["name"])) is None:
                    continue
                try:
                    sample = resident.round(is_last=number + 1 == warm_up + rounds)
                except Failed as error:
                    _fail(record, error)
                    residents.pop(record["name"]).stop()
                    continue
                label = f"round {number - warm_up + 1}/{rounds}" if number >= warm_up else "warm-up"
                if number >= warm_up:
                    record["samples"].append(sample)
                compiling = sample.get("compile_seconds", 0)
                running = [_headline(kept)[0] for kept in record["samples"] or [sample]]
                number_now, unit = _headline(sample)
                print(
                    f"  {label:11} {record['name']:44} {number_now:9.2f} {unit:9}"
                    f"median {statistics.median(running):9.2f}  peak {sample['peak_mib']:6.0f} MiB"
                    + (f", {compiling:.0f} s of compiling" if compiling > 1 else ""),
                    flush=True,
                )
            left = (warm_up + rounds - number - 1) * (time.monotonic() - started) / 60
            if left > 1:
                print(f"  {datetime.now():%H:%M} about {left:.0f} minutes to go with these", flush=True)
    finally:
        for resident in residents.values():
            resident.stop()
    return records


def _headline(sample: dict[str, Any]) -> tuple[float, str]:
    """The number of a sample that is printed, and its unit."""
    if "flops_per_second" in sample:
        return max(sample["flops_per_second"].values()) / 1e9, "GFLOP/s"
    if "tokens" in sample and "phases" not in sample:
        return sample["tokens"] / sample["seconds"], "tokens/s"
    return sample["seconds"], "s"


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _fail(record: dict[str, Any], error: Failed) -> None:
    record["failed"] = str(error)
    print(f"  {record['name']} failed: {error}", flush=True)
