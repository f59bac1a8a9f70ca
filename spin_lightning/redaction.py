"""Leaves secrets out of what is written down."""

from __future__ import annotations

import re
from typing import Any

_NAME = re.compile(
    r"secret|passw(or)?d|credential|authori[sz]ation|(^|_)(auth|pwd|bearer)$"
    r"|(^|_)(api|access|private|secret|account|ssh|encryption)_?keys?(_|$)"
    r"|(?<!pad)(?<!eos)(?<!bos)(?<!unk)(?<!sep)(?<!cls)(?<!mask)(^|_)token$"
)
_VALUE = re.compile(
    r"\b(?:hf|sk|ghp|gho|github_pat|wandb|xoxb)[_-][\w-]{16,}|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^/@\s]+:[^/@\s]+(?=@)|\bBearer\s+\S+"
)


def redacted(value: Any, name: str = "") -> Any:
    """Settings as they may be kept: without values that are secrets, by their name or by how they look.

    Args:
        value: Dicts, lists and plain values, as JSON or YAML knows them.
        name: The name that the value has.

    Example:
        >>> redacted({"api_key": "abc", "max_new_tokens": 5, "push": ["to hf_abcdefghijklmnopqrst"]})
        {'api_key': '***', 'max_new_tokens': 5, 'push': ['to ***']}
    """
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, name) for item in value]
    if value is None or isinstance(value, bool):
        return value
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.rpartition(".")[2]).lower().replace("-", "_")
    if _NAME.search(words):
        return "***"
    return _VALUE.sub("***", value) if isinstance(value, str) else value
