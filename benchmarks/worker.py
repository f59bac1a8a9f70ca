"""A contender's side of the game: a process that loads once, then works one round whenever it is told to.

The referee (``rounds``) writes a line to standard input for each round; the worker answers each with one line of
JSON. Whatever libraries print goes to the log, not between the answers.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from benchmarks.measure import Meter


class Worker:
    """Waits for the referee and reports to it. ``settings`` is what the contender was started with."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = json.loads(sys.argv[1])
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.meter = Meter()

    def wait(self) -> None:
        """Say that everything is ready and block until the next round. The process ends here when there is none."""
        self.meter.pause()
        self._say({"ready": True})
        if not sys.stdin.readline():
            os._exit(0)
        self.meter.resume()

    def report(self, earlier_seconds: float = 0.0, **facts: Any) -> None:
        """The cost of everything since the last report, waiting apart, with facts about the work.

        Args:
            earlier_seconds: What another contender spent on work that this one uses.
            facts: Whatever else the report needs.
        """
        cost = self.meter.lap()
        self._say({**cost, "seconds": cost["seconds"] + earlier_seconds, **facts})

    def _say(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self._answers, flush=True)
