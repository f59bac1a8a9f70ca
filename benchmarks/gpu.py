"""The package beside its peers on a GPU: a training step beside TRL's, and generation beside ``transformers``.

python -m benchmarks.gpu                 everything that is installed, into docs/gpu.json
python -m benchmarks.gpu --output FILE   into another file

Seconds are those of the wall once the GPU has done all its work, memory is what torch allocated there. TRL is asked for
in ``.bench/trl`` (``make .bench/trl/installed``); it runs with the batch that fits, its fastest settings beside its
usual ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import Shape, random_llama
from benchmarks.results import machine
from benchmarks.rounds import BENCH, ROOT, Contender, play
from benchmarks.run import versions
from benchmarks.sections import Plan, Work, _asked, _encoder, _smollm2, _write
from benchmarks.workload import Lengths

#: Pairs of an update, and those that TRL computes at a time.
PAIRS, PAIRS_AT_A_TIME = 64, 16
#: Tokens of our passes: about as many as TRL's, padding apart.
PASS_TOKENS = 16384
LENGTHS = Lengths(prompt=256, answer=200, longest=1024)
#: Rounds that count, and those before them.
ROUNDS, WARM_UP = 4, 3
LLAMA = Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocabulary=49152)


def step(work: Work, name: str) -> list[dict[str, Any]]:
    """A training step, ours and TRL's, two processes at a time."""
    usual = {
        "per_device_train_batch_size": PAIRS_AT_A_TIME,
        "gradient_accumulation_steps": PAIRS // PAIRS_AT_A_TIME,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "bf16": True,
    }
    compiled = {"kernels": {"layers": "compiled"}}
    contenders = [
        _trl(f"TRL, {name}", work, usual),
        _ours(f"spin_lightning, {name}", work, "bf16-mixed"),
        _trl(f"TRL with torch.compile, {name}", work, {**usual, "torch_compile": True}),
        _ours(f"spin_lightning, layers compiled, {name}", work, "bf16-mixed", compiled),
        _trl(f"TRL with Liger kernels, {name}", work, {**usual, "use_liger_kernel": True}),
        _ours(f"spin_lightning, bf16-true, layers compiled, {name}", work, "bf16-true", compiled),
    ]
    return [
        record
        for start in range(0, len(contenders), 2)
        for record in play(contenders[start : start + 2], ROUNDS, warm_up=WARM_UP, threads=8)
    ]


def _trl(name: str, work: Work, trl: dict[str, Any]) -> Contender:
    runs = str(BENCH / "runs" / name.replace(" ", "_"))
    return Contender(
        name, "trl_step", {"model": work.model, "workload": str(work.folder), "runs": runs, "trl": trl}, "trl"
    )


def _ours(name: str, work: Work, precision: str, module: dict[str, Any] | None = None) -> Contender:
    settings = {
        "model": work.model,
        "workload": str(work.folder),
        "runs": str(BENCH / "runs" / name.replace(" ", "_")),
        "precision": precision,
        "module": module or {},
        "data": {"micro_batch_tokens": PASS_TOKENS},
    }
    return Contender(name, "spin_step", settings)


def generation() -> list[dict[str, Any]]:
    """Responses to 128 prompts by SmolLM2-135M, at most 256 tokens each."""
    base, _ = _asked("gpu_generation", Plan(), 128)
    base["max_new_tokens"] = 256
    plain = {**base, "way": "plain", "batch_size": 128, "is_sorted": True}
    ours = {**base, "way": "ours", "batch_size": 128}
    contenders = [
        Contender("transformers generate, 128 at a time", "generation", plain),
        Contender("ContinuousGenerator", "generation", {**ours, "generator": "ContinuousGenerator"}),
        Contender("TransformersGenerator", "generation", {**ours, "generator": "TransformersGenerator"}),
    ]
    return play(contenders, 2, warm_up=1, threads=8)


def _workload(name: str, model: str, encoder: Any) -> Work:
    folder = _write(f"gpu_{name}", encoder, [LENGTHS] * PAIRS * (WARM_UP + ROUNDS), PAIRS)
    return Work(model, folder, batch_size=PAIRS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu.json")
    output = parser.parse_args().output
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here; python -m benchmarks.run measures on a CPU")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    results: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "measured_at": datetime.now(UTC).isoformat(),
    }

    def keep(section: str, records: list[dict[str, Any]]) -> None:
        results[section] = records
        output.write_text(json.dumps(results, indent=1).replace(f"{ROOT}/", "") + "\n")
        for record in records:
            _show(record)

    folder, encoder = _smollm2()
    keep("step of SmolLM2-135M", step(_workload("smollm2", folder, encoder), "135M"))
    keep("generation by SmolLM2-135M", generation())
    llama = str(random_llama(BENCH / "models" / "gpu_llama", LLAMA))
    keep("step of a Llama of 1.1B", step(_workload("llama", llama, _encoder(llama)), "1.1B"))
    results["shape"] = asdict(LLAMA)


def _show(record: dict[str, Any]) -> None:
    """A row of a table."""
    if "failed" in record:
        print(f"| {record['name']} | failed: {record['failed'][:80]} | | |")
        return
    samples = record["samples"]
    seconds = [sample["seconds"] for sample in samples]
    tokens = (
        f"{statistics.median(s['tokens'] / s['seconds'] for s in samples):.0f} tokens/s"
        if "tokens" in samples[0]
        else ""
    )
    peak = max(sample["peak_mib"] for sample in samples) / 1024
    median = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}, n={len(seconds)})"
    print(f"| {record['name']} | {median} {tokens} | {peak:.1f} GiB |", flush=True)


if __name__ == "__main__":
    main()
