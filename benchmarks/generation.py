"""Responses to prompts, by our generators and those of ``transformers``. A worker: a round answers all prompts once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig

import spin_lightning
from benchmarks.flops import facts
from benchmarks.measure import ON_GPU
from benchmarks.plain_generation import generate, sampling
from benchmarks.worker import Worker
from spin_lightning.generation.base import Player, opened

Ids = list[int]


def main() -> None:
    worker = Worker()
    settings = worker.settings
    asked = json.loads(Path(settings["prompts"]).read_text())
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16).eval()
    model.to("cuda" if ON_GPU else "cpu")
    answer = {"ours": ours, "plain": plain, "generate_batch": continuous}[settings["way"]]
    answer_all = answer(model, settings, asked["terminator_id"], asked["pad_id"])
    number = 0
    while True:
        worker.wait()
        torch.manual_seed(number)
        lengths = [len(ids) for ids in answer_all(asked["prompts"], number)]
        worker.report(**facts(settings, asked["prompts"], lengths))
        number += 1


def ours(model: Any, settings: dict[str, Any], terminator_id: int, pad_id: int) -> Callable[..., list[Ids]]:
    """A generator of this package."""
    generator = getattr(spin_lightning, settings["generator"])(
        max_new_tokens=settings["max_new_tokens"], batch_size=settings["batch_size"]
    )

    @torch.no_grad()
    def answer(prompts: list[Ids], number: int) -> list[Ids]:
        seeds = [1000 * number + index for index in range(len(prompts))]
        with opened(generator, Player(model)):
            found = dict(generator.generate(prompts, seeds, terminator_id, pad_id))
        return [found[index].ids for index in range(len(prompts))]

    return answer


def plain(model: Any, settings: dict[str, Any], terminator_id: int, pad_id: int) -> Callable[..., list[Ids]]:
    """Batched ``generate``."""
    config = sampling(settings["max_new_tokens"], terminator_id, pad_id)
    return lambda prompts, number: generate(model, prompts, settings["batch_size"], settings["is_sorted"], config)


def continuous(model: Any, settings: dict[str, Any], terminator_id: int, pad_id: int) -> Callable[..., list[Ids]]:
    """The continuous batching of ``transformers``."""
    config = sampling(settings["max_new_tokens"], terminator_id, pad_id)
    # its default is nine tenths of the free memory
    cache = ContinuousBatchingConfig(num_blocks=settings["num_blocks"])

    def answer(prompts: list[Ids], number: int) -> list[Ids]:
        outputs = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=cache)
        if len(outputs) < len(prompts):
            raise RuntimeError(f"generate_batch answered {len(outputs)} of {len(prompts)} prompts")
        return [output.generated_tokens for output in outputs.values()]

    return answer


if __name__ == "__main__":
    main()
