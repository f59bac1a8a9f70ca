"""The reward of the reinforcement learning that is measured: the same function for every contender."""

from __future__ import annotations

import re
from typing import Any


def right(completions: list[list[dict[str, str]]], answer: list[str], **others: Any) -> list[float]:
    """1 for the right number behind ``answer is``, else 0."""
    found = [re.findall(r"answer is (\d+)", completion[0]["content"]) for completion in completions]
    return [float(numbers[-1:] == [wanted]) for numbers, wanted in zip(found, answer, strict=True)]
