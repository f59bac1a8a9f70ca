"""Sizes of a model without its weights."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_model
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from spin_lightning.models.counting import count_adapter, make_on_meta, measure_size
from spin_lightning.types import UserError

LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    tie_word_embeddings=False,
)


def test_a_model_is_counted_by_its_config_alone():
    model = make_on_meta(LLAMA)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    size = measure_size(model)
    linear = 2 * (12 * 12 + 2 * 12 * 4 + 12 * 12 + 3 * 12 * 20)
    assert (size.packable, size.weights) == (linear, linear + 2 * 50 * 12 + 5 * 12)
    assert (size.layers, size.hidden, size.query, size.key) == (2, 12, 12, 4)
    assert (size.intermediate, size.vocabulary, size.is_tied) == (20, 50, False)
    assert size.layer == (linear + 5 * 12) // 2


def test_tied_weights_are_counted_once():
    model = tiny_model(vocab_size=60, tie_word_embeddings=True)
    size = measure_size(model)
    assert size.is_tied and size.weights == sum(weight.numel() for weight in model.parameters())


def test_a_token_meets_some_experts_and_no_all():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    mixture = MixtralConfig(vocab_size=50, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, **small)
    assert measure_size(make_on_meta(mixture)).intermediate == 48
    plain = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    assert measure_size(make_on_meta(plain)).intermediate == 64


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4},
        {"r": 4, "target_modules": "all-linear", "use_dora": True},
        {"r": 3, "target_modules": ["q_proj", "v_proj"]},
        {"r": 3, "target_modules": r".*layers\.1\..*(up|down)_proj"},
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapter_is_counted_as_peft_makes_it(settings):
    peft = pytest.importorskip("peft")
    expected = count_adapter(make_on_meta(LLAMA), settings)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear", **settings})
    with torch.device("meta"):
        made = peft.get_peft_model(make_on_meta(LLAMA), config)
    assert sum(weight.numel() for weight in made.parameters() if weight.requires_grad) == expected


def test_an_adapter_on_no_layer_is_refused():
    with pytest.raises(UserError, match="no layer of this LlamaForCausalLM is named"):
        count_adapter(make_on_meta(LLAMA), {"target_modules": ["c_attn"]})
