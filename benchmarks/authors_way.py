"""The training step of the SPIN authors' released code, in our words and in plain torch. A worker.

Two resident models, policy and opponent. Real and generated rows are concatenated and padded to the longest of the
batch. Both models give logits of every position. These are cast to float32, and log-softmax over the vocabulary is
taken of all of them. Gradient checkpointing as in their configuration, or without. Here with AdamW, as everybody else
in this measurement (theirs was RMSprop), and without their sharding over GPUs.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from benchmarks.measure import ON_GPU
from benchmarks.worker import Worker

IGNORED = -100
BETA = 0.1


def collate(pairs: list[dict[str, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels of all real rows, then all generated rows, right padded."""
    rows = [(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    shape = len(rows), max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, mask, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape), torch.full(shape, IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        ids[i, :length] = torch.tensor(prompt + answer)
        mask[i, :length] = 1
        labels[i, len(prompt) : length] = torch.tensor(answer)
    return ids, mask.long(), labels


def log_probs(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each row's answer: from float32 logits of all positions."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.to(torch.float32)[:, :-1]
    labels = labels[:, 1:].clone()
    counted = labels != IGNORED
    labels[~counted] = 0
    token_log_probs = logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
    return (token_log_probs * counted).sum(-1)


def main() -> None:
    worker = Worker()
    settings = worker.settings
    device = torch.device("cuda" if ON_GPU else "cpu")
    workload = json.loads((Path(settings["workload"]) / "pairs.json").read_text())
    policy, opponent = (
        AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).to(device) for _ in range(2)
    )
    opponent.requires_grad_(False).eval()
    policy.train()
    if settings["gradient_checkpointing"]:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    per_device = settings["per_device"]
    accumulated = workload["batch_size"] // per_device
    loader = DataLoader(workload["pairs"], batch_size=per_device, collate_fn=collate)
    batches = iter(loader)
    for _ in range(len(loader) // accumulated):
        worker.wait()
        for _ in range(accumulated):
            ids, mask, labels = (tensor.to(device) for tensor in next(batches))
            with torch.autocast(device.type, torch.bfloat16):
                policy_real, policy_generated = log_probs(policy, ids, mask, labels).chunk(2)
                with torch.no_grad():
                    opponent_real, opponent_generated = log_probs(opponent, ids, mask, labels).chunk(2)
            margin = BETA * ((policy_real - opponent_real) - (policy_generated - opponent_generated))
            loss = -F.logsigmoid(margin).mean()
            (loss / accumulated).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        worker.report(loss=float(loss))


if __name__ == "__main__":
    main()
