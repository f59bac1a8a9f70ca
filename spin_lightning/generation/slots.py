"""A cache in which rows come and go: one takes a slot when its prompt is read, and leaves it when its response ends.

All rows end in the same column. To a model of ``transformers`` this is a left-padded batch like any other: masks,
sliding windows, positions and head stay the model's own, and no architecture is known here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache

from spin_lightning.generation.packed_linear import decoding_with, packed_forwards
from spin_lightning.models.attention import attention, attention_of
from spin_lightning.models.cache import cache_argument
from spin_lightning.models.cpu_memory import keep_freed_memory, round_up
from spin_lightning.models.rope import limit_of

#: Free columns of a new buffer: so many steps until rows move to the next.
SPARE_COLUMNS = 128
#: Prompt tokens of one prefill pass, unless a single prompt has more.
PREFILL_TOKENS = 2048
#: Rows that share one width of attention on CPU. Every step reads the cache, and the widest row sets the width.
BLOCK_ROWS = 8
BLOCKWISE = "sdpa+blocks"


class SlotCache(Cache):
    """Keys and values of the rows under way, in preallocated buffers ``(slots, heads, columns, head_dim)``.

    Row ``i`` has ``widths[i]`` tokens in slot ``i``, in the columns just before ``end``. No slot between rows is empty.
    """

    def __init__(self, model: Any, slots: int) -> None:
        super().__init__(layers=[])
        self.model, self.slots = model, slots
        self.config = model.config.get_text_config(decoder=True)
        self.device = next(model.parameters()).device
        # a GPU would pay more for launching the blocks than for the columns they spare
        is_blockwise = self.device.type == "cpu" and attention_of(self.config).split("+")[0] == "sdpa"
        self.block_rows = BLOCK_ROWS if is_blockwise else None
        self.forwards = packed_forwards(model, slots)
        self.argument_name = cache_argument(model)
        self.most_positions: int = getattr(self.config, "max_position_embeddings", None) or sys.maxsize
        if self.device.type == "cpu":
            keep_freed_memory()
        self.buffers: list[list[Tensor]] = []  # keys and values of each layer
        self.widths: list[int] = []
        self.past = self.end = self.columns = 0

    def refill(self, kept: list[int], prompts: Sequence[list[int]], pad_id: int) -> list[int]:
        """Drop all rows but those kept, and take in prompts: all their tokens but the last, which the next step feeds.

        Returns:
            What each row now is: the number of an old row or, counting on from these, of a new one.
        """
        count = len(self.widths)
        widths = self.widths + [len(prompt) - 1 for prompt in prompts]
        rows = [*kept, *range(count, len(widths))]
        if max(widths) > self.end:
            self._move_columns(max(widths))
        # the widest rows in the first block, and so on; a row that is in its block already stays where it is
        size = self.block_rows or self.slots
        by_width = sorted(rows, key=lambda row: -widths[row])
        block_of = {row: rank // size for rank, row in enumerate(by_width)}
        stays = {row for row in kept if row < len(rows) and row // size == block_of[row]}
        others = (row for row in by_width if row not in stays)
        order = [slot if slot in stays else next(others) for slot in range(len(rows))]
        moved = [(row, slot) for slot, row in enumerate(order) if row < count and row != slot]
        if moved:
            sources, targets = torch.tensor(moved, device=self.device).T
            used = slice(self.end - max(widths[row] for row, _ in moved), self.end)
            for buffer in chain(*self.buffers):
                buffer[targets, :, used] = buffer[sources, :, used]
        self.widths = [widths[row] for row in order]
        self._prefill_slots(
            [(prompts[row - count][:-1], slot) for slot, row in enumerate(order) if row >= count], pad_id
        )
        return order

    def step(self, last_ids: list[int]) -> Tensor:
        """Feed one token to each row, and return the logits of the next, shape ``(B, V)``."""
        self.past = max(self.widths)
        if self.end == self.columns:
            self._move_columns(self.past)
        ids, widths = torch.tensor([last_ids, self.widths], device=self.device)[..., None]
        mask = torch.arange(self.past + 1, device=self.device) >= self.past - widths
        inputs = {"input_ids": ids, "position_ids": widths, "attention_mask": mask.long()}
        name = attention_of(self.config)
        if self.block_rows:
            name = BLOCKWISE
            blocks = [slice(row, row + self.block_rows) for row in range(0, len(self.widths), self.block_rows)]
            inputs["blocks"] = [(block, max(self.widths[block]) + 1) for block in blocks]
        with attention(self.config, name), decoding_with(self.forwards):
            logits = self.model(**inputs, **{self.argument_name: self}, use_cache=True).logits[:, -1]
        self.end += 1
        self.widths = [width + 1 for width in self.widths]
        return logits

    def _prefill_slots(self, prompts: list[tuple[list[int], int]], pad_id: int) -> None:
        slots: dict[tuple[int, ...], list[int]] = {}  # several responses to one prompt share its pass
        for prompt, slot in prompts:
            if prompt:
                slots.setdefault(tuple(prompt), []).append(slot)
        waiting = sorted(slots, key=len, reverse=True)
        while waiting:
            longest = len(waiting[0])
            group = waiting[: max(1, PREFILL_TOKENS // longest)]
            waiting = waiting[len(group) :]
            # right padding, and so no mask: causal attention does not see what comes after
            padded = torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in group], device=self.device)
            # as far as the model has positions, and its RoPE stays as it is
            most = int(min(self.most_positions, limit_of(self.model, longest)))
            padded = round_up(padded, dim=1)[:, : max(longest, most)]
            cache, no_logits = DynamicCache(), torch.arange(0, device=self.device)
            self.model(input_ids=padded, **{self.argument_name: cache}, use_cache=True, logits_to_keep=no_logits)
            layers: list[Any] = cache.layers
            for layer_idx, layer in enumerate(layers):
                new: tuple[Any, Any] = layer.keys, layer.values
                for buffer, rows in zip(self._buffers_of(layer_idx, *new), new, strict=True):
                    for row, ids in enumerate(group):
                        for slot in slots[ids]:
                            buffer[slot, :, self.end - len(ids) : self.end] = rows[row, :, : len(ids)]

    def _buffers_of(self, layer_idx: int, *new: Tensor) -> list[Tensor]:
        """The buffers of a layer, made when it first comes."""
        if layer_idx == len(self.buffers):
            device = self.device.type
            # under autocast, attention would round the keys anew at every step
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            self.buffers.append(
                [
                    states.new_zeros(self.slots, states.shape[1], self.columns, states.shape[3], dtype=autocast)
                    for states in new
                ]
            )
        return self.buffers[layer_idx]

    def _move_columns(self, end: int) -> None:
        """Move the columns in use to new buffers, where they end at ``end``. One layer at a time is in memory twice."""
        rows, used = len(self.widths), max(self.widths, default=0)
        self.columns = end + SPARE_COLUMNS
        for layer in self.buffers:
            for side, old in enumerate(layer):
                layer[side] = old.new_zeros(*old.shape[:2], self.columns, old.shape[3])
                layer[side][:rows, :, end - used : end] = old[:rows, :, self.end - used : self.end]
        self.end = end

    # what a model asks of its cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._buffers_of(layer_idx, key_states, value_states)
        rows, columns = slice(len(self.widths)), slice(self.end - self.past, self.end + 1)
        keys[rows, :, self.end], values[rows, :, self.end] = key_states[:, :, 0], value_states[:, :, 0]
        return keys[rows, :, columns], values[rows, :, columns]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.past + query_length, 0


def blockwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    blocks: Sequence[tuple[slice, int]] | None = None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of one query a row, in which each block of rows reads as many of the last columns as it needs."""
    parts = [
        F.scaled_dot_product_attention(
            query[rows],
            key[rows, :, -width:],
            value[rows, :, -width:],
            attn_mask=attention_mask[rows, :, :, -width:],
            scale=scaling,
            enable_gqa=True,
        )
        for rows, width in blocks or [(slice(None), key.shape[2])]  # some models do not pass arguments on
    ]
    return torch.cat(parts).transpose(1, 2), None


AttentionInterface.register(BLOCKWISE, blockwise_attention)
# the mask as numbers to add, made once a step: every call would make them again of truth values
AttentionMaskInterface.register(BLOCKWISE, AttentionMaskInterface()["eager"])
