"""From the finished parts to ``docs/when_self_play_helps.json``, and from that to the tables and pictures of the page.

No sentence and no table says more than the file; a difference counts where its 95 % interval over paired seeds (t with
one degree of freedom less than seeds) leaves zero out. What is not finished is named.
"""

from __future__ import annotations

import json
import math
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.arms import ARMS
from benchmarks.study.cells import CELLS, CRITERIA, GAIN_SHARE, Points, Record, Scale, forgotten_at, rounded

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = DOCS / "when_self_play_helps.json"
PAGE = DOCS / "when-self-play-helps.md"
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.study"

#: Two-sided 95 % quantiles of Student's t, by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
#: Where what was forgotten is compared: at a share of what tuned SFT gains with the same seed, in KL or in validity.
SHARES = {"early": (GAIN_SHARE, "kl"), "late": (0.9, "kl"), "valid": (GAIN_SHARE, "valid")}
#: Validity that SFT has to gain for a comparison by it.
LEAST_GAIN = 0.05


@dataclass(frozen=True)
class Comparison:
    """A number that arms are compared by.

    Attributes:
        title: What tables call it.
        criterion: What its settings were chosen by.
        name: Of the number of a run.
    """

    title: str
    criterion: str
    name: str


_CALLED = {"kl": "KL", "valid": "validity"}
COMPARED = {
    "kl": Comparison("KL at temperature 1", "kl", "kl"),
    "tuned": Comparison("KL, temperature tuned", "kl, T tuned", "kl"),
    **{
        name: Comparison(f"forgotten at {share:.0%} of SFT's gain in {_CALLED[of]}", "retention", name)
        for name, (share, of) in SHARES.items()
    },
}
SETTINGS = {
    "learning_rate": "learning rate",
    "beta": "beta",
    "temperature": "temperature",
    "dropout": "dropout",
    "kl_to_start": "KL to start",
}
OTHERS = [name for name in ARMS if name != "SFT"]
COLOURS = dict(
    zip(ARMS, ("0.35", "tab:green", "tab:olive", "tab:blue", "tab:cyan", "tab:purple", "tab:red"), strict=True)
)


# --- numbers ----------------------------------------------------------------------------------------------------------


def keep(parts: Sequence[Record], file: Path = NUMBERS) -> None:
    """Write what is finished: every number that a table or a picture has, seed by seed, and the grids' scores."""
    cells: dict[str, Any] = {}
    bests: dict[str, list[Record]] = {}  # tuned SFT's runs, seed by seed
    for part in parts:
        cell = cells.setdefault(part["cell"], {})
        arm = cell.setdefault(part["arm"], {})
        own = {key: value for key, value in part.items() if key not in ("cell", "arm", "phase")}
        if part["phase"] == "tune":
            arm["tune"] = own
            continue
        results = {name: _columns(runs) for name, runs in own.pop("results").items()}
        if runs := own.pop("runs", None):
            points, chosen = own.pop("points"), arm["tune"]["chosen"]
            best = _with_settings(runs, chosen["kl"])
            own["curve"] = _curve(points, best)
            if part["arm"] == "SFT":
                bests[part["cell"]] = best
            kept = _with_settings(runs, chosen.get("retention", chosen["kl"]))
            pairs = list(zip(kept, bests[part["cell"]], strict=True))
            results["retention"] = {
                name: [_forgotten(points, run, sft, share, of) for run, sft in pairs]
                for name, (share, of) in SHARES.items()
            }
        arm["confirm"] = {"results": results, **own}
    before = read(file) if file.exists() else {"cells": {}, "cpu_minutes": 0.0}
    for name, arms in before["cells"].items():  # of another machine or checkout: what was not run here stays
        cells[name] = arms | cells.get(name, {})
    order = [cell.name for cell in CELLS if cell.name in cells] + sorted(set(cells) - {cell.name for cell in CELLS})
    seconds = sum(part.get("cpu_seconds", 0) for part in parts)
    report = {
        "command": COMMAND,
        "measured_at": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "cpu_minutes": max(round(seconds / 60, 1), before["cpu_minutes"]),
        "scale": asdict(Scale()),
        "grids": {name: [asdict(config) for config in arm.grid] for name, arm in ARMS.items()},
        "cells": {name: cells[name] for name in order},
    }
    file.write_text(_compact(report) + "\n", encoding="utf-8")


def _columns(runs: Sequence[Record]) -> Record:
    return {key: [run[key] for run in runs] for key in runs[0]} if runs else {}


