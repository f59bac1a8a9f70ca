"""One display for all that takes time: a live line on a terminal, elsewhere a plain line now and then.

Whatever works for long reports here. Phases nest, the innermost is the one that is shown, and there is never more than
one line. What is printed meanwhile, by anybody, appears above it. It is written to stderr, and it is live only where
both stdout and stderr are terminals that can move their cursor. No thread runs: it is drawn when work is reported.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from spin_lightning import terminal
from spin_lightning.terminal import printable, say

Item = TypeVar("Item")

#: Work shorter than this, in seconds, is not worth a line that stays.
LEAST_SECONDS = 2.0
#: A plain line comes after so many seconds, or after this share of the work if that took ``LEAST_SECONDS``.
PACE_SECONDS, PACE_SHARE = 30.0, 0.1
#: Seconds between two pictures of the live line.
FRAME_SECONDS = 0.1


class Phase:
    """Something that takes time, and how far it is. Made by ``progress``; open between ``begin`` and ``end``.

    Args:
        display: Where it is shown.
        name: What goes on, such as ``answering``.
        total: How many there are to do; infinite or None if nobody knows.
        unit: What is counted, in the plural; empty if nothing is.
        facts: Asked for what else a line says when one is drawn, and only then, such as ``{"loss": "0.693"}``.
        waits: Not on a terminal at once, but when it has taken two seconds: for many small steps, which may be over by
            then.
    """

    def __init__(
        self,
        display: Display,
        name: str,
        total: float | None = None,
        unit: str = "",
        facts: Callable[[], Mapping[str, str]] = dict,
        waits: bool = False,
    ) -> None:
        self.display, self.name, self.unit, self.facts, self.waits = display, name, unit, facts, waits
        self.total = math.inf if total is None else total
        self.done = self.skipped = self.tokens = 0
        self.began = self.elsewhere = 0.0  # elsewhere: seconds that phases inside of this one took
        self.brevity = 0  # of its live line: it only gets briefer, so that it does not jump

    def skip(self, count: int) -> None:
        """So many were done before: they count as done, and not for the time that is left."""
        self.done += count
        self.skipped += count

    def advance(self, count: int = 1, tokens: int = 0) -> None:
        """So many more are done, and so many tokens were part of that."""
        self.done += count
        self.tokens += tokens
        self.display.show()

    def begin(self) -> Phase:
        """Show it from now on, as a part of what is shown already."""
        self.began = self.display.clock()
        self.display.phases.append(self)
        self.display.show(is_new=True)
        return self

    def end(self, is_done: bool = True) -> None:
        """Close it, and leave a line with what it came to if it was long, done, and no part of another. Repeatable."""
        self.display.close(self, is_done)

    def __enter__(self) -> Phase:
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(is_done=kind is None)


class Display:
    """The one line of a process. Use ``display``, not another.

    Args:
        clock: Seconds, from any start.

    Attributes:
        is_on: False shows nothing.
        heading: What all phases are part of, such as ``iteration 0 (1 of 3)``.
        phases: Those that are open, the innermost last.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.is_on = True
        self.heading = ""
        self.phases: list[Phase] = []
        self._live: Live | None = None
        self._looked_at = self._shown_at = -math.inf
        self._shown_share = 0.0
        self._redirected: list[tuple[Any, Any]] = []

    @property
    def is_drawn(self) -> bool:
        """Whether a live line is on the terminal now."""
        return self._live is not None

    def show(self, is_new: bool = False) -> None:
        """Draw the line of the innermost phase if it is time to, or if that is another than before."""
        now = self.clock()
        if (now - self._looked_at < FRAME_SECONDS and not is_new) or not self.phases or not self.is_on:
            return
        if not terminal.speaks():
            return
        self._looked_at = now
        first, phase = self.phases[0], self.phases[-1]
        if self._live is not None or is_live():
            if self._live is not None or not phase.waits or now - first.began >= LEAST_SECONDS:
                self._draw(now)
        elif self._is_due(now, phase, is_inner=phase is not first):
            self._shown_at, self._shown_share = now, _share_done(first)
            self._say(self._make_segments(phase, now))

    def close(self, phase: Phase, is_done: bool = True) -> None:
        """End a phase; once the outermost ends, its line goes. One that is closed already stays so."""
        if phase not in self.phases:
            return
        now = self.clock()
        seconds, is_outer = now - phase.began, self.phases[0] is phase
        del self.phases[self.phases.index(phase) :]  # with those inside of it that an error left open
        if self.phases:
            self.phases[-1].elsewhere += seconds
        if is_outer:
            self.stop()
            if self.is_on and is_done and seconds >= LEAST_SECONDS:
                self._say(self._make_segments(phase, now, is_over=True))
        else:
            self.show(is_new=True)

    def stop(self) -> None:
        """Take the live line away: the terminal is as if it had never been there."""
        self._shown_at, self._shown_share = -math.inf, 0.0
        if self._live is not None:
            for handler, stream in self._redirected:
                handler.setStream(stream)
            self._live.stop()
            self._live, self._redirected = None, []

    def _is_due(self, now: float, phase: Phase, is_inner: bool) -> bool:
        since = now - max(self._shown_at, self.phases[0].began)
        has_moved = round(_share_done(phase) - self._shown_share, 9) >= PACE_SHARE and not is_inner
        return since >= PACE_SECONDS or (has_moved and since >= LEAST_SECONDS)

    def _draw(self, now: float) -> None:
        if self._live is None:
            console = _Console(
                file=sys.stderr,
                force_terminal=True,
                force_jupyter=False,
                soft_wrap=True,
                highlight=False,
                markup=False,
                emoji=False,
            )
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
            self._redirect_logs()
        phase, width = self.phases[-1], self._live.console.width
        segments = self._make_segments(phase, now, phase.brevity)
        while phase.brevity < 2 and len(", ".join(segments)) > width:
            phase.brevity += 1
            segments = self._make_segments(phase, now, phase.brevity)
        while len(segments) > 1 and len(", ".join(segments)) > width:
            segments.pop()
        line = Text(printable(", ".join(segments)), style="cyan", end="")
        line.truncate(width)
        self._live.update(line, refresh=True)

    def _redirect_logs(self) -> None:
        """Logs that found stderr before the line was there would write into it."""
        streams = {id(stream.rich_proxied_file): stream for stream in (sys.stdout, sys.stderr)}  # type: ignore[union-attr]
        for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
            for handler in getattr(logger, "handlers", []):
                if proxy := streams.get(id(getattr(handler, "stream", None))):
                    self._redirected.append((handler, handler.stream))
                    handler.setStream(proxy)

    def _say(self, segments: list[str]) -> None:
        say(", ".join(segments), file=sys.stderr)

    def _make_segments(self, phase: Phase, now: float, brevity: int = 0, is_over: bool = False) -> list[str]:
        """What a line says, in parts, the least important last; ``brevity`` 1 does not count, and 2 abbreviates too."""
        seconds, new = now - phase.began, phase.done - phase.skipped
        head, has_total = ", ".join(filter(None, (self.heading, phase.name))), math.isfinite(phase.total)
        parts = []
        if brevity:
            head = f"{self.heading.replace(' of ', '/')} {phase.name}".lstrip() if brevity > 1 else head
            head += f" {_share_done(phase):.0%}" if has_total else f" {phase.done:,}" if phase.unit else ""
        elif is_over:
            head += (
                f": {phase.done:,} {phase.unit} in {format_time(seconds)}"
                if phase.unit
                else f": {format_time(seconds)}"
            )
        elif phase.unit:
            of = f" of {phase.total:,.0f} {phase.unit} ({_share_done(phase):.0%})" if has_total else f" {phase.unit}"
            head += f": {phase.done:,}{of}"
        if has_total and not is_over and new > 0 and phase.done < phase.total:
            parts.append(f"{format_time(seconds / new * (phase.total - phase.done))} left")
        parts += [f"{name} {value}" for name, value in phase.facts().items()]
        rate = phase.tokens / max(seconds - phase.elsewhere, 1e-9)
        if phase.tokens:
            parts.append(f"{_format_number(rate)} tok/s" if brevity > 1 else f"{rate:,.0f} tokens/s")
        return [head, *parts]


