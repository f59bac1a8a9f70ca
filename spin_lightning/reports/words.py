"""What happened in a run, in sentences and a few numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from spin_lightning.reports.record import KINDS, Record, as_dict, as_number, read_verdict
from spin_lightning.reports.texts import add_up, capital, clean, count, show, show_time


def say_what_happened(record: Record, others: Mapping[str, Record]) -> list[str]:
    """What was trained, from what, whether it is over, and what it gained, in sentences."""
    rows = as_number(as_dict(record.data.get("train")).get("rows"))
    on = f" on {count(rows, 'row')}" if rows else ""
    sentences = [f"{capital(KINDS[record.kind][2])} of {clean(record.model)}{on}. {_say_end(record)}"]
    if record.kind == "score":
        return _say_score(record)
    before, after = nll_of(record)
    if before is not None and after is not None:
        if not math.isfinite(after):
            sentences.append(f"The held-out NLL is {after}: the policy is broken. It was {before:.3f} at the start.")
        else:
            share = abs(after - before) / abs(before) if before else 0.0
            gain = f", {share:.0%} {'better' if after < before else 'worse'}" if share >= 0.005 else ""
            sentences.append(f"The held-out NLL {_moved(before, after)} nats a response{gain}.")
            best = _best_nll(record)
            if best is not None and best[1] < after - 0.005 * abs(after):
                sentences.append(f"It was lowest {best[0]}, at {best[1]:.3f}: what came after that made it worse.")
    elif after is not None:
        sentences.append(f"The held-out NLL is {after:.3f} nats a response.")
    sentences += _say_reward(record)
    sentences += _say_retention(record)
    for name, other in others.items():
        sentences += _say_against(record, name, other)
    return [*sentences, *map(clean, read_verdict(record.folder))]


def _moved(before: float, after: float) -> str:
    """From where to where a number went, as far as its three decimals tell."""
    old, new = f"{before:.3f}", f"{after:.3f}"
    return f"stayed at {new}" if old == new else f"{'rose' if after > before else 'fell'} from {old} to {new}"


def _say_end(record: Record) -> str:
    played = sum(1 for iteration in record.iterations if iteration.summary)
    if record.result is not None:
        reason = record.result.get("ended_because")
        updates = count(record.updates, "update")
        return f"It is over: {clean(str(reason))} ({updates})." if reason else f"It is over, after {updates}."
    if record.kind == "score":
        return "It is not over."
    wanted = as_number(as_dict(record.settings.get(_section(record))).get("iterations"))
    epochs = as_dict(record.recorded.get("settings")).get(f"{_section(record)}.epochs")
    wanted = float(len(epochs)) if wanted is None and isinstance(epochs, list) else wanted
    of = f" of {wanted:.0f}" if wanted else ""
    if record.iterations and record.kind != "dpo":
        now = record.iterations[-1]
        where = f"in iteration {now.number}" if not now.summary else f"after iteration {now.number}"
        return f"It is not over: {where} ({played}{of} iterations are over), after {count(record.updates, 'update')}."
    if not record.updates:
        return "It is not over: no update was made yet."
    return f"It is not over: {count(record.updates, 'update')} so far."


def _section(record: Record) -> str:
    return {"fit": "self_play", "ppo": "rollouts"}.get(record.kind, "export")


def nll_of(record: Record) -> tuple[float | None, float | None]:
    """The held-out NLL at the start and at the last time it was measured."""
    logged = record.metrics.get("val/nll", [])
    told = [as_number(summary.get("val_nll")) for summary in record.summaries]
    known = [value for value in told if value is not None] or [value for step, value in logged if step > 0]
    return as_number(record.start.get("val/nll")), known[-1] if known else None


def _best_nll(record: Record) -> tuple[str, float] | None:
    """Where the held-out NLL was lowest among the iterations, with the start."""
    values = [("at the start", as_number(record.start.get("val/nll")))]
    values += [(f"after iteration {i.number}", as_number(i.summary.get("val_nll"))) for i in record.iterations]
    if len(record.iterations) < 2:
        values += [(f"at update {step:,.0f}", value) for step, value in record.metrics.get("val/nll", [])]
    known = [(where, value) for where, value in values if value is not None and math.isfinite(value)]
    return min(known, key=lambda item: item[1], default=None)


def _say_reward(record: Record) -> list[str]:
    result = as_dict(record.result)
    if record.kind == "reward":
        accuracy, longer = (as_number(result.get(f"val_{name}")) for name in ("accuracy", "longer_wins"))
        if accuracy is None:
            return []
        beats = "" if longer is None else f"; taking the longer one would be right in {max(longer, 1 - longer):.0%}"
        return [f"On held-out pairs the better response has the higher score in {accuracy:.0%}{beats}."]
    if record.kind != "ppo":
        return []
    values = [as_number(iteration.statistics.get("val/reward")) for iteration in record.iterations]
    first = next((value for value in values if value is not None), None)
    last = as_number(as_dict(result.get("held_out")).get("val/reward"))
    last = last if last is not None else next((value for value in reversed(values) if value is not None), None)
    if first is None or last is None:
        return []
    return [f"The reward of responses to held-out prompts {_moved(first, last)}."]


def _say_retention(record: Record) -> list[str]:
    found = next((as_dict(s["retention"]) for s in reversed(record.summaries) if s.get("retention")), {})
    sentences = []
    before, after = as_number(as_dict(found.get("start")).get("other_nll")), as_number(found.get("other_nll"))
    if before is not None and after is not None:
        moved = _moved(before, after)
        means = "it forgets some" if moved.startswith("rose") else "nothing is forgotten there"
        sentences.append(f"The NLL of rows of other tasks {moved} nats a response: {means}.")
    if (kl := as_number(found.get("kl_to_start"))) is not None:
        sentences.append(
            f"The policy is {kl:.3g} nats a token from the model it started from, at held-out real responses."
        )
    return sentences


def _say_against(record: Record, name: str, other: Record) -> list[str]:
    ours, theirs = nll_of(record)[1], nll_of(other)[1]
    if ours is None or theirs is None:
        return [f"{clean(name)} ({KINDS[other.kind][2]}) has no held-out NLL to compare with."]
    who = f"{clean(name)} ({other.kind}, {count(other.updates, 'update')})"
    rows = [as_dict(run.recorded.get("settings")).get("data.held_out_sha256") for run in (record, other)]
    if None not in rows and rows[0] != rows[1]:
        return [
            f"{who} has a held-out NLL of {theirs:.3f}, on other held-out rows than here: the two cannot be compared."
        ]
    better = "neither is better" if ours == theirs else f"{clean(record.name if ours < theirs else name)} is better"
    return [
        f"Against {who}: held-out NLL {ours:.3f} here and {theirs:.3f} there, so {better}. It is one run of each, so a "
        "small difference may be chance: spin-lightning compare plays several seeds."
    ]


def _say_score(record: Record) -> list[str]:
    result = as_dict(record.result)
    if not result:
        return [f"Responses of {clean(record.model)} are being scored. It is not over."]
    who = clean(str(result.get("model") or "the data"))
    error = as_number(result.get("standard_error"))
    mean = as_number(result.get("mean"))
    how = "no response could be judged" if mean is None else f"the mean reward is {mean:.4g}"
    how += "" if error is None or mean is None else f", with a standard error of {error:.2g}"
    return [f"{result.get('responses')} responses of {who} to {result.get('prompts')} prompts: {how}."]


def facts_of(record: Record) -> list[tuple[str, str]]:
    """The few numbers that a person looks for first."""
    before, after = nll_of(record)
    last = record.summaries[-1] if record.summaries else {}
    metrics = as_dict(last.get("epoch_metrics"))
    seconds = sum(add_up(summary.get("seconds")) for summary in record.summaries)
    facts = {
        "held-out NLL" if after is not None else "held-out NLL at the start": " → ".join(
            show(value) for value in (before, after) if value is not None
        ),
        "updates": show(record.updates) if record.kind != "score" else "",
        "iterations over": str(sum(bool(i.summary) for i in record.iterations))
        if record.kind in ("fit", "ppo")
        else "",
        "last loss": show(last.get("last_loss")),
        "accuracy": show(metrics.get("rewards/accuracies", last.get("val_accuracy"))),
        "margin": show(metrics.get("rewards/margins")),
        "mean reward": show(last.get("mean")) if record.kind == "score" else "",
        "time": show_time(seconds) if seconds else "",
    }
    return [(name, value) for name, value in facts.items() if value not in ("", "-")]
