"""TRL's reinforcement learning: ``GRPOTrainer.train()`` or ``RLOOTrainer.train()``, an iteration a round.

A worker, in an environment of its own. An iteration is what its generation batch lasts for: responses, rewards,
reference log-probs, and the updates on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.measure import ON_GPU
from benchmarks.rl_reward import digits
from benchmarks.worker import Worker


class Turns(TrainerCallback):
    """One round an iteration. What the trainer fetched ahead of its first update belongs to it."""

    def __init__(self, worker: Worker, updates: int) -> None:
        self.worker, self.updates = worker, updates
        self.facts: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: TrainerState, *more: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.worker.wait()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "reward" in logs:  # of the iteration's first update only
            self.facts = {"reward": float(logs["reward"]), "mean_length": float(logs["completions/mean_length"])}
        if "loss" in logs and state.global_step % self.updates == 0:
            self.worker.report(**self.facts)
            self.worker.wait()


def main() -> None:
    worker = Worker()
    settings = worker.settings
    rows = [json.loads(line) for line in Path(settings["rows"]).read_text().splitlines()]
    make_config, make_trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[settings["kind"]]
    config = make_config(
        output_dir=str(Path(settings["runs"]) / "trl_rl"),
        use_cpu=not ON_GPU,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_completion_length=settings["max_new_tokens"],
        num_generations=settings["answers_per_prompt"],
        steps_per_generation=settings["updates"] * settings["trl"].get("gradient_accumulation_steps", 1),
        max_steps=settings["updates"] * settings["iterations"],
        shuffle_dataset=False,
        seed=0,
        **settings["trl"],
    )
    trainer = make_trainer(
        model=settings["model"],
        reward_funcs=digits,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["messages"][:-1]} for row in rows * settings["iterations"]]),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        callbacks=[Turns(worker, settings["updates"])],
    )
    trainer.train()


if __name__ == "__main__":
    main()
