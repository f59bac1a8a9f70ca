"""The least work that a training step or some responses need, and what one core can do at best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.measure import ON_GPU, now
from benchmarks.models import Shape
from benchmarks.worker import Worker

Ids = Sequence[int]


def least_flops(pairs: Sequence[Mapping[str, Ids]], shape: Shape) -> float:
    """Floating-point operations that any exact step of these pairs needs, forward and backward.

    Each prompt once, each response once, attention over what is visible only, the LM head on responses only. The
    backward pass costs twice the forward pass. The optimiser, norms and softmax are not counted.
    """
    forward = 0.0
    for pair in pairs:
        prompt, real, generated = (len(pair[side]) for side in ("prompt_ids", "chosen_ids", "rejected_ids"))
        tokens = prompt + real + generated
        visible = (prompt + real) ** 2 / 2 + generated * (prompt + generated / 2)
        forward += 2 * shape.layers * shape.layer_weights * tokens
        forward += 4 * shape.layers * shape.hidden * visible
        forward += 2 * shape.vocabulary * shape.hidden * (real + generated)
    return 3 * forward


def least_generation_flops(prompts: Sequence[Ids], lengths: Sequence[int], shape: Shape) -> float:
    """Floating-point operations that sampling responses of these lengths, one to each prompt, needs.

    What several prompts begin with once, equal prompts once, each sampled token but the last of its response once. The
    LM head where a token is sampled, and once for the first tokens of all responses to one prompt.
    """
    layered, visible, heads = 0.0, 0.0, 0
    last: tuple[int, ...] = ()
    for ids in sorted(map(tuple, prompts)):
        shared = next((i for i, (a, b) in enumerate(zip(ids, last, strict=False)) if a != b), len(last))
        layered += len(ids) - shared
        visible += (len(ids) ** 2 - shared**2) / 2
        heads += ids != last
        last = ids
    for prompt, length in zip(prompts, lengths, strict=True):
        layered += length - 1
        visible += (length - 1) * (len(prompt) + length / 2)
        heads += length - 1
    linear = 2 * shape.layers * shape.layer_weights * layered
    return linear + 4 * shape.layers * shape.hidden * visible + 2 * shape.vocabulary * shape.hidden * heads


def facts(settings: Mapping[str, Any], prompts: Sequence[Ids], lengths: Sequence[int]) -> dict[str, float]:
    """What a round of generation reports beside its cost: tokens, responses cut at the cap, and the least work."""
    return {
        "tokens": sum(lengths),
        "clipped": sum(length == settings["max_new_tokens"] for length in lengths),
        "least_flops": least_generation_flops(prompts, lengths, Shape(**settings["shape"])),
    }


def matrix_shapes(shape: Shape, tokens: int = 1024) -> dict[str, tuple[int, int, int]]:
    """Rows, inner size and columns of a model's matrix products on this many tokens."""
    kv = shape.kv_heads * shape.head_size
    return {
        "attention query": (tokens, shape.hidden, shape.hidden),
        "attention key": (tokens, shape.hidden, kv),
        "feed-forward up": (tokens, shape.hidden, shape.intermediate),
        "feed-forward down": (tokens, shape.intermediate, shape.hidden),
        "LM head": (tokens, shape.hidden, shape.vocabulary),
    }


def matmul_speed(rows: int, inner: int, columns: int, seconds: float = 0.3) -> float:
    """bfloat16 multiply-adds of one product, in FLOP a CPU second (on a GPU: a second); the best of a few tries."""
    device = "cuda" if ON_GPU else "cpu"
    left = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
    right = torch.randn(columns, inner, dtype=torch.bfloat16, device=device).t()
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    torch.mm(left, right, out=out)  # the first touch of its memory is not the product
    work, repeats, best, spent = 2.0 * rows * inner * columns, 1, 0.0, 0.0
    while spent < seconds:
        started = now()
        for _ in range(repeats):
            torch.mm(left, right, out=out)
        took = now() - started
        spent += took
        best = max(best, repeats * work / took) if took > 0.01 else best
        repeats = repeats if took > 0.02 else 2 * repeats
    return best


def main() -> None:
    """A worker whose rounds measure the peak, among the rounds of the others."""
    worker = Worker()
    shapes = matrix_shapes(Shape(**worker.settings["shape"]))
    while True:
        worker.wait()
        speeds = {name: matmul_speed(*sizes) for name, sizes in shapes.items()}
        worker.report(flops_per_second=speeds)


if __name__ == "__main__":
    main()
