"""The pictures of ``performance.json``: bars where things are compared, lines where something grows.

Each machine has panels of its own, with scales of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import Record, by_point, is_ours, peak, rates, values, workers
from benchmarks.results import Result, Results, shown

OURS, THEIRS = "tab:blue", "0.6"
#: Colours of lines, of ours and of peers in order.
LINES = {True: ("tab:blue", "tab:cyan"), False: ("0.2", "0.6")}

#: What a panel shows: its title and its section.
Titled = tuple[str, Result]


def draw(results: Results, folder: Path) -> None:
    """Draw what was measured; a picture whose section is missing is left as it is."""
    if steps := _titled(results, {"step": "", "authors": ", the authors' way"}):
        draw_step(steps, folder / "performance_step.png")
    if generated := _titled(results, {"generation": "", "several_answers": ", four responses to a prompt"}):
        draw_generation(generated, folder / "performance_generation.png")
    if iterations := _titled(results, {"iteration": ""}):
        draw_iteration(iterations, folder / "performance_iteration.png")
    if grown := [panel for panel in GROWTH if shown(results, panel[0])]:
        draw_growth(results, grown, folder / "performance_growth.png")


def _titled(results: Results, suffixes: dict[str, str]) -> list[Titled]:
    """Every machine's result of these sections, under a title that says which it is."""
    return [
        (f"{machine}{suffix}{', brief' if section.get('is_brief') else ''}", section)
        for name, suffix in suffixes.items()
        for machine, section in shown(results, name).items()
    ]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _rows(sections: Sequence[Titled], columns: int = 1) -> tuple[Any, Any]:
    """A figure with a row of panels for each section, as high as it has bars."""
    bars = [len(workers(section)) for _, section in sections]
    figure = _figure(12, sum(1.1 + 0.42 * count for count in bars))
    ratios = [1.1 + 0.42 * count for count in bars]
    return figure, figure.subplots(len(sections), columns, squeeze=False, height_ratios=ratios)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _bars(axes: Any, records: Sequence[Record], numbers: Callable[[Record], list[float]], unit: str, form: str) -> None:
    """Horizontal bars of medians, labelled with their numbers, whiskers from least to most."""
    centres = [median(numbers(record)) for record in records]
    low = [centre - min(numbers(record)) for centre, record in zip(centres, records, strict=True)]
    high = [max(numbers(record)) - centre for centre, record in zip(centres, records, strict=True)]
    colours = [OURS if is_ours(record) else THEIRS for record in records]
    axes.barh(range(len(records)), centres, color=colours, xerr=[low, high], error_kw={"capsize": 3, "linewidth": 1})
    for place, (centre, more) in enumerate(zip(centres, high, strict=True)):
        axes.annotate(format(centre, form), (centre + more, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(records)), [record["name"] for record in records])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(centre + more for centre, more in zip(centres, high, strict=True)))
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)


def draw_step(sections: Sequence[Titled], path: Path) -> None:
    """Seconds and memory of a training step, a row of panels for each section and machine."""
    figure, panels = _rows(sections, columns=2)
    for (left, right), (title, section) in zip(panels, sections, strict=True):
        records = workers(section)
        _bars(left, records, values, f"CPU seconds a step of {section.get('batch_size', 8)} pairs", ".1f")
        _bars(right, records, lambda record: [peak(record)], "peak memory, GiB", ".1f")
        left.set_title(title, loc="left")
        right.set_yticklabels([])
    _save(figure, path)


def draw_generation(sections: Sequence[Titled], path: Path) -> None:
    """Speed of sampling, a panel for each section and machine."""
    figure, panels = _rows(sections)
    for axes, (title, section) in zip(panels.flatten(), sections, strict=True):
        _bars(axes, workers(section), rates, "sampled tokens a CPU second", ".0f")
        axes.set_title(title, loc="left")
    _save(figure, path)


def draw_iteration(sections: Sequence[Titled], path: Path) -> None:
    """Stacked bars: where an iteration's time goes, a panel for each machine."""
    figure, panels = _rows(sections)
    for axes, (title, section) in zip(panels.flatten(), sections, strict=True):
        records = workers(section)
        ends = [0.0] * len(records)
        for phase, colour in (("generate", "tab:blue"), ("score", "tab:orange"), ("train", "tab:green")):
            widths = [record["samples"][0]["phases"][phase] for record in records]
            axes.barh(range(len(records)), widths, left=ends, color=colour, label=phase)
            for place, (start, width) in enumerate(zip(ends, widths, strict=True)):
                if width > 0.05 * max(record["samples"][0]["seconds"] for record in records):
                    middle = (start + width / 2, place)
                    axes.annotate(f"{width:.0f} s", middle, ha="center", va="center", color="white")
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        axes.set_yticks(range(len(records)), [record["name"] for record in records])
        axes.invert_yaxis()
        axes.set_xlabel("CPU seconds of one whole iteration, compiling included")
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    _save(figure, path)


#: Section, label of its points, how a point is written.
GROWTH: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("prompt_length", "tokens in a prompt (2 pairs a step, answers of 128)", "{:,}".format),
    ("answers_per_prompt", "answers per prompt (16 pairs a step, prompts of 256, answers of 64)", "{:,}".format),
    ("vocabulary", "vocabulary (small random model, 2 pairs a step)", lambda size: f"{size // 1000}k"),
    ("model_size", "weights (random model, 2 pairs a step)", lambda weights: f"{weights / 1e6:.0f} M"),
)


def draw_growth(results: Results, panels: Sequence[Any], path: Path) -> None:
    """Seconds a step over what grows: a row for what grows, a column for a machine. One machine alone has two."""
    found = [
        [(results_of.get(machine), label, write, machine) for machine in results]
        for name, label, write in panels
        for results_of in [shown(results, name)]
    ]
    if len(results) == 1:
        flat = [row[0] for row in found]
        found = [flat[start : start + 2] for start in range(0, len(flat), 2)]
    columns = max(map(len, found))
    figure = _figure(6.5 * columns, 4 * len(found))
    for axes_row, row in zip(figure.subplots(len(found), columns, squeeze=False), found, strict=True):
        for axes in axes_row:
            axes.set_axis_off()
        for axes, (section, label, write, machine) in zip(axes_row, row, strict=False):
            if section:
                axes.set_axis_on()
                _lines(axes, section, label, write, machine)
    _save(figure, path)


def _lines(axes: Any, section: Result, label: str, write: Callable[[Any], str], title: str) -> None:
    """A line for each contender, both axes logarithmic."""
    highest, lowest = 0.0, float("inf")
    colours = {ours: iter(shades) for ours, shades in LINES.items()}
    for name, column in by_point(section).items():
        points = [point for point, samples in column.items() if samples]
        seconds = [median(sample["seconds"] for sample in column[point]) for point in points]
        highest, lowest = max(highest, *seconds), min(lowest, *seconds)
        axes.plot(points, seconds, "o-", color=next(colours[is_ours({"name": name})]), linewidth=2, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(section["points"], [write(point) for point in section["points"]])
    axes.minorticks_off()
    ticks = [
        tick
        for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
        if axes.get_ylim()[0] / 1.6 <= tick <= highest * 2
    ]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(0.9 * min(ticks[0], lowest), max(ticks[-1], highest * 1.6))
    axes.set_xlabel(label)
    axes.set_ylabel("CPU seconds a step")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