def _forgotten(points: Points, run: Record, sft: Record, share: float, of: str) -> float | None:
    """What a run had forgotten at a share of SFT's gain up to its least KL; None where either does not get there."""
    best = sft["kl"].index(min(sft["kl"]))
    if of == "kl":
        found = forgotten_at(points, run["kl"], run["forgotten"], share * (sft["kl"][0] - sft["kl"][best]))
    else:
        gain = sft["valid"][best] - sft["valid"][0]
        if gain < LEAST_GAIN:
            return None
        found = forgotten_at(points, [-value for value in run["valid"]], run["forgotten"], share * gain)
    rounded_value: float | None = rounded(found)
    return rounded_value


def _with_settings(runs: Sequence[Record], config: Record) -> list[Record]:
    return [run for run in runs if all(run[key] == value for key, value in config.items())]


def _curve(points: Points, runs: Sequence[Record]) -> Record:
    """The mean over seeds of the last weights' course."""
    plain = [place for place, (_, is_average) in enumerate(points) if not is_average]

    def mean(name: str) -> list[float]:
        return [float(f"{statistics.fmean(run[name][place] for run in runs):.5g}") for place in plain]

    return {"updates": [points[place][0] for place in plain]} | {key: mean(key) for key in ("kl", "valid", "forgotten")}


def _compact(value: Any, indent: int = 0) -> str:
    """JSON with a line for whatever fits one."""
    line = json.dumps(value)
    if len(line) + indent <= 120 or not isinstance(value, dict | list) or not value:
        return line
    inner, outer = " " * (indent + 1), " " * indent
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {_compact(each, indent + 1)}" for key, each in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{outer}}}"
    return "[\n" + ",\n".join(f"{inner}{_compact(each, indent + 1)}" for each in value) + f"\n{outer}]"


def read(file: Path = NUMBERS) -> Record:
    found: Record = json.loads(file.read_text(encoding="utf-8"))
    return found


def column(cell: Record, arm: str, criterion: str, name: str) -> list[float | None]:
    """A number of every seed; empty where the arm is not finished, or the criterion could not choose."""
    results = cell.get(arm, {}).get("confirm", {}).get("results", {})
    found: list[float | None] = results.get(criterion, {}).get(name, [])
    return found


def difference(cell: Record, arm: str, by: Comparison) -> tuple[float, float, int, int] | None:
    """An arm less tuned SFT: mean, standard error, in how many seeds it is less, and how many pairs of seeds there are.

    None where fewer than three seeds have both.
    """
    own, sft = (column(cell, name, by.criterion, by.name) for name in (arm, "SFT"))
    both = zip(own, sft, strict=False)
    found = [one - other for one, other in both if one is not None and other is not None]
    if len(found) < 3:
        return None
    return (
        statistics.fmean(found),
        statistics.stdev(found) / math.sqrt(len(found)),
        sum(d < 0 for d in found),
        len(found),
    )


def verdict(found: tuple[float, float, int, int]) -> str:
    """``better`` or ``worse`` than tuned SFT where the 95 % interval leaves zero out."""
    mean, error, _, count = found
    if abs(mean) <= T_95[count - 1] * error:
        return "too close to call"
    return "better" if mean < 0 else "worse"


# --- tables -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counts_table(report: Record) -> str:
    """Of each arm: in how many cells it is better than tuned SFT, worse, and too close to call."""
    rows = []
    for arm in OTHERS:
        line = [arm]
        for by in COMPARED.values():
            found = [difference(cell, arm, by) for cell in report["cells"].values()]
            said = [verdict(each) for each in found if each]
            line.append(" / ".join(str(said.count(word)) for word in ("better", "worse", "too close to call")))
        rows.append(line)
    head = ["arm", *(f"{by.title}: better / worse / too close" for by in COMPARED.values())]
    return table(head, rows)


def differences_table(report: Record, by: Comparison) -> str:
    """A row a cell: tuned SFT's number, and what every arm has more or less."""
    rows = []
    for name, cell in report["cells"].items():
        own = [value for value in column(cell, "SFT", by.criterion, by.name) if value is not None]
        if not own:  # not finished, or SFT gains too little
            continue
        rows.append([name, f"{statistics.fmean(own):.3f}", *(_difference(cell, arm, by) for arm in OTHERS)])
    return table(["cell", "tuned SFT", *OTHERS], rows)


def _difference(cell: Record, arm: str, by: Comparison) -> str:
    found = difference(cell, arm, by)
    if found is None:
        return "not reached" if column(cell, arm, "kl", "kl") else "-"
    mean, error, less, count = found
    text = f"{mean:+.3f}"
    if verdict(found) != "too close to call":
        text = f"**{text}**"
    return f"{text} ({error:.3f}) {less}/{count}"


