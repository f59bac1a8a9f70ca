"""What a GPU runs, compared on a CPU with what a CPU runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention

from spin_lightning.models import shared_prompt
from spin_lightning.models.batches import pack
from spin_lightning.models.block_mask import MASK_BLOCK, block_mask
from spin_lightning.types import ResponseBatch

CPU = torch.device("cpu")
#: Lengths of prompts and of their responses: empty ones among them, and some longer than a block of the mask.
LAYOUTS: dict[str, list[tuple[int, list[int]]]] = {
    "short": [(3, [4, 2]), (1, [1]), (5, [3, 0, 6])],
    "empty prompt": [(0, [5]), (7, [2, 2])],
    "several blocks": [(150, [140, 30]), (20, [300]), (1, [2, 129])],
}


def make_layout(name: str) -> ResponseBatch:
    return pack([([5] * prompt, [[6] * length for length in lengths]) for prompt, lengths in LAYOUTS[name]])


def visible(batch: ResponseBatch, window: int | None, length: int) -> Tensor:
    """What each token sees by the segments of a CPU; tokens behind the batch see themselves."""
    expected = torch.eye(length, dtype=torch.bool)
    for queries, places in shared_prompt.segments(batch):
        keys = [place for part in places for place in range(part.start, part.stop)]
        mask = shared_prompt._make_mask(queries.stop - queries.start, len(keys), window)
        expected[queries.start : queries.stop, keys] = mask
    return expected


@pytest.mark.parametrize("window", [None, 1, 3, 100, 170])
@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_see_what_they_see_on_a_cpu(name: str, window: int | None) -> None:
    batch = make_layout(name)
    for length in (len(batch.input_ids), len(batch.input_ids) + 5, 2 * MASK_BLOCK * 3):
        if length < len(batch.input_ids):
            continue
        batch.block_masks.clear()
        expected, index = visible(batch, window, length), torch.arange(length)
        mask = block_mask(batch, window, length, CPU)
        nothing = torch.tensor(0)
        assert torch.equal(mask.mask_mod(nothing, nothing, index[:, None], index[None]), expected)
        by_hand = flex_attention.create_block_mask(mask.mask_mod, None, None, length, length, device="cpu")
        assert torch.equal(mask.to_dense(), by_hand.to_dense())
        assert torch.equal(mask.full_kv_num_blocks, by_hand.full_kv_num_blocks)
        assert block_mask(batch, window, length, CPU) is mask


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:The .grad attribute")
@pytest.mark.parametrize(
    ("name", "heads", "key_heads", "window", "softcap"),
    [
        ("short", 4, 4, None, None),
        ("empty prompt", 6, 2, None, 5.0),
        ("several blocks", 6, 2, None, None),
        ("several blocks", 6, 2, 16, 5.0),
    ],
)
def test_flex_attention_gives_the_numbers_and_gradients_of_a_cpu(
    name: str, heads: int, key_heads: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import flex_attention as of_transformers

    # uncompiled it has a backward pass on a CPU too; torch only forbids it
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *args: None)
    plain = lambda *args, training=False, **settings: flex_attention.flex_attention(*args, **settings)  # noqa: E731
    monkeypatch.setattr(of_transformers, "compile_friendly_flex_attention", plain)
    torch.manual_seed(0)
    batch = make_layout(name)
    length = len(batch.input_ids)
    query, key, value = (torch.randn(1, n, length, 16, requires_grad=True) for n in (heads, key_heads, key_heads))
    module: Any = nn.Module()
    module.num_key_value_groups = heads // key_heads
    given = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    expected = shared_prompt.shared_prompt_attention(module, query, key, value, batch, **given)
    found = shared_prompt._attend_in_flex_attention(module, query, key, value, batch, 0.3, window, softcap, {})
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    above = torch.randn_like(expected)
    of_cpu = torch.autograd.grad(expected, (query, key, value), above)
    of_flex = torch.autograd.grad(found, (query, key, value), above)
    torch.testing.assert_close(of_flex, of_cpu, atol=1e-5, rtol=0)
