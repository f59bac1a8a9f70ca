"""Adapters: every fast path is taken as for full models, the base stays as it is, and what is exported loads again."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from games import weight_bits
from helpers import byte_tokenizer, load, log_prob_by_hand, save_tiny_model
from torch import Tensor, nn

from spin_lightning.generation import continuous, packed_linear
from spin_lightning.models import adapters, head, kernels
from spin_lightning.models.adapters import LoraAdapter, adapter_tensors, save_adapter, trained_names
from spin_lightning.models.batches import pack
from spin_lightning.models.forward_paths import AGREEMENT, forward_path_of, is_shared
from spin_lightning.models.fused_layers import Fused
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.models.merging import merged_linear
from spin_lightning.models.saving import save_model, weights_hash
from spin_lightning.stages.export import export_policy
from spin_lightning.types import UserError

peft = pytest.importorskip("peft")

HEAD = ["lm_head"]
#: Settings, and whether the head is more than one matrix with them.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "all-linear": ({}, False),
    "DoRA": ({"use_dora": True}, False),
    "rsLoRA": ({"use_rslora": True}, False),
    "some layers": ({"target_modules": ["q_proj", "v_proj"]}, False),
    "the head too": ({"target_modules": ["q_proj", "v_proj", *HEAD]}, True),
    "a saved head": ({"modules_to_save": HEAD}, True),
    "a saved head and embeddings": ({"modules_to_save": [*HEAD, "embed_tokens"]}, True),
    "saved norms": ({"modules_to_save": ["input_layernorm", "norm"]}, False),
}
GROUPS = [([7, 30, 8, 9], [[50, 12, 13], [60]]), ([70, 8], [[3, 99, 100, 101, 5]])]


@pytest.fixture(autouse=True)
def _no_kernels_of_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_pinned", {})  # by a game, whose heads may be wider


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


def moved(policy: Any) -> Any:
    """The same model, its trained weights moved away from where they began."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return policy


