"""Training and evaluation mode: kept module by module, and out of what would be random in training.

Dropout is one source of randomness. Routers of mixtures of experts have others, which a number in a config need not
turn off (PhiMoE samples its experts, Mixtral and others add noise); whether a model is random is found by trying it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

#: Tokens of the sequence that a model is tried on.
TRIAL_TOKENS = 64


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while this lasts; then every module has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        # up to torch 2.10, weights that autocast cast without gradients would be kept, and get none in the next pass
        torch.clear_autocast_cache()


@torch.no_grad()
def is_random(model: nn.Module) -> bool:
    """Whether two passes over the same tokens differ, by more than kernels do that add in any order.

    In the mode the model is in. False for one that cannot be asked.
    """
    try:
        embeddings: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.arange(TRIAL_TOKENS, device=embeddings.device)[None] * 7919 % len(embeddings)
        first, second = (model(input_ids=ids, use_cache=False).logits.float() for _ in range(2))
        difference, spread = (first - second).square().mean().sqrt(), first[first.isfinite()].std()
        return bool(difference > torch.finfo(embeddings.dtype).eps ** 0.75 * spread)
    except Exception:  # what is wrong with it is said where it is needed
        return False


def calm(model: nn.Module) -> None:
    """Train in evaluation mode, but for the modules that recompute activations, which they do in training mode only."""
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))


def compute_dtype(device: torch.device, model: nn.Module) -> torch.dtype:
    """The dtype the matrix products of a model run in, here and now."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(model.parameters()).dtype
