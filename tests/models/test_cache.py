"""The cache goes to models, and comes back, under the name that the installed transformers knows."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from games import answers_of
from helpers import tiny_model
from torch import nn

from spin_lightning.generation.continuous import ContinuousGenerator
from spin_lightning.models.cache import cache_argument, cache_of


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None, **kwargs):
        return SimpleNamespace(logits=input_ids, past_key_values=past_key_values)


class New(nn.Module):
    def forward(self, input_ids, cache=None, **kwargs):
        return SimpleNamespace(logits=input_ids, cache=cache)


@pytest.mark.parametrize(("model", "name"), [(Old(), "past_key_values"), (New(), "cache")])
def test_a_cache_goes_and_comes_under_the_model_s_own_name(model, name):
    assert cache_argument(model) == name
    assert cache_of(model(1, **{cache_argument(model): "kept"})) == "kept"


def test_a_step_with_a_cache_equals_a_whole_pass():
    model, ids = tiny_model(32).eval(), torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        kept = cache_of(model(input_ids=ids[:, :-1], use_cache=True))
        last = model(input_ids=ids[:, -1:], **{cache_argument(model): kept}, use_cache=True).logits[0, -1]
        torch.testing.assert_close(last, model(input_ids=ids, use_cache=False).logits[0, -1])


def test_generation_does_not_use_a_name_that_goes_away(caplog):
    generator = ContinuousGenerator(max_new_tokens=3, batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(answers_of(generator, tiny_model(32).eval(), [[1, 2], [3], [4, 5]], [0, 1, 2], 31)) == 3
    assert "past_key_values" not in caplog.text
