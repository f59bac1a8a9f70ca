"""Batched ``generate`` of ``transformers``, as most scripts write it: samples at temperature 1, left-padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

Ids = list[int]


def sampling(max_new_tokens: int, terminator_id: int, pad_id: int, **more: Any) -> GenerationConfig:
    """The untouched distribution of the model."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=terminator_id,
        pad_token_id=pad_id,
        **more,
    )


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Ids], batch_size: int, is_sorted: bool, settings: GenerationConfig
) -> list[Ids]:
    """One answer to each prompt, terminator included, in the order of the prompts.

    Args:
        is_sorted: Batch prompts of similar length together, instead of in their order of arrival.
    """
    order = list(range(len(prompts)))
    if is_sorted:
        order.sort(key=lambda index: len(prompts[index]))
    device = next(model.parameters()).device
    pad_id, terminator_id = settings.pad_token_id, settings.eos_token_id
    answers: dict[int, Ids] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in indices)
        rows = [[pad_id] * (longest - len(prompts[index])) + prompts[index] for index in indices]
        mask = [[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in indices]
        tokens = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
        )[:, longest:].tolist()
        for index, ids in zip(indices, tokens, strict=True):
            answers[index] = ids[: ids.index(terminator_id) + 1] if terminator_id in ids else ids
    return [answers[index] for index in range(len(prompts))]
