"""The models that are measured: SmolLM2-135M-Instruct out of its package, and random Llamas of any shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama with tied embeddings. The defaults are SmolLM2-135M's."""

    hidden: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    intermediate: int = 1536
    vocabulary: int = 49152

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_size
        return attention + 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """Weights of the whole model."""
        return self.layers * self.layer_weights + self.vocabulary * self.hidden

    def config(self, **tokens: int | None) -> Any:
        """A Llama's config of this shape, with the ids of its tokens."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            **{"bos_token_id": None, **tokens},
        )


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16, made once of the package's GGUF file."""
    from spin_lightning.demos.steps import smollm2 as gguf_file
    from spin_lightning.models.loading import load_policy, load_tokenizer

    if not (folder / "tokenizer.json").exists():
        load_policy(gguf_file(), dtype=torch.bfloat16).save_pretrained(folder)
        load_tokenizer(gguf_file()).save_pretrained(folder)
    return folder


def random_llama(folder: Path, shape: Shape) -> Path:
    """A Llama with random weights and a tokenizer of one token a byte, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        return folder
    backend = Tokenizer(
        models.BPE(vocab={byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = shape.config(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
