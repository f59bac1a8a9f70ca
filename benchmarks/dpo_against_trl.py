"""Our DPO against TRL's ``DPOTrainer`` on one batch: losses, gradients and weights of three updates.

``python -m benchmarks.dpo_against_trl`` trains SmolLM2-135M-Instruct in float32 with plain gradient descent on eight
pairs, here and in ``.bench/trl`` (``make .bench/trl/installed``), from the same token ids, and prints by how much the
two differ. It ends with exit code 1 where that is more than rounding.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.rounds import BENCH, ROOT

UPDATES, BETA, RATE = 3, 0.1, 1e-3
#: Of float32: what two ways of adding up the same numbers may differ by, relative to the largest gradient.
ALLOWED = 1e-4


def write_pairs(folder: Path) -> Path:
    """Eight pairs, whose two answers differ in length and in all but their first words."""
    path = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": f"What is {a} plus {b}?",
            "chosen": f"{a} plus {b} is {a + b}.",
            "rejected": f"{a} plus {b} is about {a + b + 7}, but I have not looked closely.",
        }
        for a, b in ((3, 4), (12, 9), (40, 2), (7, 70), (15, 16), (1, 99), (33, 8), (5, 5))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def keep(folder: Path, name: str, losses: list[float], gradients: list[dict[str, torch.Tensor]]) -> None:
    """What a contender has to show."""
    (folder / f"{name}.json").write_text(json.dumps(losses))
    for number, gradient in enumerate(gradients):
        save_file(gradient, folder / f"{name}_{number}.safetensors")


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the names of the weights."""
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def train_here(model: str, folder: Path) -> None:
    """Our stage, as its command runs it; also writes the token ids that TRL is given."""
    import lightning as L

    from spin_lightning import DpoLightningModule, PreferenceDataModule, RecordedPairs

    gradients: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            losses.append(float(module.update_loss))
            gradients.append(gradients_of(module.policy))

    module = DpoLightningModule(
        model, beta=BETA, learning_rate=RATE, optimizer=torch.optim.SGD, lr_schedule="constant", warmup_ratio=0.0
    )
    data = PreferenceDataModule(str(write_pairs(folder)), val_fraction=0, batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=UPDATES,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[RecordedPairs(str(folder / "run")), Note()],
    )
    trainer.fit(module, data)
    keep(folder, "ours", losses, gradients)
    ids = [
        {"prompt_ids": prompt.prompt_ids, "chosen_ids": prompt.real_ids, "rejected_ids": prompt.rejected_ids}
        for prompt in data.prompts
    ]
    (folder / "ids.json").write_text(json.dumps(ids))


def train_with_trl(model: str, folder: Path) -> None:
    """TRL's trainer, in its own environment."""
    from transformers import TrainerCallback

    from benchmarks.trl_step import make_trainer

    gradients: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            gradients.append(gradients_of(model))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    settings = {
        "per_device_train_batch_size": 8,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "beta": BETA,
        "bf16": False,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
    }
    pairs = json.loads((folder / "ids.json").read_text()) * UPDATES
    make_trainer(model, pairs, str(folder / "trl"), settings, [Note()]).train()
    keep(folder, "trl", losses, gradients)


def main() -> None:
    model, folder = str(BENCH / "models" / "smollm2"), BENCH / "runs" / "dpo_against_trl"
    if sys.argv[1:] == ["trl"]:
        train_with_trl(model, folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train_here(model, folder)
    python = str(BENCH / "trl" / "bin" / "python")
    subprocess.run([python, "-m", "benchmarks.dpo_against_trl", "trl"], cwd=ROOT, check=True)
    ours, theirs = (json.loads((folder / f"{name}.json").read_text()) for name in ("ours", "trl"))
    worst = 0.0
    for number in range(UPDATES):
        a, b = (load_file(folder / f"{name}_{number}.safetensors") for name in ("ours", "trl"))
        assert a.keys() == b.keys()
        largest = max(float(gradient.abs().max()) for gradient in b.values())
        difference = max(float((a[name] - b[name]).abs().max()) for name in b) / largest
        worst = max(worst, difference)
        print(
            f"update {number}: loss {ours[number]:.6f}, TRL's {theirs[number]:.6f}; gradients differ by "
            f"{difference:.1e} of the largest"
        )
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    sys.exit(int(worst > ALLOWED or apart > ALLOWED))


if __name__ == "__main__":
    main()
