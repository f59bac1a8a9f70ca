"""What reaches a terminal: text that others wrote is shown, never obeyed.

A data row, a model's config or a sample may hold characters that move the cursor, rename the window, or turn the
reading direction around. Everything this package prints goes through ``say``; what libraries print, through ``guard``.
"""

from __future__ import annotations

import logging
import os
import re
import select
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

#: C0 (but the newline), DEL and C1, soft hyphen, marks of width zero, of direction and of lines, halves of characters.
_OBEYED = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
#: A joiner or non-joiner between two characters that are shown and not Latin: Persian, Hindi and emoji are spelt with
#: them.
_JOINER = re.compile("(?<=[^\x00-\u02ff\u2000-\u206f])[\u200c\u200d](?=[^\x00-\u02ff\u2000-\u206f])")


def _always() -> bool:
    return True


#: Whether this process is the one of its run that is heard; ``runs.processes`` knows where there are several.
speaks: Callable[[], bool] = _always


def printable(text: str) -> str:
    r"""The text with every character that a terminal would obey, or not show, written as its escape. Newlines stay.

    So do the joiners inside of words and emoji of scripts that need them.

    Example:
        >>> print(printable("a\x1b[2Jb\u202ec"))
        a\x1b[2Jb\u202ec
    """

    def shown(found: re.Match[str]) -> str:
        is_needed = _JOINER.match(text, found.start())
        return found[0] if is_needed else found[0].encode("unicode_escape").decode()

    return _OBEYED.sub(shown, text)


def name_error(error: Exception) -> str:
    r"""The kind of an error and the first line of what it says, for a note.

    Example:
        >>> name_error(ValueError("no such layer\nin this model")), name_error(MemoryError())
        ('ValueError: no such layer', 'MemoryError: ')
    """
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def say(*texts: Any, file: TextIO | None = None, wraps: bool = True, from_any: bool = False) -> None:
    """Print, as ``print`` does and at once also into a file, what a terminal can show without obeying it.

    On a terminal, lines that are too long end between words, unless ``wraps`` is false. Of several processes of a run
    only the first is heard, unless ``from_any`` is true.
    """
    if not (from_any or speaks()):
        return
    text, stream = " ".join(printable(str(text)) for text in texts), file or sys.stdout
    stream = getattr(stream, "rich_proxied_file", stream)  # the proxy of an older rich says it is no terminal
    if wraps and stream is not None and stream.isatty():
        text = wrapped(text, shutil.get_terminal_size().columns)
    print(text, file=file, flush=True)


def wrapped(text: str, width: int) -> str:
    r"""The text with lines of at most ``width`` characters, where its words allow that; what goes on is indented.

    Example:
        >>> print(wrapped("note: a remark of some length\n  and --data.train_data=a_long_name.jsonl", 20))
        note: a remark of
          some length
          and
            --data.train_data=a_long_name.jsonl
    """
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip(" ")) + 2)
        is_long = len(line) > width
        lines += (
            textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
            if is_long
            else [line]
        )
    return "\n".join(lines)


def guard() -> None:
    """Make logs, warnings and tracebacks of this process printable too. For programs, not for libraries."""

    class Record(logging.LogRecord):
        def getMessage(self) -> str:
            return printable(super().getMessage())

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        say(
            "".join(traceback.format_exception(kind, error, trace)).rstrip("\n"),
            file=sys.stderr,
            wraps=False,
            from_any=True,
        )

    logging.setLogRecordFactory(Record)
    sys.excepthook = show
    format_raw = warnings.formatwarning
    if format_raw.__module__ != __name__:
        warnings.formatwarning = lambda *args, **kwargs: printable(format_raw(*args, **kwargs))


@contextmanager
def ending_with_its_reader() -> Iterator[None]:
    """End quietly where whoever reads the standard output has had enough, as ``head`` has."""
    try:
        try:
            yield
        finally:  # also where a parser has printed, and ends the process
            sys.stdout.flush()
    except BrokenPipeError:
        if not _lost_its_reader():
            raise  # another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again as it ends
        sys.exit(141)  # that of SIGPIPE


def _lost_its_reader() -> bool:
    """Whether the standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except (OSError, ValueError):  # it is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
