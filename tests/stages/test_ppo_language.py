"""PPO on a tiny Llama whose every response can be written down: its objective, its best policy, and how near it gets.

Seven tokens, one of them the terminator, and at most three in a response: 259 responses to each of four prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pytest
import torch
from games import read
from helpers import QUIET, load
from torch import Tensor

from spin_lightning import (
    Advantage,
    AtomicCheckpointIO,
    ContinuousGenerator,
    Gae,
    LeaveOneOut,
    PpoLightningModule,
    Reward,
    Rollouts,
    SyntheticDataModule,
)
from spin_lightning.demos.language import Language, make_tokenizer, save_start, write_rows
from spin_lightning.generation.answer_store import SCHEMA
from spin_lightning.models.batches import pack
from spin_lightning.models.forward_paths import token_log_probs
from spin_lightning.rewards.base import Answer
from spin_lightning.stages.rollout_iteration import add_advantages

LANGUAGE = Language(digits="012", length=2)
PROMPTS = ["01", "12", "20", "21"]
BETA, MOST, END = 0.25, 3, 3


class Reversed(Reward):
    """1 for the prompt reversed, 0.5 for any digits that end, else 0."""

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self.of(str(a.prompt[-1]["content"]), a.text, a.finish_reason == "stop") for a in answers]

    @staticmethod
    def of(prompt: str, text: str, has_ended: bool) -> float:
        return float(text == prompt[::-1]) or 0.5 * text.isdigit() if has_ended else 0.0


class Enumeration:
    """Every response to every prompt, and what it is worth."""

    def __init__(self) -> None:
        tokenizer = make_tokenizer(LANGUAGE)
        others = [token for token in range(7) if token != END]
        self.responses = [
            [*letters, END] if count < MOST else list(letters)
            for count in range(MOST + 1)
            for letters in itertools.product(others, repeat=count)
        ]
        self.prompt_ids = [
            tokenizer.apply_chat_template([{"role": "user", "content": prompt}], return_dict=False)
            for prompt in PROMPTS
        ]
        texts = [tokenizer.decode([i for i in ids if i != END], skip_special_tokens=False) for ids in self.responses]
        self.rewards = torch.tensor(
            [
                [Reversed.of(prompt, text, ids[-1] == END) for text, ids in zip(texts, self.responses, strict=True)]
                for prompt in PROMPTS
            ],
            dtype=torch.float64,
        )
        self.batch = pack([(ids, self.responses) for ids in self.prompt_ids])
        self.lengths = [len(ids) for ids in self.responses]

    @torch.no_grad()
    def token_log_probs(self, model: Any) -> list[list[Tensor]]:
        """For each prompt and response those of its tokens, through the pass that shares prompts."""
        pieces = token_log_probs(model, self.batch).double().split(self.batch.response_lengths.tolist())
        count = len(self.responses)
        return [list(pieces[start : start + count]) for start in range(0, len(pieces), count)]

    def log_probs(self, model: Any) -> Tensor:
        return torch.stack([torch.stack([p.sum() for p in of_prompt]) for of_prompt in self.token_log_probs(model)])

    def objective(self, log_probs: Tensor, reference: Tensor) -> float:
        return float((log_probs.exp() * (self.rewards - BETA * (log_probs - reference))).sum(1).mean())

    def best(self, reference: Tensor) -> Tensor:
        return (reference + self.rewards / BETA).log_softmax(1)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_start(LANGUAGE, tmp_path_factory.mktemp("language") / "model", seed=1, hidden_size=32)


@pytest.fixture(scope="module")
def every() -> Enumeration:
    return Enumeration()


def test_the_responses_are_all_there_are(start: str, every: Enumeration) -> None:
    assert len(every.responses) == 259
    totals = every.log_probs(load(start, torch.float64)).exp().sum(1)
    assert (totals - 1).abs().max() < 1e-9


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_at_the_best_policy_every_stored_token_is_worth_what_was_expected(
    start: str, every: Enumeration, lam: float
) -> None:
    """From the pass that shares prompts through the stored table to the advantages: nothing is off by one."""
    of_reference = every.token_log_probs(load(start, torch.float64))
    rows = []
    for number, pieces in enumerate(of_reference):
        # V*(s) = beta log of the sum, over all responses that go on from s, of pi_ref exp(R / beta)
        gains: dict[tuple[int, ...], list[Tensor]] = {}
        for ids, log_probs, reward in zip(every.responses, pieces, every.rewards[number], strict=True):
            for t in range(len(ids)):
                gains.setdefault(tuple(ids[:t]), []).append(log_probs[t:].sum() + reward / BETA)
        values = {state: BETA * torch.stack(gain).logsumexp(0) for state, gain in gains.items()}
        for ids, log_probs, reward in zip(every.responses, pieces, every.rewards[number], strict=True):
            expected = [values[tuple(ids[:t])] for t in range(len(ids))]
            after = [values[tuple(ids[:t])] if t < len(ids) else reward for t in range(1, len(ids) + 1)]
            steps = [log_probs[t] + (after[t] - expected[t]) / BETA for t in range(len(ids))]
            rows.append(
                {
                    "prompt_id": number,
                    "response_ids": ids,
                    "log_probs": [float(step) for step in steps],
                    "reference_log_probs": log_probs.tolist(),
                    "values": [float(value) for value in expected],
                    "reward": float(reward),
                }
            )
    schema = pa.schema([SCHEMA.field(name) for name in rows[0]])
    table, _ = add_advantages(pa.Table.from_pylist(rows, schema=schema), Gae(lam, whiten=False), BETA)
    worst = max(abs(value) for row in table["advantages"].to_pylist() for value in row)
    assert worst < 2e-6  # stored in float32


def learn(start: str, folder: Path, advantage: Advantage, iterations: int, rate: float) -> Any:
    prompts = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    module = PpoLightningModule(
        start, beta=BETA, advantage=advantage, learning_rate=rate, lr_schedule="linear", value_scale=10.0
    )
    data = SyntheticDataModule(
        write_rows(folder / "prompts.jsonl", prompts),
        val_fraction=0,
        answers_per_prompt=32,
        batch_size=128,
        generator=ContinuousGenerator(max_new_tokens=MOST, batch_size=128),
    )
    rollouts = Rollouts(str(folder / "run"), Reversed(), iterations=iterations, prompts=4, eval_every=0)
    trainer = L.Trainer(
        **QUIET,
        max_epochs=rollouts.total_epochs,
        reload_dataloaders_every_n_epochs=1,
        plugins=[AtomicCheckpointIO()],
        callbacks=[rollouts],
        enable_checkpointing=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, data)
    return module.policy.eval()


@pytest.mark.parametrize(
    ("advantage", "iterations", "rate", "share"),
    [
        (LeaveOneOut(), 24, 5e-3, 0.3),
        *(
            pytest.param(kind, 300, 3e-3, share, marks=pytest.mark.slow)
            for kind, share in ((LeaveOneOut(), 0.95), (Gae(1.0), 0.95), (Gae(0.95), 0.95))
        ),
    ],
    ids=["short", "LeaveOneOut", "Gae(1)", "Gae(0.95)"],
)
def test_it_climbs_to_the_best_policy(
    start: str, every: Enumeration, tmp_path: Path, advantage: Advantage, iterations: int, rate: float, share: float
) -> None:
    reference = every.log_probs(load(start))
    policy = every.log_probs(learn(start, tmp_path, advantage, iterations, rate))
    from_, to = every.objective(reference, reference), every.objective(every.best(reference), reference)
    reached = (every.objective(policy, reference) - from_) / (to - from_)
    divergence = float((policy.exp() * (policy - every.best(reference))).sum(1).mean())
    print(f"J {from_:.4f} -> {every.objective(policy, reference):.4f} of {to:.4f}, {reached:.2f}")
    # J* - J(pi) = beta KL(pi, pi*)
    assert to - every.objective(policy, reference) == pytest.approx(BETA * divergence, abs=1e-5)
    assert reached > share
    assert read(tmp_path / "run" / "rollouts.json")["ended_because"] == f"all {iterations} iterations were played"
