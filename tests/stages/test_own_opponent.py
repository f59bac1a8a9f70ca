"""An opponent of the user's own, by its class path."""

from __future__ import annotations

import copy
import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from games import DoLast, Game, Stopped
from torch import nn

from spin_lightning import Opponent, StoredOpponent, last_checkpoint
from spin_lightning.cli import main
from spin_lightning.models.log_probs import pair_log_probs
from spin_lightning.types import PairBatch, PairLogProbs


class Shifted(StoredOpponent):
    """Finds every real response more likely than it did, by mistake."""

    def log_probs(self, batch: PairBatch) -> PairLogProbs:
        known = super().log_probs(batch)
        return dataclasses.replace(known, real=known.real + 1.0)


class Copied(Opponent):
    """Holds a frozen copy, as the contract asks and no more."""

    holds_weights = True

    def become(self, policy: nn.Module) -> None:
        self.copied = copy.deepcopy(policy).requires_grad_(False).eval()

    @torch.no_grad()
    def log_probs(self, batch: PairBatch) -> PairLogProbs:
        return pair_log_probs(self.copied, batch)


class Halved(StoredOpponent):
    """Finds every response a given power as likely as it did."""

    starts_as_policy = False

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share

    def log_probs(self, batch: PairBatch) -> PairLogProbs:
        known = super().log_probs(batch)
        real, generated = known.real * self.share, known.generated * self.share
        return PairLogProbs(real, generated, known.real_lengths, known.generated_lengths)


def losses(folder: Path, model: str, rows: str, *settings: str) -> list[float]:
    main(
        [
            *("fit", "--model.model_name_or_path", model, "--data.train_data", rows, "--data.batch_size", "4"),
            *("--data.generator.max_new_tokens", "4", "--self_play.output_dir", str(folder)),
            *("--self_play.iterations", "1", "--model.learning_rate", "1e-2", "--trainer.accelerator", "cpu"),
            *("--trainer.enable_progress_bar", "false", *settings),
        ]
    )
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def test_opponents_come_by_class_path_or_by_word(model: str, rows: str, tmp_path: Path) -> None:
    stored = losses(tmp_path / "stored", model, rows)
    assert len(stored) > 2 and stored[0] == pytest.approx(0.6931, abs=1e-4)
    own = f"--model.opponent={__name__}.Halved"
    assert losses(tmp_path / "own", model, rows, own) == stored
    # the gate looks at what was stored, the loss at what the opponent says
    halved = losses(tmp_path / "halved", model, rows, own, "--model.opponent.share", "0.5")
    assert abs(halved[0] - stored[0]) > 1e-3
    resident = losses(tmp_path / "resident", model, rows, "--model.opponent", "resident")
    assert losses(tmp_path / "path", model, rows, "--model.opponent", "spin_lightning.ResidentOpponent") == resident
    assert resident == pytest.approx(stored, abs=1e-5)


def test_the_gate_looks_at_what_the_opponent_says(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        losses(tmp_path, model, rows, f"--model.opponent={__name__}.Shifted")
    said = " ".join(capsys.readouterr().err.split())
    assert "Likely cause: Shifted.log_probs does not give those of the policy where an iteration begins" in said


def test_an_opponent_that_holds_weights_continues_and_keeps_them_out_of_checkpoints(
    model: str, rows: str, tmp_path: Path
) -> None:
    def play(folder: Path, **settings: Any) -> Game:
        return Game(model, rows, folder, module={"opponent": Copied()}, **settings)

    def stop(trainer: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            raise Stopped

    whole = play(tmp_path / "whole").play()
    with pytest.raises(Stopped):
        play(tmp_path / "run", last=[DoLast(on_train_batch_end=stop)]).play()
    checkpoint = torch.load(last_checkpoint(tmp_path / "run"), weights_only=True)
    assert not [key for key in checkpoint["state_dict"] if key.startswith("opponent.")]
    assert play(tmp_path / "run").play().weights == whole.weights


def test_what_is_no_opponent_is_refused(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        losses(tmp_path, model, rows, "--model.opponent", "spin_lightning.SpinLoss")
    assert "model.opponent" in capsys.readouterr().err
