"""A model of a few thousand weights and tokenizers, all made in code: the default tests need no file and no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    chat_template: str | None = CHATML,
    eos: str = "<|im_end|>",
    **kwargs: Any,
) -> PreTrainedTokenizerFast:
    """One token a byte, plus control tokens: small, reversible, and honest about control tokens in text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
        **kwargs,
    )


def tiny_model(vocab_size: int = 264, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama of about 13,000 weights."""
    settings = dict(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # spread out, so that answers depend on prompts and log-probs are not flat
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return model


def save_tiny_model(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A Hugging Face folder with model and tokenizer."""
    tokenizer = byte_tokenizer()
    tiny_model(vocab_size=len(tokenizer), seed=seed, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, count: int = 12) -> str:
    """Short sums as message rows."""
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+{a + 1}?"}, {"role": "assistant", "content": str(2 * a + 1)}]}
        for a in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
