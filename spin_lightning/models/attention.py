"""The name under which ``transformers`` looks up the attention of a model at each forward pass.

It keeps the name in a private attribute of the config, which is read and set here only. And how many heads there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def attention_of(config: Any) -> str:
    """The name of a model's attention, such as ``sdpa``."""
    return str(config._attn_implementation)


def heads_of(model: Any) -> tuple[int, int, int]:
    """Heads, those of keys and values, and the width of a head, as a model's config has them.

    Raises:
        AttributeError: It does not say so.
    """
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, key_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def set_attention(config: Any, name: str) -> None:
    """Have a model take the attention of this name, which is registered already, from now on."""
    config._attn_implementation = name


@contextmanager
def attention(config: Any, name: str) -> Iterator[None]:
    """Have a model take the attention of this name while this lasts."""
    own = attention_of(config)
    set_attention(config, name)
    try:
        yield
    finally:
        set_attention(config, own)
