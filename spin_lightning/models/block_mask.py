"""Which tokens each token of a batch may see, as FlexAttention on a GPU wants it.

A token sees two runs of tokens: its prompt, and its own sequence up to itself. So blocks of the mask are found by
counting along these runs, tokens times blocks of them, and not tokens times tokens.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spin_lightning.types import ResponseBatch

#: Tokens on either side of a block of the mask. FlexAttention is fastest on passes of whole blocks.
MASK_BLOCK = 128


def block_mask(layout: ResponseBatch, window: int | None, length: int, device: torch.device) -> Any:
    """A batch's mask for FlexAttention. Made once a batch, and kept with it.

    Args:
        layout: Where the batch's prompts and responses stand.
        window: How many positions back a token sees, itself included. None: all.
        length: Tokens of the pass; those behind the batch's, which fill it up, see themselves.
        device: Where the mask is wanted.
    """
    if window not in layout.block_masks:
        runs = torch.from_numpy(find_runs(layout, window, length))
        if device.type == "cuda":  # out of pinned memory nothing has to wait for the device
            runs = runs.pin_memory()
        layout.block_masks[window] = _make_mask(*runs.to(device, non_blocking=True))
    return layout.block_masks[window]


def find_runs(layout: ResponseBatch, window: int | None, length: int) -> NDArray[np.int64]:
    """Where the runs that each token sees begin and end.

    Returns:
        Shape ``(3, length)``: the first token of its prompt that a token sees, the one after the last, and the first
        token of its own sequence. A prompt's own tokens see no prompt beside themselves.

    Example:
        >>> from spin_lightning.models.batches import pack
        >>> find_runs(pack([([5, 6], [[7], [8, 9]])]), None, 6).tolist()
        [[0, 0, 0, 0, 0, 0], [0, 0, 2, 2, 2, 0], [0, 0, 2, 3, 3, 5]]
    """
    begin, end = np.zeros((2, length), np.int64)
    own = np.arange(length)
    start = 0
    for prompt_length, *of_responses in layout.lengths:
        after = start + prompt_length
        own[start:after] = start
        for first, last in pairwise(accumulate(of_responses, initial=after)):
            own[first:last] = first
            begin[first:last], end[first:last] = start, after
            if window is not None:  # a response's positions continue those of its prompt
                begin[first:last] += np.clip(np.arange(last - first) + prompt_length - window + 1, 0, prompt_length)
        start = after + sum(of_responses)
    if window is not None:
        own = np.maximum(own, np.arange(length) - window + 1)
    return np.stack([begin, end, own])


def _make_mask(begin: Tensor, end: Tensor, own: Tensor) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= own[q]) & (k <= q)) | ((k >= begin[q]) & (k < end[q]))

    length = len(own)
    blocks = torch.arange(0, length, MASK_BLOCK, device=own.device)

    def count(first: Tensor, after: Tensor) -> Tensor:
        """Tokens from ``first`` to ``after`` in each block, shape ``(length, blocks)``."""
        stops, starts = torch.minimum(after[:, None], blocks + MASK_BLOCK), torch.maximum(first[:, None], blocks)
        return (stops - starts).clamp_min_(0)

    seen = count(own, torch.arange(1, length + 1, device=own.device)) + count(begin, end)
    by_block = F.pad(seen, (0, 0, 0, -length % MASK_BLOCK)).unflatten(0, (-1, MASK_BLOCK))
    whole = by_block.amin(1) == MASK_BLOCK
    partly = (by_block.amax(1) > 0) & ~whole

    def listed(kind: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks of a kind each row of blocks has, and these before all others."""
        order = kind.int().argsort(dim=-1, descending=True, stable=True)
        return kind.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(partly), *listed(whole), BLOCK_SIZE=MASK_BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )
