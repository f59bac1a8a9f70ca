"""A base in 4 bits: gradients go through it, it stays as it is, and what is merged predicts what was trained."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from games import DoLast, Game
from helpers import byte_tokenizer, load, save_tiny_model
from torch import nn

from spin_lightning import ContinuousGenerator, LoraAdapter, UserError
from spin_lightning.generation import continuous
from spin_lightning.models import adapters, kernels, merging
from spin_lightning.models.batches import pack
from spin_lightning.models.forward_paths import forward_path_of, is_shared
from spin_lightning.models.loading import load_policy
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.models.modes import evaluating
from spin_lightning.models.saving import save_model, weights_hash

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
GROUPS = [([7, 30, 8, 9], [[50, 12, 13], [60]]), ([70, 8], [[3, 99, 100, 101, 5]])]


@pytest.fixture(autouse=True)
def _no_kernels_of_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_pinned", {})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose rows fill a block of 64 weights, which have one scale."""
    folder = tmp_path_factory.mktemp("wide")
    return save_tiny_model(
        folder, hidden_size=64, intermediate_size=128, num_attention_heads=4, tie_word_embeddings=False
    )


def packed(folder: str, dtype: torch.dtype) -> Any:
    return load_policy(folder, dtype=dtype, quantize="nf4")


def adapted(folder: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    policy = LoraAdapter(**{"r": 4, "quantize": "nf4", **settings}).apply(
        load_policy(folder, dtype=dtype, quantize="nf4")
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_((0.1 * torch.randn(weight.shape, generator=generator)).to(weight.dtype))
    return policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_paths_are_taken_and_gradients_are_those_of_the_unpacked_weights(
    dtype: torch.dtype, wide: str, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = adapted(wide, dtype)
    assert {weight.dtype for weight in policy.parameters()} == {dtype, torch.uint8}
    assert all(weight.dtype is dtype for weight in policy.parameters() if weight.requires_grad)
    twin = LoraAdapter(r=4).apply(load(wide, dtype))
    for name, layer in twin.named_modules():
        if hasattr(layer, "get_base_layer"):
            base = policy.get_submodule(name).get_base_layer()
            with torch.no_grad():
                layer.get_base_layer().weight.copy_(base(torch.eye(base.in_features, dtype=dtype)).mT)
    twin.load_state_dict({name: weight for name, weight in policy.named_parameters() if weight.requires_grad}, False)
    before = weights_hash(policy)
    with evaluating(policy), torch.no_grad():  # in which the library would pack them anew, and lose gradients after it
        assert is_shared(forward_path_of(policy))
        assert continuous.refusal(policy, [[5, 6, 7, 8]], 0) == ""
    assert weights_hash(policy) == before
    assert "cannot" not in capsys.readouterr().out
    found, expected = (response_log_probs(model, pack(GROUPS)) for model in (policy, twin))
    assert torch.allclose(found, expected, atol=1e-4 if dtype is torch.float32 else 0.1)
    for values in (found, expected):
        values.sum().backward()
    other = dict(twin.named_parameters())
    for name, weight in policy.named_parameters():
        if weight.requires_grad:
            error = (weight.grad - other[name].grad).float().norm() / other[name].grad.float().norm()
            assert error < (1e-3 if dtype is torch.float32 else 0.05), name


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_merged_predicts_what_was_trained(
    settings: dict[str, Any], dtype: torch.dtype, wide: str, tmp_path: Path
) -> None:
    policy = adapted(wide, dtype, **settings)
    before = weights_hash(policy)
    save_model(policy, byte_tokenizer(), tmp_path / "policy", "", 258)
    assert weights_hash(policy) == before
    merged = load(tmp_path / "policy", dtype)
    assert not hasattr(merged.config, "quantization_config") and type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    ids = torch.tensor([[5, 60, 7, 80, 33]])
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=ids).logits.float() for model in (policy, merged))
        base = load(wide, dtype)(input_ids=ids).logits.float()
    spread = float(expected.std())
    assert float((found - expected).abs().max()) < (1e-4 if dtype is torch.float32 else 0.2) * spread
    assert float((base - expected).abs().max()) > 0.5 * spread
    assert adapters.exported_bytes(policy) >= sum(weight.nbytes for weight in merged.parameters())


def test_a_merged_model_that_predicts_something_else_is_not_exported(
    wide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_measure_divergence", lambda model, merged: 0.3)
    with pytest.raises(UserError, match=r"0\.3 nats a token, where rounding may make it 0\.0001.*merged: false"):
        save_model(adapted(wide), byte_tokenizer(), tmp_path / "policy", "", 258)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_game_starts_at_ln_2_keeps_the_base_and_resumes_to_the_bit(
    precision: str, wide: str, rows: str, tmp_path: Path
) -> None:
    def keep(trainer: Any, *args: Any) -> None:
        if trainer.global_step == 7:
            shutil.copytree(tmp_path / "run", tmp_path / "again")

    def play(name: str, *last: DoLast, quantize: Any = "nf4") -> Game:
        module = {"adapter": LoraAdapter(r=4, quantize=quantize)}
        data = {"generator": ContinuousGenerator(max_new_tokens=5)}
        return Game(
            wide, rows, tmp_path / name, module=module, data=data, trainer={"precision": precision}, last=last
        ).play()

    whole = play("run", DoLast(on_train_batch_end=keep))
    assert [whole.losses[0], whole.losses[4]] == pytest.approx(
        [math.log(2)] * 2, abs=1e-5 if "32" in precision else 0.1
    )
    assert whole.losses[-1] < 0.3
    again = play("again")
    assert again.losses == whole.losses[-len(again.losses) :] and 0 < len(again.losses) < len(whole.losses)
    assert again.weights == whole.weights
    with pytest.raises(UserError, match=r"model\.adapter\.quantize: 'nf4' -> None"):
        play("again", quantize=None)
    dtype = next(whole.module.policy.parameters()).dtype
    kept = adapters.adapter_tensors(whole.module.policy)
    adapter = LoraAdapter(path=str(tmp_path / "run/iteration_1/adapter"), quantize="nf4")
    reloaded = adapters.adapter_tensors(adapter.apply(packed(wide, dtype)))
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in kept.items())
    assert weights_hash(whole.module.policy.unload()) == weights_hash(packed(wide, dtype))
    assert (tmp_path / "run/iteration_1/policy/model.safetensors").exists()


def test_an_adapter_of_a_packed_base_goes_onto_the_whole_one_with_a_note(
    wide: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters.save_adapter(adapted(wide), byte_tokenizer(), tmp_path / "adapter", "")
    LoraAdapter(path=str(tmp_path / "adapter")).apply(load(wide))
    printed = capsys.readouterr().out
    assert f"was trained on {wide} (float32, packed (nf4)), and goes onto {wide} (float32) now" in printed


def test_a_model_that_comes_packed_is_trained_with_an_adapter_only(wide: str, rows: str, tmp_path: Path) -> None:
    packed(wide, torch.float32).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    module: dict[str, Any] = {"adapter": LoraAdapter(r=4)}
    game = Game(str(tmp_path / "model"), rows, tmp_path / "run", module=module, play={"iterations": 1}).play()
    assert game.losses[0] == pytest.approx(math.log(2), abs=1e-5) and game.losses[-1] < 0.3
    assert (tmp_path / "run/iteration_0/policy/model.safetensors").exists()
    with pytest.raises(UserError, match=r"are packed and cannot be trained\. Train an adapter on them"):
        Game(str(tmp_path / "model"), rows, tmp_path / "full").play()
