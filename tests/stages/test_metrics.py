"""What is measured of an update and of an epoch."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from games import Game, read
from helpers import load, log_prob_by_hand

from spin_lightning.stages.metrics import PairMetrics, RewardAccuracy
from spin_lightning.types import PairLogProbs, PairLossOutput


def test_accuracy_counts_a_tie_one_half() -> None:
    accuracy = RewardAccuracy()
    accuracy.update(torch.zeros(4), torch.zeros(4))
    assert accuracy.compute() == 0.5  # an iteration's first step
    accuracy.update(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, -1.0]))  # win, tie, loss, win
    assert accuracy.compute() == pytest.approx((4 * 0.5 + 2.5) / 8)


def output_of(real: list[float], generated: list[float]) -> tuple[PairLossOutput, PairLogProbs]:
    rewards = torch.tensor(real), torch.tensor(generated)
    lengths = torch.ones(len(real), dtype=torch.long)
    log_probs = PairLogProbs((rewards[0] - 10).requires_grad_(), (rewards[1] - 20).requires_grad_(), lengths, lengths)
    return PairLossOutput(torch.zeros(len(real)), *rewards), log_probs


def test_means_weigh_every_pair_alike_however_it_was_batched() -> None:
    metrics = PairMetrics()
    first = metrics([output_of([1.0, 2.0, 3.0], [0.0, 2.0, 5.0])])
    second = metrics([output_of([10.0], [2.0])])
    assert float(first["rewards/real"]) == 2.0 and float(second["rewards/real"]) == 10.0  # a batch's own values
    assert float(first["rewards/accuracies"]) == 0.5 and float(second["rewards/accuracies"]) == 1.0
    expected = {
        "rewards/real": 16 / 4, "rewards/generated": 9 / 4, "rewards/margins": 7 / 4,
        "logps/real": 16 / 4 - 10, "logps/generated": 9 / 4 - 20, "rewards/accuracies": 2.5 / 4,
    }  # fmt: skip
    aliases = {"real": "chosen", "generated": "rejected"}
    for kind in ("rewards", "logps"):
        for ours, theirs in aliases.items():
            expected[f"{kind}/{theirs}"] = expected[f"{kind}/{ours}"]
    found = metrics.compute()
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    assert not any(value.requires_grad for value in found.values())
    metrics.reset()
    metrics([output_of([1.0], [3.0])])
    assert float(metrics.compute()["rewards/margins"]) == -2.0 and float(metrics.compute()["rewards/accuracies"]) == 0.0


def test_an_epochs_means_survive_a_checkpoint(tmp_path: Path) -> None:
    whole, before, after = PairMetrics(), PairMetrics(), PairMetrics()
    batches = [output_of([1.0, 2.0, 3.0], [0.0, 2.0, 5.0]), output_of([10.0], [2.0])]
    for batch in batches:
        whole([batch])
    before([batches[0]])
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after.load_state_dict(torch.load(tmp_path / "state.pt"), strict=True)
    after([batches[1]])
    assert {name: float(value) for name, value in after.compute().items()} == {
        name: float(value) for name, value in whole.compute().items()
    }


# --- in a whole game --------------------------------------------------------------------------------------------------


def test_held_out_nll_equals_an_independent_computation(plain: Game) -> None:
    for k in range(2):
        policy = load(plain.clock.folder(k) / "policy").eval()
        nlls = [-log_prob_by_hand(policy, prompt.prompt_ids, prompt.real_ids) for prompt in plain.data.val_prompts]
        assert read(plain.clock.folder(k) / "summary.json")["val_nll"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-4)
    tokens = sum(len(prompt.real_ids) for prompt in plain.data.val_prompts)
    logged = [float(row["val/nll_per_token"]) for row in logged_rows(plain) if row["val/nll_per_token"]]
    assert logged[-1] == pytest.approx(sum(nlls) / tokens, rel=1e-4)
    start = read(plain.clock.output_dir / "start.json")
    model = load(plain.module.model_name_or_path).eval()
    nlls = [-log_prob_by_hand(model, prompt.prompt_ids, prompt.real_ids) for prompt in plain.data.val_prompts]
    assert start["val/nll"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-4)


def logged_rows(game: Game) -> list[dict[str, str]]:
    with (game.folder / "logs" / "0" / "metrics.csv").open() as stream:  # type: ignore[attr-defined]
        return list(csv.DictReader(stream))


def test_metrics_are_logged_under_the_names_people_know(plain: Game) -> None:
    logged = logged_rows(plain)
    names = [
        "loss",
        "val/nll",
        "completions/mean_length",
        "completions/clipped_ratio",
        "completions/identical_ratio",
        "iteration",
    ]
    names += [f"rewards/{name}" for name in ("real", "generated", "margins", "accuracies", "chosen", "rejected")]
    names += [f"logps/{name}" for name in ("real", "generated", "chosen", "rejected")]
    for name in names:
        assert any(row[name] for row in logged), name
    steps = [row for row in logged if row["loss"]]
    assert [float(row["loss"]) for row in steps] == pytest.approx(plain.losses)
    for row in steps:
        assert float(row["rewards/margins"]) == pytest.approx(
            float(row["rewards/real"]) - float(row["rewards/generated"]), abs=1e-5
        )
        assert row["rewards/chosen"] == row["rewards/real"] and row["logps/rejected"] == row["logps/generated"]
    assert [float(row["rewards/accuracies"]) for row in (steps[0], steps[4])] == pytest.approx([0.5, 0.5], abs=0.5)
    assert [row["iteration"] for row in logged if row["iteration"]] == ["0.0", "1.0"]
    whole = read(plain.clock.folder(1) / "summary.json")["epoch_metrics"]
    last_epoch = [float(row["rewards/margins"]) for row in steps[-4:]]
    assert whole["rewards/margins"] == pytest.approx(sum(last_epoch) / 4, rel=1e-4)
