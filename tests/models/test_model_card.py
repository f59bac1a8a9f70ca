"""The card of a saved policy."""

from __future__ import annotations

import math
from typing import Any

import yaml

from spin_lightning.models.model_card import render_model_card


def card(**changes: Any) -> str:
    summary = {
        "iteration": 1, "beta": 0.1, "first_loss": math.log(2), "last_loss": 0.5, "updates": 1556, "val_nll": 12.34567,
        "epoch_metrics": {"rewards/real": 0.25, "rewards/chosen": 0.25, "logps/rejected": 1, "rewards/accuracies": .75},
        "pairs": {"training_pairs": 99584, "training_pairs_dropped": 12},
    }  # fmt: skip
    manifest = {
        "binding": {"sampling": {"temperature": 1.0, "top_p": 1.0}, "opponent_sha256": "0123abcd" * 8, "seed": 7},
        "opponent": "runs/a|b`c", "versions": {"spin_lightning": "9.8.7", "torch": "2"},
    }  # fmt: skip
    return render_model_card({**summary, **changes}, manifest)


def test_model_card_says_what_made_the_model() -> None:
    text = card()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["spin", "self-play", "spin-lightning"],
    }  # fmt: skip
    for line in (
        "# Self-play fine-tuned policy, iteration 1",
        "| opponent | `runs/a/b'c` (weights sha256 `0123abcd0123abcd`) |",
        "| pairs | 99584 trained on, 12 identical ones dropped |",
        "| sampling | temperature 1.0, top_p 1.0 |",
        "| seed | 7 |",
        "| beta | 0.1 |",
        "| updates | 1556 |",
        "| loss, first and last step | 0.693147, 0.500000 |",
        "| held-out NLL | 12.3457 nats a response |",
        "| rewards/real | 0.2500 |",
        "| rewards/accuracies | 0.7500 |",
    ):
        assert line in body.splitlines()
    assert "`spin_lightning` 9.8.7" in body
    assert "chosen" not in body and "rejected" not in body  # the same numbers under other names


def test_model_card_of_a_game_that_did_not_measure() -> None:
    lines = card(val_nll=None, first_loss=None, last_loss=None).splitlines()
    assert "| held-out NLL | not measured |" in lines
    assert "| loss, first and last step | -, - |" in lines
