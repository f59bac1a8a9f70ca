"""The fused RMS normalisation against those it replaces, and the layers it must not touch."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny_model
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from spin_lightning.models.fused_layers import Fused, fuse_layers, unfuse_layers
from spin_lightning.models.rms_norm import find_rms_norm


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("shape", [(1, 5, 48), (3, 700, 48), (2, 4, 6, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_as_close_to_float64_as_what_it_replaces(
    kind: type[nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    own = kind(48, 1e-3).to(dtype)
    own.weight.data.normal_()
    fused = copy.deepcopy(own)
    fuse_layers(fused, [find_rms_norm])
    assert isinstance(fused, Fused) and isinstance(fused, kind) and not isinstance(own, Fused)
    x, above = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)

    def run(layer: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        inputs = x.to(dtype).requires_grad_()
        output = layer(inputs)
        return [output, *torch.autograd.grad(output, [inputs, layer.weight], above.to(dtype))]

    class Exact(nn.Module):
        weight = nn.Parameter(own.weight.double())

        def forward(self, x: Tensor) -> Tensor:
            offset = 1.0 if kind is Gemma2RMSNorm else 0.0
            return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * (self.weight + offset)

    for found, replaced, expected in zip(run(fused, dtype), run(own, dtype), run(Exact(), torch.float64), strict=True):
        assert found.dtype is dtype and found.shape == expected.shape
        error, before = ((value.double() - expected).norm() / expected.norm() for value in (found, replaced))
        assert error <= max(1.1 * before, 1e-6)


def test_a_copy_has_its_own_weight_and_undoing_leaves_no_trace() -> None:
    model = tiny_model(32)
    classes = [type(module) for module in model.modules()]
    fuse_layers(model, [find_rms_norm])
    fuse_layers(model, [find_rms_norm])
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    assert len(fused) == 5 and len({type(module) for module in fused}) == 1  # torch.compile needs one class, not five
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    x = torch.randn(1, 3, 16)
    assert model.model.norm(x).abs().sum() > 0 and twin.model.norm(x).abs().sum() == 0
    assert model.state_dict().keys() == tiny_model(32).state_dict().keys()
    unfuse_layers(model)
    assert [type(module) for module in model.modules()] == classes


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


class ShiftedRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


@pytest.mark.parametrize("kind", [GatedRMSNorm, ShiftedRMSNorm, nn.LayerNorm, nn.Linear])
def test_layers_that_compute_something_else_are_left_alone(kind: type[nn.Module]) -> None:
    layer = kind(8, 8) if kind is nn.Linear else kind(8)
    fuse_layers(layer, [find_rms_norm])
    assert type(layer) is kind
