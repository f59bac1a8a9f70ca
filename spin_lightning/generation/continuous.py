"""The fast generator: a finished response makes room for the next prompt at once, so that none waits for the longest.

Whether a model can be served this way is tried on the model itself. One that cannot is answered by
``TransformersGenerator``, and a printed note says why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice, takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spin_lightning.generation.base import as_set
from spin_lightning.generation.sampling import choose_tokens, dtype_of_uniforms, uniforms_of
from spin_lightning.generation.slots import SlotCache
from spin_lightning.generation.transformers import TransformersGenerator
from spin_lightning.models import rope
from spin_lightning.models.cache import cache_argument, cache_of
from spin_lightning.terminal import name_error, say
from spin_lightning.types import FinishReason, Response

#: Tokens that all prompts must have in common for these to be read in a pass of their own.
LEAST_PREFIX = 16


@dataclass
class _Answer:
    """An answer under way. ``last_id`` is the token whose successor comes next: at first the prompt's last."""

    index: int
    last_id: int
    uniforms: list[float]
    ids: list[int] = field(default_factory=list)
    log_prob: float = 0.0
    log_probs: list[float] = field(default_factory=list)

    def end(self, reason: FinishReason) -> Response:
        return Response(self.ids, reason, self.log_prob, self.log_probs)


class ContinuousGenerator(TransformersGenerator):
    """The responses of ``TransformersGenerator``, several times faster: ``batch_size`` of them are always under way."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The record of ``TransformersGenerator``, its name included: the responses are the same, seed by seed."""
        sampling = super().sampling
        if type(self) is ContinuousGenerator:
            sampling["generator"] = f"{TransformersGenerator.__module__}.{TransformersGenerator.__qualname__}"
        return sampling

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        terminator_ids: int | Collection[int],
        pad_id: int,
    ) -> Iterator[tuple[int, Response]]:
        if not prompts:
            return
        model = self.opponent.model
        rope.refuse_crossing(model, [len(prompt) for prompt in prompts], self.max_new_tokens)
        if len(groups := rope.groups_of(model, prompts)) > 1:
            for group in groups:
                some = [prompts[index] for index in group], [seeds[index] for index in group]
                for index, response in self.generate(*some, terminator_ids, pad_id):
                    yield group[index], response
            return
        if refusal(model, prompts, pad_id):
            yield from super().generate(prompts, seeds, terminator_ids, pad_id)
            return
        rope.settle(model)
        ends = as_set(terminator_ids)
        prefix = _find_prefix(model, prompts) if _verdicts[model].shares else None
        cache = SlotCache(model, min(self.batch_size, len(prompts)), prefix)
        # longest first: memory is at its highest at once, and neighbours prefill with little padding; the responses to
        # one prompt one after the other, so that it is read once for all of them
        first: dict[tuple[int, ...], int] = {}
        order_of = [(-len(prompt), first.setdefault(tuple(prompt), index)) for index, prompt in enumerate(prompts)]
        waiting = deque(sorted(range(len(prompts)), key=order_of.__getitem__))
        active: list[_Answer] = []
        kept: list[int] = []  # places in `active` of the responses that go on
        while waiting or kept:
            free = cache.slots - len(kept)
            entering: list[int] = []
            if free >= cache.slots / 8:  # several at once: one short prompt does not fill the machine
                entering = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            if entering or len(kept) < len(active):
                order = cache.refill(kept, [prompts[index] for index in entering], pad_id)
                if prefix is not None and cache.prefix is None:
                    _verdicts[model] = _Verdict()  # and not again
                active += [
                    _Answer(index, prompts[index][-1], uniforms_of(seeds[index], self.max_new_tokens).tolist())
                    for index in entering
                ]
                active = [active[place] for place in order]
            logits = cache.step([answer.last_id for answer in active])
            numbers = torch.tensor(
                [answer.uniforms[len(answer.ids)] for answer in active], dtype=dtype_of_uniforms(), device=logits.device
            )
            tokens, log_probs = choose_tokens(logits, numbers, self.temperature, self.top_p)
            # together, for one transfer and one wait a step; float32 holds whole numbers up to 16 million
            chosen = torch.stack((tokens.float(), log_probs), dim=1).tolist()
            kept = []
            for place, (answer, (token, log_prob)) in enumerate(zip(active, chosen, strict=True)):
                answer.last_id = int(token)
                answer.ids.append(answer.last_id)
                answer.log_prob += log_prob
                answer.log_probs.append(log_prob)
                if answer.last_id in ends:
                    yield answer.index, answer.end("stop")
                elif len(answer.ids) == self.max_new_tokens:
                    yield answer.index, answer.end("length")
                else:
                    kept.append(place)


