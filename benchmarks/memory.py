"""Memory of a training step and of generation, beside what ``spin-lightning plan`` says of them.

    python -m benchmarks.memory                    every case, on the GPU if there is one
    python -m benchmarks.memory --device cpu --cases small
    python -m benchmarks.memory --output memory.json

Each case is a process of its own: a real ``Trainer.fit`` of a few updates on random weights, or responses to random
prompts. On a GPU the figure is ``torch.cuda.max_memory_allocated``, on a CPU the largest resident memory; both from the
second update on, when the optimiser's state is there. A case that fails is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import Shape
from benchmarks.rounds import pipe

ROOT = Path(__file__).absolute().parent.parent
MIB = 2**20
#: How a line begins that is an answer, among what libraries print.
MARK = "measured "

SHAPES = {
    "31M": Shape(hidden=384, layers=8, heads=6, kv_heads=2, intermediate=1024),
    "135M": Shape(),
    "360M": Shape(hidden=960, layers=32, heads=15, kv_heads=5, intermediate=2560),
    # as Qwen2.5-1.5B, with tied embeddings
    "1.5B": Shape(hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, vocabulary=151936),
}


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        shape: Name of a shape.
        precision: Of the trainer.
        pairs: In a pass, each of a prompt and two responses.
        prompt: Its tokens.
        response: Tokens of each response.
        passes: In an update.
        rank: Of a LoRA adapter on all linear layers. 0: the whole model is trained.
        recomputes: Gradient checkpointing.
        slots: Responses to generate at a time. 0: an update is measured, else generation.
    """

    shape: str
    precision: str = "bf16-true"
    pairs: int = 4
    prompt: int = 128
    response: int = 192
    passes: int = 2
    rank: int = 0
    recomputes: bool = False
    slots: int = 0

    def __str__(self) -> str:
        if self.slots:
            return f"{self.shape} {self.precision}, {self.slots} responses at a time"
        how = f"LoRA {self.rank}" if self.rank else "full"
        again = ", recomputing" if self.recomputes else ""
        tokens = self.pairs * (self.prompt + 2 * self.response)
        return f"{self.shape} {self.precision}, {how}, {self.passes} x {tokens} tokens{again}"


def _cases(shapes: list[str], responses: tuple[int, ...], big: int) -> list[Case]:
    cases = []
    for shape in shapes:
        for precision in ("bf16-true", "bf16-mixed"):
            for rank in (0, 16):
                cases += [Case(shape, precision, rank=rank, response=response) for response in responses]
        cases += [Case(shape, passes=1), Case(shape, recomputes=True), Case(shape, slots=big)]
    return cases


CASES = {
    "small": _cases(["31M"], (192,), 16),
    "cpu": [*_cases(["31M", "135M"], (64, 192), 32), Case("360M", pairs=2), Case("360M", pairs=2, rank=16)],
    # the workload of docs/performance.json's model_size
    "sizes": [Case(shape, pairs=2, response=100, passes=1) for shape in ("31M", "135M", "360M")],
    "gpu": [
        Case("135M"),
        Case("135M", rank=16),
        Case("135M", "bf16-mixed"),
        Case("135M", "bf16-mixed", rank=16),
        Case("360M"),
        Case("360M", rank=16),
        Case("360M", "bf16-mixed"),
        Case("360M", response=448),
        Case("360M", recomputes=True),
        Case("360M", slots=64),
        Case("1.5B"),
        Case("1.5B", rank=16),
        Case("1.5B", recomputes=True, pairs=8),
        Case("1.5B", slots=64),
        Case("360M", "bf16-mixed", passes=1),
        Case("360M", rank=16, response=448),
    ],
}


# --- the measured process ---------------------------------------------------------------------------------------------


def measure(case: Case, device: str) -> dict[str, Any]:
    """The peak of a case in MiB, how much of it was there before on a GPU, and seconds."""
    import torch
    from transformers import LlamaForCausalLM

    shape = SHAPES[case.shape]
    torch.manual_seed(0)
    config = shape.config(eos_token_id=1, pad_token_id=0)
    dtype = torch.bfloat16 if case.precision == "bf16-true" else torch.float32
    model = LlamaForCausalLM._from_config(config, dtype=dtype)
    before = torch.cuda.memory_allocated() / MIB if device == "cuda" else 0.0  # of an earlier case
    found = (_generate if case.slots else _train)(case, model, device)
    return {**found, "mib": found["mib"] - before, "before": before}


def _train(case: Case, model: Any, device: str) -> dict[str, Any]:
    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    from spin_lightning.models.batches import pack
    from spin_lightning.stages.sft import SftLightningModule

    class Module(SftLightningModule):
        def configure_model(self) -> None:
            if case.rank and not hasattr(self, "policy"):
                from peft import LoraConfig, get_peft_model

                super().configure_model()
                settings = LoraConfig(r=case.rank, target_modules="all-linear", task_type="CAUSAL_LM")
                self.policy = get_peft_model(self.policy, settings, autocast_adapter_dtype=False)
                self.policy.train()
            else:
                super().configure_model()

    class Peaks(L.Callback):
        def __init__(self) -> None:
            self.found: list[float] = []
            self.seconds: list[float] = []
            self.started = 0.0

        def on_train_batch_start(self, *args: Any) -> None:
            _forget_peak(device)
            self.started = time.perf_counter()

        def on_train_batch_end(self, *args: Any) -> None:
            self.found.append(_peak(device))
            self.seconds.append(time.perf_counter() - self.started)

    generator = torch.Generator().manual_seed(0)
    draw = lambda length: torch.randint(2, 1000, (length,), generator=generator).tolist()  # noqa: E731
    part = [(draw(case.prompt), [draw(case.response), draw(case.response)]) for _ in range(case.pairs)]
    batch = [pack(part) for _ in range(case.passes)]
    peaks = Peaks()
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=case.precision,  # type: ignore[arg-type]
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[peaks],
    )
    module = Module(model, learning_rate=1e-6, gradient_checkpointing=case.recomputes)
    loader = DataLoader([batch] * 4, batch_size=None, collate_fn=lambda made: made)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    trained = sum(weight.numel() for weight in module.policy.parameters() if weight.requires_grad)
    return {"mib": max(peaks.found[1:]), "each": peaks.found, "seconds": min(peaks.seconds), "trained": trained}


