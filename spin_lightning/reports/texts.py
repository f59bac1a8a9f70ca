"""Numbers and texts as a report shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spin_lightning.reports.record import as_number
from spin_lightning.terminal import printable

#: What a page allows itself: styles, and nothing from elsewhere.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def clean(text: str, most: int = 500) -> str:
    """Text of others as a page can show it: control characters spelled out, and cut where it is long."""
    shown = printable(text[:most])[:most]
    return shown if len(text) <= most else f"{shown} …"


def capital(text: str) -> str:
    """The text with a capital letter first, and no other changed."""
    return text[:1].upper() + text[1:]


def show(value: Any) -> str:
    """A number with as many digits as a person compares.

    Example:
        >>> show(0.6931471), show(12345), show(None), show(1e-6), show(True)
        ('0.6931', '12,345', '-', '1e-06', 'True')
    """
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return clean(str(value))
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def percent(value: Any) -> str:
    """A share as a percentage; a dash where there is none."""
    number = as_number(value)
    return "-" if number is None else f"{number:.1%}"


def show_time(seconds: Any) -> str:
    """Seconds, minutes or hours.

    Example:
        >>> show_time(7.391), show_time(600), show_time(9000)
        ('7.39 s', '10.0 min', '2.5 h')
    """
    number = as_number(seconds) or 0.0
    if number < 120:
        return f"{number:.3g} s"
    return f"{number / 60:.1f} min" if number < 7200 else f"{number / 3600:.1f} h"


def count(number: float, what: str) -> str:
    """A number of things, in words.

    Example:
        >>> count(1, "update"), count(1200, "update")
        ('1 update', '1,200 updates')
    """
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"


def add_up(seconds: Any) -> float:
    """The seconds of a summary, which may be by what they were spent on."""
    if isinstance(seconds, Mapping):
        return sum(as_number(value) or 0.0 for value in seconds.values())
    return as_number(seconds) or 0.0
