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

from benchmarks.results import Result, Results, is_products, shown

DOCS = Path(__file__).absolute().parent.parent / "docs"
Record = dict[str, Any]


def render(results: Results, path: Path) -> None:
    """Write tables into the page at ``path`` (the prose of ``docs`` where there is none yet) and pictures beside it."""
    from benchmarks import pictures

    path.write_text(with_tables((path if path.exists() else DOCS / "performance.md").read_text(), results))
    pictures.draw(results, path.parent)
    print(f"report: {path}")


def with_tables(page: str, results: Results) -> str:
    """The page with the tables of these results between its markers.

    Raises:
        ValueError: It has no markers for one of them.
    """
    for name, make in TABLES.items():
        if found := shown(results, name):
            tables = (f"{heading(machine, section)}\n\n{make(section)}" for machine, section in found.items())
            page = _between_markers(page, name, "\n\n".join(tables))
    return _between_markers(page, "machine", machines(results)) if results else page


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


def workers(section: Result) -> list[Record]:
    """The contenders that have samples, in order, without the one that multiplies matrices to measure the peak."""
    return [record for record in section["contenders"] if record["samples"] and not is_products(record)]


def of(section: Result, word: str) -> list[Record]:
    """Those of them with this word in their name."""
    return [record for record in workers(section) if word in record["name"]]


def is_ours(record: Record) -> bool:
    return "spin_lightning" in record["name"] or "Generator" in record["name"]


def dtype(record: Record) -> str:
    """Of weights and products, as Lightning calls it. Whose settings do not tell computes as its users do."""
    settings = record["settings"]
    loads = settings.get("trl", {}).get("model_init_kwargs", {})
    return str(settings.get("precision", "bf16-true" if loads.get("dtype") == "bfloat16" else "bf16-mixed"))


def product_speeds(section: Result) -> dict[str, float]:
    """FLOP a second of each of the model's own matrix products; empty where they were not measured."""
    samples = [sample for record in section["contenders"] if is_products(record) for sample in record["samples"]]
    names = samples[0]["flops_per_second"] if samples else ()
    return {name: median(sample["flops_per_second"][name] for sample in samples) for name in names}


def shares(section: Result, record: Record) -> list[float]:
    """Share of the machine's matrix-multiply peak that the least work of each round amounts to; empty if unknown."""
    speeds = product_speeds(section)
    least = section.get("least_flops") or [sample.get("least_flops") for sample in record["samples"]]
    if not speeds or None in least:
        return []
    best = max(speeds.values())
    return [flops / seconds / best for flops, seconds in zip(least, values(record), strict=False)]


def spread(numbers: Sequence[float], form: str) -> str:
    """Median, and least and most in brackets; a dash where there is no number."""
    if len(numbers) < 2:
        return format(numbers[0], form) if numbers else "-"
    return f"{median(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"


# --- tables -----------------------------------------------------------------------------------------------------------


def heading(machine: str, section: Result) -> str:
    """Whose table follows: the machine, the day, and what it can do at best."""
    speeds = product_speeds(section)
    best = f"peak {max(speeds.values()) / 1e9:,.0f} GFLOP a CPU second" if speeds else "peak not measured"
    brief = ", brief measurement" if section.get("is_brief") else ""
    return f"**{machine}**, {section['measured_at'][:10]}{brief}: {best}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _remarks(section: Result) -> str:
    """Who compiled in rounds that count, and who did not run."""
    made = ""
    for record in workers(section):
        compiling = _compiling(record)
        if compiling > 0.01 * sum(values(record)) and "phases" not in record["samples"][0]:
            made += f"\n\nCompiling took {compiling:,.0f} s of these rounds of {record['name']}."
    for record in section["contenders"]:
        if record.get("failed"):
            made += f"\n\nDid not run: {record['name']}: `{record['failed']}`."
    return made


