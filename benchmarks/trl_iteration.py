"""One whole iteration with public parts: batched ``generate``, then TRL's trainer. A worker of one round.

The best settings we found for each part: prompts sorted by length, reference log-probs computed before training, no
gradient checkpointing. Of contenders that share a file of answers the first generates them, and the others take the
same ones over, with what they cost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.measure import ON_GPU, Meter
from benchmarks.plain_generation import generate, sampling
from benchmarks.trl_step import make_trainer
from benchmarks.worker import Worker


def main() -> None:
    worker = Worker()
    settings = worker.settings
    asked = json.loads(Path(settings["prompts"]).read_text())
    worker.wait()
    path = Path(settings["answers"])
    earlier_seconds = 0.0
    meter = Meter()
    if path.exists():
        answers, earlier_seconds = json.loads(path.read_text())
        meter.lap()
        phases = {"generate": earlier_seconds}
    else:
        answers = answer(settings, asked)
        phases = {"generate": meter.lap()["seconds"]}
        path.write_text(json.dumps([answers, phases["generate"]]))
    pairs = [
        {"prompt_ids": prompt, "chosen_ids": real, "rejected_ids": answer}
        for prompt, real, answer in zip(asked["prompts"], asked["real"], answers, strict=True)
    ]
    output_dir = str(Path(settings["runs"]) / "trl")
    trainer = make_trainer(settings["model"], pairs, output_dir, settings["trl"], [])
    phases["score"] = meter.lap()["seconds"]
    trainer.train()
    trainer.save_model(output_dir)
    phases["train"] = meter.lap()["seconds"]
    facts = {"phases": phases, "tokens": sum(map(len, answers)), "updates": trainer.state.global_step}
    worker.report(earlier_seconds, **facts)


def answer(settings: dict[str, Any], asked: dict[str, Any]) -> list[list[int]]:
    """A response to each prompt, by the model that is loaded for it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16).eval()
    model.to("cuda" if ON_GPU else "cpu")
    config = sampling(settings["max_new_tokens"], asked["terminator_id"], asked["pad_id"])
    return generate(model, asked["prompts"], settings["generation_batch"], True, config)


if __name__ == "__main__":
    main()
