"""Log-probabilities of responses: a model and token tensors in, one number a response out.

No tokenizer, no loading, no Lightning. The one-token shift between logits and ids happens here and nowhere
else, so every caller passes unshifted tensors. Only the positions from the first scored one on reach the LM head.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from spin_lightning.types import PairBatch, PairLogProbs


def response_log_probs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    """Log-probability of each row's response given its prompt: the SUM over its tokens, in nats.

    Args:
        model: A Hugging Face causal language model.
        input_ids: Prompt and response, right padded, shape ``(R, T)``.
        attention_mask: 1 on every token that is not padding, shape ``(R, T)``.
        response_mask: True on the tokens to score, unshifted, shape ``(R, T)``. The first column is never scored.

    Returns:
        Shape ``(R,)``, float32 (float64 for a float64 model). A row without scored tokens gives 0.

    Source: log p(y|x) = sum_j log p(y_j | x, y_<j), Chen et al. 2024 (arXiv:2401.01335), section 3.
    """
    # The logits at position t predict token t + 1, so the first useful ones are just before the first scored token.
    first = int(response_mask[:, 1:].any(0).int().argmax())
    num_kept = input_ids.shape[1] - first
    kwargs = {"logits_to_keep": num_kept} if "logits_to_keep" in _forward_parameters(type(model)) else {}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).logits
    mask = response_mask[:, first + 1 :]
    scored = logits[:, -num_kept:-1][mask]
    scored = scored.float() if scored.dtype in (torch.bfloat16, torch.float16) else scored
    targets = input_ids[:, first + 1 :][mask]
    token_log_probs = scored.gather(1, targets[:, None]).squeeze(1) - scored.logsumexp(1)
    return torch.zeros_like(mask, dtype=scored.dtype).masked_scatter(mask, token_log_probs).sum(1)


def pair_log_probs(model: nn.Module, batch: PairBatch) -> PairLogProbs:
    """Log-probs of the real and generated (and, where present, initial) responses of a batch, in one forward pass."""
    log_probs = response_log_probs(model, batch.input_ids, batch.attention_mask, batch.response_mask)
    lengths = batch.response_mask.sum(1)
    real, generated, *initial = log_probs.split(len(batch))
    real_lengths, generated_lengths, *_ = lengths.split(len(batch))
    return PairLogProbs(real, generated, real_lengths, generated_lengths, initial[0] if initial else None)


def _forward_parameters(model_class: type, _cache: dict[type, frozenset[str]] = {}) -> frozenset[str]:  # noqa: B006
    if model_class not in _cache:
        _cache[model_class] = frozenset(inspect.signature(model_class.forward).parameters)
    return _cache[model_class]
