"""The step of SPIN in a game: the loss it starts from, in every precision and on every way through the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from games import Do, Game, weight_bits
from helpers import load, save_tiny_model
from lightning import Trainer
from transformers import AutoModelForCausalLM

from spin_lightning import (
    SpinLightningModule,
    SpinLoss,
    UserError,
)
from spin_lightning.generation.pair_store import PairStore
from spin_lightning.models import forward_paths
from spin_lightning.stages.optim import Float32Master

LINKS_AT_0 = {"logistic": math.log(2), "hinge": 1.0, "exponential": 1.0, "correlation": 1.0}


@pytest.mark.parametrize("link", LINKS_AT_0)
def test_loss_at_each_iterations_first_step_is_the_links_value_at_0(
    link: Any, model: str, rows: str, tmp_path: Path
) -> None:
    game = Game(model, rows, tmp_path, module={"loss": SpinLoss(link), "beta": 0.7, "learning_rate": 1e-3}).play()
    assert [game.losses[0], game.losses[4]] == pytest.approx([LINKS_AT_0[link]] * 2, abs=1e-5)
    assert game.losses[1] < LINKS_AT_0[link] - 1e-3


def test_stored_and_resident_opponents_give_the_same_losses_over_a_whole_game(
    plain: Game, model: str, rows: str, tmp_path: Path
) -> None:
    game = Game(model, rows, tmp_path, module={"opponent": "resident"}).play()
    assert game.losses == pytest.approx(plain.losses, abs=1e-4)


@pytest.mark.parametrize("answers_per_prompt", [1, 3])
def test_batches_in_several_passes_train_the_same(
    model: str, rows: str, tmp_path: Path, answers_per_prompt: int
) -> None:
    data = {"answers_per_prompt": answers_per_prompt, "keep_prompts_together": answers_per_prompt > 1}
    whole, cut = (
        Game(model, rows, tmp_path / str(tokens), data={**data, "micro_batch_tokens": tokens}).play()
        for tokens in (10_000, 60)
    )
    assert cut.losses == pytest.approx(whole.losses, abs=1e-4)
    assert cut.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    for a, b in zip(whole.module.policy.parameters(), cut.module.policy.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-3


def test_fifty_steps_of_the_fast_path_are_those_of_the_plain_one(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared prompts, packed, head in chunks, two passes a step; against padded rows and whole logits in one pass."""
    settings: dict[str, Any] = {"play": {"iterations": 1, "epochs": 17}, "module": {"learning_rate": 3e-3}}
    data = {"answers_per_prompt": 2, "batch_size": 6}
    plain_path = forward_paths.ForwardPath(forward_paths._read_plain)
    fast = Game(model, rows, tmp_path / "fast", data={**data, "micro_batch_tokens": 100}, **settings).play()
    monkeypatch.setattr(forward_paths, "forward_path_of", lambda model: plain_path)
    plain = Game(model, rows, tmp_path / "plain", data={**data, "micro_batch_tokens": 10**6}, **settings).play()
    assert len(fast.losses) == len(plain.losses) >= 50
    assert fast.losses == pytest.approx(plain.losses, abs=2e-3)
    assert min(plain.losses) < 0.5  # and something was learned


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_play_and_pass_the_gate(
    precision: str, plain: Game, model: str, rows: str, tmp_path: Path
) -> None:
    optimizers: set[type] = set()
    note = Do(on_train_batch_end=lambda trainer, *_: optimizers.add(type(trainer.optimizers[0])))
    game = Game(model, rows, tmp_path, trainer={"precision": precision}, callbacks=[note]).play()
    assert [game.losses[0], game.losses[4]] == pytest.approx([math.log(2)] * 2, abs=0.2)
    assert all(map(math.isfinite, game.losses)) and game.losses[-1] < game.losses[4]
    assert optimizers == {Float32Master if precision == "bf16-true" else torch.optim.AdamW}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "iteration_1/policy")
    assert weight_bits(exported) == game.weights


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_the_loss_is_given_the_opponent_s_log_probs_as_they_are_stored(
    precision: str, model: str, rows: str, tmp_path: Path
) -> None:
    seen: dict[int, float] = {}

    def look(trainer: Trainer, module: SpinLightningModule, outputs: Any, batch: Any, *_: Any) -> None:
        for part in batch:
            seen.update(zip(part.pair_ids.tolist(), part.opponent.generated.tolist(), strict=True))

    play = {"iterations": 1, "epochs": 1}
    Game(
        model, rows, tmp_path, play=play, trainer={"precision": precision}, callbacks=[Do(on_train_batch_end=look)]
    ).play()
    table = PairStore(tmp_path / "iteration_0/pairs").read(["opponent_generated_log_prob"])
    stored = table["opponent_generated_log_prob"].to_pylist()
    assert len(seen) == len(stored) and max(map(abs, stored)) > 16  # where bfloat16 has steps of an eighth
    assert [seen[pair] for pair in range(len(stored))] == pytest.approx(stored, abs=1e-5)


def test_float32_master_weights_keep_updates_that_bfloat16_rounds_away(model: str, rows: str, tmp_path: Path) -> None:
    before = load(model, torch.bfloat16)
    moved: list[float] = []

    def look(trainer: Trainer, module: SpinLightningModule, *_: Any) -> None:
        masters = trainer.optimizers[0].master_weights
        moved.append(
            max((m - p.float()).abs().max().item() for m, p in zip(masters, module.policy.parameters(), strict=True))
        )

    game = Game(
        model,
        rows,
        tmp_path,
        module={"learning_rate": 1e-6},
        trainer={"precision": "bf16-true"},
        callbacks=[Do(on_train_batch_end=look)],
    ).play()
    changed = sum(
        int((a != b).sum()) for a, b in zip(before.parameters(), game.module.policy.parameters(), strict=True)
    )
    assert max(moved) > 0  # what the weights of the model cannot show yet is kept
    assert changed < 200


def test_gradient_checkpointing_changes_nothing_but_memory(plain: Game, model: str, rows: str, tmp_path: Path) -> None:
    game = Game(model, rows, tmp_path, module={"gradient_checkpointing": True}).play()
    assert game.losses == pytest.approx(plain.losses, abs=1e-5)


def test_dropout_is_off_unless_asked_and_the_gate_names_it(rows: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", attention_dropout=0.1)
    game = Game(model, rows, tmp_path / "off").play()
    assert [game.losses[0], game.losses[4]] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    with pytest.raises(
        UserError, match=r"iteration 0 does not start where it should.*so dropout is on. Set model.dropout: false"
    ):
        Game(model, rows, tmp_path / "on", module={"dropout": True}).play()
