"""What was read, dropped, cut and found strange in the data, in words and as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from spin_lightning.data.formats import Tally
from spin_lightning.data.rows import LoadedRows
from spin_lightning.terminal import say

#: What is counted about the rows, in the words of the screen. Its keys are those of ``data_report.json``.
COUNTED = {
    "byte_order_marks": "files that begin with a byte order mark, which is skipped",
    "exact_duplicates": "rows that repeat an earlier row, prompt and real answer; kept",
    "repeated_prompts": "rows with another real answer to an earlier row's prompt; kept",
    "long_prompts": "prompts longer than data.max_prompt_tokens; left out",
    "cut_answers": "real answers longer than data.max_response_tokens (in a game the generator's max_new_tokens); cut "
    "there, without a terminator",
    "empty_answers": "real answers that are a terminator and nothing else; kept",
    "refused_rows": "rows that the chat template refuses; left out",
    "control_tokens": "rows that spell control tokens; encoded as text, so that they neither open nor close a turn",
    "template_text": "rows that spell what this chat template writes around turns in plain text, which can pass for a "
    "turn",
    "encoded_apart": "answers encoded apart from their prompts, as the chat template writes past answers differently",
    "reasoning_left_out": "real answers whose reasoning_content the chat template does not write; it is left out",
    "no_reasoning": "real answers without reasoning, where the chat template's prompts begin it; they end it at once",
    "tools_left_out": "rows with tools that the chat template does not write; they are left out",
    "turns_left_out": "prompts of which the chat template leaves out a turn's text or tool calls",
    "text_left_out": "real answers whose text beside tool calls the chat template does not write; it is left out",
    "cut_rejected": "answers that are not preferred, longer than data.max_response_tokens; cut there, without a "
    "terminator",
    "same_answers": "rows whose two answers are the same tokens; left out",
    "long_answers": "rows with an answer that is cut, or longer than data.max_response_tokens; left out",
    "also_trained_on": "held-out prompts that are also trained on; the held-out NLL is too good by them",
}


def describe_source(what: str, source: str | dict[str, float], loaded: LoadedRows) -> dict[str, Any]:
    """Say what was read and what is strange about it; the same as part of the report."""
    for line in loaded.description.splitlines():
        say(f"{what}: {line}")
    for note in loaded.notes:
        say(f"note: {note}")
    for key, tally in itertools.islice(loaded.unused_keys.items(), 20):
        say(f"note: {key!r} inside turns has no effect: in {tally.count} rows, the first {tally.first[0]}")
    for kind, tally in loaded.dropped.items():
        say(f"note: bad rows that were dropped, {kind}: {tally.count}, the first {tally.first[0]}")
    say_noted(loaded.noted)
    return {
        "source": source if isinstance(source, str) else {str(name): weight for name, weight in source.items()},
        "format": loaded.format,
        "description": loaded.description,
        "rows_read": loaded.num_read,
        "rows_kept": sum(loaded.times),
        "rows_dropped": sum(tally.count for tally in loaded.dropped.values()),
        "dropped": as_dicts(loaded.dropped),
        "notes": loaded.notes,
        "unused_turn_keys": [{"key": key, **asdict(tally)} for key, tally in loaded.unused_keys.items()],
        "sources": [
            {
                "source": name,
                "weight": weight,
                "format": part.format,
                "rows_read": part.num_read,
                "rows_kept": len(part.rows),
                "rows_taken": sum(part.times),
            }
            for name, weight, part in loaded.parts
        ],
        **as_dicts(loaded.noted),
    }


def refusal_of(refused: Tally, num_rows: int) -> str:
    """What to say of rows that a chat template refuses."""
    cure = ", or set data.on_bad_row: drop to leave them out" if refused.count < num_rows else ""
    return f"{refused.count} of {num_rows} rows cannot be encoded{refused.listed()}\nMend or remove these rows{cure}."


def say_noted(noted: dict[str, Tally], suffix: str = "") -> None:
    """A note for each kind that was found, with its first place."""
    for name, tally in noted.items():
        if tally.count and name in COUNTED:
            say(f"note: {COUNTED[name]}{suffix}: {tally.count}, the first {tally.first[0]}")


def as_dicts(tallies: dict[str, Tally]) -> dict[str, Any]:
    """What was noted, as the report has it."""
    return {name: asdict(tally) for name, tally in tallies.items()}


def spread(lengths: Sequence[int]) -> dict[str, float] | None:
    """Median, the least number that 90 % do not exceed, and the most. None of nothing.

    Example:
        >>> spread([1, 2, 3, 40])
        {'median': 2.5, 'p90': 40, 'most': 40}
    """
    if not lengths:
        return None
    ranked = sorted(lengths)
    return {"median": median(ranked), "p90": ranked[-(len(ranked) // 10) - 1], "most": ranked[-1]}
