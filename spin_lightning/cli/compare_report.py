"""What a comparison found, for people: tables, one sentence, and a page with pictures. Numbers in, text out."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from spin_lightning.cli.chain import aligned
from spin_lightning.cli.verdict import Judgement, Values, best_of_arms, judge, sentence, t_interval
from spin_lightning.progress import format_time
from spin_lightning.reports.charts import interval_chart
from spin_lightning.reports.texts import POLICY
from spin_lightning.runs.files import replacing

Result = Mapping[str, Any]
_EXACT = "exact_match"
_PAGE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "pre{overflow-x:auto;font-size:14px}.verdict{font-weight:600}"
)


def describe(result: dict[str, Any]) -> list[str]:
    """The tables and the sentence, as lines of at most 80 columns but for the sentence; adds ``verdict`` to the result.

    Args:
        result: What ``comparison.json`` holds, without its verdict.
    """
    judgements = judge_all(result)
    text = sentence(judgements, _sft_arms(result), result["failed"])
    result["verdict"] = {"sentence": text, "judgements": [_as_json(judgement) for judgement in judgements]}
    return ["", *tables(result), "", text]


def tables(result: Result) -> list[str]:
    """The tables, as lines."""
    seeds = max((len(arm["seeds"]) for arm in result["arms"].values()), default=0)
    over = "" if seeds < 2 else f"; means over {seeds} seeds, +- their standard deviation"
    lines = [
        f"{result['rows']['report']} held-out rows{over}",
        "",
        _table(
            result,
            {
                "held-out NLL": lambda found: found["nll"],
                "other NLL": lambda found: found.get("other_nll"),
                "KL": lambda found: found.get("kl_to_start"),
                "updates": lambda found: found.get("updates"),
                "passes": lambda found: found.get("token_passes"),
                "time": lambda found: found.get("seconds"),
            },
        ),
    ]
    lines += ["", *_legend(result)]
    for name in _rewards_of(result):
        columns = {
            ("T = " if place == 0 else "") + f"{temperature:g}": reward_at(name, temperature)
            for place, temperature in enumerate(result["temperatures"])
        }
        what = "exact match" if name == _EXACT else name
        lines += ["", f"{what}, at temperature", "", _table(result, columns)]
    return [line for part in lines for line in part.split("\n")]


def _legend(result: Result) -> list[str]:
    other = ", other: of other tasks" if "other_nll" in result["start"] else ""
    lines = textwrap.wrap(
        f"NLL in nats a response{other}. KL: to the start, in nats a token of the held-out responses, a lower bound. "
        "Passes: tokens, forward and sampling 1, training 3; held-out rows and measuring are not counted.",
        80,
    )
    for name, arm in result["arms"].items():
        first = arm["seeds"].get("0", {})
        if "search_updates" in first:
            lines += textwrap.wrap(
                f"{name}: learning rate {first['learning_rate']:g}, the best of those tried with the first seed "
                f"({first['search_updates']} updates in all).",
                80,
            )
    return lines


def reward_at(name: str, temperature: float) -> Callable[[Result], float | None]:
    """Reads the mean of a reward at a temperature out of what was measured of an arm with a seed."""
    return lambda found: found["rewards"][f"{temperature:g}"][name]["mean"]


_STYLES: dict[str, Callable[[float], str]] = {
    "held-out NLL": lambda value: f"{value:.3f}",
    "other NLL": lambda value: f"{value:.3f}",
    "KL": lambda value: f"{value:.4f}",
    "updates": lambda value: f"{value:.0f}",
    "passes": lambda value: _short(value),
    "time": lambda value: format_time(value),
}
_WITH_SPREAD = ("held-out NLL", "other NLL")


def _table(result: Result, columns: Mapping[str, Callable[[Result], float | None]]) -> str:
    rows = [["", *columns]]
    parts: dict[str, list[Result]] = {"start": [result["start"]] if "nll" in result["start"] else []}
    parts |= {name: list(arm["seeds"].values()) for name, arm in result["arms"].items()}
    for name, seeds in parts.items():
        cells = []
        for column, of in columns.items():
            values = [value for found in seeds if (value := of(found)) is not None]
            style = _STYLES.get(column, lambda value: f"{value:.3f}")
            cell = style(fmean(values)) if values else "-" if not seeds else ""
            spread = column in _WITH_SPREAD or column not in _STYLES
            cells.append(f"{cell} +- {style(stdev(values))}" if len(values) > 1 and spread else cell)
        rows.append([name, *cells])
    return aligned(rows, ["<", *(">" if column in ("updates", "passes", "time") else "<" for column in columns)])


def _short(value: float) -> str:
    """A count in three digits.

    Example:
        >>> _short(950), _short(12_345), _short(2_500_000)
        ('950', '12k', '2.5M')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 10 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


# --- the verdict ------------------------------------------------------------------------------------------------------