def step_table(section: Result, most_peers: int = 3) -> str:
    """Seconds, memory, and how many times faster than each peer; the peer of the same dtype first."""
    records = sorted(workers(section), key=is_ours)
    peers = [record for record in records if not is_ours(record)]
    same = {name: next((peer for peer in peers if dtype(peer) == name), None) for name in map(dtype, records)}
    named = [peer for peer in peers if dtype(peer) == "bf16-mixed"][:most_peers]
    head = ["contender", "samples", "CPU seconds a step", "times faster, same dtype"]
    head += [*(f"times faster than {peer['name']}" for peer in named), "share of peak", "peak GiB"]
    rows = []
    for record in records:
        like = same[dtype(record)]
        faster = spread(ratios(like, record), ".2f") if like and is_ours(record) else "-"
        others = (spread(ratios(peer, record), ".2f") for peer in named)
        share = f"{median(found):.0%}" if (found := shares(section, record)) else "-"
        seconds = spread(values(record), ".1f")
        rows.append([record["name"], _samples(record), seconds, faster, *others, share, f"{peak(record):.1f}"])
    made = _without_empty(head, rows)
    if speeds := product_speeds(section):
        made += "\n\nPeaks in GFLOP a CPU second, bfloat16, 1,024 tokens: "
        made += ", ".join(f"{name} {speed / 1e9:,.0f}" for name, speed in speeds.items()) + "."
    return made + _workload(section) + _remarks(section)


def _samples(record: Record) -> str:
    return str(len(record["samples"]))


