"""A model's key-value cache, under the name that the model knows.

transformers 5.24 renamed ``past_key_values`` to ``cache``. Up to 5.23 models do not know the new name, from 5.24 on the
old one is warned of, and it goes away in 5.40. A model whose code came with its weights keeps the name it was written
with.
"""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from typing import Any

from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast


def cache_argument(model: nn.Module) -> str:
    """The argument of a model's forward pass that takes its cache; where none is named, what transformers calls it.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, input_ids, past_key_values=None): ...
        >>> cache_argument(Model())
        'past_key_values'
    """
    named = [*signature(model.forward).parameters, *(field.name for field in fields(CausalLMOutputWithPast))]
    return next(name for name in named if name in ("cache", "past_key_values"))


def cache_of(output: Any) -> Any:
    """The cache that a forward pass returned."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
