"""Sums with their steps: a program can tell whether the answer is right, whatever way leads there.

No tokenizer, no model, no download. A seed gives the same bytes on every version of Python, and train and held-out rows
never share a prompt.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from spin_lightning.demos.skills import Rows, write_rows
from spin_lightning.types import UserError

#: Numbers have two digits, so that there are so many prompts.
MOST_ROWS = 4000


def solve(left: int, right: int, sign: int) -> str:
    """The response: tens first, then ones.

    Example:
        >>> solve(82, 37, -1)
        '82 minus 30 is 52, 52 minus 7 is 45. The answer is 45.'
    """
    word, tens, ones = "plus" if sign > 0 else "minus", right // 10 * 10, right % 10
    between, result = left + sign * tens, left + sign * right
    return f"{left} {word} {tens} is {between}, {between} {word} {ones} is {result}. The answer is {result}."


def make_sums(num_train: int = 512, num_held_out: int = 256, seed: int = 0) -> tuple[Rows, Rows]:
    """Train and held-out rows of chat messages: plus and minus take turns, and no result is negative.

    Held-out rows are drawn first, so asking for more training rows only appends.

    Example:
        >>> [message["content"] for message in make_sums(num_train=1, num_held_out=2)[0][0]["messages"]][0]
        'What is 40 plus 58?'
    """
    if min(num_train, num_held_out) < 0 or num_train + num_held_out > MOST_ROWS:
        raise UserError(
            f"expected counts of at least 0 with a sum of at most {MOST_ROWS}, so that no prompt comes twice, got "
            f"num_train={num_train!r} and num_held_out={num_held_out!r}. Lower or raise them."
        )
    rng, seen = Random(f"sums/{seed}"), set[str]()
    rows: Rows = []
    while len(rows) < num_train + num_held_out:
        sign = -1 if len(rows) % 2 else 1
        left, right = sorted((11 + int(rng.random() * 88), 11 + int(rng.random() * 88)), reverse=sign < 0)
        prompt = f"What is {left} {'plus' if sign > 0 else 'minus'} {right}?"
        if prompt in seen:
            continue
        seen.add(prompt)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": solve(left, right, sign)}]
        rows.append({"messages": turns})
    return rows[num_held_out:], rows[:num_held_out]


def write_sums(folder: Path, num_train: int = 512, num_held_out: int = 256, seed: int = 0) -> tuple[Path, Path]:
    """Paths of ``train.jsonl`` and ``held_out.jsonl``, written so that no reader ever sees half a file."""
    return write_rows(folder, *make_sums(num_train, num_held_out, seed))
