"""The sizes of a model by its config alone: it is made on device ``meta``, where weights have shapes and no numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spin_lightning.models.footprint import ModelSize
from spin_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def make_on_meta(config: PreTrainedConfig, trust_remote_code: bool = False) -> nn.Module:
    """The model of a config without its weights, in seconds and in no memory, whatever its size."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def measure_size(model: Any) -> ModelSize:
    """What of a model decides its memory.

    Weights are counted. Widths are those of its config; where that has no feed-forward width, four times the hidden
    one. Of a mixture of experts, a token goes through as many of these as the config says.

    Raises:
        UserError: The config does not tell them.
    """
    config = model.config.get_text_config(decoder=True)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    hidden, layers = _read(config, "hidden_size"), _read(config, "num_hidden_layers")
    if hidden is None or layers is None:
        raise UserError(
            f"the config of this {type(model).__name__} has no hidden_size or num_hidden_layers, by which its memory "
            "is planned. Measure a run instead: trainer.fast_dev_run."
        )
    heads = _read(config, "num_attention_heads") or 1
    head_size = _read(config, "head_dim") or hidden // heads
    return ModelSize(
        weights=sum(weight.numel() for weight in model.parameters()),
        packable=sum(layer.weight.numel() for layer in linear),
        layers=layers,
        hidden=hidden,
        query=heads * head_size,
        key=(_read(config, "num_key_value_heads") or heads) * head_size,
        intermediate=_width_of_a_token(config, hidden),
        vocabulary=embeddings.weight.shape[0],
        is_tied=head is not None and head.weight is embeddings.weight,
    )


def _read(config: Any, name: str) -> int | None:
    """A number of a config; the largest where layers differ. None if it has none."""
    value = getattr(config, name, None)
    value = max(value, default=None) if isinstance(value, list | tuple) else value
    return value if isinstance(value, int) else None


def _width_of_a_token(config: Any, hidden: int) -> int:
    width = _read(config, "intermediate_size") or 4 * hidden
    experts = _read(config, "num_experts_per_tok")
    return width if experts is None else experts * (_read(config, "moe_intermediate_size") or width)


def count_adapter(model: Any, adapter: Mapping[str, Any]) -> int:
    """Weights that a LoRA adapter trains: for each layer that gets one, its rank times the layer's inputs and outputs.

    Args:
        model: Whose layers these are; on any device.
        adapter: Its settings: ``r``, and where they are given ``target_modules`` (all linear layers but the head if
            not), ``modules_to_save`` and ``use_dora``.

    Raises:
        UserError: No layer has such a name.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> count_adapter(make_on_meta(config), {"r": 2, "target_modules": ["q_proj"]})
        32
    """
    targets, head = adapter.get("target_modules") or "all-linear", model.get_output_embeddings()
    total = found = 0
    for name, layer in model.named_modules():
        if len(getattr(getattr(layer, "weight", None), "shape", ())) == 2 and _is_target(name, layer, targets, head):
            found += 1
            outputs, inputs = layer.weight.shape
            total += adapter.get("r", 16) * (inputs + outputs) + (outputs if adapter.get("use_dora") else 0)
        if any(name.split(".")[-1] == saved for saved in adapter.get("modules_to_save") or ()):
            found += 1
            total += sum(weight.numel() for weight in layer.parameters())
    if not found:
        raise UserError(
            f"no layer of this {type(model).__name__} is named as model.adapter.target_modules {targets!r} says. "
            "Leave it out for all linear layers."
        )
    return total


def _is_target(name: str, layer: nn.Module, targets: Any, head: Any) -> bool:
    if targets == "all-linear":
        return layer is not head and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
