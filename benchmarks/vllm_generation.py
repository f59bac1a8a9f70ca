"""Answers to prompts, by vLLM on a CPU. A worker, in an environment of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.worker import Worker


def main() -> None:
    worker = Worker()
    settings = worker.settings
    # one process, so that its CPU seconds and its memory are all there are
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(settings["prompts"]).read_text())
    llm = LLM(
        settings["model"],
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=settings["batch_size"],
        enable_prefix_caching=False,  # rounds repeat their prompts
        **settings.get("vllm", {}),
    )
    number = 0
    while True:
        worker.wait()
        parameters = [
            SamplingParams(
                temperature=1.0,
                max_tokens=settings["max_new_tokens"],
                stop_token_ids=[asked["terminator_id"]],
                detokenize=False,
                seed=1000 * number + index if settings.get("is_seeded") else None,
            )
            for index in range(len(asked["prompts"]))
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], parameters, use_tqdm=False)
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        worker.report(tokens=sum(lengths), clipped=sum(length == settings["max_new_tokens"] for length in lengths))
        number += 1


if __name__ == "__main__":
    main()
