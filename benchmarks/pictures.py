"""The pictures of ``performance.json``: bars where things are compared, lines where something grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import Record, Results, by_point, of, peak, rates, values

OURS, THEIRS = "tab:blue", "0.6"


def draw(results: Results, folder: Path) -> None:
    """Draw what was measured; a picture whose section is missing is left as it is."""
    if "step" in results:
        sections = [results[name] for name in ("step", "authors") if name in results]
        draw_step(sections, folder / "performance_step.png")
    if "generation" in results:
        draw_generation(results["generation"], folder / "performance_generation.png")
    if "iteration" in results:
        draw_iteration(results["iteration"], folder / "performance_iteration.png")
    grown = [panel for panel in GROWTH if panel[0] in results]
    if grown:
        draw_growth(results, grown, folder / "performance_growth.png")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _bars(axes: Any, records: Sequence[Record], numbers: Callable[[Record], list[float]], unit: str, form: str) -> None:
    """Horizontal bars of medians, labelled with their numbers, whiskers from least to most."""
    names = [record["name"] for record in records]
    centres = [median(numbers(record)) for record in records]
    low = [centre - min(numbers(record)) for centre, record in zip(centres, records, strict=True)]
    high = [max(numbers(record)) - centre for centre, record in zip(centres, records, strict=True)]
    colours = [OURS if _is_ours(name) else THEIRS for name in names]
    axes.barh(range(len(names)), centres, color=colours, xerr=[low, high], error_kw={"capsize": 3, "linewidth": 1})
    for place, (centre, more) in enumerate(zip(centres, high, strict=True)):
        axes.annotate(format(centre, form), (centre + more, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(centre + more for centre, more in zip(centres, high, strict=True)))
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)


def _is_ours(name: str) -> bool:
    return "spin_lightning" in name or name.startswith(("ContinuousGenerator", "TransformersGenerator"))


def draw_step(sections: Sequence[Results], path: Path) -> None:
    """Seconds and memory of a training step, a row of panels for each section."""
    figure = _figure(12, 2.6 * len(sections))
    for (left, right), section in zip(figure.subplots(len(sections), 2, squeeze=False), sections, strict=True):
        records = [
            record
            for record in section["contenders"]
            if record["samples"] and "flops_per_second" not in record["samples"][0]
        ]
        _bars(left, records, values, "CPU seconds a step of 8 pairs", ".1f")
        _bars(right, records, lambda record: [peak(record)], "peak memory, GiB", ".1f")
        right.set_yticklabels([])
    _save(figure, path)


def draw_generation(section: Results, path: Path) -> None:
    records = of(section, "")
    figure = _figure(9, 0.6 + 0.5 * len(records))
    _bars(figure.subplots(), records, rates, "sampled tokens a CPU second", ".0f")
    _save(figure, path)


def draw_iteration(section: Results, path: Path) -> None:
    """Stacked bars: where an iteration's time goes."""
    records = of(section, "")
    figure = _figure(9, 1 + 0.7 * len(records))
    axes = figure.subplots()
    ends = [0.0] * len(records)
    for phase, colour in (("generate", "tab:blue"), ("score", "tab:orange"), ("train", "tab:green")):
        widths = [record["samples"][0]["phases"][phase] for record in records]
        axes.barh(range(len(records)), widths, left=ends, color=colour)
        for place, (start, width) in enumerate(zip(ends, widths, strict=True)):
            if width > 0.1 * max(record["samples"][0]["seconds"] for record in records):
                axes.annotate(
                    f"{phase}\n{width:.0f} s", (start + width / 2, place), ha="center", va="center", color="white"
                )
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.set_yticks(range(len(records)), [record["name"] for record in records])
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds of one whole iteration")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


#: Section, label of its points, how a point is written.
GROWTH: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("prompt_length", "tokens in a prompt (2 pairs a step, answers of 128)", "{:,}".format),
    ("answers_per_prompt", "answers per prompt (16 pairs a step, prompts of 256, answers of 64)", "{:,}".format),
    ("vocabulary", "vocabulary (small random model, 2 pairs a step)", lambda size: f"{size // 1000}k"),
    ("model_size", "weights (random model, 2 pairs a step)", lambda weights: f"{weights / 1e6:.0f} M"),
)


def draw_growth(results: Results, panels: Sequence[Any], path: Path) -> None:
    """Seconds a step over what grows, one panel each, both axes logarithmic."""
    columns = 2 if len(panels) > 1 else 1
    figure = _figure(6 * columns, 4 * -(-len(panels) // columns))
    flat = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for axes in flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, label, write) in zip(flat, panels, strict=False):
        section = results[name]
        highest = 0.0
        for word, colour, shown in (
            ("TRL", "0.4", "TRL, its best settings"),
            ("spin_lightning", OURS, "spin_lightning"),
        ):
            found = {point: samples for point, samples in by_point(section, word).items() if samples}
            if not found:
                continue
            points = list(found)
            seconds = [median(sample["seconds"] for sample in found[point]) for point in points]
            highest = max(highest, *seconds)
            axes.plot(points, seconds, "o-", color=colour, linewidth=2)
            rises = seconds[-1] > seconds[0]
            place, offset = ((points[-1], seconds[-1]), (-4, 8)) if rises else ((points[0], seconds[0]), (12, 0))
            axes.annotate(
                shown, place, offset, textcoords="offset points", ha="right" if rises else "left", color=colour
            )
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
        axes.set_ylim(0.9 * ticks[0], max(ticks[-1], highest * 1.6))
        axes.set_xlabel(label)
        axes.set_ylabel("CPU seconds a step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