def cell_table(cell: Record) -> str:
    """Every arm's means over seeds on test prompts, with the settings of either criterion."""
    rows = []
    for arm in ("start", *ARMS):
        own, tuned = (
            {name: _mean(column(cell, arm, criterion, name)) for name in ("kl", "reverse_kl", "tv", "valid", "greedy")}
            | {name: _mean(column(cell, arm, criterion, name)) for name in ("forgotten", "temperature", "tokens")}
            for criterion in ("kl", "kl, T tuned")
        )
        if own["kl"] is None or tuned["kl"] is None:
            continue
        equal = [_retained(column(cell, arm, "retention", name)) for name in SHARES]
        rows.append(
            [
                arm,
                *(_number(own[name]) for name in ("kl", "reverse_kl", "tv", "valid", "greedy", "forgotten")),
                f"{(own['tokens'] or 0) / 1000:.0f}k",
                *(_number(tuned[name]) for name in ("kl", "reverse_kl", "tv", "valid", "forgotten")),
                _number(tuned["temperature"], ".2f"),
                *equal,
            ]
        )
    own_head = ["KL", "rKL", "TV", "valid", "greedy", "forgotten", "tokens"]
    tuned_head = [
        "KL*",
        "rKL*",
        "TV*",
        "valid*",
        "greedy*",
        "forgotten*",
        "T*",
        *(COMPARED[name].title for name in SHARES),
    ]
    return table(["arm", *own_head, *tuned_head], rows)


def _retained(values: Sequence[float | None]) -> str:
    kept = [value for value in values if value is not None]
    return _number(_mean(kept)) + (f" ({len(kept)} seeds)" if len(kept) < len(values) else "")


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def cell_tables(report: Record) -> str:
    return "\n\n".join(f"**{name}**\n\n{cell_table(cell)}" for name, cell in report["cells"].items())


def settings_table(report: Record) -> str:
    """What the tuning seeds chose of each grid."""
    rows = []
    for name, cell in report["cells"].items():
        for arm in ARMS:
            chosen = cell.get(arm, {}).get("tune", {}).get("chosen")
            if chosen:
                rows.append([name, arm, *(_settings(chosen.get(criterion)) for criterion in CRITERIA)])
    return table(["cell", "arm", "for KL at temperature 1", "for KL, temperature tuned", "for retention"], rows)


def _settings(config: Record | None) -> str:
    if config is None:
        return "-"
    said = [f"lr {config['learning_rate']:g}"]
    if config["beta"] != 1:
        said.append(f"{'beta' if config['beta'] >= 1 else 'price'} {config['beta']:g}")
    said += [f"T {config['temperature']:g}"] if config["temperature"] != 1 else []
    said += [f"dropout {config['dropout']:g}"] if config["dropout"] else []
    said += [f"KL to start {config['kl_to_start']:g}"] if config["kl_to_start"] else []
    return ", ".join(said)


def regrets_table(report: Record) -> str:
    """What a value of a setting costs: the best of the grid with it less the best of all, mean over cells."""
    rows = []
    for arm in ARMS:
        grids = [cell[arm]["tune"]["grid"] for cell in report["cells"].values() if "tune" in cell.get(arm, {})]
        for name in SETTINGS:
            values = sorted({config[name] for grid in grids for config in grid})
            if len(values) < 2:
                continue
            costs = []
            for value in values:
                found = [[_regret(grid, name, value, by) for grid in grids] for by in ("kl", "kl, T tuned")]
                costs.append(f"{value:g}: {' / '.join(f'{statistics.fmean(each):.3f}' for each in found)}")
            called = "price of KL" if arm == "reward" and name == "beta" else SETTINGS[name]
            rows.append([arm, called, "; ".join(costs)])
    return table(["arm", "setting", "value: nats at temperature 1 / with the temperature tuned"], rows)


def _regret(grid: Sequence[Record], name: str, value: float, by: str) -> float:
    scores = [config["scores"][by] for config in grid]
    return min(score for score, config in zip(scores, grid, strict=True) if config[name] == value) - min(scores)


