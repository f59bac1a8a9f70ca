"""Files that are whole or not there, and their hashes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import byte_tokenizer, save_tiny_model, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from spin_lightning import losses
from spin_lightning.data.encoding import Encoder
from spin_lightning.models import log_probs
from spin_lightning.models.batches import collate_pairs, pack
from spin_lightning.models.loading import disable_dropout, load_policy, load_tokenizer, locate, save_model, weights_hash
from spin_lightning.models.log_probs import pair_log_probs, rounding_of
from spin_lightning.models.model_card import render_model_card
from spin_lightning.runs.files import read_json, replacing, sha256_of, write_json
from spin_lightning.schedule import at_iteration, check_schedule
from spin_lightning.stages.gate import FLOOR, check_gate
from spin_lightning.stages.metrics import PairMetrics, RewardAccuracy
from spin_lightning.stages.opponent import ResidentOpponent, StoredOpponent
from spin_lightning.stages.optim import Float32Master
from spin_lightning.types import PairBatch, PairLogProbs, PairLossOutput, UserError


def test_replaced_file_is_old_or_new_and_never_half(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [child.name for child in path.parent.iterdir()] == ["file.txt"]


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"name": "Größe 日本", "numbers": [1, 0.1, 1e-7, None, True], "nested": {"a": {}}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "Größe" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "b.json") is None
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert read_json(tmp_path / "a.json") == value


def test_hashes_of_bytes_text_files_and_values(tmp_path: Path) -> None:
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(b"abc") == sha256_of("abc") == sha256_of(tmp_path / "file") == abc
    assert sha256_of({"a": 1, "b": [2]}) == sha256_of({"b": [2], "a": 1}) != sha256_of({"a": 1, "b": [3]})
