"""Generation with ``transformers``: ordinary batched ``generate``, with a seed for every response.

Prompts of different lengths are padded on the left, and a cache keeps what was read. A model may see that padding, as
most recurrent ones do, or decode otherwise from its cache than it reads; that is tried on the model itself, and one
that does is given prompts of one length at a time, or one by one, or no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, groupby, islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from spin_lightning.generation.base import ResponseGenerator, as_set
from spin_lightning.generation.sampling import choose_tokens, uniforms_of
from spin_lightning.models import rope
from spin_lightning.models.modes import compute_dtype
from spin_lightning.terminal import name_error, say
from spin_lightning.types import Response, UserError


class SeededSampler(LogitsProcessor):
    """Chooses each row's next token from that row's own random numbers, and keeps its log-prob.

    All other logits become -inf, so that greedy decoding takes the choice.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        num_steps: int,
        temperature: float,
        top_p: float,
        device: torch.device,
        heard: Callable[[list[int]], None] | None = None,
    ) -> None:
        self.heard = heard
        rows = [uniforms_of(seed, num_steps) for seed in seeds]
        self.uniforms = torch.stack(rows, dim=1).to(device)  # (steps, B)
        self.temperature, self.top_p = temperature, top_p
        self.tokens: list[Tensor] = []
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, log_probs = choose_tokens(scores, self.uniforms[len(self.tokens)], self.temperature, self.top_p)
        self.tokens.append(tokens)
        self.log_probs.append(log_probs)
        if self.heard is not None:
            self.heard(tokens.tolist())
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class TransformersGenerator(ResponseGenerator):
    """Batched ``generate`` of ``transformers``: works wherever the model does, no further package.

    Attributes:
        heard: Called with the next token of each response of a batch as soon as it is chosen; after its end a response
            goes on with whatever is chosen for it. None: nobody listens.
    """

    heard: Callable[[list[int]], None] | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        terminator_ids: int | Collection[int],
        pad_id: int,
    ) -> Iterator[tuple[int, Response]]:
        model, ends = self.opponent.model, as_set(terminator_ids)
        device = next(model.parameters()).device
        rope.refuse_crossing(model, [len(prompt) for prompt in prompts], self.max_new_tokens)
        if not prompts:
            return
        manner = manner_of(model, prompts, pad_id)
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=sorted(ends), pad_token_id=pad_id
        )
        settings.use_cache = manner.cached
        for indices in self._plan_batches(model, prompts, manner):
            rope.settle(model)
            sampler = SeededSampler(
                [seeds[index] for index in indices],
                self.max_new_tokens,
                self.temperature,
                self.top_p,
                device,
                self.heard,
            )
            _generate(model, [prompts[index] for index in indices], settings, sampler, pad_id)
            tokens = torch.stack(sampler.tokens, dim=1).tolist()
            log_probs = torch.stack(sampler.log_probs, dim=1).tolist()
            for row, index in enumerate(indices):
                end = next((place for place, token in enumerate(tokens[row]) if token in ends), None)
                stopped, length = end is not None, len(tokens[row]) if end is None else end + 1
                own = log_probs[row][:length]
                yield index, Response(tokens[row][:length], "stop" if stopped else "length", sum(own), own)

    def _plan_batches(self, model: Any, prompts: Sequence[list[int]], manner: Manner) -> Iterator[list[int]]:
        """The numbers of the prompts that are answered together."""
        size = self.batch_size if manner.together else 1
        for group in rope.groups_of(model, prompts):
            order = sorted(group, key=lambda index: len(prompts[index]))  # little padding in each batch
            for _, run in groupby(order, key=lambda index: 0 if manner.padded else len(prompts[index])):
                numbers = list(run)
                yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


@dataclass(frozen=True)
class Manner:
    """How a model answers prompts: several together, of several lengths, with a cache; and the note to print of it."""

    together: bool = True
    padded: bool = True
    cached: bool = True
    words: str = ""


#: Tokens of the longest sequence that manners are tried on, where a model takes so many.
TRIAL_TOKENS = 64
#: Fastest first.
MANNERS = (
    Manner(),
    Manner(padded=False, words="only prompts of equal length are answered together"),
    Manner(together=False, padded=False, words="its prompts are answered one by one"),
    Manner(together=False, padded=False, cached=False, words="its prompts are answered one by one, without a cache"),
)
_manners: WeakKeyDictionary[nn.Module, Manner] = WeakKeyDictionary()


def manner_of(model: Any, prompts: Sequence[list[int]], pad_id: int) -> Manner:
    """The fastest manner that gives a model's own logits. Tried once for each model, on a few tokens of the prompts.

    Raises:
        UserError: None does.
    """
    if model not in _manners:
        ids = list(islice(cycle(chain(*prompts)), 3 * TRIAL_TOKENS))
        reason = ""
        for manner in MANNERS:
            try:
                difference, allowed = _measure_cache(model, ids, pad_id, manner)
                if difference <= allowed:
                    break
                why = f"its logits would be off by {difference:.1g} of their spread"
            except Exception as error:  # whatever a model's code does with padding or a cache
                why = name_error(error)
            reason = reason or why
        else:
            raise UserError(
                f"{type(model).__name__} cannot answer prompts as it scores them, in a batch or alone, with a cache or "
                f"without ({why}). Use a model whose generate() gives the logits of its forward pass."
            )
        if reason:
            say(f"note: {type(model).__name__} is slow to answer: {manner.words} ({reason} otherwise).")
        _manners[model] = manner
    return _manners[model]


def _measure_cache(model: Any, ids: list[int], pad_id: int, manner: Manner) -> tuple[float, float]:
    """How far a cache takes logits from those of plain passes, relative to their spread; and how far rounding may.

    The logits are those before three tokens of a response, the plain passes go over prompt and response.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    most = positions if isinstance(positions, int) else TRIAL_TOKENS
    longest = int(min(TRIAL_TOKENS, most, rope.limit_of(model))) - 3
    answer, long, other = ids[:3], ids[3 : 3 + longest], ids[3 + longest : 3 + 2 * longest]
    prompts = [long, other[:7] if manner.padded else other] if manner.together else [long]
    dictated = _Dictated(answer)
    settings = GenerationConfig(
        max_new_tokens=len(answer), do_sample=False, pad_token_id=pad_id, use_cache=manner.cached
    )
    rope.settle(model)
    _generate(model, prompts, settings, dictated, pad_id)
    found, own = torch.stack(dictated.logits, dim=1), []
    for prompt in prompts:
        rope.settle(model)
        row = torch.tensor([prompt + answer[:-1]], device=found.device)
        own.append(model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 :].float())
    expected = torch.stack(own)
    is_possible = expected.isfinite()
    difference = F.mse_loss(found[is_possible], expected[is_possible]).sqrt()
    spread = expected[is_possible].std(correction=0)
    return float(difference / (spread + 1e-6)), 2 * torch.finfo(compute_dtype(found.device, model)).eps ** 0.5


class _Dictated(LogitsProcessor):
    """Has every row say the same, and keeps the logits."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.answer[len(self.logits)]
        self.logits.append(scores.float())
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor(token, device=scores.device), 0.0)


def _generate(
    model: Any, prompts: Sequence[list[int]], settings: GenerationConfig, processor: LogitsProcessor, pad_id: int
) -> None:
    """``generate`` over left padded rows: the next token of every row is at the same place."""
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    rows = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    own_settings, model.generation_config = model.generation_config, GenerationConfig()  # ours alone decide
    try:
        model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([processor]),
        )
    finally:
        model.generation_config = own_settings