def _find_prefix(model: nn.Module, prompts: Sequence[list[int]]) -> list[int]:
    """What all prompts begin with, such as their system turn, if it pays to read it once and changes no position.

    Of each prompt two tokens are left: one to read behind it, and the last, which the first step feeds.
    """
    beginnings = [prompt[:-2] for prompt in prompts]
    first, last = min(beginnings), max(beginnings)  # what these two share, all do
    prefix = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    is_several = any(prompt != prompts[0] for prompt in prompts)
    is_same_rope = rope.limit_of(model, max(1, len(prefix))) >= max(map(len, prompts))
    return prefix if is_several and is_same_rope and len(prefix) >= LEAST_PREFIX else []


@dataclass(frozen=True)
class _Verdict:
    """How slots can serve a model: not at all for a reason, or whether prompts may be read end to end."""

    reason: str = ""
    shares: bool = False


_verdicts: WeakKeyDictionary[nn.Module, _Verdict] = WeakKeyDictionary()


def refusal(model: nn.Module, prompts: Sequence[list[int]], pad_id: int) -> str:
    """Why slots cannot serve a model; empty if they can. Tried once for each model, on a few tokens of the prompts."""
    if model not in _verdicts:
        ids = list(islice(cycle(chain(*prompts)), 28))
        shared, padded = _find_reason(model, ids, pad_id, shares=True), ""
        if shared:
            padded = _find_reason(model, ids, pad_id, shares=False)
        if padded:
            say(
                f"note: ContinuousGenerator cannot serve {type(model).__name__} ({padded}); its responses come from "
                "TransformersGenerator, which is slower."
            )
        _verdicts[model] = _Verdict(padded, shares=not shared)
    return _verdicts[model].reason


def _find_reason(model: nn.Module, ids: list[int], pad_id: int, *, shares: bool) -> str:
    try:
        difference, allowed = _measure_slots(model, ids, pad_id, shares=shares)
    except Exception as error:  # whatever a model's code does with a cache that it does not know
        return name_error(error)
    return "" if difference <= allowed else f"its logits would be off by {difference:.1g} of their spread"


def _measure_slots(model: nn.Module, ids: list[int], pad_id: int, *, shares: bool) -> tuple[float, float]:
    """How far slots move logits from those of the model's own cache, relative to their spread; how far rounding may.

    Two rows of different lengths take two steps, then a third comes in the place of the longer one, and two steps more.
    """
    sequences, seen = [ids[:11], [ids[0], *ids[12:18]], [ids[0], *ids[19:]]], [9, 3, 8]
    cache = SlotCache(model, slots=2, prefix=ids[:1] if shares else None)
    alone = [
        _decode_alone(model, torch.tensor([row], device=cache.device), at)
        for row, at in zip(sequences, seen, strict=True)
    ]
    active: list[int] = []
    found, expected = [], []
    for leaving, entering in ((None, [0, 1]), (0, [2])):
        kept = [place for place, row in enumerate(active) if row != leaving]
        order = cache.refill(kept, [sequences[row][: seen[row] + 1] for row in entering], pad_id)
        active = [(active + entering)[place] for place in order]
        for _ in range(2):
            found.append(cache.step([sequences[row][seen[row]] for row in active]))
            expected += [next(alone[row]) for row in active]
            for row in active:
                seen[row] += 1
    slots, own = torch.cat(found).float(), torch.stack(expected).float()
    is_possible = own.isfinite()
    difference = F.mse_loss(slots[is_possible], own[is_possible]).sqrt() / (own[is_possible].std(correction=0) + 1e-6)
    return float(difference), 2 * torch.finfo(cache.buffers[0][0].dtype).eps ** 0.5


def _decode_alone(model: nn.Module, ids: Tensor, start: int) -> Iterator[Tensor]:
    """Logits after one token and the next, from ``start`` on, in a batch of this row alone."""
    cache = cache_of(model(input_ids=ids[:, :start], use_cache=True))
    for column in range(start, ids.shape[1]):
        inputs = {"input_ids": ids[:, column : column + 1], cache_argument(model): cache}
        yield model(**inputs, use_cache=True).logits[0, -1]
