"""The order in which pairs are trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from games import Game

from spin_lightning import (
    SyntheticDataModule,
)
from spin_lightning.generation.synthetic_data import ResumableLoader


def test_data_order_is_a_function_of_seed_and_epoch_and_shows_each_pair_once(
    plain: Game, model: str, rows: str, tmp_path: Path
) -> None:
    for epoch, count in enumerate([8, 8, 16, 16]):
        assert sorted(plain.recorder.order_of(epoch)) == list(range(count))
    epochs = [plain.recorder.order_of(epoch) for epoch in range(4)]
    assert epochs[0] != epochs[1] and epochs[2] != epochs[3]
    torch.rand(7)  # the global state of chance plays no part
    data = plain.data
    loader = data._make_loader(list(range(8)), list(range(8)), lambda batch, max_tokens: batch)
    loader.sampler.set_epoch(1)
    assert [index for batch in loader for index in batch] == epochs[1]
    other = SyntheticDataModule(rows, seed=1, batch_size=4, tokenizer_name_or_path=model)
    other.setup()
    order = other._make_loader(list(range(8)), list(range(8)), lambda batch, max_tokens: batch)
    assert isinstance(order, ResumableLoader)
    assert [index for batch in order for index in batch] != epochs[0]
