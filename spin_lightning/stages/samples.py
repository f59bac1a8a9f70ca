"""Prints real and generated responses side by side when an iteration's pairs are made."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

import lightning as L

from spin_lightning.generation.pair_store import PairStore, name_sides
from spin_lightning.terminal import printable, say
from spin_lightning.types import UserError


class ShowAnswers(L.Callback):
    """Shows a person what the opponent says, each iteration for the same prompts.

    Args:
        num_prompts: How many pairs to show. 0 shows none.
        width: Characters of a line, at least 40. A narrower terminal has shorter ones.
    """

    def __init__(self, num_prompts: int = 3, width: int = 100) -> None:
        if num_prompts < 0:
            raise UserError(f"samples.num_prompts must be 0 or more, got {num_prompts!r}.")
        if width < 40:
            raise UserError(f"samples.width must be at least 40 characters, got {width!r}.")
        self.num_prompts = num_prompts
        self.width = width

    def on_generation_end(
        self, trainer: L.Trainer, module: L.LightningModule, iteration: int, store: PairStore, report: dict[str, Any]
    ) -> None:
        if not isinstance(store, PairStore):  # of a stage without pairs
            return
        real, generated = name_sides(report)
        labels = (real, f"iteration {iteration}" if generated == "generated" else generated)
        columns = ["iteration", "prompt", "chosen", "rejected"]
        first = store.read_shard(store.manifest["shards"][0]["file"], columns).slice(0, self.num_prompts)
        width = max(40, min(self.width, shutil.get_terminal_size((self.width, 24)).columns))
        for row in first.to_pylist():
            say(
                side_by_side(
                    {
                        "prompt": row["prompt"][-1]["content"],
                        labels[0]: row["chosen"][0]["content"],
                        labels[1]: row["rejected"][0]["content"],
                    },
                    width,
                )
            )


def side_by_side(texts: dict[str, str], width: int = 100) -> str:
    """Labelled texts under each other, cut to three lines each, with nothing in them that a terminal obeys.

    Example:
        >>> print(side_by_side({"real": "Yes.", "iteration 0": "No."}))
          real         Yes.
          iteration 0  No.
    """
    label_width = max(map(len, texts))
    lines = []
    for label, text in texts.items():
        wrapped = textwrap.wrap(
            printable(" ".join(text.split())), width - label_width - 4, max_lines=3, placeholder=" ..."
        ) or ["(empty)"]
        lines += [f"  {(label if number == 0 else ''):<{label_width}}  {line}" for number, line in enumerate(wrapped)]
    return "\n".join(lines)