def _generate(case: Case, model: Any, device: str) -> dict[str, Any]:
    import torch

    from spin_lightning import ContinuousGenerator
    from spin_lightning.generation.base import Player, opened

    model = model.eval().to(device)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 1000, (case.prompt,), generator=generator).tolist() for _ in range(case.slots)]
    peaks = []
    with torch.no_grad(), opened(ContinuousGenerator(case.response, batch_size=case.slots), Player(model)) as made:
        for _ in range(2):
            _forget_peak(device)
            started = time.perf_counter()
            count = sum(len(response.ids) for _, response in made.generate(prompts, list(range(case.slots)), {1}, 0))
            peaks.append(_peak(device))
    return {"mib": max(peaks), "each": peaks, "seconds": time.perf_counter() - started, "tokens": count, "trained": 0}


def _forget_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> float:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MIB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


# --- the plan beside it -----------------------------------------------------------------------------------------------


def planned(case: Case, device: str, trained: int) -> dict[str, float]:
    """What the plan says of a case, in bytes by part."""
    from spin_lightning.models.footprint import NUMERICS, Load, ModelSize, Setup, generation_memory, training_memory

    shape = SHAPES[case.shape]
    size = ModelSize(
        weights=shape.weights + (2 * shape.layers + 1) * shape.hidden,
        packable=shape.layers * shape.layer_weights,
        layers=shape.layers,
        hidden=shape.hidden,
        query=shape.hidden,
        key=shape.kv_heads * shape.head_size,
        intermediate=shape.intermediate,
        vocabulary=shape.vocabulary,
    )
    setup = Setup(
        NUMERICS[case.precision],
        device=device,
        adapter=trained if case.rank else None,
        recomputes=case.recomputes,
    )
    if case.slots:
        return generation_memory(size, case.slots, case.prompt, case.response, setup)
    load = Load(
        tokens=case.pairs * (case.prompt + 2 * case.response),
        scored=case.pairs * 2 * case.response,
        passes=case.passes,
    )
    return training_memory(size, load, setup)


def _run(cases: Sequence[Case], device: str, minutes: float) -> Iterator[dict[str, Any]]:
    """What the processes of these cases found, or why they found nothing, in order.

    On a CPU each case has its own, on a GPU they share one, which compiles kernels once, until it ends.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    while cases:
        together = cases if device == "cuda" else cases[:1]
        asked = json.dumps([asdict(case) for case in together])
        command = [sys.executable, "-m", "benchmarks.memory", "--device", device, "--measure", asked]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
            watchdog = threading.Timer(60 * minutes * len(together), process.kill)
            watchdog.start()
            count = 0
            for line in pipe(process.stdout):
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
                    count += 1
            watchdog.cancel()
            code = process.wait()
            if count < len(together):
                log.seek(0)
                said = [line.strip() for line in log if line.strip()]
                yield {"error": f"exit {code}: {said[-1] if said else 'without a word'}", "log": said[-30:]}
                count += 1
        cases = cases[count:]


def _measure_all(cases: Sequence[Case], device: str) -> None:
    """In the process of some cases: one line for each."""
    for case in cases:
        try:
            found = measure(case, device)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "log": traceback.format_exc().splitlines()[-30:]}
        print(f"{MARK}{json.dumps(found)}", flush=True)
        gc.collect()
        if device == "cuda":
            import torch

            torch.cuda.empty_cache()


def _lines(records: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'':<52} {'plan':>8} {'measured':>9} {'':>6}  MiB"
    for record in records:
        if "error" in record:
            yield f"{record['name']:<52} failed: {record['error'][:120]}"
        else:
            off = record["planned"] / record["mib"] - 1
            yield f"{record['name']:<52} {record['planned']:>8,.0f} {record['mib']:>9,.0f} {off:>+6.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument(
        "--cases", choices=CASES, help="small, cpu, sizes or gpu; those of the device if it is left out"
    )
    parser.add_argument("--minutes", type=float, default=5, help="after which a case has failed")
    parser.add_argument("--output", type=Path, help="a JSON file for what was found")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.measure is not None:
        _measure_all([Case(**case) for case in json.loads(args.measure)], args.device)
        return
    chosen = CASES[args.cases or ("gpu" if args.device == "cuda" else "cpu")]
    cases = [case for case in chosen if args.only in str(case)]
    records = []
    for case, found in zip(cases, _run(cases, args.device, args.minutes), strict=True):
        record = {"name": str(case), "case": asdict(case), "device": args.device, **found}
        if "error" not in record:
            parts = planned(case, args.device, record["trained"])
            record |= {"planned": sum(parts.values()) / MIB, "parts": {k: v / MIB for k, v in parts.items()}}
        records.append(record)
        print(list(_lines([record]))[-1], flush=True)
        if args.output:
            args.output.write_text(json.dumps({"machine": _describe(args.device), "records": records}, indent=1))
    print("\n".join(["", _describe(args.device), *_lines(records)]))


def _describe(device: str) -> str:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, python {sys.version.split()[0]}, {' '.join(sys.argv[1:])}"


if __name__ == "__main__":
    main()
