"""One whole iteration with public parts: batched ``generate``, then TRL's trainer. A worker of one round.

The best settings we found for each part: prompts sorted by length, reference log-probs computed before training, no
gradient checkpointing.
"""

from __future__ import annotations

import json
from pathlib import Path

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
    phases, meter = {}, Meter()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16).eval()
    model.to("cuda" if ON_GPU else "cpu")
    law = sampling(settings["max_new_tokens"], asked["terminator_id"], asked["pad_id"])
    answers = generate(model, asked["prompts"], settings["generation_batch"], True, law)
    del model
    phases["generate"] = meter.lap()["seconds"]
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
    worker.report(phases=phases, tokens=sum(map(len, answers)), updates=trainer.state.global_step)


if __name__ == "__main__":
    main()