def adapted(folder: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return moved(LoraAdapter(**{"r": 4, **settings}).apply(load(folder, dtype)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fast_paths_are_taken_as_for_full_models(
    kind: str, tied: bool, model: str, untied: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, is_head_adapted = KINDS[kind]
    if tied and kind == "the head too":
        pytest.skip("is refused")
    settings = {**settings, "ensure_weight_tying": tied and is_head_adapted}
    for dtype in (torch.float32, torch.bfloat16):
        policy = adapted(model if tied else untied, dtype, **settings).eval()
        assert is_shared(forward_path_of(policy))
        assert head.is_linear(policy) is not is_head_adapted
        norms = [module for module in policy.modules() if isinstance(module, Fused) and "Norm" in type(module).__name__]
        assert len(norms) == (10 if kind == "saved norms" else 5)  # both copies
        assert sum("MLP" in type(module).__name__ for module in policy.modules() if isinstance(module, Fused)) == 2
        expected = [log_prob_by_hand(policy, prompt, one) for prompt, several in GROUPS for one in several]
        tolerance = 1e-4 if dtype is torch.float32 else 5 * AGREEMENT[dtype]
        with torch.no_grad():
            found = response_log_probs(policy, pack(GROUPS)).double()
            assert torch.allclose(found, torch.tensor(expected, dtype=torch.double), atol=tolerance, rtol=1e-5)
            assert continuous.refusal(policy, [[5, 6, 7, 8]], 0) == ""
    assert "cannot" not in capsys.readouterr().out


def test_gradients_are_those_of_plain_passes_and_of_the_adapter_alone(untied: str) -> None:
    policy = adapted(untied, use_dora=True, modules_to_save=HEAD)
    response_log_probs(policy, pack(GROUPS)).sum().backward()
    found = {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}
    assert found.keys() == {name for name, weight in policy.named_parameters() if weight.requires_grad}
    policy.zero_grad()
    for prompt, several in GROUPS:
        for response in several:
            logits = policy(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum().backward()
    for name, weight in policy.named_parameters():
        if weight.requires_grad:
            assert torch.allclose(weight.grad, found[name], rtol=1e-3, atol=1e-4), name


# --- what is drawn, and what is trained -------------------------------------------------------------------------------


def test_the_first_matrices_are_drawn_from_the_seed_alone(model: str) -> None:
    def drawn(dtype: torch.dtype, seed: int, around: torch.dtype = torch.float32) -> dict[str, Tensor]:
        torch.set_default_dtype(around)
        try:
            return adapter_tensors(LoraAdapter(r=4).apply(load(model, dtype), seed))
        finally:
            torch.set_default_dtype(torch.float32)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = drawn(torch.float32, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again, other, half = drawn(torch.float32, 1), drawn(torch.float32, 2), drawn(torch.bfloat16, 1, torch.bfloat16)
    names = [name for name in first if "lora_A" in name]
    assert len(names) == 14 and first.keys() == half.keys()
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name].bfloat16(), half[name]) and half[name].dtype is torch.bfloat16
        assert torch.equal(first[name], other[name]) is (name not in names)  # B is 0


def test_what_is_trained_is_the_adapter_and_saved_layers(model: str) -> None:
    policy = LoraAdapter(r=4, modules_to_save=["model.norm"]).apply(load(model))
    names = trained_names(policy)
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    assert len(names) == 2 * 14 + 1
    assert {name for name, weight in policy.named_parameters() if weight.requires_grad} == names
    linear = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 32), (16, 32), (32, 16)]
    count = 2 * sum(4 * (a + b) for a, b in linear) + 16
    assert sum(weight.numel() for weight in policy.parameters() if weight.requires_grad) == count
    assert adapters.exported_bytes(policy) == 4 * (count + load(model).num_parameters())
    policy.adapter_merged = False
    assert adapters.exported_bytes(policy) == 4 * count


def test_scales_are_as_documented(model: str) -> None:
    for settings, scale in (
        ({}, 2.0),
        ({"alpha": 4}, 1.0),
        ({"alpha": 6, "use_rslora": True}, 3.0),
    ):
        policy = LoraAdapter(r=4, **settings).apply(load(model))
        assert policy.get_base_model().model.layers[0].mlp.up_proj.scaling["default"] == scale


# --- decoding from merged copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all-linear", "DoRA", "rsLoRA", "the head too"])
def test_a_layer_with_an_adapter_is_merged_in_a_copy(kind: str, untied: str) -> None:
    policy = adapted(untied, **KINDS[kind][0])
    before = weights_hash(policy)
    layers = [module for module in policy.modules() if merged_linear(module) is not None]
    assert len(layers) == {"the head too": 5}.get(kind, 14)
    for layer in layers:
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        merged = merged_linear(layer)
        assert type(merged) is nn.Linear
        assert torch.allclose(merged(x), layer(x), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(layer.get_base_layer()(x), layer(x), atol=1e-2)
    assert weights_hash(policy) == before
    assert merged_linear(policy) is None and merged_linear(nn.Linear(2, 2)) is None


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 units")
@pytest.mark.parametrize("kind", ["all-linear", "DoRA", "a saved head"])
def test_decoding_takes_one_packed_matrix_for_base_and_adapter(kind: str, untied: str) -> None:
    policy = adapted(untied, torch.bfloat16, **KINDS[kind][0]).eval()
    before = weight_bits(policy)
    forwards = packed_linear.packed_forwards(policy, 4)
    adapter_layers = [module for module in forwards if type(module) is not nn.Linear]
    assert len(adapter_layers) == 14 and len(forwards) == {"a saved head": 16}.get(kind, 15)  # and the head
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = policy(input_ids=ids).logits.float()
        with packed_linear.decoding_with(forwards):
            found = policy(input_ids=ids).logits.float()
        assert torch.equal(policy(input_ids=ids).logits.float(), expected)
        with policy.disable_adapter():
            base = policy(input_ids=ids).logits.float()
    spread = float(expected.std())
    assert float((found - expected).square().mean().sqrt()) < 0.03 * spread
    assert float((base - expected).square().mean().sqrt()) > 0.3 * spread  # and not the base
    assert weight_bits(policy) == before


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_and_a_merged_model_load_as_what_was_trained(
    kind: str, model: str, untied: str, tmp_path: Path
) -> None:
    settings, is_head_adapted = KINDS[kind]
    for folder, extra in ((untied, {}), (model, {"ensure_weight_tying": is_head_adapted})):
        if folder == model and kind == "the head too":
            continue  # is refused
        policy = adapted(folder, **settings, **extra).eval()
        before, tokenizer, place = weight_bits(policy), byte_tokenizer(), tmp_path / Path(folder).name
        place.mkdir()
        save_adapter(policy, tokenizer, place / "adapter", "a card")
        save_model(policy, tokenizer, place / "policy", "a card", 258)
        assert weight_bits(policy) == before
        reloaded = peft.PeftModel.from_pretrained(load(folder), place / "adapter").eval()
        merged = load(place / "policy").eval()
        ids = torch.tensor([[5, 60, 7, 80]])
        with torch.no_grad():
            expected = policy(input_ids=ids).logits
            assert torch.equal(reloaded(input_ids=ids).logits, expected)
            assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5 * float(expected.abs().max()))
        base = json.loads((place / "adapter" / "base.json").read_text())
        assert base == {"name": folder, "dtype": "float32", "sha256": weights_hash(load(folder))}
        assert (place / "adapter" / "README.md").read_text() == "a card"
        assert sorted(path.name for path in place.iterdir()) == ["adapter", "policy"]


def test_a_changed_byte_of_an_adapter_is_noticed(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted(model)
    own = adapters.adapter_tensors(policy)
    name = min(own)
    monkeypatch.setattr(adapters, "adapter_tensors", lambda model: {**own, name: own[name] + 1})
    with pytest.raises(RuntimeError, match=r"the adapter saved in .* reloads with other weights"):
        save_adapter(policy, byte_tokenizer(), tmp_path / "adapter", "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(model: str, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """An adapter that was trained, and its tensors."""
    policy = adapted(model, use_dora=True, modules_to_save=["norm"])
    save_adapter(policy, byte_tokenizer(), tmp_path / "adapter", "")
    return tmp_path / "adapter", adapter_tensors(policy)


def test_an_adapter_is_continued_with_its_own_settings(model: str, saved: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = saved
    policy = LoraAdapter(path=str(folder)).apply(load(model), seed=9)
    found = adapter_tensors(policy)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert {name for name, weight in policy.named_parameters() if weight.requires_grad} == trained_names(policy)
    assert len(trained_names(policy)) == len(tensors)
    assert policy.peft_config["default"].use_dora
    half = adapter_tensors(LoraAdapter(path=str(folder)).apply(load(model, torch.bfloat16)))
    assert all(torch.equal(half[name], tensors[name].bfloat16()) for name in tensors)


def test_an_adapter_is_refused_on_other_weights(
    model: str, saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = saved
    other = save_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(
        UserError, match=r"was trained on other weights than those of .*a merged policy/ has the adapter"
    ):
        LoraAdapter(path=str(folder)).apply(load(other))
    assert capsys.readouterr().out == ""
    LoraAdapter(path=str(folder)).apply(load(other, torch.bfloat16))  # whose hash is another in any case
    assert f"was trained on {model} (float32), and goes onto {other} (bfloat16) now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "is no folder of an adapter: .* does not exist"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "has no adapter_model.safetensors. An adapter",
        ),
        (lambda folder: change(folder, peft_type="IA3"), "is of the kind 'IA3', and only LORA"),
        (
            lambda folder: change(folder, use_dora=False),
            r"are not those that its adapter_config.json tells of: .*\(14 in",
        ),
        (lambda folder: change(folder, r=5), "cannot be put into a LlamaForCausalLM: .*size mismatch"),
    ],
)
def test_what_is_no_adapter_that_can_be_continued_is_refused(
    spoil: Callable[[Path], Any], message: str, model: str, saved: tuple[Path, dict[str, Tensor]]
) -> None:
    spoil(saved[0])
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        LoraAdapter(path=str(saved[0])).apply(load(model))


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_settings_beside_a_path_are_those_of_the_adapter(saved: tuple[Path, dict[str, Tensor]]) -> None:
    path = str(saved[0])
    for settings, words in (({"r": 8}, "r 8 .*made with 4"), ({"alpha": 4}, "alpha 4 .*made with 8")):
        with pytest.raises(UserError, match=rf"model\.adapter\.{words}, and keeps it"):
            LoraAdapter(**settings, path=path)
    with pytest.raises(UserError, match=r"target_modules \['q_proj'\] does not go with"):
        LoraAdapter(target_modules=["q_proj"], path=path)
    adapter = LoraAdapter(r=4, alpha=8, merged=False, modules_to_save=["norm"], path=path)
    assert (adapter.r, adapter.alpha, adapter.use_dora, adapter.merged) == (4, 8, True, False)
    assert LoraAdapter(path=path).shape == adapter.shape
    change(saved[0], lora_dropout=0.05)  # which many have; without model.dropout it is off
    assert LoraAdapter(path=path).dropout == 0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"model\.adapter\.r must be at least 1, got 0"),
        ({"alpha": 0}, r"model\.adapter\.alpha must be at least 1, got 0"),
        ({"dropout": 1.0}, r"model\.adapter\.dropout must be in \[0, 1\), got 1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoraAdapter(**settings)


def test_layers_that_the_model_lacks_are_named(model: str) -> None:
    with pytest.raises(UserError, match=r"model\.adapter\.target_modules names 'query'"):
        LoraAdapter(target_modules=["query"]).apply(load(model))
    with pytest.raises(UserError, match=r"modules_to_save names 'score', .*There are 0, 1, act_fn, down_proj"):
        LoraAdapter(modules_to_save=["score"]).apply(load(model))


@pytest.mark.parametrize("kind", ["the head too", "a saved head", "a saved head and embeddings"])
def test_tied_weights_are_not_untied_unnoticed(kind: str, model: str, untied: str) -> None:
    settings = KINDS[kind][0]
    with pytest.raises(UserError, match=r"are one matrix .*with ensure_weight_tying: true"):
        LoraAdapter(**settings).apply(load(model))
    LoraAdapter(**settings).apply(load(untied))
    if "target_modules" in settings:  # of two pairs of matrices in one memory each would be updated
        with pytest.raises(UserError, match="are one matrix"):
            LoraAdapter(**settings, ensure_weight_tying=True).apply(load(model))
        return
    policy = adapted(model, **settings, ensure_weight_tying=True)
    merged = copy.deepcopy(policy).merge_and_unload()
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert not torch.allclose(merged.lm_head.weight, load(model).lm_head.weight, atol=1e-2)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package peft. Install it: pip install 'spin-lightning\[lora\]'"):
        LoraAdapter()


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(UserError, match=r"needs the packages bitsandbytes and accelerate.*'spin-lightning\[qlora\]'"):
        LoraAdapter(quantize="nf4")
    with pytest.raises(UserError, match=r"model\.adapter\.quantize must be nf4, fp4 or null, got 'int8'"):
        LoraAdapter(quantize="int8")  # type: ignore[arg-type]


def test_a_merged_model_is_compared_with_what_was_trained(
    untied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spin_lightning.models import merging

    found: list[float] = []
    measure = merging._measure_divergence
    monkeypatch.setattr(merging, "_measure_divergence", lambda *models: found.append(measure(*models)) or found[-1])
    for dtype in (torch.float32, torch.bfloat16):
        merging.merged_copy(adapted(untied, dtype))
    exact, rounded = found
    assert abs(exact) < 1e-5 < rounded < merging.MOST_DIVERGENCE[torch.bfloat16]
    monkeypatch.setattr(merging, "_measure_divergence", lambda *models: math.nan)
    with pytest.raises(UserError, match=r"predict something else: nan nats .*Set model\.adapter\.merged: false"):
        save_model(adapted(untied), byte_tokenizer(), tmp_path / "policy", "", 258)


@pytest.mark.parametrize("setting", ["target_modules", "modules_to_save"])
def test_a_name_that_no_layer_has_is_refused_beside_names_that_some_have(setting: str, model: str) -> None:
    with pytest.raises(UserError, match=rf"model\.adapter\.{setting} names 'nosuch'.*There are .*q_proj"):
        LoraAdapter(**{setting: ["q_proj", "nosuch"]}).apply(load(model))


def test_an_export_without_a_merged_model_leaves_no_earlier_one_behind(model: str, tmp_path: Path) -> None:
    policy, encoder = adapted(model).eval(), SimpleNamespace(tokenizer=byte_tokenizer(), end_ids=258)
    export_policy(policy, encoder, tmp_path, "a card", {})
    policy.adapter_merged = False
    export_policy(policy, encoder, tmp_path, "a card", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "summary.json"]
