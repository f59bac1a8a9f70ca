"""What a run computed, in token-passes: a forward pass of a token is 1, training on it 3, sampling it 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from spin_lightning.generation.pair_store import PairStore
from spin_lightning.runs.files import read_json
from spin_lightning.stages.iteration import iteration_folder
from spin_lightning.stages.law_table import LawStore

#: Of a token that is trained on: the forward pass, and a backward pass of twice as much.
TRAINING = 3
#: The commands whose runs tell what they computed.
COUNTED = ("sft", "fit")


def passes_of(word: str, folder: Path) -> int | None:
    """The token-passes of a run that is over; None where its folder does not tell them.

    Of a game: each own response is sampled behind its prompt, all pairs are scored by the opponent, and they are
    trained on; where it compares tokens, the opponent scores the real responses and samples nothing. Of SFT that stays
    near its start, the start scores them too. Prompts count once for all their responses. Measuring held-out rows is
    not counted.

    Args:
        word: The command of the run.
        folder: Its folder.
    """
    if word == "sft":
        tokens = (read_json(folder / "summary.json") or {}).get("trained_tokens")
        return None if tokens is None else TRAINING * tokens + _passes_of_laws(folder / "start_laws")
    if word not in COUNTED:
        return None
    total = 0
    for summary in (read_json(folder / "game.json") or {"iterations": []})["iterations"]:
        if "trained_tokens" not in summary:
            return None
        number = summary["iteration"]
        place = iteration_folder(folder, number)
        of_table = _passes_of_laws(place / "laws") or _passes_of_pairs(place, number)
        total += TRAINING * summary["trained_tokens"] + of_table
    return total


def _passes_of_laws(folder: Path) -> int:
    """Of taking next-token laws, where they were taken: each response is scored once behind its prompt."""
    if not folder.is_dir():
        return 0
    table = LawStore(folder).read(["prompt_ids", "real_ids"])
    return sum(pc.sum(pc.list_value_length(table[name])).as_py() or 0 for name in table.column_names)


def _passes_of_pairs(folder: Path, number: int) -> int:
    """Of making and scoring an iteration's pairs."""
    names = ["iteration", "prompt_id", "prompt_ids", "real_ids", "generated_ids"]
    table = PairStore(folder / "pairs").read(names)
    if not table.num_rows:
        return 0
    lengths: dict[str, list[int]] = {name: pc.list_value_length(table[name]).to_pylist() for name in names[2:]}
    sampled = scored = 0
    prompts_sampled: set[int] = set()
    prompts_scored: set[int] = set()
    rows: Any = zip(table["iteration"].to_pylist(), table["prompt_id"].to_pylist(), *lengths.values(), strict=True)
    for iteration, prompt_id, prompt, real, generated in rows:
        if iteration == number:
            sampled += generated + prompt * (prompt_id not in prompts_sampled)
            prompts_sampled.add(prompt_id)
        scored += generated + (prompt + real) * (prompt_id not in prompts_scored)
        prompts_scored.add(prompt_id)
    return sampled + scored


def updates_for(passes: float, rows: int, row_tokens: float, batch_size: int, accumulated: int = 1) -> int:
    """How many updates of SFT take so many token-passes, at least one.

    Args:
        passes: Token-passes.
        rows: Rows that are trained on in an epoch.
        row_tokens: Mean tokens of one, prompt and response.
        batch_size: Rows in a batch; the last one of an epoch has what is left.
        accumulated: Batches in an update.

    Example:
        >>> updates_for(3 * 10 * 20.0 * 4, rows=10, row_tokens=20.0, batch_size=5)  # four epochs of two updates
        8
    """
    batches = -(-rows // batch_size)
    updates = -(-batches // accumulated)
    return max(1, round(passes / (TRAINING * rows * row_tokens) * updates))
