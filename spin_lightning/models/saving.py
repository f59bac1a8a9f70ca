"""A model as a Hugging Face folder, read back and compared before it gets its name; and the hash of its weights.

The only place that saves a whole model; what of a model is an adapter, ``adapters`` saves.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spin_lightning.models.loading import without_bars
from spin_lightning.models.merging import merged_copy
from spin_lightning.progress import progress
from spin_lightning.runs.checkpoints import refuse_non_finite
from spin_lightning.runs.files import explaining_storage_errors, sync

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of all weights: two models agree if and only if they answer alike."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    eos_ids: int | Sequence[int],
    trust_remote_code: bool = False,
) -> None:
    """Write a Hugging Face folder, reload it, and only then give it its name.

    The folder holds safetensors, tokenizer with chat template, generation config (which stops at ``eos_ids``) and a
    model card. For the check the model is in memory twice for a moment. An older folder of the same name is replaced.

    Of a model with an adapter a merged copy is written, rounded to the dtype of the base; the model is not touched.

    Raises:
        NonFiniteError: A weight is NaN or infinite.
        UserError: A merged copy predicts something else than base and adapter.
        RuntimeError: The reloaded weights differ from those in memory.
        StorageError: There is no room, or the folder cannot be written to.
    """
    from transformers import AutoModelForCausalLM

    refuse_non_finite(model)
    if hasattr(model, "merge_and_unload"):
        model = merged_copy(model)
    with save_folder(folder) as partial, _served_with(model, eos_ids, tokenizer.pad_token_id):
        write_verified(model, tokenizer, partial, card, AutoModelForCausalLM, trust_remote_code)


@contextmanager
def save_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in beside its place, which it takes when all is written and synced. An older one is replaced.

    Raises:
        StorageError: There is no room, or the folder cannot be written to.
    """
    partial = folder.with_name(folder.name + ".partial")
    with explaining_storage_errors(folder), progress("saving the model"), without_bars():
        try:
            shutil.rmtree(partial, ignore_errors=True)
            yield partial
            for path in (*partial.iterdir(), partial):
                sync(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync(folder.parent)


def write_verified(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    auto_class: Any,
    trust_remote_code: bool,
) -> None:
    """Write weights, tokenizer and README into a folder, and read the weights back.

    Args:
        model: What is saved.
        tokenizer: Saved beside it.
        folder: Where to.
        card: Its README.
        auto_class: The class of ``transformers`` by which a user loads it, such as ``AutoModelForCausalLM``.
        trust_remote_code: Whether its class may be code that comes with the model.

    Raises:
        RuntimeError: The reloaded weights differ from those in memory.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    reloaded = auto_class.from_pretrained(folder, dtype=model.dtype, trust_remote_code=trust_remote_code)
    if weights_hash(reloaded) != weights_hash(model):
        raise RuntimeError(
            f"the model saved in {folder} reloads with other weights; the disk may be faulty. Nothing was replaced."
        )


@contextmanager
def _served_with(model: PreTrainedModel, eos_ids: int | Sequence[int], pad_id: int | None) -> Iterator[None]:
    """Have a model saved with a generation config that stops at these ids.

    Not written over afterwards: the base model's own may be one that transformers refuses to save.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=_one_or_list(eos_ids), pad_token_id=pad_id)
    try:
        yield
    finally:
        model.generation_config = own


def _one_or_list(ids: int | Sequence[int]) -> int | list[int]:
    """How ``generation_config.json`` has the ids that end a response."""
    listed = [ids] if isinstance(ids, int) else list(ids)
    return listed[0] if len(listed) == 1 else listed
