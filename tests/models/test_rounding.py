"""What rounding moves a token by is measured: two ways through one model, dropout off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import scored_batch, tiny_model
from torch import Tensor, nn

from spin_lightning.models import forward_paths
from spin_lightning.models.batches import pack
from spin_lightning.models.forward_paths import rounding_of


def test_rounding_is_the_distance_a_token_of_two_forward_paths_through_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model().to(torch.bfloat16).train()
    batch = pack([([5, 6, 7], [[8, 9], [10]]), ([11], [[12, 13]])])
    seen = []

    class Rows(forward_paths.ForwardPath):
        def __call__(self, model: nn.Module, batch: Any, *args: Any) -> Tensor:
            if self.read is forward_paths._read_shared:
                return super().__call__(model, batch, *args)
            seen.append(batch.lengths)
            shared = forward_paths.ForwardPath(forward_paths._read_shared, self.is_linear)
            return shared(model, batch) + torch.tensor([0.02, -0.02, 0.1, 0.0, 0.06, -0.04, 0.0, 0.1, 0.1])

    forward_paths.forward_path_of(model)
    monkeypatch.setattr(forward_paths, "ForwardPath", Rows)
    # whole sequences: prompts make more numbers; the responses alone are no further off
    assert rounding_of(model, batch) == pytest.approx(
        ((2 * 0.02**2 + 3 * 0.1**2 + 0.06**2 + 0.04**2) / 9) ** 0.5, rel=0.01
    )
    assert seen == [((0, 5), (0, 4), (0, 3))] and model.training


def test_dropout_is_no_rounding() -> None:
    model = tiny_model(attention_dropout=0.5).train()
    assert rounding_of(model, scored_batch(model).responses) < 1e-4