def judge_all(result: Result) -> list[Judgement]:
    """By held-out NLL, by exact match and by the reward, the best arm that is not SFT against the best one that is.

    Each is at its own best temperature, as that is free. Where there is no SFT, the start is what arms are compared
    with.
    """
    sft = _sft_arms(result)
    judgements = []
    for metric, values_of, lower in _metrics(result):
        arms = {name: values_of(name) for name in result["arms"]}
        others = [arms[name] for name in arms if name not in sft]
        references = [arms[name] for name in sft] or [values_of("start")]
        candidate, reference = best_of_arms(others, lower), best_of_arms(references, lower)
        if candidate is None and len(references) > 1 and not others:  # SFT alone: its best against the next
            candidate = reference
            reference = best_of_arms([arm for arm in references if arm is not candidate], lower)
        if candidate is not None and reference is not None and (found := judge(metric, candidate, reference, lower)):
            judgements.append(found)
    return judgements


def _metrics(result: Result) -> list[tuple[str, Callable[[str], Values], bool]]:
    """Each metric with what it says of an arm, and whether less is better."""
    found: list[tuple[str, Callable[[str], Values], bool]] = [
        ("held-out NLL", lambda name: _values(result, name, name, lambda f: (f["nll"], f["nll_by_row"])), True)
    ]
    at_best = "" if len(result["temperatures"]) == 1 else " at each arm's best temperature"
    for reward in _rewards_of(result):
        what = "exact match" if reward == _EXACT else reward
        found.append((f"{what}{at_best}", _at_best_temperature(result, reward), False))
    return found


def _at_best_temperature(result: Result, reward: str) -> Callable[[str], Values]:
    several = len(result["temperatures"]) > 1

    def values_at(name: str, temperature: float) -> Values:
        shown = f"{name} at T={temperature:g}" if several else name
        return _values(result, name, shown, lambda found: _mean_and_rows(found, reward, temperature))

    def values_of(name: str) -> Values:
        each = [values_at(name, temperature) for temperature in result["temperatures"]]
        return best_of_arms(each, lower_is_better=False) or each[0]

    return values_of


def _mean_and_rows(found: Result, reward: str, temperature: float) -> tuple[float, Sequence[float | None]]:
    said = found["rewards"][f"{temperature:g}"][reward]
    return math.nan if said["mean"] is None else said["mean"], said["by_row"]


def _values(
    result: Result, name: str, shown: str, of: Callable[[Result], tuple[float, Sequence[float | None]]]
) -> Values:
    """What an arm has by seed; the start has the same with every seed."""
    if name == "start":
        seeds = {seed for arm in result["arms"].values() for seed in arm["seeds"]}
        parts: Mapping[str, Any] = dict.fromkeys(seeds, result["start"]) if "nll" in result["start"] else {}
    else:
        parts = result["arms"][name]["seeds"]
    both = {int(seed): of(found) for seed, found in parts.items()}
    return Values(
        shown, {seed: mean for seed, (mean, _) in both.items()}, {seed: rows for seed, (_, rows) in both.items()}
    )


def _sft_arms(result: Result) -> list[str]:
    return [name for name, arm in result["arms"].items() if arm["stage"] == "sft"]


def _rewards_of(result: Result) -> list[str]:
    return [_EXACT, *([result["reward"]] if result["reward"] not in (None, "TextMatch") else [])]


def _as_json(judgement: Judgement) -> dict[str, Any]:
    kept = dict(vars(judgement))
    kept["difference"] = [end if math.isfinite(end) else None for end in judgement.difference]
    return {**kept, "values": list(judgement.values)}


# --- the page ---------------------------------------------------------------------------------------------------------


def write_report(folder: Path, result: Result, lines: Sequence[str]) -> None:
    """Write ``comparison.html``, a page without anything outside of it, and its first picture as ``comparison.svg``."""
    charts = [_chart(result, metric, values_of) for metric, values_of, _ in _metrics(result)]
    text = html.escape("\n".join(lines[:-1]).strip())
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><title>Comparison</title><style>{_PAGE}</style>'
        f"<h1>Comparison</h1><p class=verdict>{html.escape(lines[-1])}</p>{''.join(charts)}<pre>{text}</pre></html>\n"
    )
    for name, content in (("comparison.html", page), ("comparison.svg", charts[0])):
        with replacing(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


def _chart(result: Result, metric: str, values_of: Callable[[str], Values]) -> str:
    """Each arm's mean with its interval over the seeds."""
    rows = []
    for name in ("start", *result["arms"]):
        values = values_of(name)
        known = [value for value in values.by_seed.values() if math.isfinite(value)]
        if known:
            mean, low, high = t_interval(known) if name != "start" else (known[0], math.nan, math.nan)
            rows.append((values.name, mean, low, high))
    seeds = max((len(arm["seeds"]) for arm in result["arms"].values()), default=0)
    return interval_chart(rows, metric, "mean and 95 % interval over seeds" if seeds > 1 else "one seed", None)
