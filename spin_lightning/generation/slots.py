"""A cache in which rows come and go: one takes a slot when its prompt is read, and leaves it when its response ends.

All rows end in the same column. To a model of ``transformers`` this is a left-padded batch like any other: masks,
sliding windows, positions and head stay the model's own, and no architecture is known here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache

from spin_lightning.generation.packed_linear import decoding_with, packed_forwards
from spin_lightning.models import decode_attention
from spin_lightning.models.attention import attention, attention_of
from spin_lightning.models.batches import pack
from spin_lightning.models.cache import cache_argument
from spin_lightning.models.cpu_memory import keep_freed_memory, make_zeros, round_up
from spin_lightning.models.head import decoder_of
from spin_lightning.models.kernels import kernel_of
from spin_lightning.models.rope import limit_of
from spin_lightning.models.shared_prompt import fill_cache, sharing_attention_of

#: Free columns of a new buffer: so many steps until rows move to the next.
SPARE_COLUMNS = 128
#: Prompt tokens of one prefill pass, unless a single prompt has more.
PREFILL_TOKENS = 2048
#: Rows that share one width of attention on CPU. Every step reads the cache, and the widest row sets the width.
BLOCK_ROWS = 8
BLOCKWISE = "sdpa+blocks"

Ids = tuple[int, ...]
#: Keys and values of a layer.
States = tuple[Tensor, Tensor]


class SlotCache(Cache):
    """Keys and values of the rows under way, in preallocated buffers ``(slots, heads, columns, head_dim)``.

    Row ``i`` has ``widths[i]`` tokens in slot ``i``, in the columns just before ``end``. No slot between rows is empty.

    Args:
        model: Of ``transformers``.
        slots: Rows under way at a time.
        prefix: What all prompts begin with, or a part of it: it is read once, and they are read end to end. None: they
            are read in padded rows.
    """

    def __init__(self, model: Any, slots: int, prefix: Sequence[int] | None = None) -> None:
        super().__init__(layers=[])
        self.model, self.slots = model, slots
        self.config = model.config.get_text_config(decoder=True)
        self.device = next(model.parameters()).device
        # a GPU would pay more for launching the blocks than for the columns they spare
        own = attention_of(self.config)
        is_blockwise = self.device.type == "cpu" and own.split("+")[0] == "sdpa"
        kernel = kernel_of(model, "decode_attention") if is_blockwise else ""
        self.attention = f"{BLOCKWISE}+{kernel}" if is_blockwise else own
        # in C no more is read of a row than it has
        self.block_rows = BLOCK_ROWS if is_blockwise and kernel != "compiled" else None
        self.prefix: Ids | None = None if prefix is None or self.device.type != "cpu" else tuple(prefix)
        self.prefix_states: list[States] = []
        self.last: tuple[Ids, list[States]] | None = None  # a prompt, and its keys and values
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
        slot_of = {row: slot for slot, row in enumerate(order)}
        new = [(tuple(prompt[:-1]), slot_of[count + number]) for number, prompt in enumerate(prompts)]
        self._prefill_slots(new, pad_id)
        return order

    def step(self, last_ids: list[int]) -> Tensor:
        """Feed one token to each row, and return the logits of the next, shape ``(B, V)``."""
        self.past = max(self.widths)
        if self.end == self.columns:
            self._move_columns(self.past)
        ids, widths = torch.tensor([last_ids, self.widths], device=self.device)[..., None]
        mask = torch.arange(self.past + 1, device=self.device) >= self.past - widths
        inputs = {"input_ids": ids, "position_ids": widths, "attention_mask": mask.long()}
        if self.block_rows:
            blocks = [slice(row, row + self.block_rows) for row in range(0, len(self.widths), self.block_rows)]
            inputs["blocks"] = [(block, max(self.widths[block]) + 1) for block in blocks]
        with attention(self.config, self.attention), decoding_with(self.forwards):
            logits = self.model(**inputs, **{self.argument_name: self}, use_cache=True).logits[:, -1]
        self.end += 1
        self.widths = [width + 1 for width in self.widths]
        return logits

    def _prefill_slots(self, prompts: list[tuple[Ids, int]], pad_id: int) -> None:
        slots: dict[Ids, list[int]] = {}  # several responses to one prompt share its pass
        for prompt, slot in prompts:
            slots.setdefault(prompt, []).append(slot)
        if self.last and self.last[0] in slots:
            self._write(*self.last, slots.pop(self.last[0]))
        waiting = sorted(filter(None, slots), key=len, reverse=True)
        while waiting:
            group, others = self._cut_group(waiting)
            try:
                read = self._read_padded(group, pad_id) if self.prefix is None else self._read_shared(group)
            except NotImplementedError:  # a mask that only passes longer than those of the trial have
                if self.prefix is None:
                    raise
                self.prefix = None
                continue
            waiting = others
            for ids, states in read:
                self._write(ids, states, slots[ids])
                if ids == prompts[-1][0]:  # the next that comes may be the same
                    self.last = (ids, [(keys.clone(), values.clone()) for keys, values in states])

    def _cut_group(self, prompts: list[Ids]) -> tuple[list[Ids], list[Ids]]:
        """The first prompts that fill a pass, and the others."""
        if self.prefix is not None:
            tokens = accumulate(len(ids) - len(self.prefix) for ids in prompts)
            count = sum(total <= PREFILL_TOKENS for total in tokens)
        else:
            count = PREFILL_TOKENS // len(prompts[0])
        return prompts[: max(1, count)], prompts[max(1, count) :]

    def _read_shared(self, prompts: list[Ids]) -> list[tuple[Ids, list[States]]]:
        """Keys and values of prompts, each ``(heads, len(ids), head_dim)``: end to end, behind what they share."""
        decoder, prefix = decoder_of(self.model), self.prefix or ()
        start, cache = len(prefix), DynamicCache()
        kernel = kernel_of(self.model, "prompt_attention")
        with attention(self.config, sharing_attention_of(self.config, kernel)):
            if prefix and not self.prefix_states:
                fill_cache(decoder, pack([(prefix, [[]])]), cache)
                self.prefix_states = [(keys[:, :, :start], values[:, :, :start]) for keys, values in _states_of(cache)]
                cache = DynamicCache()
            for layer_idx, states in enumerate(self.prefix_states):
                cache.update(*states, layer_idx)
            fill_cache(decoder, pack([(prefix, [ids[start:] for ids in prompts])]), cache)
        found, layers = [], _states_of(cache)
        for ids in prompts:
            own = slice(start, start + len(ids) - len(prefix))
            found.append((ids, [(_join(k[0], len(prefix), own), _join(v[0], len(prefix), own)) for k, v in layers]))
            start = own.stop
        return found

    def _read_padded(self, prompts: list[Ids], pad_id: int) -> list[tuple[Ids, list[States]]]:
        """The same, in padded rows."""
        longest = len(prompts[0])
        # right padding, and so no mask: causal attention does not see what comes after
        padded = torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in prompts], device=self.device)
        # as far as the model has positions, and its RoPE stays as it is
        most = int(min(self.most_positions, limit_of(self.model, longest)))
        padded = round_up(padded, dim=1)[:, : max(longest, most)]
        cache, no_logits = DynamicCache(), torch.arange(0, device=self.device)
        self.model(input_ids=padded, **{self.argument_name: cache}, use_cache=True, logits_to_keep=no_logits)
        layers = _states_of(cache)
        return [
            (ids, [(keys[row, :, : len(ids)], values[row, :, : len(ids)]) for keys, values in layers])
            for row, ids in enumerate(prompts)
        ]

    def _write(self, ids: Ids, states: list[States], slots: list[int]) -> None:
        """Put the keys and values of a prompt into slots."""
        for layer_idx, new in enumerate(states):
            for buffer, rows in zip(self._buffers_of(layer_idx, *new), new, strict=True):
                for slot in slots:
                    buffer[slot, :, self.end - len(ids) : self.end] = rows

    def _buffers_of(self, layer_idx: int, *new: Tensor) -> list[Tensor]:
        """The buffers of a layer, made when it first comes."""
        if layer_idx == len(self.buffers):
            device = self.device.type
            # under autocast, attention would round the keys anew at every step
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            self.buffers.append(
                [
                    make_zeros(states, (self.slots, states.shape[-3], self.columns, states.shape[-1]), autocast)
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
                layer[side] = make_zeros(old, (*old.shape[:2], self.columns, old.shape[3]))
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


def _join(states: Tensor, length: int, own: slice) -> Tensor:
    """The states of the first tokens, and behind them those of a prompt's own."""
    return torch.cat((states[:, :length], states[:, own]), dim=1) if length else states[:, own]


def _states_of(cache: Any) -> list[States]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def blockwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    blocks: Sequence[tuple[slice, int]] | None = None,
    scaling: float | None = None,
    *,
    attend: Callable[..., Tensor],
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of one query a row, in which each block of rows reads as many of the last columns as it needs."""
    parts = [
        attend(
            query[rows],
            key[rows, :, -width:],
            value[rows, :, -width:],
            attention_mask[rows, :, :, -width:],
            scaling,
        )
        for rows, width in blocks or [(slice(None), key.shape[2])]  # some models do not pass arguments on
    ]
    return torch.cat(parts).transpose(1, 2), None


for _name, _attend in decode_attention.CANDIDATES.items():
    AttentionInterface.register(f"{BLOCKWISE}+{_name}", partial(blockwise_attention, attend=_attend))
    # the mask as numbers to add, made once a step: every call would make them again of truth values
    AttentionMaskInterface.register(f"{BLOCKWISE}+{_name}", AttentionMaskInterface()["eager"])
