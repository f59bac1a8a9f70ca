"""The gated feed-forward layer that keeps less, against the one it replaces, and the layers it must not touch."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import tiny_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import Gemma2Config, LlamaConfig, Phi3Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from spin_lightning.models.forward_paths import FUSED
from spin_lightning.models.fused_layers import Fused, fuse_layers, unfuse_layers

SHAPE = {"hidden_size": 12, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}


class SwiGlu(nn.Module):
    """Other names, another order."""

    def __init__(self, width: int = 12, inner: int = 12) -> None:
        super().__init__()
        self.out, self.w3, self.w1 = nn.Linear(inner, width), nn.Linear(width, inner), nn.Linear(width, inner)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


LAYERS = {
    "llama": lambda: LlamaMLP(LlamaConfig(**SHAPE, mlp_bias=True)),
    "gemma2": lambda: Gemma2MLP(Gemma2Config(**SHAPE)),
    "other names": SwiGlu,
}


def fused_copy(own: nn.Module) -> nn.Module:
    fused = copy.deepcopy(own)
    fuse_layers(fused, FUSED)
    assert isinstance(fused, Fused) and isinstance(fused, type(own)) and not isinstance(own, Fused)
    return fused


def run(layer: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    inputs = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = layer(inputs)
    above = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    return [output, *torch.autograd.grad(output, [inputs, *weights], above)]


@contextmanager
def counted() -> Iterator[list[int]]:
    """The sizes of what is kept for the backward pass, the layers' own exceptions left out."""
    sizes: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        yield sizes


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_and_gradients_are_the_same_to_the_bit(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    own = LAYERS[name]().to(dtype)
    fused = fused_copy(own)
    for shape in ((2, 7, 12), (5, 1, 12), (9, 12)):
        x = torch.randn(shape).to(dtype)
        assert all(torch.equal(a, b) for a, b in zip(run(fused, x), run(own, x), strict=True))
    if dtype is torch.float32:
        mixed = zip(run(fused, x, torch.bfloat16), run(own, x, torch.bfloat16), strict=True)
        assert all(torch.equal(a, b) for a, b in mixed)
    for part in (own, fused):  # what only adapters train needs fewer gradients
        next(part.parameters()).requires_grad_(False)
    assert all(torch.equal(a, b) for a, b in zip(run(fused, x), run(own, x), strict=True))


def test_only_gate_and_up_are_kept() -> None:
    own = LAYERS["llama"]()
    x = torch.randn(1, 7, 12)
    with counted() as kept_by_own:
        own(x)
    fused, products = fused_copy(own), []
    fused.down_proj.register_forward_pre_hook(lambda _, inputs: products.append(weakref.ref(inputs[0])))
    with counted() as kept:
        output = fused(x)
    assert output.requires_grad and [product() for product in products] == [None]
    assert kept_by_own.count(7 * 40) == 4  # act(gate) and the product, too
    assert kept.count(7 * 40) == 2


def test_under_gradient_checkpointing_too() -> None:
    own = LAYERS["llama"]()
    fused = fused_copy(own)
    expected = run(own, x := torch.randn(1, 7, 12))
    found = run(nn.Sequential(Checkpointed(fused)), x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with counted() as kept:
        Checkpointed(fused)(x)
    assert 7 * 40 not in kept


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_the_projections_are_called_with_their_hooks() -> None:
    fused = fused_copy(LAYERS["llama"]())
    seen: list[str] = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(fused, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    run(fused, torch.randn(1, 7, 12))
    assert seen == ["gate_proj", "up_proj", "down_proj"]


def test_a_second_derivative_is_refused() -> None:
    fused, x = fused_copy(LAYERS["llama"]()), torch.randn(1, 7, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_undoing_leaves_no_trace() -> None:
    model = tiny_model(32)
    classes = [type(module) for module in model.modules()]
    fuse_layers(model, FUSED)
    assert sum(isinstance(module, LlamaMLP) and isinstance(module, Fused) for module in model.modules()) == 2
    assert len({type(module) for module in model.modules() if isinstance(module, LlamaMLP)}) == 1
    assert model.state_dict().keys() == tiny_model(32).state_dict().keys()
    unfuse_layers(model)
    assert [type(module) for module in model.modules()] == classes


class Plus(SwiGlu):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


class Gated(SwiGlu):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class Dropped(SwiGlu):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()


class Scaled(SwiGlu):
    """By a weight of its own, which is one at first."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Random(SwiGlu):
    """In training only."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class InPlace(SwiGlu):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)


class Tuples(SwiGlu):
    """One of whose parts gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.w3.register_forward_hook(lambda module, inputs, output: (output,))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.w1(x)) * self.w3(x)[0])  # type: ignore[no-any-return]


def make_random() -> nn.Module:
    return Random().eval()


@pytest.mark.parametrize(
    "make",
    [
        Plus,
        Gated,
        Dropped,
        Scaled,
        make_random,
        InPlace,
        Tuples,
        lambda: Phi3MLP(Phi3Config(**SHAPE, pad_token_id=0)),
        lambda: SwiGlu().to("meta"),
    ],
)
def test_layers_that_compute_something_else_are_left_alone(make: type[nn.Module]) -> None:
    layer = make()
    before, mode = type(layer), layer.training
    fuse_layers(layer, FUSED)
    assert type(layer) is before and layer.training is mode
    assert all(weight.grad is None for weight in layer.parameters())
