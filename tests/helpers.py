"""A model of a few thousand weights and tokenizers, all made in code: the default tests need no file and no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spin_lightning import losses
from spin_lightning.models.batches import collate_pairs
from spin_lightning.models.log_probs import pair_log_probs
from spin_lightning.types import PairBatch

#: What a trainer of a test is given: one device, no logger, and nothing on the screen.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

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


def metaspace_tokenizer(scheme: str, template: str | None) -> PreTrainedTokenizerFast:
    """Characters with SentencePiece's visible space, which is put before a text's first word."""
    vocabulary = ["<unk>", "▁", *(chr(code) for code in range(33, 127)), "\n", "▁4", ":4"]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, [("▁", "4"), (":", "4")], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
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


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder, as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def args_of(word: str, model: str, rows: str, folder: Path | str, *flags: str) -> list[str]:
    """A command as a user gives it: its word, the model, the rows, the folder to write in, and more flags."""
    key = "export" if word == "sft" else "self_play"
    return [
        word,
        f"--model.model_name_or_path={model}",
        f"--data.train_data={rows}",
        f"--{key}.output_dir={folder}",
        *flags,
    ]


def write_rows(path: Path, count: int = 12) -> str:
    """Short sums as message rows."""
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+{a + 1}?"}, {"role": "assistant", "content": str(2 * a + 1)}]}
        for a in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def scored_batch(model: nn.Module, initial: nn.Module | None = None) -> PairBatch:
    """Three pairs with the log-probs that this model gave them."""
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 60, (count,), generator=generator).tolist()

    pairs: list[dict[str, Any]] = [
        {
            "pair_id": i,
            "prompt_id": i,
            "prompt_ids": ids(4 + i),
            "real_ids": ids(3 + i),
            "generated_ids": ids(7 - 2 * i),
            "initial_ids": ids(2),
        }
        for i in range(3)
    ]
    for row in pairs:
        row |= {
            f"{player}_{side}_log_prob": 0.0 for player in ("opponent", "initial") for side in ("real", "generated")
        }
    (batch,) = collate_pairs(pairs, max_tokens=1000)
    was_training = model.training
    with torch.no_grad():
        batch.opponent = pair_log_probs(model.eval(), batch)
        batch.initial = pair_log_probs((initial or model).eval(), batch)
    model.train(was_training)
    return batch


#: Each loss of the package, with a beta for it.
LOSSES: dict[str, tuple[Callable[[], losses.PairLoss], float]] = {
    **{link: (lambda link=link: losses.SpinLoss(link=link), 0.1) for link in losses.LINKS},
    "nll": (lambda: losses.SpinLoss(nll_weight=0.5), 0.1),
    "smoothing": (lambda: losses.SpinLoss(label_smoothing=0.2), 5.0),
    "alpha": (lambda: losses.AlphaSpinLoss(alpha=0.5), 1.0),
    "tspin": (losses.TSpinLoss, 1.0),
    "space": (losses.SpaceLoss, 1.0),
    "ipo": (losses.IpoLoss, 0.1),
    "dpop": (losses.DpopLoss, 0.1),
    "length": (losses.LengthNormalizedLoss, 2.0),
}


def log_prob_by_hand(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    """One token at a time, from the full distribution: slow, and free of masks and shifts."""
    ids, total = list(prompt), 0.0
    for token in response:
        with torch.no_grad():
            total += float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
        ids.append(token)
    return total
