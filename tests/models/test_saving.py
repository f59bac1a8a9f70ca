"""A policy is saved as a folder that others can use, and hashed by what its weights are."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from spin_lightning.data.encoding import Encoder
from spin_lightning.models.loading import load_policy
from spin_lightning.models.saving import save_model, weights_hash


def test_weights_hash_sees_one_bit_a_name_and_a_dtype() -> None:
    model = tiny_model()
    start = weights_hash(model)
    assert weights_hash(copy.deepcopy(model).train()) == start == weights_hash(tiny_model())
    assert weights_hash(tiny_model(seed=1)) != start
    assert weights_hash(copy.deepcopy(model).to(torch.bfloat16)) != start
    changed = copy.deepcopy(model)
    with torch.no_grad():
        bits = changed.model.norm.weight.view(torch.int32)
        bits[3] ^= 1
    assert weights_hash(changed) != start
    plain, renamed = nn.Sequential(nn.Linear(2, 2)), nn.Sequential()
    renamed.add_module("first", plain[0])
    assert weights_hash(plain) != weights_hash(renamed)


def test_weights_hash_does_not_depend_on_memory_layout() -> None:
    wide, turned = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    turned.weight = nn.Parameter(wide.weight.detach().T.contiguous().T)
    assert not turned.weight.is_contiguous()
    assert weights_hash(wide) == weights_hash(turned)
    narrow = nn.Linear(2, 3, bias=False)  # the same bytes in another shape
    narrow.weight = nn.Parameter(wide.weight.detach().reshape(3, 2))
    assert weights_hash(narrow) != weights_hash(wide)


def exported(folder: Path, model: nn.Module, template: str | None = None) -> Encoder:
    encoder = Encoder(byte_tokenizer(), template)
    save_model(model, encoder.tokenizer, folder, "# A card\n", encoder.terminator_id)
    return encoder


def test_saved_model_is_a_folder_others_can_use(tmp_path: Path) -> None:
    model, folder = tiny_model(), tmp_path / "policy"
    encoder = exported(folder, model, "alpaca")
    again, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert weights_hash(again) == weights_hash(model)
    assert (folder / "README.md").read_text() == "# A card\n"
    assert list(folder.glob("*.safetensors"))
    assert tokenizer.chat_template == encoder.chat_template
    assert again.generation_config.eos_token_id == encoder.terminator_id
    assert again.generation_config.pad_token_id == encoder.pad_id
    assert again.generation_config.do_sample is True
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_saving_replaces_an_older_folder_and_what_a_crash_left(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    exported(folder, tiny_model(seed=0))
    (folder / "old.txt").write_text("x")
    (tmp_path / "policy.partial").mkdir()
    (tmp_path / "policy.partial" / "half.txt").write_text("x")
    exported(folder, tiny_model(seed=1))
    assert weights_hash(AutoModelForCausalLM.from_pretrained(folder)) == weights_hash(tiny_model(seed=1))
    assert not (folder / "old.txt").exists() and not (folder / "half.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_model_that_reloads_otherwise_does_not_get_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "policy"
    exported(folder, tiny_model(seed=0))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_args, **_settings: tiny_model(seed=2))
    with pytest.raises(RuntimeError, match=r"policy\.partial reloads with other weights.*Nothing was replaced"):
        exported(folder, tiny_model(seed=1))
    monkeypatch.undo()
    assert weights_hash(AutoModelForCausalLM.from_pretrained(folder)) == weights_hash(tiny_model(seed=0))


@pytest.mark.parametrize(
    "own",
    [{"temperature": 0.6, "top_p": 0.9}, {"num_beams": 1, "early_stopping": True}, {"do_sample": True, "top_k": 20}],
)
def test_odd_generation_settings_of_the_base_model_do_not_stop_the_export(tmp_path: Path, own: dict[str, Any]) -> None:
    model = tiny_model()
    model.generation_config = own_settings = GenerationConfig(**own)
    exported(tmp_path / "policy", model)
    assert model.generation_config is own_settings
    saved = json.loads((tmp_path / "policy" / "generation_config.json").read_text())
    assert saved["do_sample"] is True and not set(own) & (set(saved) - {"do_sample"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_saved_model_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    exported(tmp_path / "policy", model)
    assert weights_hash(load_policy(str(tmp_path / "policy"), dtype=dtype)) == weights_hash(model)