class _Console(Console):
    """Leaves the cursor visible, so that nothing has to bring it back, whatever ends the process."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


#: The display of this process.
display = Display()
atexit.register(display.stop)


def progress(
    name: str, total: float | None = None, unit: str = "", facts: Callable[[], Mapping[str, str]] = dict
) -> Phase:
    """Something that takes time, for a ``with``: shown as long as it lasts, and remembered if that was two seconds.

    Args:
        name: What goes on.
        total: How many there are to do. None: nobody knows.
        unit: What is counted, in the plural. Empty: nothing is.
        facts: Asked for what else a line says when one is drawn.

    Example:
        >>> with progress("counting", total=3, unit="sheep") as phase:
        ...     for _ in range(3):
        ...         phase.advance()
        >>> phase.done
        3
    """
    return Phase(display, name, total, unit, facts)


def track(items: Iterable[Item], name: str, total: float | None = None, unit: str = "rows") -> Iterator[Item]:
    """The same items, one by one, and how many were taken, if that takes more than two seconds.

    Example:
        >>> list(track("abc", "reading", total=3))
        ['a', 'b', 'c']
    """
    with Phase(display, name, total, unit, waits=True) as phase:
        for item in items:
            yield item
            phase.advance()


def is_live() -> bool:
    """Whether a line can be drawn over: stdout and stderr are terminals, not ``TERM=dumb``, without another bar."""
    streams = (sys.stdout, sys.stderr)
    if os.environ.get("TERM") in ("dumb", "unknown") or any(hasattr(stream, "rich_proxied_file") for stream in streams):
        return False
    return all(stream is not None and stream.isatty() for stream in streams)


def _share_done(phase: Phase) -> float:
    return phase.done / phase.total if phase.total else 1.0


def _format_number(value: float) -> str:
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.1f}k" if value < 99_950 else f"{value / 1000:.0f}k"


def format_time(seconds: float) -> str:
    """A time in the two largest units that matter.

    Example:
        >>> [format_time(seconds) for seconds in (0.4, 99, 119, 5000)]
        ['0 s', '99 s', '2 min', '1 h 23 min']
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