def _without_empty(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without columns of dashes alone."""
    kept = [place for place in range(len(head)) if any(row[place] != "-" for row in rows)]
    return table([head[place] for place in kept], [[row[place] for place in kept] for row in rows])


def long_run_table(section: Result, warm_up: int = 2) -> str:
    """Peak memory up to some steps; the cost of a step after a warm-up, and of all of them."""
    base, *_ = records = workers(section)
    last = max(len(record["samples"]) for record in records)
    steps = sorted({min(step, last) for step in (1, 3, 6, 12, 18, 24)})
    first = min(warm_up, last - 1)
    rows = []
    for record in records:
        peaks = [f"{peak(record, step):.1f}" for step in steps]
        faster = spread(ratios(base, record)[first:], ".2f")
        share = f"{median(found[first:]):.0%}" if (found := shares(section, record)) else "-"
        total = sum(values(record))
        all_faster = f"{sum(values(base)) / total:.2f}"
        settled = [str(len(record["samples"]) - first), spread(values(record)[first:], ".1f"), faster, share]
        rows.append([record["name"], *peaks, *settled, f"{total:,.0f}", all_faster])
    head = ["contender", *(f"peak GiB, {step} step{'s' * (step > 1)}" for step in steps)]
    head += ["samples", f"CPU seconds a step, after {first}", f"times faster than {base['name']}", "share of peak"]
    head += ["all steps, start included, CPU s", "times faster"]
    return _without_empty(head, rows) + _workload(section) + _remarks(section)


def _workload(section: Result) -> str:
    facts = section["workload"]
    sides = (
        f"{side} {facts[side]['median']}/{facts[side]['p90']}/{facts[side]['most']}"
        for side in ("prompt", "real", "generated")
    )
    return (
        f"\n\nWorkload: {facts['pairs']} pairs, {section.get('batch_size', 8)} a step, those of a warm-up included; "
        f"tokens (median/90 %/most): {', '.join(sides)}."
    )


def generation_table(section: Result) -> str:
    records = workers(section)
    plain = max(of(section, "transformers generate"), key=_median_rate, default=None)
    vllm = max(of(section, "vLLM"), key=_median_rate, default=None)
    bases = [base for base in (plain, vllm) if base]
    head = ["contender", "samples", "tokens a CPU second", *(f"times {base['name']}" for base in bases)]
    head += ["share of peak", "peak GiB", "tokens sampled"]
    rows = []
    for record in records:
        faster = (spread([rate / _median_rate(base) for rate in rates(record)], ".2f") for base in bases)
        share = f"{median(found):.0%}" if (found := shares(section, record)) else "-"
        tokens = f"{sum(values(record, 'tokens')):,}"
        figures = [spread(rates(record), ".0f"), *faster, share, f"{peak(record):.1f}", tokens]
        rows.append([record["name"], _samples(record), *figures])
    answers = section.get("answers_per_prompt", 1)
    asked = f"{section['prompts']} prompts a round{f', {answers} responses to each' if answers > 1 else ''}."
    return _without_empty(head, rows) + f"\n\n{asked}" + _remarks(section)


def _median_rate(record: Record) -> float:
    return median(rates(record))


def iteration_table(section: Result) -> str:
    rows = []
    for record in workers(section):
        for sample in record["samples"]:
            phases = [f"{sample['phases'][phase]:.0f}" for phase in ("generate", "score", "train")]
            compiling = f"{sample['compile_seconds']:.0f}" if "compile_seconds" in sample else "-"
            rest = [
                compiling,
                f"{sample['seconds']:.0f}",
                f"{sample['tokens']:,}",
                str(sample["updates"]),
                f"{sample['peak_mib'] / 1024:.1f}",
            ]
            rows.append([record["name"], *phases, *rest])
    head = ["contender", "generate", "score", "train", "of these compiling", "whole iteration, CPU s"]
    made = _without_empty([*head, "tokens sampled", "updates", "peak GiB"], rows)
    for own in of(section, "spin_lightning"):
        for other in of(section, "TRL"):
            made += f"\n\n{own['name']}: {median(ratios(other, own)):.2f} times faster than {other['name']}"
            if max(_compiling(own), _compiling(other)) > 1:
                settled = [sum(values(record)) - _compiling(record) for record in (other, own)]
                made += f", {settled[0] / settled[1]:.2f} times without what each spent compiling"
            made += "."
    return made + "\n\nOne run of each." + _remarks(section)


def _compiling(record: Record) -> float:
    """Seconds of all rounds that went into ``torch.compile``."""
    return float(sum(sample.get("compile_seconds", 0) for sample in record["samples"]))


def by_point_table(section: Result, first: str, label: Callable[[Any], str] = "{:,}".format) -> str:
    """One line a point; each contender has one record with a sample a point, or one record a point."""
    columns = by_point(section)
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
        counts = {len(column.get(point, [])) for column in columns.values()}
        rows.append([label(point), " or ".join(map(str, sorted(counts))), *cells])
    head = [first, "samples", *(f"{name}, {what}" for name in columns for what in ("CPU s a step", "peak GiB"))]
    return table(head, rows) + _remarks(section)


def by_point(section: Result) -> dict[str, dict[Any, list[Any]]]:
    """Samples of each contender at each point. A contender of one point alone has the point behind its name."""
    points = section["points"]
    found: dict[str, dict[Any, list[Any]]] = {}
    for record in workers(section):
        name, point = record["name"], None
        for candidate in points:
            if name.endswith(f", {candidate:,}"):
                name, point = name.removesuffix(f", {candidate:,}"), candidate
        column = found.setdefault(name, {})
        if point is None:
            column |= {point: [sample] for point, sample in zip(points, record["samples"], strict=False)}
        else:
            column[point] = record["samples"]
    return found


def machines(results: Results) -> str:
    """Where, when and with what each section was measured, machine by machine."""
    made = []
    for machine, sections in results.items():
        where = list(sections.values())[-1]["machine"]
        lines = [f"**{machine}**, {where['cores']} cores, {where['memory_gib']} GiB:", ""]
        for name, section in sections.items():
            lines.append(
                f"- {name}: {section['measured_at'][:10]}, {section['threads']} thread(s), "
                f"load before {section['load_before']:.1f}, {section['minutes']} minutes; `{section['command']}`"
            )
        versions = {key: value for section in sections.values() for key, value in section["versions"].items()}
        said = ", ".join(f"{name} {value}" for name, value in versions.items())
        made.append("\n".join(lines) + f"\n\nVersions: {said}.")
    return "\n\n".join(made)


TABLES: dict[str, Callable[[Result], str]] = {
    "step": step_table,
    "without_amx": step_table,
    "long_run": long_run_table,
    "authors": step_table,
    "trl_settings": lambda section: step_table(section, most_peers=1),
    "generation": generation_table,
    "several_answers": generation_table,
    "iteration": iteration_table,
    "prompt_length": lambda section: by_point_table(section, "prompt tokens"),
    "answers_per_prompt": lambda section: by_point_table(section, "answers per prompt"),
    "vocabulary": lambda section: by_point_table(section, "vocabulary"),
    "model_size": lambda section: by_point_table(section, "weights", lambda weights: f"{weights / 1e6:,.0f} M"),
}


if __name__ == "__main__":
    render(json.loads((DOCS / "performance.json").read_text()), DOCS / "performance.md")
