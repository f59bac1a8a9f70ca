"""What is refused before weights are read: no whole model, pickles, code from the hub, ids without a row, no hub."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import args_of, byte_tokenizer, save_tiny_model, tiny_model, write_rows
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

from spin_lightning.cli.commands import main
from spin_lightning.models import hub
from spin_lightning.models import loading as models
from spin_lightning.models.loading import (
    check_model,
    disable_dropout,
    load_config,
    load_policy,
    load_tokenizer,
    locate,
    refuse_ids_beyond,
    refuse_without_causal_head,
)
from spin_lightning.types import UserError


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save_tiny_model(tmp_path / "model")


def change(model: str, file: str, **entries: Any) -> None:
    path = Path(model) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def endings(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """What each command says when it ends with exit code 2."""
    rows, said = write_rows(tmp_path / "rows.jsonl"), []
    common = ["--data.val_fraction=0.2", "--trainer.accelerator=cpu"]
    for word in ("check", "fit", "sft", "validate"):
        cap = "--data.max_response_tokens=4" if word == "sft" else "--data.generator.max_new_tokens=4"
        with pytest.raises(SystemExit) as stop:
            main(args_of(word, model, rows, tmp_path / "run", cap, *common, *flags))
        printed = capsys.readouterr()
        assert stop.value.code == 2, (word, printed.err)
        said.append(printed.err.partition("spin-lightning: error: ")[2])
        assert "answers" not in printed.out and not list(tmp_path.glob("run/iteration_0"))  # before generation
    return said


# --- what is no whole model -------------------------------------------------------------------------------------------


def test_a_reward_model_is_no_policy_even_where_its_embeddings_would_be_a_head(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = save_tiny_model(tmp_path / "reward")
    settings = {key: value for key, value in load_config(model).to_dict().items() if "label" not in key}
    LlamaForSequenceClassification(LlamaConfig(**settings, num_labels=1)).save_pretrained(reward)
    rows = write_rows(tmp_path / "rows.jsonl")
    for word in ("fit", "sft", "check", "dpo"):
        with pytest.raises(SystemExit) as stop:
            main([word, f"--model.model_name_or_path={reward}", f"--data.train_data={rows}"])
        error = " ".join(capsys.readouterr().err.split())
        assert stop.value.code == 2 and "holds a reward model (LlamaForSequenceClassification)" in error, (word, error)
        assert "Give the language model that it was made from" in error
    with pytest.raises(UserError, match="holds a reward model"):
        load_policy(reward)
    assert load_policy(reward, needs_head=False).config.tie_word_embeddings  # as a critic it is welcome


def test_an_adapter_is_named_with_the_settings_that_continue_it_and_the_command_that_merges_it(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(model) / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    for said in endings(model, tmp_path, capsys):
        assert said.startswith(f"{model!r} holds a LoRA adapter (adapter_config.json), not a whole model. To go on")
        assert f"--model.model_name_or_path org/base --model.adapter LoraAdapter --model.adapter.path {model}." in said
        assert "merge_and_unload()" in said and "T.from_pretrained('org/base')" in said


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_a_pickle_is_named_with_the_command_that_converts_it(model: str, name: str) -> None:
    (Path(model) / name).write_bytes(b"not read")
    check_model(model)  # safetensors are there too, and are what is read
    (Path(model) / "model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        check_model(model)
    said = str(caught.value)
    assert f"are a pickle ({name}), which can run code and is not opened" in said
    assert said.count("save_pretrained('converted')") == 2 and "M.from_pretrained" in said


def test_the_command_that_converts_a_pickle_makes_a_folder_that_loads(model: str, tmp_path: Path) -> None:
    weights = tiny_model(vocab_size=259).state_dict()
    (Path(model) / "model.safetensors").unlink()
    torch.save(weights, Path(model) / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        load_policy(model)
    code = str(caught.value).partition('python -c "')[2].partition('" and')[0]
    exec(code.replace("'converted'", repr(str(tmp_path / "converted"))), {})
    loaded = load_policy(str(tmp_path / "converted"))
    assert torch.equal(loaded.get_input_embeddings().weight, weights["model.embed_tokens.weight"])  # type: ignore[operator]
    assert len(load_tokenizer(str(tmp_path / "converted"))) == 259


def test_a_file_that_is_no_gguf_and_a_folder_of_gguf_files_are_told_apart(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a file, and no \.gguf\. Give the Hugging Face folder that it is in"):
        load_policy(f"{model}/model.safetensors")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "q8.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"Name the file, if you mean .*packed/q8\.gguf"):
        load_policy(str(tmp_path / "packed"))


def test_weights_that_are_missing_are_never_made_up(model: str) -> None:
    path = Path(model) / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "q_proj" in name)
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"has no values for 1 of the weights of a LlamaForCausalLM, such as {name}"):
        load_policy(model)
    save_file({**weights, "more": torch.zeros(1)}, path, {"format": "pt"})  # such as a head that is not used here
    load_policy(model)
    change(model, "config.json", model_type="gpt2")
    with pytest.raises(UserError, match="of the weights of a GPT2LMHeadModel"):
        load_policy(model)


@pytest.mark.parametrize("content", [b"", b"half", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 99])
def test_a_file_of_weights_that_is_not_whole_is_named_by_every_command(
    model: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(model) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content == b"half" else content)
    for said in endings(model, tmp_path, capsys):
        assert said.startswith(f"{path} is not whole (")


def test_files_of_weights_are_those_beside_the_index_and_safetensors_only(model: str, tmp_path: Path) -> None:
    path, index = Path(model) / "model.safetensors", Path(model) / "model.safetensors.index.json"
    names = list(load_file(path))
    torch.save({}, Path(model) / "evil.bin")
    path.rename(tmp_path / "a.safetensors")
    for file, words in (
        ("../a.safetensors", "names '../a.safetensors', and only safetensors beside it are opened"),
        ("evil.bin", "names 'evil.bin', and only safetensors"),
        ("gone.safetensors", r"has no gone.safetensors, which would hold its weights; it has evil.bin"),
        (5, "names 5"),
    ):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
        with pytest.raises(UserError, match=words):
            check_model(model)
    index.write_text("[]")
    with pytest.raises(UserError, match=r"index of the weights of .* cannot be read"):
        check_model(model)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}))
    (tmp_path / "a.safetensors").rename(Path(model) / "a.safetensors")
    load_policy(model)
    change(model, "config.json", transformers_weights="evil.bin")
    with pytest.raises(UserError, match="only safetensors beside it are opened"):
        load_policy(model)


def test_check_refuses_a_model_that_fit_would_refuse(model: str) -> None:
    refuse_without_causal_head(load_config(model))
    for entries in ({"model_type": "t5"}, {"hidden_act": "no such"}):
        change(model, "config.json", **entries)
        with pytest.raises(UserError, match="no model could be loaded from"):
            refuse_without_causal_head(load_config(model))


@pytest.mark.parametrize("entries", [{"model_max_length": "x"}, {"chat_template": 5}])
def test_a_tokenizer_that_makes_no_sense_ends_in_a_sentence(model: str, entries: dict[str, Any]) -> None:
    (Path(model) / "chat_template.jinja").unlink(missing_ok=True)
    change(model, "tokenizer_config.json", **entries)
    with pytest.raises(UserError, match="no tokenizer could be loaded from"):
        load_tokenizer(model)


def test_a_chat_template_that_is_no_jinja_ends_in_a_sentence(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(model) / "chat_template.jinja").write_text("{% if %}")
    for said in endings(model, tmp_path, capsys):
        assert said.startswith("the chat template is not one of Jinja: ")


@pytest.mark.parametrize("entry", [{"quant_method": "no_such_method"}, {"bits": 4}, {"quant_method": 7}, "no dict"])
def test_weights_packed_in_an_unknown_way_end_in_a_sentence(model: str, entry: Any) -> None:
    change(model, "config.json", quantization_config=entry)
    with pytest.raises(UserError, match="no model could be loaded from"):
        load_policy(model)


@pytest.mark.parametrize(
    "entries", [{"num_attention_heads": "two"}, {"hidden_size": 24}, {"rope_parameters": 3}, {"model_type": 5}]
)
def test_a_config_that_makes_no_sense_ends_in_a_sentence(model: str, entries: dict[str, Any]) -> None:
    change(model, "config.json", **entries)
    with pytest.raises(UserError, match=r"no (model|config) could be loaded from"):
        load_policy(model)


# --- code from the hub ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [
        {"attn_implementation": "org/kernel"},
        {"_attn_implementation": "org/kernel@main:name"},
        {"_attn_implementation_internal": "paged|org/kernel"},
        {"experts_implementation": "org/kernel"},
        {"_experts_implementation": {"": "sdpa", "text_config": "org/kernel"}},
        {"text_config": {"attn_implementation": "org/kernel"}},
    ],
)
def test_a_config_that_names_a_kernel_on_the_hub_is_refused(
    model: str, entries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda **_: pytest.fail("it was loaded"))
    change(model, "config.json", **entries)
    for load in (load_policy, load_config):
        with pytest.raises(
            UserError, match=r"names code from the hub: \w+ '.*org/kernel.*set model\.trust_remote_code"
        ):
            load(model)


def test_a_kernel_is_refused_as_a_setting_too_unless_it_is_trusted(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for said in endings(model, tmp_path, capsys, "--model.attn_implementation=org/kernel"):
        assert said.startswith("the settings names code from the hub: attn_implementation 'org/kernel'")
    check_model(model, "org/kernel", trust_remote_code=True)
    for own in ("sdpa", "eager", None):
        check_model(model, own)


def test_flash_attention_that_would_be_fetched_is_code_from_the_hub(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"kernels"}
    monkeypatch.setattr(models, "find_spec", lambda name: name if name in installed else None)
    with pytest.raises(UserError, match="names code from the hub: attn_implementation 'flash_attention_2'"):
        check_model(model, "flash_attention_2")
    installed.add("flash_attn")
    check_model(model, "flash_attention_2")


# --- ids and rows -----------------------------------------------------------------------------------------------------


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(vocab_size=258).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")  # 259 tokens
    for said in endings(str(tmp_path / "m"), tmp_path, capsys):
        assert said.startswith(
            "the model's embedding has 258 rows, for the ids 0 to 257, but the tokenizer's ids go up to 258 "
            "('<|im_end|>')"
        )


def test_the_largest_id_counts_not_how_many_there_are() -> None:
    tokenizer = byte_tokenizer()
    refuse_ids_beyond(259, tokenizer)
    refuse_ids_beyond(320, tokenizer)  # rows beyond the tokens, as many models have
    refuse_ids_beyond(None, tokenizer)
    for rows, ids in ((258, ()), (259, (259,)), (300, (7, 300))):
        with pytest.raises(UserError, match=f"has {rows} rows"):
            refuse_ids_beyond(rows, tokenizer, *ids)


def test_the_limit_of_the_tokenizer_is_not_called_the_model_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(vocab_size=259).save_pretrained(tmp_path / "m")
    byte_tokenizer(model_max_length=16).save_pretrained(tmp_path / "m")
    for said in endings(str(tmp_path / "m"), tmp_path, capsys):
        assert "but the tokenizer's model_max_length is 16. Lower" in said
        assert "raise model_max_length in the tokenizer_config.json of its folder" in said


def test_a_pad_id_without_a_row_is_refused_by_every_command(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(model, "config.json", pad_token_id=259)
    for said in endings(model, tmp_path, capsys):
        assert said.startswith(
            "the model's embedding has 259 rows (vocab_size), for the ids 0 to 258, but its config's pad_token_id is "
            "259."
        )


# --- no hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A hub that does not answer; the waiting times that were asked for."""
    asked: list[float] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(timeout)
            raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    hub._try_hub.cache_clear()
    return asked


