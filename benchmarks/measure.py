"""What a piece of work cost: CPU seconds and peak memory of this process.

On a GPU these are synchronised seconds and device memory. CPU seconds count all threads and no waiting, so a busy
machine disturbs them little. The GPU branch is the same code path with another clock.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

ON_GPU = torch.cuda.is_available()


class Meter:
    """Counts from one lap to the next; time spent in ``pause`` to ``resume`` does not count."""

    def __init__(self) -> None:
        self._last, self._last_system = self._now(), os.times().system
        self._paused = 0.0
        self._paused_at: float | None = None

    @staticmethod
    def _now() -> float:
        if not ON_GPU:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def pause(self) -> None:
        self._paused_at = self._now()

    def resume(self) -> None:
        """Go on, with the peak of memory forgotten."""
        forget_peak()
        if self._paused_at is not None:
            self._paused += self._now() - self._paused_at
            self._paused_at = None

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, those in the kernel, and the peak of memory in MiB since the last ``resume``."""
        now, system = self._now(), os.times().system
        sample = {
            "seconds": now - self._last - self._paused,
            "system_seconds": system - self._last_system,
            "peak_mib": peak_mib(),
        }
        self._paused, self._last, self._last_system = 0.0, self._now(), system
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
