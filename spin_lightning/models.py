"""Models and tokenizers: from a hub name, a local folder or a ``.gguf`` file, to a hash of their weights.

The only place that calls ``from_pretrained`` and ``save_pretrained``. Nothing here knows what a game is.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spin_lightning.files import explaining_storage_errors, sync
from spin_lightning.types import NonFiniteError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def locate(name_or_path: str) -> dict[str, Any]:
    """The arguments ``from_pretrained`` wants for a hub name, a folder or a ``.gguf`` file.

    Raises:
        UserError: It reads like a path, and nothing is there.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    if name_or_path.startswith((".", "/", "~")) or path.suffix == ".gguf" or name_or_path.count("/") > 1:
        raise UserError(
            f"model_name_or_path {name_or_path!r} does not exist (looked at {path.absolute()}). "
            "Give a Hugging Face folder, a .gguf file, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    return {"pretrained_model_name_or_path": name_or_path}


def load_policy(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal language model in the dtype asked for, ready to be trained.

    Raises:
        UserError: Nothing can be loaded under that name; the message names what was tried.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GgufConfig

    where = locate(name_or_path)
    if "gguf_file" in where:
        where["quantization_config"] = GgufConfig(dequantize=True)  # packed weights cannot be trained
    else:
        where["use_safetensors"] = True  # a pytorch_model.bin is a pickle, and is not opened
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=dtype,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _not_loaded("model", name_or_path, error) from error
    if "gguf_file" in where:  # the weights are plain tensors now; a saved folder must not claim otherwise
        model.config.__dict__.pop("quantization_config", None)
        model.__dict__.pop("hf_quantizer", None)
        model.__dict__.pop("quantization_method", None)
        model.__dict__.pop("is_quantized", None)
    return model


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, under the same name.

    Raises:
        UserError: Nothing can be loaded under that name.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            **locate(name_or_path), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise _not_loaded("tokenizer", name_or_path, error) from error


def context_length(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """Tokens a model takes, prompt and answer together, if its config tells. No weights are loaded.

    Raises:
        UserError: Nothing can be loaded under that name.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            **locate(name_or_path), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _not_loaded("config", name_or_path, error) from error
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit


def end_ids_of(model: Any) -> list[int]:
    """The tokens that end an answer by a model's own settings: those of its generation config, else of its config."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return _as_list(found if found is not None else getattr(model.config, "eos_token_id", None))


def end_ids(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[int]:
    """The same of a model that is not loaded. A ``.gguf`` file has no other than its tokenizer's.

    Raises:
        UserError: Nothing can be loaded under that name.
    """
    from transformers import AutoConfig, GenerationConfig

    where = locate(name_or_path)
    if "gguf_file" in where:
        return _as_list(tokenizer.eos_token_id)
    try:
        own = GenerationConfig.from_pretrained(
            where["pretrained_model_name_or_path"], revision=revision or "main"
        ).eos_token_id
    except (OSError, ValueError):  # a model need not have one
        own = None
    if own is not None:
        return _as_list(own)
    try:
        config = AutoConfig.from_pretrained(**where, revision=revision or "main", trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _not_loaded("config", name_or_path, error) from error
    return _as_list(getattr(config, "eos_token_id", None))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to zero, also those kept as a plain number and applied inside attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of all weights: two models agree if and only if they answer alike."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_non_finite(model: nn.Module) -> None:
    """Make sure that weights are worth keeping.

    Raises:
        NonFiniteError: A weight is infinite or not a number.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise NonFiniteError(
                f"weight {name} is not finite, so nothing is saved. "
                "The last checkpoint is whole: continue from it with a lower learning rate."
            )


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    eos_ids: int | Sequence[int],
    trust_remote_code: bool = False,
) -> None:
    """Write a Hugging Face folder, reload it, and only then give it its name.

    The folder holds safetensors, tokenizer with chat template, generation config (which stops at ``eos_ids``) and a model card. For the check
    the model is in memory twice for a moment. An older folder of the same name is replaced.

    Raises:
        NonFiniteError: A weight is infinite or not a number.
        RuntimeError: The reloaded weights differ from those in memory.
        StorageError: There is no room, or the folder cannot be written to.
    """
    refuse_non_finite(model)
    partial = folder.with_name(folder.name + ".partial")
    with explaining_storage_errors(folder):
        try:
            _save_verified(model, tokenizer, partial, card, eos_ids, trust_remote_code)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync(folder.parent)


def _save_verified(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    partial: Path,
    card: str,
    eos_ids: int | Sequence[int],
    trust_remote_code: bool,
) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    shutil.rmtree(partial, ignore_errors=True)
    served = GenerationConfig(do_sample=True, eos_token_id=_one_or_list(eos_ids), pad_token_id=tokenizer.pad_token_id)
    # not written over afterwards: the base model's own may be one that transformers refuses to save
    own_settings, model.generation_config = model.generation_config, served
    try:
        model.save_pretrained(partial)
    finally:
        model.generation_config = own_settings
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    reloaded = AutoModelForCausalLM.from_pretrained(partial, dtype=model.dtype, trust_remote_code=trust_remote_code)
    if weights_hash(reloaded) != weights_hash(model):
        raise RuntimeError(
            f"the model saved in {partial} reloads with other weights; the disk may be faulty. Nothing was replaced."
        )
    for path in (*partial.iterdir(), partial):
        sync(path)


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _one_or_list(ids: int | Sequence[int]) -> int | list[int]:
    """How ``generation_config.json`` has the ids that end an answer."""
    listed = _as_list(ids)
    return listed[0] if len(listed) == 1 else listed


def _not_loaded(what: str, name_or_path: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "custom code" in reason:
        return UserError(f"{reason} Read that code, and set model.trust_remote_code to run it.")
    return UserError(
        f"no {what} could be loaded from {name_or_path!r}: {reason} "
        "Give a Hugging Face folder, a .gguf file, or the name of a model that the hub has and you may read."
    )
