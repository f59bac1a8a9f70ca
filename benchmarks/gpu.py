"""The package beside its peers on a GPU: a pass beside the card's peak, a step beside TRL's, and generation.

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
from lightning.fabric.utilities.apply_func import move_data_to_device
from transformers import LlamaForCausalLM

from benchmarks.flops import matmul_speed
from benchmarks.measure import forget_peak, now, peak_mib
from benchmarks.models import Shape, random_llama
from benchmarks.results import machine
from benchmarks.rounds import BENCH, ROOT, Contender, play
from benchmarks.run import versions
from benchmarks.sections import Plan, Work, _asked, _encoder, _smollm2, _write
from benchmarks.workload import Lengths
from spin_lightning.models.batches import pack
from spin_lightning.models.forward_paths import forget_forward_path
from spin_lightning.models.kernels import pin_kernels
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.stages.optim import sum_in_passes

#: Pairs of an update, and those that TRL computes at a time.
PAIRS, PAIRS_AT_A_TIME = 64, 16
#: Tokens of our passes: about as many as TRL's, padding apart.
PASS_TOKENS = 16384
LENGTHS = Lengths(prompt=256, answer=200, longest=1024)
#: Rounds that count, and those before them.
ROUNDS, WARM_UP = 4, 3
LLAMA = Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocabulary=49152)


def one_pass(shape: Shape) -> list[dict[str, Any]]:
    """Forward, backward and AdamW over one pass in bfloat16, without a trainer, beside the peak of a matrix product."""
    peak = matmul_speed(8192, 8192, 8192)
    model = LlamaForCausalLM._from_config(shape.config(pad_token_id=None), dtype=torch.bfloat16).to("cuda")
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, fused=True)
    records = []
    for layers in ("plain", "compiled"):
        pin_kernels(model, {"layers": layers})
        forget_forward_path(model)
        for pairs, prompt, response in ((4, 128, 100), (16, 128, 100), (16, 512, 256)):
            ids = torch.randint(5, 40000, (prompt + 2 * response,)).tolist()
            group = (ids[:prompt], [ids[prompt : prompt + response], ids[prompt + response :]])
            batch = move_data_to_device(pack([group] * pairs), torch.device("cuda"))

            def update(batch: Any = batch) -> None:
                batch.block_masks.clear()
                loss_of = lambda part: response_log_probs(model, part).sum() / 1000  # noqa: E731
                sum_in_passes(loss_of, [batch], weights).backward()
                optimizer.step()
                optimizer.zero_grad()

            for _ in range(3):
                update()
            forget_peak()
            started = now()
            for _ in range(10):
                update()
            seconds, tokens = (now() - started) / 10, len(batch.input_ids)
            share = 6 * shape.weights * tokens / seconds / peak
            what = f"{shape.weights / 1e6:.0f}M, {tokens} tokens, layers {layers}"
            name = f"{what}: {share:.0%} of {peak / 1e12:.0f} TFLOP/s"
            records.append({"name": name, "samples": [{"seconds": seconds, "peak_mib": peak_mib()}]})
    return records


def step(work: Work, name: str) -> list[dict[str, Any]]:
    """A training step, ours and TRL's, two processes at a time."""
    usual = {
        "per_device_train_batch_size": PAIRS_AT_A_TIME,
        "gradient_accumulation_steps": PAIRS // PAIRS_AT_A_TIME,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "bf16": True,
    }
    plain = {"kernels": {"layers": "plain"}}
    contenders = [
        _trl(f"TRL, {name}", work, usual),
        _ours(f"spin_lightning, {name}", work, "bf16-mixed"),
        _trl(f"TRL with torch.compile, {name}", work, {**usual, "torch_compile": True}),
        _ours(f"spin_lightning, layers not compiled, {name}", work, "bf16-mixed", plain),
        _trl(f"TRL with Liger kernels, {name}", work, {**usual, "use_liger_kernel": True}),
        _ours(f"spin_lightning, bf16-true, {name}", work, "bf16-true"),
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

    keep("one pass", [record for shape in (Shape(), LLAMA) for record in one_pass(shape)])
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
