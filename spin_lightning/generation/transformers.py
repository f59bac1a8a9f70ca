"""Generation with ``transformers``: ordinary batched ``generate``, with a seed for every answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from spin_lightning.generation.base import ResponseGenerator, as_set
from spin_lightning.generation.sampling import choose_tokens, uniforms_of
from spin_lightning.types import Response


class SeededSampler(LogitsProcessor):
    """Chooses each row's next token from that row's own random numbers, and keeps its log-prob.

    All other logits become -inf, so that greedy decoding takes the choice.
    """

    def __init__(
        self, seeds: Sequence[int], num_steps: int, temperature: float, top_p: float, device: torch.device
    ) -> None:
        rows = [uniforms_of(seed, num_steps) for seed in seeds]
        self.uniforms = torch.stack(rows, dim=1).to(device)  # (steps, B)
        self.temperature, self.top_p = temperature, top_p
        self.tokens: list[Tensor] = []
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, log_probs = choose_tokens(scores, self.uniforms[len(self.tokens)], self.temperature, self.top_p)
        self.tokens.append(tokens)
        self.log_probs.append(log_probs)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class TransformersGenerator(ResponseGenerator):
    """Batched ``generate`` of ``transformers``: works wherever the model does, no further package."""

    @torch.no_grad()
    def generate(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        terminator_ids: int | Collection[int],
        pad_id: int,
    ) -> Iterator[tuple[int, Response]]:
        ends = as_set(terminator_ids)
        device = next(model.parameters()).device
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding in each batch
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=sorted(ends), pad_token_id=pad_id
        )
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            longest = len(prompts[indices[-1]])
            # left padding: the next token of every row is at the same place
            rows = [[pad_id] * (longest - len(prompts[index])) + prompts[index] for index in indices]
            mask = [[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in indices]
            sampler = SeededSampler(
                [seeds[index] for index in indices], self.max_new_tokens, self.temperature, self.top_p, device
            )
            own_settings, model.generation_config = model.generation_config, GenerationConfig()  # ours alone decide
            try:
                model.generate(
                    input_ids=torch.tensor(rows, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([sampler]),
                )
            finally:
                model.generation_config = own_settings
            tokens = torch.stack(sampler.tokens, dim=1).tolist()
            log_probs = torch.stack(sampler.log_probs, dim=1).tolist()
            for row, index in enumerate(indices):
                end = next((place for place, token in enumerate(tokens[row]) if token in ends), None)
                stopped, length = end is not None, len(tokens[row]) if end is None else end + 1
                yield (
                    index,
                    Response(tokens[row][:length], "stop" if stopped else "length", sum(log_probs[row][:length])),
                )
