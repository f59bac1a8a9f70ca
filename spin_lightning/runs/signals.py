"""Signals that ask a run to end: noticed at once, obeyed where everything done so far can be saved.

The first SIGTERM, SIGINT or SIGUSR1 is kept until somebody asks; a second one ends the process on the spot.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from spin_lightning import terminal
from spin_lightning.progress import display
from spin_lightning.runs import processes
from spin_lightning.types import Interrupted

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
_received: list[int] = []
_before: dict[int, object] = {}


def listen() -> None:
    """Take the signals from whoever handles them. May be called again, when somebody else took them since."""
    if threading.current_thread() is not threading.main_thread():
        return  # Python gives signals to the main thread alone
    for number in _SIGNALS:
        if (handler := signal.getsignal(number)) is not _keep_signal:
            _before.setdefault(number, handler)
            signal.signal(number, _keep_signal)


def stop_listening() -> None:
    """Give the signals back, and forget what was received."""
    for number, handler in _before.items():
        if signal.getsignal(number) is _keep_signal:  # else somebody took them back already
            signal.signal(number, handler)  # type: ignore[arg-type]
    _before.clear()
    _received.clear()


def received_by_any() -> int:
    """The signal that asks the run to end where it can be saved, whichever process got it; 0 if none did. Together."""
    return processes.largest(_received[0] if _received else 0)


def end_together() -> None:
    """Call this where every process is, and nothing would be lost. Together.

    Raises:
        Interrupted: A process received a signal.
    """
    if number := received_by_any():
        raise Interrupted(number)


def end_if_asked() -> None:
    """Call this where nothing would be lost and the other processes are not waited for.

    Raises:
        Interrupted: This process received a signal.
    """
    if _received:
        raise Interrupted(_received[0])


def _keep_signal(number: int, frame: FrameType | None) -> None:
    if _received:
        os._exit(Interrupted(number).exit_code)
    _received.append(number)
    if not terminal.speaks():
        return
    name = signal.Signals(number).name
    # not print: a handler may interrupt another print
    above = "\r\x1b[2K" if display.is_drawn else "\n"
    os.write(
        2,
        f"{above}{name} received: ending at the next point that can be continued from. Once more ends at "
        "once.\n".encode(),
    )
