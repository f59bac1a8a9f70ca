"""What tests need beside ``spin_lightning.testing``: all made in code, without a file and without network."""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from spin_lightning import losses
from spin_lightning.cli.commands import COMMANDS
from spin_lightning.testing import CHATML as CHATML
from spin_lightning.testing import byte_tokenizer as byte_tokenizer
from spin_lightning.testing import save_tiny_model as save_tiny_model
from spin_lightning.testing import scored_batch as scored_batch
from spin_lightning.testing import tiny_model as tiny_model
from spin_lightning.testing import write_rows as write_rows

#: What a trainer of a test is given: one device, no logger, and nothing on the screen.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


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


@cache
def plugin_of_the_docs() -> tuple[ModuleType, dict[str, Any]]:
    """The module that the examples of docs/extending.md make together, and the commands that it adds to the table.

    It is imported once and stays: its classes are found among the subclasses of their bases for as long as the process.
    """
    page = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    folder = Path(tempfile.mkdtemp())
    (folder / "my_plugin.py").write_text("\n\n".join(re.findall(r"```python\n(.*?)```", page, re.S)))
    before = dict(COMMANDS)
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("my_plugin")
    finally:
        sys.path.remove(str(folder))
    added = {word: command for word, command in COMMANDS.items() if word not in before}
    for word in added:
        del COMMANDS[word]
    return module, added
