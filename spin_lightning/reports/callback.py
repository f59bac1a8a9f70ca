"""Keeps a run's ``report.html`` current while it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L

from spin_lightning.reports.page import write_report
from spin_lightning.runs import processes
from spin_lightning.runs.files import run_folder
from spin_lightning.terminal import name_error, say

#: A report is left out where the last one took more than this share of the time since.
MOST_TIME = 0.02


class WriteReport(L.Callback):
    """Writes ``report.html`` into the run's folder when an iteration or an epoch ends, and at the end of the run.

    It reads files and draws no random number, so nothing that is trained depends on it. In a run of many short
    iterations it leaves some out, so that it takes at most a fiftieth of the time. Where it fails it says so once, and
    the run goes on.

    Args:
        output_dir: Folder of the run. None: that of the callback that has one, as ``SelfPlay`` and ``ExportPolicy`` do.
        enabled: Whether it is written.

    Example:
        >>> report = WriteReport("runs/mine")
    """

    def __init__(self, output_dir: str | None = None, enabled: bool = True) -> None:
        self.output_dir = None if output_dir is None else run_folder(output_dir, "report.output_dir")
        self.enabled = enabled
        self._has_failed = False
        self._written_at = 0.0
        self._took = 0.0

    def on_iteration_end(
        self, trainer: L.Trainer, module: L.LightningModule, iteration: int, summary: dict[str, Any]
    ) -> None:
        """Write it, for a stage that plays in iterations."""
        self._write(trainer, running=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it, for a stage without iterations."""
        if getattr(trainer.datamodule, "game", None) is None:  # type: ignore[attr-defined]
            self._write(trainer, running=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write it whatever time it takes, when all others have written what they write at a run's end."""
        if stage == "fit":
            self._took = 0.0
            self._write(trainer, running=False)

    def _write(self, trainer: Any, running: bool) -> None:
        if not self.enabled or self._has_failed or trainer.fast_dev_run or not processes.is_first():
            return
        started = time.monotonic()
        if self._took > MOST_TIME * (started - self._written_at):
            return
        parts = [self, getattr(trainer.datamodule, "game", None), *trainer.callbacks]
        folder = next(filter(None, (getattr(part, "output_dir", None) for part in parts)), None)
        try:
            if folder is not None and Path(folder).is_dir():
                write_report(Path(folder), running=running)
        except Exception as error:  # a picture of the run is not worth the run
            self._has_failed = True
            say(f"note: report.html could not be written, and the run goes on without it ({name_error(error)}).")
        self._written_at = time.monotonic()
        self._took = self._written_at - started
