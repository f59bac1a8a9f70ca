"""A sharded model has the log-probs and gradients of a whole one, and the whole one beside it has its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_model
from several import together
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, MixtralConfig

from spin_lightning.models import forward_paths
from spin_lightning.models.batches import pack
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.models.saving import weights_hash
from spin_lightning.models.sharding import WholeModel, shard
from spin_lightning.types import UserError

SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
#: With a tied head, an own one, a scaled one, one that is capped; one without sharing of prompts; a mixture of experts.
MODELS: dict[str, Any] = {
    "tied": lambda: tiny_model(64),
    "untied": lambda: tiny_model(64, tie_word_embeddings=False),
    "scaled logits": lambda: AutoModelForCausalLM.from_config(CohereConfig(**SIZES, logit_scale=0.5)),
    "capped logits": lambda: AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "GPT-2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(
            vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ),
    "experts": lambda: AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4)),
}


def compare_with_whole(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    passes = [
        pack([([5, 6, 7], [[8, 9, 2], [10, 2]]), ([11, 12], [[13, 14, 15, 2]])]),
        pack([([20, 21], [[22, 23, 2]]), ([24], [[25, 26], [27, 28, 29]])]),
    ]
    for name, make in MODELS.items():
        torch.manual_seed(0)
        # products of experts are not computed in float64
        dtype, allowed = (torch.float32, 1e-5) if name == "experts" else (torch.float64, 1e-12)
        model = make().to(dtype).train()
        expected = [response_log_probs(model, part) for part in passes]
        torch.stack([values.sum() for values in expected]).sum().backward()
        gradients = {key: weight.grad for key, weight in model.named_parameters()}
        own_hash = weights_hash(model)
        model.zero_grad()
        forward_paths.forget_forward_path(model)
        whole = WholeModel(model)
        shard(model, 2)
        found = response_log_probs(model, passes[rank])
        torch.testing.assert_close(found, expected[rank], rtol=0, atol=allowed, msg=name)
        (found.sum() * 2).backward()
        for key, weight in model.named_parameters():
            assert weight.grad is not None, (name, key)
            torch.testing.assert_close(weight.grad.full_tensor(), gradients[key], rtol=0, atol=100 * allowed)
        assert weights_hash(whole.gather(model)) == own_hash, name
        alone = response_log_probs(whole.model, passes[0]) if rank else None  # nobody is waited for
        assert alone is None or torch.allclose(alone, expected[0], rtol=0, atol=allowed), name
        whole.release()
        assert sum(weight.numel() for weight in whole.model.parameters()) == 0
    long = tiny_model(64, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(UserError, match="changes its rotary positions with the length of a pass"):
        shard(long, 2)


def test_a_sharded_model_is_the_whole_one(tmp_path: Path) -> None:
    ended = together(tmp_path, compare_with_whole, tmp_path)
    assert ended.codes == [0, 0], ended.printed
