"""Supervised fine-tuning: response tokens only, and no game."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from games import Do, Recorder, read, weight_bits
from helpers import QUIET, load
from lightning import Trainer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from spin_lightning import (
    ExportPolicy,
    SelfPlay,
    SftLightningModule,
    SyntheticDataModule,
    UserError,
)


@pytest.mark.parametrize("average", ["token", "response"])
def test_supervised_fine_tuning_learns_from_response_tokens_only(
    average: Any, model: str, rows: str, tmp_path: Path
) -> None:
    """Its first step's gradient equals that of a loss computed one row at a time."""
    gradients: list[list[torch.Tensor]] = []
    keep = Do(
        on_before_optimizer_step=lambda trainer, module, *_: gradients.append(
            [p.grad.clone() for p in module.policy.parameters()]
        )
    )
    module = SftLightningModule(model, learning_rate=1e-2, average=average, warmup_ratio=0.25)
    data, recorder = SyntheticDataModule(rows, batch_size=8, val_fraction=0.2), Recorder()
    callbacks = [keep, recorder, ExportPolicy(str(tmp_path))]
    Trainer(max_epochs=4, enable_checkpointing=False, callbacks=callbacks, **QUIET).fit(module, data)
    reference = load(model)
    total = 0
    for prompt in data.prompts:
        ids = torch.tensor([[*prompt.prompt_ids, *prompt.real_ids]])
        start = len(prompt.prompt_ids)
        total = total + F.cross_entropy(reference(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="sum")
    loss = total / (sum(len(prompt.real_ids) for prompt in data.prompts) if average == "token" else len(data.prompts))
    loss.backward()
    assert recorder.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    for found, expected in zip(gradients[0], reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected.grad, rtol=1e-3, atol=1e-5)
    # one step of warm-up, then down to zero over the other three: no step is wasted on a rate of zero
    assert list(recorder.rates.values()) == pytest.approx([0.5e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    summary = read(tmp_path / "summary.json")
    assert summary["updates"] == 4 and summary["first_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert summary["val_nll"] is not None and summary["last_loss"] < summary["first_loss"]
    assert weight_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "policy")) == weight_bits(module.policy)


def test_supervised_fine_tuning_refuses_a_game_and_unknown_averages(model: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.average must be token or response, got 'row'"):
        SftLightningModule(model, average="row")  # type: ignore[arg-type]
    data = SyntheticDataModule(rows)
    data.game = SelfPlay(str(tmp_path))
    with pytest.raises(UserError, match="SftLightningModule has no opponent, so it takes no SelfPlay callback"):
        Trainer(accelerator="cpu", logger=False, max_epochs=1).fit(SftLightningModule(model), data)
