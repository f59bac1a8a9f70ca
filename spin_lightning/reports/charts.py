"""Charts as SVG text: numbers in, text out. No files, no dependency, and the same bytes for the same numbers.

A chart stands alone as a file, and can be put into an HTML page as it is. Its colours follow the reader's light or dark
setting by CSS variables (``--chart-1`` to ``--chart-8``, ``--chart-text``, ``--chart-grid``, ``--chart-paper``), and a
series is told by its dashes as well as by its colour. Numbers that are not finite are gaps, never errors.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from spin_lightning.terminal import printable

#: Points of a series that are drawn; of more, the lowest and highest of each stretch stay.
MOST_POINTS = 400
_LIGHT = ("#0b5fae", "#c2410c", "#0a7a4a", "#8a35a8", "#8a6300", "#b3246b", "#1f7486", "#57606a")
_DARK = ("#6cb6ff", "#ff9e64", "#5fd39a", "#d2a8ff", "#e3c04b", "#ff8fc2", "#7fd1e0", "#adb5bd")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
#: A number beyond it would overflow on its way to a place on the paper.
_LARGEST = 1e300
_FONT = 13
#: Mean width of a character, in pixels.
_CHARACTER = 6.8


def _style() -> str:
    def variables(text: str, grid: str, paper: str, colours: Sequence[str]) -> str:
        numbered = "".join(f"--chart-{place}:{colour};" for place, colour in enumerate(colours, 1))
        return f".sl-chart{{--chart-text:{text};--chart-grid:{grid};--chart-paper:{paper};{numbered}}}"

    light = variables("#1f2328", "#d5dae0", "#ffffff", _LIGHT)
    dark = variables("#e6edf3", "#3b434d", "#151a21", _DARK)
    return (
        f"{light}@media (prefers-color-scheme:dark){{{dark}}}"
        f".sl-chart{{font:{_FONT}px system-ui,sans-serif;max-width:100%;height:auto}}"
        ".sl-chart text{fill:var(--chart-text);stroke:var(--chart-paper);stroke-width:3px;paint-order:stroke}"
        ".sl-chart .paper{fill:var(--chart-paper)}"
        ".sl-chart .title{font-weight:600}"
        ".sl-chart .grid{stroke:var(--chart-grid);fill:none}.sl-chart .axis{stroke:var(--chart-text);fill:none}"
        ".sl-chart .guide{stroke:var(--chart-text);stroke-dasharray:3 4;fill:none}"
    )


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    x_label: str,
    y_label: str,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    *,
    log_y: bool = False,
    guides: Mapping[str, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    width: int = 480,
    height: int = 290,
) -> str:
    """Curves over one x axis, with a legend if there are several.

    Args:
        series: Points ``(x, y)`` by name, in the order in which they are joined. A number that is not finite (with
            ``log_y`` also one that is not positive) is a gap. Long series are thinned, so that peaks stay.
        title: What is seen, above the chart.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        bands: Stretches ``(x, low, high)`` that are tinted, by name; that of a series has its colour.
        log_y: Whether y has a logarithmic axis.
        guides: Values of y that a horizontal line marks, by what they are.
        marks: Values of x that a vertical line marks, and what begins there; an empty text has a line alone.
        width: Pixels.
        height: Pixels, without the legend.

    Returns:
        An ``<svg>`` element.

    Example:
        >>> chart = line_chart({"SPIN": [(0, 0.693), (10, 0.41)]}, "Loss", "updates", "nats")
        >>> chart.startswith("<svg "), "SPIN: 2 points" in chart
        (True, True)
    """
    bands, guides = bands or {}, guides or {}
    names = list(dict.fromkeys([*series, *bands]))
    kept = {name: thin(points, log_y=log_y) for name, points in series.items()}
    tinted = {name: _thin_band(points, log_y) for name, points in bands.items()}
    given: list[Sequence[tuple[float, ...]]] = [*kept.values(), *tinted.values()]
    shown = [point for points in given for point in points if _is_drawn(point, log_y)]
    xs, ys = [x for x, *_ in shown], [y for _, *values in shown for y in values]
    ys += [y for y in guides.values() if _is_shown(y) and (y > 0 or not log_y)] if ys else []
    legend = _Legend(names if len(names) > 1 else [], width)
    top = 32 + legend.height + 16 * any(name for _, name in marks)  # above the plot, where no curve is
    foot = top + height - 32
    parts: list[str] = []
    if xs:
        y_ticks = log_ticks(min(ys), max(ys)) if log_y else round_ticks(min(ys), max(ys))
        labels = tick_labels(y_ticks)
        left = 34 + max(len(label) for label in labels) * _CHARACTER
        x_ticks = round_ticks(min(xs), max(xs), most=6, whole=all(float(x).is_integer() for x in xs))
        to_x = _Scale(min(x_ticks[0], min(xs)), max(x_ticks[-1], max(xs)), left, width - 18)
        to_y = _Scale(y_ticks[0], y_ticks[-1], foot - 46, top + 8, is_log=log_y)
        parts += _axes(to_x, to_y, x_ticks, list(zip(y_ticks, labels, strict=True)))
        parts += _draw_marks(marks, to_x, to_y)
        for name, band in tinted.items():
            parts += _draw_band(band, to_x, to_y, names.index(name))
        for name, value in guides.items():
            if _is_shown(value) and (value > 0 or not log_y):
                y = _place(to_y(value))
                text = _text(to_x.high - 2, to_y(value) - 4, name, anchor="end")
                parts.append(f'<path class="guide" d="M{_place(to_x.low)} {y}H{_place(to_x.high)}"/>{text}')
        for name, points in kept.items():
            parts += _draw_line(points, to_x, to_y, names.index(name))
        parts.append(_text((to_x.low + to_x.high) / 2, foot - 8, x_label, anchor="middle"))
        middle = (to_y.low + to_y.high) / 2
        parts.append(_text(15, middle, y_label, anchor="middle", turned=True))
    else:
        parts.append(_text(width / 2, (top + foot) / 2, "no numbers", anchor="middle"))
    described = [_describe(name, series[name], log_y) for name in series] or ["no series"]
    described += [f"{name}: {value:.6g}" for name, value in guides.items()]
    return _svg(title, f"{y_label} over {x_label}. " + "; ".join(described), [*legend.draw(), *parts], width, foot)


def interval_chart(
    rows: Sequence[tuple[str, float, float, float]],
    title: str,
    x_label: str,
    zero_line: float | None = 0.0,
    *,
    width: int = 560,
) -> str:
    """Means with their intervals, one under the other: a filled dot where the interval leaves ``zero_line`` out.

    Args:
        rows: Name, mean, and the low and high end of its interval. An end that is not finite is not drawn.
        title: What is seen, above the chart.
        x_label: What the numbers are, with their unit.
        zero_line: The value that means no difference, as a vertical line. None: there is none, and all dots are filled.
        width: Pixels.

    Returns:
        An ``<svg>`` element.

    Example:
        >>> chart = interval_chart([("SPIN - SFT", -0.02, -0.05, 0.01)], "Held-out NLL", "nats a token")
        >>> "includes 0" in chart
        True
    """
    row_height, top = 30, 40
    label_width = min(0.42 * width, 24 + max((len(_clean(name)) for name, *_ in rows), default=0) * _CHARACTER)
    foot = top + row_height * max(1, len(rows)) + 52
    values = [value for _, *numbers in rows for value in numbers if _is_shown(value, numbers[0])]
    parts, described = [], []
    if any(_is_shown(mean) for _, mean, _, _ in rows):
        ticks = round_ticks(*_ends([*values, *([] if zero_line is None else [zero_line])]), most=6)
        shown = tick_labels(ticks)
        to_x = _Scale(ticks[0], ticks[-1], label_width, width - 74)
        bottom = foot - 46
        for tick, label in zip(ticks, shown, strict=True):
            x = _place(to_x(tick))
            parts.append(f'<path class="grid" d="M{x} {top - 8}V{_place(bottom)}"/>')
            parts.append(_text(to_x(tick), bottom + 18, label, anchor="middle"))
        parts.append(f'<path class="axis" d="M{_place(to_x.low)} {_place(bottom)}H{_place(to_x.high)}"/>')
        if zero_line is not None:
            parts.append(f'<path class="guide" d="M{_place(to_x(zero_line))} {top - 8}V{_place(bottom)}"/>')
        for number, (name, mean, low, high) in enumerate(rows):
            y = top + row_height * (number + 0.5)
            parts.append(_text(label_width - 12, y + 4, name, anchor="end", room=label_width - 16))
            if not _is_shown(mean):
                parts.append(_text(width - 66, y + 4, "none"))
                described.append(f"{name}: no number")
                continue
            is_apart = zero_line is None or (_is_shown(low, high) and not low <= zero_line <= high)
            fill = "var(--chart-1)" if is_apart else "var(--chart-paper)"
            ends = [end if _is_shown(end) else mean for end in (low, high)]
            d = f"M{_place(to_x(ends[0]))} {_place(y)}H{_place(to_x(ends[1]))}"
            caps = "".join(
                f"M{_place(to_x(end))} {_place(y - 5)}V{_place(y + 5)}" for end in (low, high) if _is_shown(end)
            )
            parts.append(f'<path d="{d}{caps}" fill="none" stroke="var(--chart-1)" stroke-width="2"/>')
            parts.append(
                f'<circle cx="{_place(to_x(mean))}" cy="{_place(y)}" r="5" fill="{fill}" stroke="var(--chart-1)" '
                'stroke-width="2"/>'
            )
            parts.append(_text(width - 66, y + 4, f"{mean:.3g}"))
            verdict = "" if zero_line is None else f", {'leaves out' if is_apart else 'includes'} {zero_line:g}"
            described.append(f"{name}: {mean:.6g} ({low:.6g} to {high:.6g}{verdict})")
        parts.append(_text((to_x.low + to_x.high) / 2, foot - 8, x_label, anchor="middle"))
    else:
        parts.append(_text(width / 2, foot / 2, "no numbers", anchor="middle"))
    return _svg(title, f"{x_label}. " + ("; ".join(described) or "no rows"), parts, width, foot)


def round_ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round values in equal steps of 1, 2 or 5 times a power of ten, from at most ``low`` to at least ``high``.

    Args:
        low: Least value.
        high: Largest value.
        most: How many steps there are, give or take one.
        whole: Whether the values are counts, between which there is nothing.

    Example:
        >>> round_ticks(0.03, 0.69), round_ticks(7.0, 7.0), round_ticks(0, 2, whole=True)
        ([0.0, 0.2, 0.4, 0.6, 0.8], [6.0, 6.5, 7.0, 7.5, 8.0], [0.0, 1.0, 2.0])
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # all but one value: no step between is round
        room = abs(low) / 10
        low, high = (low, low + 1) if whole or not low else (low - room, high + room)
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next((factor * size for factor in (1, 2, 5) if factor * size * most >= high - low), 10 * size)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(number * step, digits) + 0.0 for number in range(first, last + 1)]  # + 0.0: no -0


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from at most ``low`` to at least ``high``, both positive; over few of them, 2 and 5 times these.

    Example:
        >>> log_ticks(0.3, 4.0), log_ticks(1e-6, 1.0)
        ([0.2, 0.5, 1.0, 2.0, 5.0], [1e-06, 0.0001, 0.01, 1.0])
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first <= 3:
        values = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
        values = [float(f"{value:.0e}") for value in values]
        start = max((place for place, value in enumerate(values) if value <= low), default=0)
        end = next((place for place, value in enumerate(values) if value >= high), len(values) - 1)
        return values[start : max(end, start + 1) + 1]
    step = math.ceil((last - first) / 5)
    return [float(f"1e{power}") for power in range(first, last + step, step)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Short texts of round values, as many decimals as tell them apart.

    Example:
        >>> tick_labels([0.0, 0.05, 0.1]), tick_labels([0.0, 20000.0]), tick_labels([1e-6, 2e-6])
        (['0.00', '0.05', '0.10'], ['0', '20,000'], ['1e-6', '2e-6'])
    """
    largest = max(abs(tick) for tick in ticks)
    gap = min((abs(b - a) for a, b in pairwise(ticks)), default=largest) or 1.0
    smallest = min((abs(tick) for tick in ticks if tick), default=1.0)
    if largest >= 1e6 or (largest < 1e-3 and smallest < 1e-3):
        return [_short(f"{tick:.3g}") for tick in ticks]
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    if decimals > 3 and smallest < 1e-3:  # of a logarithmic axis
        return [_short(f"{tick:g}") for tick in ticks]
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def _short(number: str) -> str:
    return number.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def thin(
    points: Sequence[tuple[float, float]], most: int = MOST_POINTS, log_y: bool = False
) -> list[tuple[float, float]]:
    """At most about ``most`` of the points: the first, the last, and of each stretch the lowest, the highest, a gap.

    Example:
        >>> thin([(x, 0.0) for x in range(1000)] + [(1000, 9.0)] + [(x, 0.0) for x in range(1001, 2000)], 8)
        [(0, 0.0), (500, 0.0), (1000, 9.0), (1001, 0.0), (1500, 0.0), (1999, 0.0)]
    """
    if len(points) <= most:
        return list(points)
    stretches = max(1, most // 2)
    kept = {0, len(points) - 1}
    for number in range(stretches):
        places = range(number * len(points) // stretches, (number + 1) * len(points) // stretches)
        shown = [place for place in places if _is_drawn(points[place], log_y)]
        gaps = (place for place in places if not _is_drawn(points[place], log_y))
        kept |= {next(gaps)} if len(shown) < len(places) else set()
        if shown:
            kept |= {choose(shown, key=lambda place: points[place][1]) for choose in (min, max)}
    return [points[place] for place in sorted(kept)]


def _thin_band(points: Sequence[tuple[float, float, float]], log_y: bool) -> list[tuple[float, float, float]]:
    """A band, each stretch of it as wide as its widest part; a number that cannot be shown makes its point a gap."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    taken = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        lows, highs = [low for _, low, _ in stretch], [high for _, _, high in stretch]
        is_whole = all(_is_drawn(point, log_y) for point in stretch)
        taken.append((stretch[0][0], min(lows), max(highs)) if is_whole else (stretch[0][0], math.nan, math.nan))
    return taken


class _Scale:
    """Places on the paper, in pixels, of the numbers of an axis."""

    def __init__(self, first: float, last: float, low: float, high: float, is_log: bool = False) -> None:
        self.low, self.high, self.is_log = low, high, is_log
        self.first, self.last = (math.log10(first), math.log10(last)) if is_log else (first, last)

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.is_log else value
        return self.low + (value - self.first) / (self.last - self.first) * (self.high - self.low)


class _Legend:
    """Names of series in rows above the curves."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        self.places: list[tuple[str, float, float]] = []
        x, y = 14.0, 44.0
        for name in names:
            taken = 44 + min(len(_clean(name)), 44) * _CHARACTER
            if x > 14 and x + taken > width:
                x, y = 14.0, y + 19
            self.places.append((name, x, y))
            x += taken
        self.height = int(y - 44 + 22) if names else 0

    def draw(self) -> Iterator[str]:
        for number, (name, x, y) in enumerate(self.places):
            yield f'<path {_stroke(number)} d="M{_place(x)} {_place(y - 4)}h24"/>'
            yield _text(x + 30, y, name, room=44 * _CHARACTER)


def _axes(to_x: _Scale, to_y: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[tuple[float, str]]) -> Iterator[str]:
    for tick, label in y_ticks:
        y = _place(to_y(tick))
        yield f'<path class="grid" d="M{_place(to_x.low)} {y}H{_place(to_x.high)}"/>'
        yield _text(to_x.low - 7, to_y(tick) + 4, label, anchor="end")
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = _place(to_x(tick))
        yield f'<path class="axis" d="M{x} {_place(to_y.low)}v4"/>'
        yield _text(to_x(tick), to_y.low + 18, label, anchor="middle")
    yield f'<path class="axis" d="M{_place(to_x.low)} {_place(to_y.low)}H{_place(to_x.high)}"/>'


def _draw_marks(marks: Sequence[tuple[float, str]], to_x: _Scale, to_y: _Scale) -> Iterator[str]:
    free = -math.inf  # up to where a text would cover the last one
    for value, name in marks:
        if not (_is_shown(value) and to_x.first <= value <= to_x.last):
            continue
        x = to_x(value)
        yield f'<path class="grid" stroke-dasharray="2 2" d="M{_place(x)} {_place(to_y.low)}V{_place(to_y.high)}"/>'
        if name and x >= free and x + len(name) * _CHARACTER < to_x.high:
            yield _text(x, to_y.high - 8, name)
            free = x + (len(name) + 1) * _CHARACTER


def _draw_line(points: Sequence[tuple[float, float]], to_x: _Scale, to_y: _Scale, number: int) -> Iterator[str]:
    runs = list(_runs(points, to_y.is_log))
    for run in runs:
        places = [f"{_place(to_x(x))} {_place(to_y(y))}" for x, y in run]
        if len(run) > 1:
            yield f'<path {_stroke(number)} d="M{" ".join(places)}"/>'
    few = sum(map(len, runs)) <= 24
    for run in runs:
        for x, y in run if few or len(run) == 1 else ():
            yield f'<circle cx="{_place(to_x(x))}" cy="{_place(to_y(y))}" r="2.8" fill="{_colour(number)}"/>'


def _draw_band(points: Sequence[tuple[float, float, float]], to_x: _Scale, to_y: _Scale, number: int) -> Iterator[str]:
    for run in _runs(points, to_y.is_log):
        around = [(x, high) for x, _, high in run] + [(x, low) for x, low, _ in reversed(run)]
        places = " ".join(f"{_place(to_x(x))} {_place(to_y(y))}" for x, y in around)
        yield f'<path d="M{places}Z" fill="{_colour(number)}" fill-opacity="0.2"/>'


def _runs(points: Sequence[tuple[float, ...]], is_log: bool) -> Iterator[list[tuple[float, ...]]]:
    """The points between gaps."""
    run: list[tuple[float, ...]] = []
    for point in points:
        if _is_drawn(point, is_log):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _is_shown(*values: float) -> bool:
    return all(math.isfinite(value) and abs(value) < _LARGEST for value in values)


def _is_drawn(point: Sequence[float], is_log: bool) -> bool:
    return _is_shown(*point) and (not is_log or point[1] > 0)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _describe(name: str, points: Sequence[tuple[float, float]], log_y: bool) -> str:
    drawn = [point for point in points if _is_drawn(point, log_y)]
    if not drawn:
        return f"{name}: no numbers"
    low, high = _ends([y for _, y in drawn])
    gaps = f", {len(points) - len(drawn)} not shown" if len(drawn) < len(points) else ""
    return f"{name}: {len(drawn)} points{gaps}, from {drawn[0][1]:.4g} to {drawn[-1][1]:.4g}, {low:.4g} to {high:.4g}"


def _colour(number: int) -> str:
    return f"var(--chart-{number % len(_LIGHT) + 1})"


def _stroke(number: int) -> str:
    dashes = _DASHES[number % len(_DASHES)]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'fill="none" stroke="{_colour(number)}" stroke-width="2" stroke-linejoin="round"{dashed}'


def _place(pixels: float) -> str:
    return f"{pixels + 0.0:.1f}".removesuffix(".0")


def _clean(text: str) -> str:
    return " ".join(printable(str(text)).split())


def _text(x: float, y: float, text: str, anchor: str = "start", turned: bool = False, room: float = math.inf) -> str:
    """A line of text; one that is longer than its room is cut, and whole when it is pointed at."""
    whole = _clean(text)
    most = len(whole) if math.isinf(room) else max(1, int(room / _CHARACTER))
    cut = whole if len(whole) <= most else f"{whole[: most - 1]}…"
    hint = "" if cut == whole else f"<title>{html.escape(whole)}</title>"
    turn = f' transform="rotate(-90 {_place(x)} {_place(y)})"' if turned else ""
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{_place(x)}" y="{_place(y)}"{where}{turn}>{html.escape(cut)}{hint}</text>'


def _svg(title: str, described: str, parts: Sequence[str], width: int, height: float) -> str:
    title, described = _clean(title), _clean(described)
    shown = textwrap.shorten(title, int((width - 28) / (_CHARACTER * 1.1)), placeholder="…") or title[:60]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="sl-chart" role="img" width="{width}" '
        f'height="{_place(height)}" viewBox="0 0 {width} {_place(height)}" font-size="{_FONT}">'
        f"<title>{html.escape(title)}</title><desc>{html.escape(described)}</desc><style>{_style()}</style>"
        f'<rect class="paper" width="{width}" height="{_place(height)}" rx="6"/>'
        f'<text class="title" x="14" y="22">{html.escape(shown)}</text>' + "".join(parts) + "</svg>"
    )
