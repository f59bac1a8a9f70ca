"""Many small Llamas that are computed as one: their weights in one tensor, a row a model.

The forward pass is that of ``transformers``' ``LlamaForCausalLM`` (``pack_weights`` takes its weights, and
``tests/test_study.py`` compares the logits), with the package's layout of a batch: each prompt once, followed by
its responses, which do not see each other. The optimiser is ``torch.optim.AdamW`` with its standard settings, but a
learning rate a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

#: Weight decay of ``torch.optim.AdamW``.
DECAY = 0.01


@dataclass(frozen=True)
class Shape:
    """A Llama with an output layer of its own and as many key heads as heads."""

    vocabulary: int
    hidden: int = 32
    layers: int = 2
    heads: int = 4

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """The weights in the order of the model's state dict, q, k and v as one, gate and up as one."""
        wide, inner = self.hidden, 2 * self.hidden
        parts: dict[str, tuple[int, ...]] = {"embed": (self.vocabulary, wide)}
        for layer in range(self.layers):
            parts |= {
                f"{layer}.qkv": (3 * wide, wide),
                f"{layer}.out": (wide, wide),
                f"{layer}.gate_up": (2 * inner, wide),
                f"{layer}.down": (wide, inner),
                f"{layer}.norm_1": (wide,),
                f"{layer}.norm_2": (wide,),
            }
        return parts | {"norm": (wide,), "head": (self.vocabulary, wide)}

    @property
    def num_weights(self) -> int:
        return sum(math.prod(part) for part in self.parts.values())


@dataclass(frozen=True)
class Layout:
    """Prompts of equal length, each followed by ``responses`` responses of at most ``length`` tokens, the end included.

    The last token of a response predicts nothing, so a response takes ``length - 1`` places.
    """

    prompt: int
    responses: int
    length: int
    positions: Tensor = field(init=False, repr=False)
    mask: Tensor = field(init=False, repr=False)
    predictors: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        inside = self.length - 1
        owner = torch.cat([torch.full((self.prompt,), -1), torch.arange(self.responses).repeat_interleave(inside)])
        positions = torch.cat([torch.arange(self.prompt), (torch.arange(inside) + self.prompt).repeat(self.responses)])
        order = torch.arange(len(owner))
        seen = (order[:, None] >= order) & ((owner == -1) | (owner[:, None] == owner))
        first = self.prompt + inside * torch.arange(self.responses)[:, None] - 1
        predictors = first + torch.arange(self.length)
        predictors[:, 0] = self.prompt - 1
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "mask", torch.zeros(seen.shape).masked_fill(~seen, float("-inf")))
        object.__setattr__(self, "predictors", predictors.flatten())


def pack_weights(state: Mapping[str, Tensor], shape: Shape) -> Tensor:
    """The state dict of a ``LlamaForCausalLM`` as one row, shape ``(P,)``."""
    flat = torch.cat([weight.detach().float().flatten() for weight in state.values()])
    assert len(flat) == shape.num_weights, (len(flat), shape.num_weights)
    return flat


def unpack_weights(flat: Tensor, shape: Shape) -> dict[str, Tensor]:
    """Views of the stacked weights ``(S, P)``, each ``(S, *part)``."""
    pieces = flat.split([math.prod(part) for part in shape.parts.values()], dim=1)
    named = zip(pieces, shape.parts.items(), strict=True)
    return {name: piece.view(len(flat), *part) for piece, (name, part) in named}