def test_without_a_network_a_name_on_the_hub_is_refused_in_seconds(
    no_network: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.process_time()
    for load in (load_tokenizer, load_config, load_policy):
        with pytest.raises(
            UserError, match=r"'nobody/nothing': it is no folder here, and the hub cannot be asked \(no network"
        ):
            load("nobody/nothing")
    assert no_network == [hub.TIMEOUT_SECONDS] and hub.TIMEOUT_SECONDS <= 10  # one try, however many names
    assert time.process_time() - began < 5
    assert capsys.readouterr().out.count("does not answer (no route to host)") == 1
    hub._try_hub.cache_clear()


def test_a_folder_asks_no_hub(no_network: list[float], model: str) -> None:
    load_tokenizer(model), load_config(model), load_policy(model)
    assert no_network == []


# --- what is read -----------------------------------------------------------------------------------------------------


def test_locate_tells_folders_files_and_hub_names_apart(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert locate(str(tmp_path)) == {"pretrained_model_name_or_path": str(tmp_path)}
    assert locate(str(tmp_path / "model.gguf")) == {
        "pretrained_model_name_or_path": str(tmp_path),
        "gguf_file": "model.gguf",
    }
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert locate(name) == {"pretrained_model_name_or_path": name}


@pytest.mark.parametrize(
    "name", ["./nothing", "/nowhere/at/all", "~/nowhere-at-all", "runs/iteration_0/policy", "lost.gguf"]
)
def test_locate_refuses_a_path_where_nothing_is(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"model_name_or_path '{name}' does not exist \(looked at /.*\.gguf file, or a hub name"
    ):
        locate(name)


def test_folder_without_a_model_is_a_user_error(tmp_path: Path) -> None:
    for what, load in (("model", load_policy), ("tokenizer", load_tokenizer)):
        with pytest.raises(
            UserError, match=rf"no {what} could be loaded from '{tmp_path}': .*Give a Hugging Face folder"
        ):
            load(str(tmp_path))


def test_policy_is_loaded_in_the_dtype_asked_for(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert {parameter.dtype for parameter in load_policy(path, dtype=dtype).parameters()} == {dtype}


def test_disable_dropout_makes_training_mode_repeatable() -> None:
    llama = tiny_model(attention_dropout=0.5)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    )
    ids = torch.arange(5, 25)[None]
    for model in (llama, gpt2):
        model.train()
        with torch.no_grad():
            assert not torch.equal(model(ids).logits, model(ids).logits)
            disable_dropout(model)
            assert model.training
            first, second = model(ids).logits, model(ids).logits
            assert torch.equal(first, second)
            torch.testing.assert_close(first, model.eval()(ids).logits)
    assert llama.model.layers[0].self_attn.attention_dropout == 0.0
    assert gpt2.transformer.drop.p == 0.0


def test_the_folder_of_a_run_is_no_model_and_its_model_is_named(tmp_path):
    for number in (0, 1):
        (tmp_path / f"iteration_{number}" / "policy").mkdir(parents=True)
    with pytest.raises(UserError, match=r"folder of a run, and no model\. Give what it exported: .*iteration_1/policy"):
        check_model(str(tmp_path))
