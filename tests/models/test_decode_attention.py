"""Every way to attend with one query a row gives what attention is, in numbers."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spin_lightning.models import decode_attention
from spin_lightning.models.decode_attention import CANDIDATES, attend_compiled, make_inputs

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="nothing can be compiled here")
#: Heads, key heads and their width: groups of several sizes, heads with keys of their own.
SHAPES = [(9, 3, 64), (4, 4, 16), (14, 2, 32), (8, 1, 128)]
PARAMETERS = [pytest.param(name, marks=needs_compiler if name == "compiled" else []) for name in CANDIDATES]


def make_states(heads: int, key_heads: int, head_dim: int, hidden: float = -torch.inf) -> tuple[Tensor, ...]:
    """Three rows out of larger buffers: one whole, one padded in front, one that sees a window only."""
    random = torch.Generator().manual_seed(heads)
    query = torch.randn(3, heads, 1, head_dim, generator=random).bfloat16() * 3
    buffers = torch.randn(2, 5, key_heads, 60, head_dim, generator=random).bfloat16()
    mask = torch.zeros(3, 1, 1, 37, dtype=torch.bfloat16)
    mask[1, ..., :29] = mask[2, ..., :30] = hidden
    key, value = (buffer[:3, :, 11:48] for buffer in buffers)
    return query, key, value, mask


def expected_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    group = query.shape[1] // key.shape[1]
    query, key, value = (
        x.double() for x in (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))
    )
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale) + mask.double()
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("hidden", "scale"), [(-torch.inf, None), (torch.finfo(torch.bfloat16).min, 0.3)])
def test_every_candidate_is_attention(
    name: str, shape: tuple[int, int, int], hidden: float, scale: float | None
) -> None:
    states = make_states(*shape, hidden)
    expected = expected_of(*states, scale)
    found = CANDIDATES[name](*states, scale)
    assert found.dtype is torch.bfloat16
    # rounded once where weights meet values, and once at the end
    assert (found.double() - expected).abs().max() <= 2**-7 * states[2].abs().max()
    assert (found.double() - expected).abs().mean() <= 2**-9 * expected.abs().mean() + 1e-3


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_mask_may_differ_by_head(name: str) -> None:
    query, key, value, mask = make_states(9, 3, 64)
    slopes = torch.linspace(-1, 1, 9).bfloat16()[:, None, None] * torch.arange(37).bfloat16()
    states = (query, key, value, mask + slopes)
    found = CANDIDATES[name](*states, None)
    assert (found.double() - expected_of(*states, None)).abs().max() <= 2**-7 * value.abs().max()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_mask_may_be_one_of_truth_values(name: str) -> None:
    query, key, value, mask = make_states(9, 3, 64)
    found = CANDIDATES[name](query, key, value, mask == 0, None)
    assert (found.double() - expected_of(query, key, value, mask, None)).abs().max() <= 2**-7 * value.abs().max()


@needs_compiler
def test_in_c_a_row_may_see_one_key_or_none() -> None:
    query, key, value, mask = make_states(40, 2, 16)  # and a group is larger than what is unrolled
    mask = mask.clone()
    mask[0], mask[0, ..., 5], mask[1] = -torch.inf, 0, -torch.inf
    found = attend_compiled(query, key, value, mask, None)
    assert torch.equal(found[0, :, 0], value[0, :, 5].repeat_interleave(20, 0))
    assert not found[1].any() and found[2].isfinite().all()


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_wider_dtypes_they_agree_closely(name: str, dtype: torch.dtype) -> None:
    states = [x.to(dtype) for x in make_states(9, 3, 64)]
    torch.testing.assert_close(
        CANDIDATES[name](*states, None).double(), expected_of(*states, None), atol=1e-6, rtol=1e-5
    )


@needs_compiler
def test_in_c_what_is_hidden_is_not_read() -> None:
    query, key, value, mask = make_states(9, 3, 64)
    expected = attend_compiled(query, key, value, mask, None)
    key, value = key.clone(), value.clone()
    key[1, :, :29] = value[1, :, :29] = torch.nan
    assert torch.equal(attend_compiled(query, key, value, mask, None), expected)


@needs_compiler
def test_in_c_a_row_is_the_same_alone_and_with_several_threads() -> None:
    states, threads = make_states(8, 1, 128), torch.get_num_threads()
    together = attend_compiled(*states, None)
    alone = torch.cat([attend_compiled(*(x[row : row + 1] for x in states), None) for row in range(3)])
    try:
        torch.set_num_threads(2)
        threaded = attend_compiled(*states, None)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone) and torch.equal(together, threaded)


@needs_compiler
def test_under_autocast_states_come_in_float32() -> None:
    query, key, value, mask = make_states(9, 3, 64)
    expected = attend_compiled(query, key, value, mask, None)
    lowest = torch.full((), torch.finfo(torch.float32).min)
    wide = torch.where(mask == 0, 0.0, lowest)
    assert torch.equal(attend_compiled(query.float(), key, value, wide, None), expected)


@needs_compiler
def test_building_it_leaves_tiny_numbers_as_they_are() -> None:
    decode_attention._build(16, 3)
    assert float(torch.tensor(1e-40) * 0.5) > 0


@pytest.fixture
def builds_anew() -> Iterator[None]:
    decode_attention._build.cache_clear()
    yield
    decode_attention._build.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"), [("", "there is no C compiler"), ("false", "returned non-zero exit status 1")]
)
def test_where_nothing_can_be_compiled_it_says_so(
    compiler: str, reason: str, builds_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NotImplementedError, match=f"cannot be built here: .*{reason}"):
        attend_compiled(*make_states(9, 3, 64), None)


@needs_compiler
def test_the_compiler_of_the_environment_is_taken(builds_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: "cc -pthread")
    attend_compiled(*make_states(9, 3, 64), None)


def test_in_c_there_are_some_widths_only() -> None:
    with pytest.raises(NotImplementedError, match="a multiple of 16, not 24"):
        attend_compiled(*make_states(6, 2, 24), None)


def test_in_c_there_is_bfloat16_only() -> None:
    with pytest.raises(NotImplementedError, match=r"not of torch\.float32"):
        attend_compiled(*(x.float() for x in make_states(9, 3, 64)), None)


@pytest.mark.parametrize("settings", [{"head_dim": 16}, {"num_key_value_heads": 4}])
def test_what_it_is_tried_on_has_the_heads_of_the_model(
    settings: dict[str, Any], tiny_llama: Callable[..., Any]
) -> None:
    query, key, value, mask, scale = make_inputs(tiny_llama(**settings), torch.bfloat16)
    heads = {"head_dim": (4, 2, 16), "num_key_value_heads": (4, 4, 4)}[next(iter(settings))]
    assert (query.shape[1], key.shape[1], key.shape[3]) == heads
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    assert torch.equal(CANDIDATES["grouped"](query, key, value, mask, scale), expected)
    assert mask.isinf().any() and not mask.isinf().all()


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    return lambda **more: LlamaForCausalLM(LlamaConfig(**{**sizes, "intermediate_size": 8, "vocab_size": 9, **more}))