def machine(report: Record) -> str:
    """With what it was measured, and what of the design is missing."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    missing = [
        f"`{cell.name}`" if cell.name not in report["cells"] else f"`{cell.name}` ({'; '.join(left)})"
        for cell in CELLS
        if (left := [arm for arm in ARMS if "confirm" not in report["cells"].get(cell.name, {}).get(arm, {})])
    ]
    said = f"`{report['command']}`, {report['measured_at']}, one CPU thread, "
    said += f"{report['cpu_minutes']:.0f} CPU minutes; {versions}."
    absent = f"Not run yet: {', '.join(missing)}." if missing else "The whole design was run."
    return f"{said} {absent}"


def sections(report: Record) -> dict[str, str]:
    """The page's generated parts, by the name of their place."""
    return {
        "counts": counts_table(report),
        **{f"differences {name}": differences_table(report, by) for name, by in COMPARED.items()},
        "cells": cell_tables(report),
        "settings": settings_table(report),
        "regrets": regrets_table(report),
        "machine": machine(report),
    }


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The page with its generated parts made anew, each by the name of its place.

    Raises:
        ValueError: It has no place for one of them.
    """
    for name, content in parts.items():
        place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"the page has no place for {name!r}: put '<!-- {name} -->' and '<!-- end -->' into it")
        page = place.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", page)  # type: ignore[misc]
    return page


def render(page: Path = PAGE, numbers: Path = NUMBERS) -> None:
    """Draw the pictures, and write the tables into the page if there is one."""
    report = read(numbers)
    draw_differences(report, numbers.with_suffix(".png"))
    draw_courses(report, numbers.with_name(f"{numbers.stem}_courses.png"))
    if page.exists():
        page.write_text(filled(page.read_text(encoding="utf-8"), sections(report)), encoding="utf-8")


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_differences(report: Record, path: Path) -> None:
    """Each arm less tuned SFT, with 95 % intervals over paired seeds: a panel a number, a row a cell."""
    from matplotlib.figure import Figure

    cells = list(report["cells"].items())
    figure = Figure(figsize=(17, 1.6 + 0.85 * len(cells)), layout="constrained")
    for axes, by in zip(figure.subplots(1, len(COMPARED), sharey=True), COMPARED.values(), strict=True):
        scale = []
        for row, (_, cell) in enumerate(cells):
            for place, arm in enumerate(OTHERS):
                found = difference(cell, arm, by)
                if found is None:
                    continue
                mean, error, _, count = found
                half = T_95[count - 1] * error
                scale.append(min(abs(mean) + half, 3 * abs(mean) + 0.02))
                is_sure = verdict(found) != "too close to call"
                axes.errorbar(
                    mean,
                    row + 0.12 * (place - 2.5),
                    xerr=half,
                    fmt="o",
                    markersize=5,
                    markerfacecolor=COLOURS[arm] if is_sure else "white",
                    color=COLOURS[arm],
                    capsize=2,
                    linewidth=1.2,
                )
        limit = 1.1 * max(scale, default=1.0)
        axes.set_xscale("symlog", linthresh=0.02)
        axes.set_xlim(-limit, limit)
        ticks = [tick for tick in (0.02, 0.1, 0.5, 2) if tick <= limit]
        axes.set_xticks([-tick for tick in reversed(ticks)] + [0, *ticks])
        axes.set_xticklabels([f"{tick:+g}" if tick else "0" for tick in axes.get_xticks()], rotation=45)
        axes.axvline(0, color="0.35", linewidth=1.2)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(f"{by.title}\narm less tuned SFT, nats", fontsize=9)
        axes.set_yticks(range(len(cells)), [name for name, _ in cells])
        axes.set_ylim(len(cells) - 0.5, -0.5)
    handles = [figure.axes[0].plot([], [], "o", color=COLOURS[arm], label=arm)[0] for arm in OTHERS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(OTHERS), fontsize=9)
    figure.savefig(path, dpi=90)


def draw_courses(report: Record, path: Path, most: int = 4) -> None:
    """Of the first cells: KL over updates, and what was forgotten over KL, mean over seeds."""
    from matplotlib.figure import Figure

    cells = list(report["cells"].items())[:most]
    figure = Figure(figsize=(3.6 * len(cells) + 0.5, 6.4), layout="constrained")
    for (above, below), (name, cell) in zip(figure.subplots(2, len(cells), squeeze=False).T, cells, strict=True):
        for arm in ARMS:
            curve = cell.get(arm, {}).get("confirm", {}).get("curve")
            if curve is None:
                continue
            style = {"color": COLOURS[arm], "linewidth": 2.2 if arm == "SFT" else 1.4, "label": arm}
            above.plot(curve["updates"], curve["kl"], "--" if arm == "SFT" else "-", **style)
            below.plot(curve["kl"], curve["forgotten"], "o--" if arm == "SFT" else "o-", markersize=3, **style)
        kls = [arm["confirm"]["curve"]["kl"] for arm in cell.values() if "curve" in arm.get("confirm", {})]
        least = min(map(min, kls), default=0.1)
        most_kl = max((each[0] for each in kls), default=1.0)
        above.set_ylim(least - 0.1 * (most_kl - least), most_kl + 0.3 * (most_kl - least))
        above.set_title(name, fontsize=10)
        above.set_xlabel("updates")
        below.set_xlim(least - 0.05 * (most_kl - least), most_kl + 0.05 * (most_kl - least))
        below.set_yscale("symlog", linthresh=0.01)
        below.set_ylim(0, 3)
        below.set_xlabel("KL(p_data || p_theta), nats")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("KL(p_data || p_theta), nats")
    figure.axes[len(cells) if len(figure.axes) > len(cells) else 1].set_ylabel("forgotten, nats")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ARMS), fontsize=9)
    figure.savefig(path, dpi=90)
