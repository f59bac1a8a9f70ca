"""Where a model's rotary positions (RoPE) change with the length of a pass: for ALL its tokens, the first included.

LongRoPE has one set of frequencies for passes up to some length and another beyond; dynamic RoPE has new ones for every
length beyond. What a sequence means then depends on what else is in its pass, and a response that grows across such a
boundary was not sampled from the model that scores it. The boundary is found by asking the model's rotary modules.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spin_lightning.types import UserError

#: No model reads so many tokens; positions are looked at up to here.
FARTHEST = 2**24
#: Positions whose numbers are compared.
FIRST = 8


@dataclass(frozen=True)
class Boundary:
    """Lengths of passes at which a model's rotary positions change.

    Attributes:
        lengths: The last length before each change, ascending.
        every_length_from: Beyond this length every length has frequencies of its own. None: there is no such length.
        kind: What the model calls its RoPE.
        asks: The calls of the rotary modules.
    """

    lengths: tuple[int, ...]
    every_length_from: int | None
    kind: str
    asks: tuple[_Ask, ...]

    def side(self, length: int) -> int:
        """The number of the side that a length is on: sequences on the same side may share a pass."""
        if self.every_length_from is not None and length > self.every_length_from:
            return length
        return -sum(length > own for own in self.lengths)

    def limit(self, length: int) -> float:
        """The greatest length on the side of this one."""
        return next((own for own in self.lengths if own >= length), math.inf)

    def settle(self) -> None:
        """Take back what a long pass left behind: some modules keep its frequencies for shorter passes after it."""
        for ask in self.asks:
            ask(1)

    def crossing(self, prompt_length: int, max_new_tokens: int) -> bool:
        """Whether the frequencies could change while a prompt is answered, or when its response is scored.

        The first pass of generation may be two tokens shorter than the shortest sequence that is scored.
        """
        first, last = max(prompt_length - 1, 1), prompt_length + max_new_tokens
        return self.side(first) != self.side(last)


def boundary_of(model: nn.Module) -> Boundary | None:
    """The boundary of a model, or None if its positions do not depend on the length of a pass. Found once a model."""
    if model not in _boundaries:
        _boundaries[model] = _find_boundary(model)
    return _boundaries[model]


def limit_of(model: nn.Module, length: int = 1) -> float:
    """The greatest length of a pass that leaves a model's positions as they are in one of this length."""
    boundary = boundary_of(model)
    return math.inf if boundary is None else boundary.limit(length)


def settle(model: nn.Module) -> None:
    """Take back what a long pass left behind in a model, where it has a boundary."""
    boundary = boundary_of(model)
    if boundary is not None:
        boundary.settle()


def groups_of(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of the prompts that may be answered together, in their order."""
    boundary = boundary_of(model)
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        side = boundary.side(len(prompt) + 1) if boundary is not None else 0
        groups.setdefault(side, []).append(number)
    return list(groups.values())


def refuse_crossing(model: nn.Module, prompt_lengths: Sequence[int], max_new_tokens: int) -> None:
    """Refuse prompts whose responses could cross a boundary.

    Raises:
        UserError: At least one could.
    """
    boundary = boundary_of(model)
    if boundary is None:
        return
    crossing = [length for length in prompt_lengths if boundary.crossing(length, max_new_tokens)]
    if crossing:
        longest, first = max(crossing) + max_new_tokens, boundary.lengths[0]
        raise UserError(
            f"{type(model).__name__} has a RoPE of type {boundary.kind!r}: beyond {first} tokens the positions of all "
            f"tokens change, so a response must not cross that length. {len(crossing)} of {len(prompt_lengths)} "
            f"prompts could cross it with their responses: the longest needs {longest} tokens ({max(crossing)} and "
            f"{max_new_tokens} new ones). Lower data.max_prompt_tokens or data.generator.max_new_tokens so that both "
            f"fit into {first} tokens."
        )


_boundaries: WeakKeyDictionary[nn.Module, Boundary | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Ask:
    """A rotary module, and one of the kinds of layers that it may distinguish."""

    module: Any
    layer_type: str | None

    @property
    def kind(self) -> str:
        kind: Any = getattr(self.module, "rope_type", type(self.module).__name__)
        return str(kind[self.layer_type] if self.layer_type is not None else kind)

    @torch.no_grad()
    def __call__(self, length: int, module: Any = None) -> list[Tensor]:
        """The rotary numbers of the first positions in a pass of this length, which only its last position tells."""
        module = module or self.module
        device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
        positions = torch.tensor([[*range(min(length, FIRST)), length - 1]], device=device)
        extra = {} if self.layer_type is None else {"layer_type": self.layer_type}
        output = module.forward(torch.zeros(1, 1, 1, dtype=torch.float32, device=device), positions, **extra)
        return [part[..., :-1, :] for part in (output if isinstance(output, tuple) else (output,))]

    def on_a_copy(self, length: int) -> list[Tensor]:
        """Ask a copy, which leaves the module as it is."""
        twin = copy.copy(self.module)
        twin._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in twin._buffers.items()}
        self(1, twin)
        return self(length, twin)


def _find_boundary(model: nn.Module) -> Boundary | None:
    lengths: set[int] = set()
    exact: list[int] = []
    kinds: list[str] = []
    asks, is_clear = [], True
    for ask in _make_asks(model):
        try:
            start, end = ask.on_a_copy(FIRST), ask.on_a_copy(FARTHEST)
            if _are_equal(start, end):
                continue
            low, high = FIRST, FARTHEST  # the numbers at `low` are those of the start, at `high` they are not
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _are_equal(ask.on_a_copy(middle), start) else (low, middle)
            if not _are_equal(ask.on_a_copy(high), end):
                exact.append(low)
            ask(1)
        except Exception:  # a module that is asked otherwise
            is_clear = False
            continue
        lengths.add(low)
        kinds.append(ask.kind)
        asks.append(ask)
    if not is_clear:
        for kind, length in _read_config(model):
            lengths.add(length)
            kinds.append(kind)
            exact += [length] if kind == "dynamic" else []
    if not lengths:
        return None
    return Boundary(tuple(sorted(lengths)), min(exact, default=None), " and ".join(sorted(set(kinds))), tuple(asks))


def _make_asks(model: nn.Module) -> Iterator[_Ask]:
    for module in model.modules():
        if "rotary" in type(module).__name__.lower():
            kinds = getattr(module, "rope_type", None)
            yield from (_Ask(module, layer_type) for layer_type in (kinds if isinstance(kinds, dict) else [None]))


def _read_config(model: Any) -> Iterator[tuple[str, int]]:
    """What the configuration says of RoPE that depends on length: for modules that could not be asked."""
    config = model.config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None)
    known = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in [known, *(nested for nested in known.values() if isinstance(nested, dict))]:
        kind = rope.get("rope_type", rope.get("type"))
        length = rope.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", most))
        if kind in ("longrope", "su", "dynamic") and length:
            yield kind, int(length)


def _are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
