"""The tables of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spin_lightning.data.report import COUNTED
from spin_lightning.reports.record import Record, as_dict, as_number
from spin_lightning.reports.texts import add_up, clean, show, show_time

#: Rows of a table; of more, the first and the last are shown.
MOST_ROWS = 60
Cells = list[str]


@dataclass
class Table:
    """Rows under a header; ``note`` says what was left out, or how to read it."""

    header: Cells
    rows: list[Cells]
    note: str = ""


def _table_of_iterations(record: Record) -> Table | None:
    if not record.iterations:
        return None
    columns: dict[str, Any] = {
        "updates": lambda i: i.summary.get("updates"),
        "time": lambda i: show_time(add_up(i.summary.get("seconds"))) if i.summary else None,
        "loss, first": lambda i: i.summary.get("first_loss"),
        "loss, last": lambda i: i.summary.get("last_loss"),
        "margin": lambda i: as_dict(i.summary.get("epoch_metrics")).get("rewards/margins"),
        "reward, real": lambda i: as_dict(i.summary.get("epoch_metrics")).get("rewards/real"),
        "reward, generated": lambda i: as_dict(i.summary.get("epoch_metrics")).get("rewards/generated"),
        "accuracy": lambda i: as_dict(i.summary.get("epoch_metrics")).get("rewards/accuracies"),
        "held-out NLL": lambda i: i.summary.get("val_nll"),
        "other rows' NLL": lambda i: as_dict(i.summary.get("retention")).get("other_nll"),
        "KL to start, a token": lambda i: as_dict(i.summary.get("retention")).get("kl_to_start"),
        "reward": lambda i: i.statistics.get("reward/mean"),
        "held-out reward": lambda i: i.statistics.get("val/reward"),
        "KL to reference": lambda i: i.statistics.get("kl/reference"),
        "pairs": lambda i: i.statistics.get("training_pairs", i.statistics.get("pairs")),
        "length, real": lambda i: i.statistics.get("real_mean_length", i.statistics.get("chosen_mean_length")),
        "length, generated": lambda i: i.statistics.get(
            "generated_mean_length", i.statistics.get("rejected_mean_length")
        ),
        "length": lambda i: i.statistics.get("completions/mean_length"),
        "cut": lambda i: i.statistics.get("generated_clipped_share", i.statistics.get("completions/cut")),
        "identical": lambda i: i.statistics.get("identical_share"),
        "empty": lambda i: i.statistics.get("empty_share"),
    }
    rows = [[str(i.number), *(show(read(i)) for read in columns.values())] for i in record.iterations]
    kept = [place for place in range(len(columns) + 1) if any(row[place] != "-" for row in rows)]
    header = ["iteration", *columns]
    rows, note = _shorten([[row[place] for place in kept] for row in rows])
    return Table([header[place] for place in kept], rows, note)


def _table_of_scores(record: Record) -> Table | None:
    if record.kind != "score" or not record.result:
        return None
    result = record.result
    rows = [["mean reward", show(result.get("mean"))], ["standard error", show(result.get("standard_error"))]]
    for name, words in (("mean_by_reward", "{}"), ("pass_at", "pass@{}"), ("best_of", "best of {}")):
        rows += [[words.format(clean(str(key))), show(value)] for key, value in as_dict(result.get(name)).items()]
    rows += [["cut", show(result.get("cut_share"))], ["mean length, tokens", show(result.get("mean_tokens"))]]
    if against := as_dict(result.get("against")):
        interval = " to ".join(show(end) for end in against.get("interval") or ())
        rows.append(
            [f"win rate against {clean(str(against.get('model')))}", f"{show(against.get('win_rate'))} ({interval})"]
        )
    return Table(["", "value"], rows)


def _table_of_evaluations(record: Record) -> Table | None:
    if not record.evaluations:
        return None
    tasks: dict[str, dict[str, str]] = {}
    for where, evaluation in record.evaluations.items():
        for task, found in as_dict(evaluation.get("tasks")).items():
            value, error = as_number(as_dict(found).get("value")), as_number(as_dict(found).get("stderr"))
            text = show(value) + ("" if error is None else f" ± {error:.2g}")
            name = f"{task} ({as_dict(found).get('metric')}, {as_dict(found).get('shots')} shots)"
            tasks.setdefault(clean(name), {})[where] = text
    places = list(record.evaluations)
    rows, note = _shorten([[task, *(found.get(place, "-") for place in places)] for task, found in tasks.items()])
    return Table(["task", *map(clean, places)], rows, note)


def _table_of_data(record: Record) -> Table | None:
    if not record.data:
        return None
    rows: list[Cells] = []
    for part, words in (("train_data", "training data"), ("val_data", "held-out data"), ("other_data", "other data")):
        found = as_dict(record.data.get(part))
        if found.get("description"):
            rows.append([words, clean(str(found["description"]), 600)])
        rows += [[f"{words}, note", clean(str(note), 300)] for note in (found.get("notes") or ())[:10]]
        rows += _counted(words, found)
    for part, words in (("train", "trained on"), ("held_out", "held out"), ("other", "other rows")):
        found = as_dict(record.data.get(part))
        if "rows" in found:
            rows.append([words, f"{show(found['rows'])} rows, {show(found.get('prompts'))} prompts"])
        for key, of in (("prompt_tokens", "prompts"), ("real_tokens", "real responses"), ("chosen_tokens", "chosen")):
            spread = as_dict(found.get(key))
            if spread:
                numbers = (show(spread.get(name)) for name in ("median", "p90", "most"))
                rows.append([f"{words}, tokens of {of}", "median {}, 90 % up to {}, most {}".format(*numbers)])
        rows += _counted(words, found)
    rows, note = _shorten(rows)
    return Table(["data", "what was found"], rows, note)


def _counted(words: str, found: Mapping[str, Any]) -> list[Cells]:
    """What was strange about rows, where anything was."""
    rows = []
    for key, sentence in COUNTED.items():
        tally = as_dict(found.get(key))
        if tally.get("count"):
            first = clean(", ".join(map(str, (tally.get("first") or ())[:1])), 200)
            rows.append([f"{words}, note", f"{sentence}: {show(tally['count'])}, the first {first}"])
    return rows


def _table_of_settings(record: Record) -> Table | None:
    flat = _flatten(record.settings) or as_dict(record.recorded.get("settings"))
    rows = [[clean(str(key)), clean(str(value), 300)] for key, value in flat.items()]
    changes = [as_dict(change) for change in record.recorded.get("changes") or ()]
    rows += [
        [clean(f"changed: {change.get('setting')}"), clean(f"{change.get('from')} → {change.get('to')}", 300)]
        for change in changes
    ]
    note = "Secrets are left out (***)." if any("***" in value for _, value in rows) else ""
    if len(rows) > 500:
        rows, note = rows[:500], f"{note} {len(rows) - 500} more are in config.yaml."
    return Table(["setting", "value"], rows, note)


def _table_of_hashes(record: Record) -> Table | None:
    settings = as_dict(record.recorded.get("settings"))
    rows = [[key, str(value)] for key, value in settings.items() if key.endswith("_sha256")]
    for iteration in record.iterations:
        for key in ("opponent_sha256", "policy_sha256", "critic_sha256"):
            if value := iteration.binding.get(key):
                rows.append([f"iteration {iteration.number}, {key}", str(value)])
    for where, evaluation in record.evaluations.items():
        rows += [[f"{where}, evaluated model_sha256", str(evaluation[k])] for k in ("model_sha256",) if k in evaluation]
    rows, note = _shorten([[clean(key), clean(value, 100)] for key, value in rows])
    return Table(["what", "SHA-256"], rows, note)


def _table_of_versions(record: Record) -> Table | None:
    versions = {**as_dict(record.recorded.get("versions")), **as_dict(record.recorded.get("kernels"))}
    return Table(["what it ran on", ""], [[clean(str(k)), clean(str(v), 100)] for k, v in versions.items()])


def _shorten(rows: list[Cells]) -> tuple[list[Cells], str]:
    """The first and the last of many rows, and a note on those between."""
    if len(rows) <= MOST_ROWS:
        return rows, ""
    half = MOST_ROWS // 2
    return [*rows[:half], *rows[-half:]], f"{len(rows) - MOST_ROWS:,} rows between are left out."


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


#: By their titles, in the order of the page.
TABLES: dict[str, Callable[[Record], Table | None]] = {
    "Iterations": _table_of_iterations,
    "Scores": _table_of_scores,
    "Evaluation": _table_of_evaluations,
    "Data": _table_of_data,
    "Settings": _table_of_settings,
    "Hashes": _table_of_hashes,
    "Versions": _table_of_versions,
}
