"""Models that are random in training, that keep parts in float32, and precisions that would round what is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from games import Do, Game, read
from helpers import byte_tokenizer, save_tiny_model, tiny_model, write_rows
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from spin_lightning import TransformersGenerator
from spin_lightning.generation.pair_maker import _is_exact
from spin_lightning.models.loading import as_policy
from spin_lightning.models.modes import calm, evaluating, is_random
from spin_lightning.types import UserError


class Noisy(nn.Module):
    """Adds noise to its logits in training mode, as the routers of some mixtures of experts do."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.embedding, self.inner, self.noise = nn.Embedding(50, 8), nn.Linear(8, 50), noise

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = self.inner(self.embedding(input_ids))
        if self.training:
            logits = logits + self.noise * torch.randn_like(logits)
        return type("Output", (), {"logits": logits})


def test_a_model_that_is_random_in_training_is_found_and_calmed() -> None:
    assert is_random(Noisy(0.1)) and not is_random(Noisy(0.0)) and not is_random(Noisy(0.1).eval())
    model = Noisy(0.1)
    model.inner.gradient_checkpointing = True  # type: ignore[assignment]
    calm(model)
    assert not is_random(model)
    assert (model.training, model.embedding.training, model.inner.training) == (False, False, True)


def test_every_module_has_its_own_mode_again_after_evaluation() -> None:
    model = Noisy(0.0)
    model.embedding.eval()

    def look_and_fail() -> None:
        assert not (model.training or model.inner.training)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"), evaluating(model):
        look_and_fail()
    assert (model.training, model.embedding.training, model.inner.training) == (True, False, True)


def test_stored_log_probs_are_not_rounded_to_the_precision_of_training(tmp_path: Path) -> None:
    """A bfloat16 of -130 is off by up to half a nat, and the margin would be too."""
    model, rows = save_tiny_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 8)
    seen: list[Any] = []
    keep = Do(on_train_batch_start=lambda trainer, module, batch, *_: seen.extend(part.opponent for part in batch))
    Game(
        model, rows, tmp_path / "run", callbacks=[keep], play={"iterations": 1, "epochs": 1},
        trainer={"precision": "bf16-true"},
    ).play()  # fmt: skip
    values = torch.cat([part.generated for part in seen])
    assert values.dtype is torch.float32
    assert not torch.equal(values, values.bfloat16().float())
    assert read(tmp_path / "run/iteration_0/summary.json")["first_loss"] == pytest.approx(0.693147, abs=0.02)


def deepseek() -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=len(byte_tokenizer()), hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4,
            num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
            max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip


@pytest.mark.parametrize("by", ["name", "object"])
def test_a_router_that_is_kept_in_float32_stays_so_in_bfloat16_and_is_exported(by: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    deepseek().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    given: Any = str(folder) if by == "name" else AutoModelForCausalLM.from_pretrained(folder)
    game = Game(
        given, rows, tmp_path / "run", play={"iterations": 1, "epochs": 1}, trainer={"precision": "bf16-true"},
        data={"val_fraction": 0.0}, every_n_steps=None,
    ).play()  # fmt: skip
    dtypes = {name: tensor.dtype for name, tensor in game.module.policy.state_dict().items()}
    kept = {name for name, dtype in dtypes.items() if dtype is torch.float32}
    in_float32 = DeepseekV3ForCausalLM._keep_in_fp32_modules_strict  # older versions of transformers have fewer
    assert kept == {name for name in dtypes if any(part in name for part in in_float32)} != set()
    assert (tmp_path / "run/iteration_0/policy").is_dir()


def test_the_frequencies_of_positions_stay_in_float32() -> None:
    model = deepseek()
    before = model.model.rotary_emb.inv_freq.clone()
    as_policy(model, torch.bfloat16)
    assert torch.equal(model.model.rotary_emb.inv_freq, before) and model.lm_head.weight.dtype is torch.bfloat16


def test_an_opponent_of_slightly_other_weights_is_stopped_in_bfloat16(tmp_path: Path) -> None:
    """One matrix is a tenth larger than when the pairs were scored: a log-ratio of some tenths of a nat."""
    model, rows = save_tiny_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 8)

    def change(trainer: Any, module: Any, *_: Any) -> None:
        with torch.no_grad():
            module.policy.model.layers[0].mlp.down_proj.weight.mul_(1.1)

    game = Game(
        model, rows, tmp_path / "run", callbacks=[Do(on_generation_end=change)], play={"iterations": 1, "epochs": 1},
        trainer={"precision": "bf16-true"}, data={"generator": TransformersGenerator(max_new_tokens=40)},
    )  # fmt: skip
    with pytest.raises(UserError, match="iteration 0 does not start where it should"):
        game.play()


def test_the_sampler_is_trusted_in_float32_only() -> None:
    """In bfloat16 it rounds otherwise than a whole pass, and would agree by chance where responses are certain."""
    model = tiny_model()
    assert _is_exact(model) and not _is_exact(tiny_model().to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not _is_exact(model)
