"""Reward models: one number at a response's last token, which transformers reads there too."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer, tiny_model
from test_log_probs import GROUPS, KINDS, MODELS, ROWS, spread_out
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from spin_lightning.models import saving
from spin_lightning.models.batches import pack
from spin_lightning.models.reward_model import (
    add_score_head,
    check_classifier,
    choose_pad,
    make_classifier,
    save_reward_model,
    score_padded,
    scores_of,
)
from spin_lightning.types import UserError

#: Rows that end in the terminator 2, as responses do, and their prompts.
ENDED = [(prompt, [response if response[-1] == 2 else [*response, 2] for response in rows]) for prompt, rows in GROUPS]
WHOLE = [prompt + response for prompt, rows in ENDED for response in rows]
IN_FLOAT32 = ("gemma2", "mixtral", "llama-tied-eager", "bloom-alibi")
WITH_CLASS = [name for name in MODELS if not name.startswith(("cohere", "granite"))]


def with_head(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    add_score_head(model)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = (MODELS.get(name) or (lambda: AutoModelForCausalLM.from_config(KINDS[name][0]())))()
    model = spread_out(config).eval()
    # eager attention in float64 makes NaN of padding
    return with_head(model if name in IN_FLOAT32 else model.double())


def test_scores_are_zero_at_first_and_need_no_seed() -> None:
    model = tiny_model(32)
    add_score_head(model)
    assert scores_of(model, pack(GROUPS)).tolist() == [0.0] * len(ROWS)
    assert model.lm_head.weight.requires_grad  # it is the embeddings
    apart = tiny_model(32, tie_word_embeddings=False)
    add_score_head(apart)
    assert not apart.lm_head.weight.requires_grad and apart.score.weight.requires_grad


@pytest.mark.parametrize("name", [*WITH_CLASS, "mixtral"])
def test_transformers_gives_the_same_scores_to_rows_padded_on_either_side(name: str, tmp_path: Path) -> None:
    """Shared prompts in one pass here, padded rows of a reloaded folder there."""
    model = made(name)
    with torch.no_grad():
        own = scores_of(model, pack(ENDED))
        tokenizer = byte_tokenizer()
        pad = 1  # no response ends with it
        check_classifier(model, pad, WHOLE[0])
        save_reward_model(model, tokenizer, tmp_path / "rm", "a card", pad, {"shift": 0.5})
        # eager attention, which alone has Gemma 2's softcap; older versions of transformers have another default
        attention = {"attn_implementation": "eager"} if name == "gemma2" else {}
        theirs: Any = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "rm", dtype=model.dtype, **attention
        ).eval()
        allowed = 1e-3 if model.dtype is torch.float32 else 1e-5
        for side in ("right", "left"):
            if side == "left" and name == "gpt2":
                continue  # learned positions, which transformers counts from the padding on
            found = score_padded(theirs, WHOLE, pad, side)
            assert (found - own).abs().max() <= allowed * own.abs().max(), (name, side)
    assert own.std() > 0.5
    assert (theirs.config.num_labels, theirs.config.get_text_config().pad_token_id) == (1, pad)
    assert AutoTokenizer.from_pretrained(tmp_path / "rm").pad_token_id == pad
    assert json.loads((tmp_path / "rm" / "reward.json").read_text()) == {"shift": 0.5}
    assert model.config.pad_token_id != pad and tokenizer.pad_token_id != pad  # nothing here has changed


def test_with_the_terminator_as_pad_token_transformers_reads_another_token() -> None:
    """The trap, both ways: it is what an export is kept from, and the check before training finds it."""
    model = made("llama")
    with torch.no_grad():
        own = scores_of(model, pack(ENDED))
        trapped, fine = make_classifier(model, 2), make_classifier(model, 1)
        for side in ("right", "left"):
            assert (score_padded(fine, WHOLE, 1, side) - own).abs().max() < 1e-5
            assert (score_padded(trapped, WHOLE, 2, side) - own).abs().min() > 0.01
    with pytest.raises(
        UserError, match=r"LlamaForSequenceClassification elsewhere: on rows padded with token 2 it gives"
    ):
        check_classifier(model, 2, WHOLE[0])


def test_an_architecture_without_a_class_is_refused_before_it_is_trained() -> None:
    torch.manual_seed(0)
    for name, kind in (("cohere-scaled-logits", "cohere"), ("granite-divided-logits", "granite")):
        with pytest.raises(UserError, match=f"no class that would hold a reward model of the architecture '{kind}'"):
            add_score_head(MODELS[name]())


def test_a_class_that_is_built_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForSequenceClassification

    own = LlamaForSequenceClassification.__init__

    def with_a_bias(self: Any, config: Any) -> None:
        own(self, config)
        self.score = nn.Linear(config.hidden_size, 1)

    monkeypatch.setattr(LlamaForSequenceClassification, "__init__", with_a_bias)
    with pytest.raises(UserError, match=r"is not built like LlamaForCausalLM with a score: it has \['score.weight', "):
        add_score_head(tiny_model(32))


def test_only_what_scores_depend_on_is_trained() -> None:
    model = with_head(tiny_model(32, tie_word_embeddings=False).double())
    scores_of(model, pack(GROUPS)).sum().backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert without == ["lm_head.weight"]
    hidden = copy.deepcopy(model)(
        torch.tensor([ROWS[0][0] + ROWS[0][1]]), output_hidden_states=True, use_cache=False
    ).hidden_states[-1][0, -1]
    torch.testing.assert_close(scores_of(model, pack(GROUPS))[0], hidden @ model.score.weight[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_with_the_head_is_in_float32(dtype: torch.dtype) -> None:
    model = with_head(tiny_model(32).to(dtype))
    assert scores_of(model, pack(GROUPS)).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = scores_of(model, pack(GROUPS))
    assert found.dtype is torch.float32


def test_the_pad_token_is_one_that_ends_no_response() -> None:
    tokenizer = byte_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    assert choose_pad(tokenizer, [ids["<|im_end|>"]], 5) == 5  # its own
    assert choose_pad(tokenizer, [ids["<|im_end|>"]], ids["<|im_end|>"]) == ids["<|endoftext|>"]
    with_pad = byte_tokenizer(("<|endoftext|>", "<|im_end|>", "<|finetune_right_pad_id|>"), eos="<|endoftext|>")
    ends = [with_pad.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>")]
    assert with_pad.decode([choose_pad(with_pad, ends, ends[0])]) == "<|finetune_right_pad_id|>"
    without = byte_tokenizer(("<|im_end|>",), chat_template=None)
    with pytest.raises(UserError, match=r"no control token that ends no response.*add_special_tokens"):
        choose_pad(without, [without.eos_token_id], without.eos_token_id)


def test_a_disk_that_gives_other_weights_back_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_head(tiny_model(len(byte_tokenizer())))
    save_reward_model(model, byte_tokenizer(), tmp_path / "rm", "", 1, {"number": 1})
    monkeypatch.setattr(saving, "weights_hash", lambda model: id(model))
    with pytest.raises(RuntimeError, match="reloads with other weights"):
        save_reward_model(model, byte_tokenizer(), tmp_path / "rm", "", 1, {"number": 2})
    assert json.loads((tmp_path / "rm" / "reward.json").read_text()) == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]
