"""The reward of the reinforcement learning that is measured: the same function for every contender."""

from __future__ import annotations

from typing import Any


def digits(completions: list[list[dict[str, str]]], **others: Any) -> list[float]:
    """Share of a response's characters that are digits: responses differ in it, so none is left out of training."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in texts]