def _rotary(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    speeds = 1 / 10000 ** (torch.arange(0, width, 2) / width)
    angles = positions[:, None] * speeds
    return torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * weight[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def logits(weights: Tensor, shape: Shape, layout: Layout, ids: Tensor, dropout: Tensor | None = None) -> Tensor:
    """What each model says at each response token.

    Args:
        weights: Shape ``(S, P)``.
        shape: Of each model.
        layout: Of each sequence.
        ids: Shape ``(S, B, T)``, or ``(1, B, T)`` where all models read the same.
        dropout: Of what attention and the inner layers add to the stream: a rate a model, shape ``(S,)``.

    Returns:
        Shape ``(S, B, responses, length, vocabulary)``.
    """
    part = unpack_weights(weights, shape)
    count, wide, heads = len(weights), shape.hidden, shape.heads
    ids = ids.expand(count, -1, -1)
    rows, time = ids.shape[1:]
    cos, sin = _rotary(layout.positions, wide // heads)

    def drop(x: Tensor) -> Tensor:
        if dropout is None:
            return x
        kept = 1 - dropout[:, None, None]
        return x * (torch.rand_like(x) < kept) / kept

    offsets = torch.arange(count)[:, None, None] * shape.vocabulary
    x = F.embedding((ids + offsets).view(count, rows * time), part["embed"].reshape(-1, wide))
    for layer in range(shape.layers):
        inner = _norm(x, part[f"{layer}.norm_1"]) @ part[f"{layer}.qkv"].mT
        q, k, v = inner.view(count * rows, time, 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed = _attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v, layout.mask)
        mixed = mixed.transpose(1, 2).reshape(count, rows * time, wide)
        x = x + drop(mixed @ part[f"{layer}.out"].mT)
        gate, up = (_norm(x, part[f"{layer}.norm_2"]) @ part[f"{layer}.gate_up"].mT).chunk(2, dim=-1)
        x = x + drop((F.silu(gate) * up) @ part[f"{layer}.down"].mT)
    x = x.view(count, rows, time, wide)[:, :, layout.predictors].reshape(count, -1, wide)
    said = _norm(x, part["norm"]) @ part["head"].mT
    return said.view(count, rows, layout.responses, layout.length, shape.vocabulary)


@dataclass(frozen=True)
class Sample:
    """Responses that were drawn exactly from a model's law.

    Attributes:
        ids: Shape ``(S, B, K, length)``; what follows the end token is padding.
        is_token: Which of them are response tokens, the end included. Same shape.
        log_probs: Of each token at temperature 1, in nats, 0 at padding. Same shape.
    """

    ids: Tensor
    is_token: Tensor
    log_probs: Tensor


@torch.no_grad()
def sample(
    weights: Tensor,
    shape: Shape,
    layout: Layout,
    prompts: Tensor,
    temperature: Tensor,
    end: int,
    noise: torch.Generator,
) -> Sample:
    """Draw ``layout.responses`` responses to each prompt, token by token.

    Args:
        weights: Shape ``(S, P)``.
        shape: Of each model.
        layout: How many responses, and how long at most.
        prompts: Shape ``(S, B, prompt)``.
        temperature: A model's, shape ``(S,)``.
        end: The token after which a response is over.
        noise: Where the random numbers come from.
    """
    part = unpack_weights(weights, shape)
    count, rows, asked = prompts.shape
    several, wide, heads = layout.responses, shape.hidden, shape.heads
    offsets = torch.arange(count)[:, None] * shape.vocabulary
    embed = part["embed"].reshape(-1, wide)
    cached: list[tuple[Tensor, Tensor]] = []

    def step(tokens: Tensor, start: int, length: int) -> Tensor:
        """The model's logits after the last of these tokens, shape ``(S, X, vocabulary)``."""
        cos, sin = _rotary(torch.arange(start, start + length), wide // heads)
        x = F.embedding(tokens + offsets, embed)
        for layer in range(shape.layers):
            inner = _norm(x, part[f"{layer}.norm_1"]) @ part[f"{layer}.qkv"].mT
            q, k, v = inner.view(-1, length, 3, heads, wide // heads).permute(2, 0, 3, 1, 4)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            if start:
                k, v = torch.cat([cached[layer][0], k], 2), torch.cat([cached[layer][1], v], 2)
                cached[layer] = k, v
                mixed = _attend(q, k, v, None)
            else:
                mixed = _attend(q, k, v, layout.mask[:asked, :asked])
                cached.append((k.repeat_interleave(several, 0), v.repeat_interleave(several, 0)))
            x = x + mixed.transpose(1, 2).reshape(x.shape) @ part[f"{layer}.out"].mT
            gate, up = (_norm(x, part[f"{layer}.norm_2"]) @ part[f"{layer}.gate_up"].mT).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ part[f"{layer}.down"].mT
        last = x.view(count, -1, length, wide)[:, :, -1]
        return _norm(last, part["norm"]) @ part["head"].mT

    said = step(prompts.reshape(count, -1), 0, asked).repeat_interleave(several, 1)
    ids, alive, log_probs = [], [], []
    is_alive = torch.ones(said.shape[:2], dtype=torch.bool)
    for place in range(layout.length):
        gumbel = -torch.empty_like(said).exponential_(generator=noise).log()
        token = (said / temperature[:, None, None] + gumbel).argmax(-1)
        token = torch.where(is_alive, token, 0)
        ids.append(token)
        alive.append(is_alive)
        log_probs.append(said.log_softmax(-1).gather(-1, token[..., None])[..., 0] * is_alive)
        is_alive = is_alive & (token != end)
        if place + 1 < layout.length:
            said = step(token, asked + place, 1)
    stacked = [torch.stack(each, -1).view(count, rows, several, -1) for each in (ids, alive, log_probs)]
    return Sample(*stacked)


class StackedAdamW:
    """``torch.optim.AdamW`` with its standard settings, and a learning rate a model.

    Args:
        weights: Shape ``(S, P)``, changed in place.
        learning_rate: Shape ``(S,)``.
    """

    def __init__(self, weights: Tensor, learning_rate: Tensor) -> None:
        self.weights = weights
        self.learning_rate = learning_rate[:, None]
        self.mean = torch.zeros_like(weights)
        self.square = torch.zeros_like(weights)
        self.updates = 0

    @torch.no_grad()
    def step(self) -> None:
        gradient = self.weights.grad
        assert gradient is not None
        self.updates += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (self.square / (1 - 0.999**self.updates)).sqrt_().add_(1e-8)
        self.weights.mul_(1 - self.learning_rate * DECAY)
        self.weights.sub_(self.learning_rate / (1 - 0.9**self.updates) * self.mean / scale)
        self.weights.grad = None
