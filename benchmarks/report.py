"""Tables and pictures of ``performance.json``. Nothing is measured here, and no number is typed by hand.

The prose is ``docs/performance.md``; the tables in it stand between markers and are written anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

DOCS = Path(__file__).absolute().parent.parent / "docs"
Results = dict[str, Any]
Record = dict[str, Any]


def render(results: Results, path: Path) -> None:
    """Write tables into the page at ``path`` (the prose of ``docs`` where there is none yet) and pictures beside it."""
    from benchmarks import pictures

    text = (path if path.exists() else DOCS / "performance.md").read_text()
    for name, make in TABLES.items():
        if name in results:
            text = _between_markers(text, name, make(results[name]))
    if results:
        text = _between_markers(text, "machine", machine(results))
    path.write_text(text)
    pictures.draw(results, path.parent)
    print(f"report: {path}")


def _between_markers(text: str, name: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(
            f"the page has no place for {name!r}: put '<!-- {name} -->' and '<!-- end -->' on lines of their own"
        )
    return pattern.sub(lambda found: f"{found[1]}{content.strip()}\n{found[2]}", text)


# --- numbers ----------------------------------------------------------------------------------------------------------


def values(record: Record, key: str = "seconds") -> list[float]:
    return [sample[key] for sample in record["samples"]]


def rates(record: Record) -> list[float]:
    """Tokens a second of every round."""
    return [sample["tokens"] / sample["seconds"] for sample in record["samples"]]


def ratios(base: Record, record: Record) -> list[float]:
    """How many times faster than ``base``, round by round: both had the same work in each."""
    return [one / other for one, other in zip(values(base), values(record), strict=False)]


def peak(record: Record, rounds: int | None = None) -> float:
    """Peak memory in GiB over the first so many rounds; None: over all."""
    return max(values(record, "peak_mib")[:rounds]) / 1024


def of(section: Results, word: str) -> list[Record]:
    """The contenders with this word in their name that have samples, in order."""
    return [record for record in section["contenders"] if word in record["name"] and record["samples"]]


def utilisation(section: Results) -> dict[str, list[float]]:
    """Share of the measured matrix-multiply peak that the least work of each round amounts to, by contender."""
    (products,) = of(section, "matrix products")
    best = max(
        median(sample["flops_per_second"][name] for sample in products["samples"])
        for name in products["samples"][0]["flops_per_second"]
    )
    return {
        record["name"]: [
            flops / seconds / best for flops, seconds in zip(section["least_flops"], values(record), strict=False)
        ]
        for record in section["contenders"]
        if record["samples"] and record is not products
    }


def spread(numbers: Sequence[float], form: str) -> str:
    """Median, and least and most in brackets."""
    if len(numbers) == 1:
        return format(numbers[0], form)
    return f"{median(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"


# --- tables -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _failures(section: Results) -> str:
    return "".join(
        f"\n\nDid not run: {record['name']}: `{record['failed']}`."
        for record in section["contenders"]
        if record.get("failed")
    )


def step_table(section: Results, most_peers: int = 3) -> str:
    """Seconds, memory, and how many times faster than each peer."""
    records = [record for record in section["contenders"] if "flops_per_second" not in (record["samples"] or [{}])[0]]
    records = sorted((record for record in records if record["samples"]), key=lambda record: "spin" in record["name"])
    peers = [record for record in records if "spin" not in record["name"]][:most_peers]
    rows = []
    for record in records:
        faster = [spread(ratios(peer, record), ".2f") for peer in peers]
        rows.append([record["name"], spread(values(record), ".1f"), *faster, f"{peak(record):.1f}"])
    head = ["contender", "CPU seconds a step", *(f"times faster than {peer['name']}" for peer in peers), "peak GiB"]
    made = table(head, rows)
    if of(section, "matrix products"):
        shares = {name: f"{median(share):.0%}" for name, share in utilisation(section).items()}
        (products,) = of(section, "matrix products")
        speeds = {
            name: median(sample["flops_per_second"][name] for sample in products["samples"])
            for name in products["samples"][0]["flops_per_second"]
        }
        made += (
            "\n\nShare of the matrix-multiply peak (least work of the step, divided by CPU seconds and by the best of "
            "the model's own products): "
        )
        made += (
            "; ".join(f"{name} {share}" for name, share in shares.items())
            + ". Peaks in GFLOP a CPU second, bfloat16, 1,024 tokens: "
        )
        made += ", ".join(f"{name} {speed / 1e9:,.0f}" for name, speed in speeds.items()) + "."
    return made + _workload(section["workload"]) + _failures(section)


def long_run_table(section: Results, warm_up: int = 2) -> str:
    """Peak memory up to some steps; the cost of a step after a warm-up, and of all of them."""
    base, *_ = records = [record for record in section["contenders"] if record["samples"]]
    last = max(len(record["samples"]) for record in records)
    steps = sorted({min(step, last) for step in (1, 3, 6, 12, 18, 24)})
    first = min(warm_up, last - 1)
    rows = []
    for record in records:
        peaks = [f"{peak(record, step):.1f}" for step in steps]
        faster = spread(ratios(base, record)[first:], ".2f")
        total = sum(values(record))
        all_faster = f"{sum(values(base)) / total:.2f}"
        rows.append(
            [record["name"], *peaks, spread(values(record)[first:], ".1f"), faster, f"{total:,.0f}", all_faster]
        )
    head = ["contender", *(f"peak GiB, {step} step{'s' * (step > 1)}" for step in steps)]
    head += [f"CPU seconds a step, after {first}", "times faster", "all steps, start included, CPU s", "times faster"]
    return table(head, rows) + _workload(section["workload"]) + _failures(section)


def _workload(facts: dict[str, Any]) -> str:
    sides = (
        f"{side} {facts[side]['median']}/{facts[side]['p90']}/{facts[side]['most']}"
        for side in ("prompt", "real", "generated")
    )
    return (
        f"\n\nWorkload: {facts['pairs']} pairs, those of a warm-up included; tokens (median/90 %/most): "
        f"{', '.join(sides)}."
    )


def generation_table(section: Results) -> str:
    base, *_ = section["contenders"]
    base_rates = rates(base)
    rows = []
    for record in section["contenders"]:
        if record["samples"]:
            rate = rates(record)
            faster = spread([one / median(base_rates) for one in rate], ".2f") if base_rates else "-"
            tokens = sum(values(record, "tokens"))
            rows.append([record["name"], spread(rate, ".0f"), faster, f"{peak(record):.1f}", f"{tokens:,}"])
    head = ["contender", "tokens a CPU second", f"times {base['name']}", "peak GiB", "tokens sampled"]
    return table(head, rows) + f"\n\n{section['prompts']} prompts a round." + _failures(section)


def iteration_table(section: Results) -> str:
    rows = []
    for record in section["contenders"]:
        for sample in record["samples"]:
            phases = [f"{sample['phases'][phase]:.0f}" for phase in ("generate", "score", "train")]
            rest = [
                f"{sample['seconds']:.0f}",
                f"{sample['tokens']:,}",
                str(sample["updates"]),
                f"{sample['peak_mib'] / 1024:.1f}",
            ]
            rows.append([record["name"], *phases, *rest])
    head = [
        "contender",
        "generate",
        "score",
        "train",
        "whole iteration, CPU s",
        "tokens sampled",
        "updates",
        "peak GiB",
    ]
    made = table(head, rows)
    if len(ours := of(section, "spin_lightning")) == 1 and (others := of(section, "TRL")):
        made += f"\n\nThe whole iteration: {median(ratios(others[0], ours[0])):.2f} times faster. One run of each."
    return made + _failures(section)


def by_point_table(section: Results, first: str, label: Callable[[Any], str] = "{:,}".format) -> str:
    """One line a point; each contender has one record with a sample a point, or one record a point."""
    columns = {name: by_point(section, name) for name in ("TRL", "spin_lightning")}
    columns = {name: column for name, column in columns.items() if column}
    rows = []
    for point in section["points"]:
        cells = []
        for column in columns.values():
            samples = column.get(point, [])
            cells += (
                [spread([s["seconds"] for s in samples], ".2f"), f"{max(s['peak_mib'] for s in samples) / 1024:.1f}"]
                if samples
                else ["-", "-"]
            )
        rows.append([label(point), *cells])
    head = [first, *(f"{name}, {what}" for name in columns for what in ("CPU s a step", "peak GiB"))]
    return table(head, rows) + _failures(section)


def by_point(section: Results, word: str) -> dict[Any, list[Record]]:
    """Samples of a contender at each point."""
    records = [record for record in section["contenders"] if word in record["name"]]
    if len(records) == 1:  # a sample a point, in their order
        return {point: [sample] for point, sample in zip(section["points"], records[0]["samples"], strict=False)}
    return {point: record["samples"] for point, record in zip(section["points"], records, strict=False)}


def machine(results: Results) -> str:
    """Where, when and with what each section was measured."""
    lines = []
    for name, section in results.items():
        where = section["machine"]
        units = " and ".join(where["bfloat16_units"]) or "no bfloat16 units"
        lines.append(
            f"- {name}: {section['measured_at'][:10]}, {where['processor']}, {where['cores']} cores, {units}, "
            f"{where['memory_gib']} GiB, {section['threads']} thread(s), load before {section['load_before']:.1f}, "
            f"{section['minutes']} minutes; `{section['command']}`"
        )
    versions = {key: value for section in results.values() for key, value in section["versions"].items()}
    return "\n".join(lines) + "\n\nVersions: " + ", ".join(f"{name} {value}" for name, value in versions.items()) + "."


TABLES: dict[str, Callable[[Results], str]] = {
    "step": step_table,
    "without_amx": step_table,
    "long_run": long_run_table,
    "authors": step_table,
    "trl_settings": lambda section: step_table(section, most_peers=1),
    "generation": generation_table,
    "iteration": iteration_table,
    "prompt_length": lambda section: by_point_table(section, "prompt tokens"),
    "answers_per_prompt": lambda section: by_point_table(section, "answers per prompt"),
    "vocabulary": lambda section: by_point_table(section, "vocabulary"),
    "model_size": lambda section: by_point_table(section, "weights", lambda weights: f"{weights / 1e6:,.0f} M"),
}


if __name__ == "__main__":
    render(json.loads((DOCS / "performance.json").read_text()), DOCS / "performance.md")
