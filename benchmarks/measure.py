"""What a piece of work cost: CPU seconds and peak memory of this process.

On a GPU these are synchronised seconds and device memory. CPU seconds count all threads and no waiting, so a busy
machine disturbs them little. The GPU branch is the same code path with another clock. What ``torch.compile`` takes of
them is counted apart as well, the compilers that it starts as processes of their own not.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.callback import callback_handler

ON_GPU = torch.cuda.is_available()


def now() -> float:
    """Seconds on the clock that counts: of the processor, or of the wall once a GPU has done all its work."""
    if not ON_GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class _Compiling:
    """Seconds that ``torch.compile`` took in this process so far."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def _start(self, *args: Any) -> None:
        self._since = now()

    def _end(self, *args: Any) -> None:
        self.seconds += now() - self._since


_COMPILING = _Compiling()


class Meter:
    """Counts from one lap to the next; time spent in ``pause`` to ``resume`` does not count."""

    def __init__(self) -> None:
        self._last_compiling = _COMPILING.seconds
        self._last, self._last_system = now(), os.times().system
        self._paused = 0.0
        self._paused_at: float | None = None

    def pause(self) -> None:
        """Stop the clock, until ``resume``."""
        self._paused_at = now()

    def resume(self) -> None:
        """Go on, with the peak of memory forgotten."""
        forget_peak()
        if self._paused_at is not None:
            self._paused += now() - self._paused_at
            self._paused_at = None

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, those in the kernel and in ``torch.compile``, and most MiB since ``resume``."""
        time_now, system = now(), os.times().system
        sample = {
            "seconds": time_now - self._last - self._paused,
            "system_seconds": system - self._last_system,
            "compile_seconds": _COMPILING.seconds - self._last_compiling,
            "peak_mib": peak_mib(),
        }
        self._paused, self._last, self._last_system = 0.0, now(), system
        self._last_compiling = _COMPILING.seconds
        return sample


def peak_mib() -> float:
    """Most memory in use at once since ``forget_peak``: resident memory of the process, or allocated GPU memory."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM line: peak memory can be measured on Linux only.")


def forget_peak() -> None:
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
