"""A plan as a table of at most 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spin_lightning.models.footprint import peak

PARTS = {
    "base": "interpreter and libraries",
    "weights": "weights",
    "adapter": "adapter",
    "opponent": "resident opponent",
    "gradients": "gradients",
    "optimiser": "optimiser, master weights",
    "activations": "activations",
    "logits": "logits",
    "cache": "keys and values",
    "other": "copies and buffers",
}


def render(plan: Mapping[str, Any]) -> list[str]:
    """A plan as lines of at most 80 characters."""
    model, data, updates, devices, disk = (plan[key] for key in ("model", "data", "updates", "devices", "disk"))
    lines = [f"{model['name']}: {_count(model['weights'])} weights, {model['precision']}"]
    if model["trained"] != model["weights"]:
        below = ", on a model in 4 bits" if model["is_packed"] else ""
        lines.append(f"  trained: {_count(model['trained'])} of an adapter{below}")
    lines += ["", f"rows            {data['rows']:,} to train on, {data['held_out']:,} held out"]
    lines[-1] += " (assumed)" if data["is_assumed"] else ""
    for key, name in (("prompt_tokens", "prompts"), ("real_tokens", "responses")):
        if tokens := data[key]:
            lines.append(
                f"  {name:<14}median {tokens['median']:g}, 90 % up to {tokens['p90']:g}, most {tokens['most']:g} tokens"
            )
    total = sum(updates["per_iteration"])
    each = " + ".join(f"{count:,}" for count in updates["per_iteration"])
    lines.append(f"updates         {each}{f' = {total:,}' if len(updates['per_iteration']) > 1 else ''}")
    passes = f"{updates['batches']} x {updates['mean_passes']:.1f} passes"
    lines.append(f"  of each       {updates['pairs']:,} {updates['of']}, in {passes}")
    lines.append(f"  largest pass  {updates['largest_pass']:,} tokens, {updates['largest_scored']:,} of them scored")
    lines.append(f"tokens          {_count(sum(updates['training_tokens']))} to train on")
    if updates["generated_tokens"]:
        lines[-1] += f", {_count(updates['generated_tokens'])} to generate in each iteration"
    phases = list(plan["memory"])
    where = f"{devices['count']} x {devices['kind']}"
    lines += ["", f"{f'memory of each device, {where}':<34}" + "".join(f"{phase:>14}" for phase in phases)]
    for part, name in PARTS.items():
        row = [plan["memory"][phase].get(part, 0) for phase in phases]
        if any(row):
            lines.append(f"  {name:<32}" + "".join(f"{_gib(value):>14}" for value in row))
    sums = [peak(plan["memory"][phase]) for phase in phases]
    lines.append(f"  {'in all':<32}" + "".join(f"{_gib(value):>14}" for value in sums))
    if updates["generated_tokens"] and "generation" not in phases:
        lines.append("  generation is by an engine with memory of its own")
    room = devices["usable"]
    if room is None:
        lines.append("  no such device is here: --memory 24GiB says whether it fits on one")
    else:
        have = f"of {_gib(devices['memory'])}, may be filled"
        lines.append(f"  {have:<32}" + f"{_gib(room):>14}" * len(phases))
        verdicts = ["fits" if value <= room else "DOES NOT FIT" for value in sums]
        lines.append(f"  {'':<32}" + "".join(f"{verdict:>14}" for verdict in verdicts))
    lines += ["", f"disk, at most                     {_gib(disk['total']):>14}  of {_gib(disk['free'])} free"]
    for part in ("checkpoints", "exports", "pairs", "laws"):
        if disk[part]:
            lines.append(f"  {part:<32}{_gib(disk[part]):>14}")
    lines += _render_time(plan.get("time"))
    if plan["advice"]:
        lines += ["", "what would help"]
        for entry in plan["advice"]:
            takes = f"{_gib(entry['takes']):>10}  {'fits' if entry['fits'] else ''}" if entry.get("takes") else ""
            lines.append(f"  {entry['what']:<11}{entry['setting']:<52}{takes}".rstrip())
    return lines


def _render_time(time: Mapping[str, Any] | None) -> list[str]:
    if time is None:
        return []
    lines = ["", "time, from a short probe on this machine"]
    for name in ("training", "generation", "scoring", "validation"):
        if time["seconds"].get(name):
            rate = time["tokens_per_second"].get(name)
            lines.append(
                f"  {name:<14}{_duration(time['seconds'][name]):>12}{f'  {rate:,.0f} tokens/s' if rate else ''}"
            )
    lines.append(f"  {'in all':<14}{_duration(sum(time['seconds'].values())):>12}")
    if time["cost"] is not None:
        lines.append(f"  {'cost':<14}{time['cost']:>12,.2f}  at {time['price_per_hour']:g} an hour for each device")
    return lines


def _count(number: float) -> str:
    """A large number in three digits.

    Example:
        >>> _count(134_515_008), _count(7.24e9), _count(950)
        ('135M', '7.24B', '950')
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
