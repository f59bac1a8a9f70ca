"""Models and tokenizers, from a hub name, a local folder or a ``.gguf`` file.

Nothing here knows what a game is. ``saving`` writes what was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spin_lightning.models import hub
from spin_lightning.progress import progress
from spin_lightning.runs.files import iteration_folders
from spin_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    ModelOrName = str | PreTrainedModel
else:
    ModelOrName = str  # the command line takes names only, and reads its types here


def locate(name_or_path: str) -> dict[str, Any]:
    """The arguments ``from_pretrained`` wants for a hub name, a folder or a ``.gguf`` file.

    Raises:
        UserError: It reads like a path, and nothing is there.
    """
    if not name_or_path.strip():
        raise UserError("model_name_or_path is empty. Give a Hugging Face folder, a .gguf file, or a hub name.")
    path = _path_of(name_or_path)
    if path.suffix == ".gguf" and path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        raise UserError(
            f"model_name_or_path {name_or_path!r} is a file, and no .gguf. Give the Hugging Face folder that it is in."
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) or name_or_path.startswith(".") or path.suffix == ".gguf":
        raise UserError(
            f"model_name_or_path {name_or_path!r} does not exist (looked at {path.absolute()}). "
            "Give a Hugging Face folder, a .gguf file, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    return {"pretrained_model_name_or_path": name_or_path}


def _path_of(name_or_path: str) -> Path:
    path = Path(name_or_path)
    try:
        path = path.expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long; a user that nobody knows
        raise UserError(
            f"model_name_or_path {name_or_path!r} is no name of a model: {error}. Give another one."
        ) from None
    return path


def check_model(
    name_or_path: str,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    needs_head: bool = True,
) -> None:
    """Refuse what could not be loaded or would run code of others, as far as names tell. Reads no weights, asks no hub.

    Raises:
        UserError: Nothing is there, it is an adapter or holds pickles only, or the attention is code from the hub,
            which needs ``trust_remote_code``. Or it is to predict tokens (``needs_head``), and is a reward model.
    """
    where = locate(name_or_path)
    _refuse_kernels({"attn_implementation": attn_implementation}, "the settings", trust_remote_code)
    folder = Path(where["pretrained_model_name_or_path"])
    if "gguf_file" in where or not folder.is_dir():
        return
    if (folder / "adapter_config.json").is_file():
        raise _make_adapter_error(
            name_or_path, (folder / "adapter_config.json").read_text(encoding="utf-8", errors="replace")
        )
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    if "config.json" not in files:
        places = [place / "policy" for place in (*iteration_folders(folder).values(), folder)]
        if found := [repr(str(place)) for place in places if place.is_dir()]:
            raise UserError(
                f"{name_or_path!r} is the folder of a run, and no model. Give what it exported: "
                f"{' or '.join(found[-3:])}."
            )
    if needs_head and "config.json" in files:
        config: Any = None
        with suppress(ValueError, RecursionError):  # loading says what is wrong with it
            config = json.loads((folder / "config.json").read_text(errors="replace"))
        _refuse_classifier(config, name_or_path)
    pickles = [name for name in files if re.fullmatch(r"pytorch_model.*\.bin|.*\.(pth?|ckpt)", name)]
    if pickles and not any(name.endswith(".safetensors") for name in files):
        raise UserError(
            f"the weights in {name_or_path!r} are a pickle ({pickles[0]}), which can run code and is not opened. If "
            "you trust "
            'where it comes from, convert it to safetensors: python -c "from transformers import AutoModelForCausalLM '
            "as M, "
            f"AutoTokenizer as T; M.from_pretrained({name_or_path!r}).save_pretrained('converted'); "
            f"T.from_pretrained({name_or_path!r}).save_pretrained('converted')\" and give the folder 'converted'."
        )
    if "config.json" in files and '"transformers_weights"' not in (folder / "config.json").read_text(errors="replace"):
        _check_weights(name_or_path, folder, files)


def _refuse_classifier(config: Any, name_or_path: str) -> None:
    """Make sure that a config is not that of a reward model, which has no head for tokens.

    Raises:
        UserError: It is. Where a model's embeddings serve as its head, it would load without a word.
    """
    kinds = config.get("architectures") if isinstance(config, dict) else None
    for kind in kinds if isinstance(kinds, list) else ():
        if str(kind).endswith("ForSequenceClassification"):
            raise UserError(
                f"{name_or_path!r} holds a reward model ({kind}): it gives a text a number, and was not trained to "
                "predict tokens. Give the language model that it was made from, or policy/ of a run. A reward model "
                "is for ModelReward.folder, and for model.critic of ppo."
            )


def _check_weights(name_or_path: str, folder: Path, files: Sequence[str]) -> None:
    """Look whether all safetensors are there, and whole by what their headers say. A few kilobytes are read.

    Raises:
        UserError: One is missing, or cut; or an index names something else.
    """
    from safetensors import SafetensorError, safe_open

    names = _files_of_index(folder / _INDEX, name_or_path) if _INDEX in files and _WEIGHTS not in files else {_WEIGHTS}
    for name in sorted(names):
        if name not in files:
            there = (
                ", ".join(other for other in files if not other.endswith((".json", ".md", ".txt", ".jinja")))
                or "no weights"
            )
            raise UserError(
                f"{name_or_path!r} has no {name}, which would hold its weights; it has {there}. Give a whole Hugging "
                "Face folder with safetensors, or a .gguf file by its own name."
            )
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{folder / name} is not whole ({error}). Download or copy it again; a file of some hundred bytes is a "
                "pointer of Git LFS: git lfs pull."
            ) from None


_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def _files_of_index(path: Path, name_or_path: str) -> set[str]:
    """The files that an index of weights names.

    Raises:
        UserError: It names something else than safetensors beside it, which could be a pickle or lie elsewhere.
    """
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"the index of the weights of {name_or_path!r} cannot be read ({type(error).__name__}: {error})."
        ) from None
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise UserError(
                f"the index of the weights of {name_or_path!r} names {name!r}, and only safetensors beside it are "
                "opened."
            )
    return names


def load_config(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model's config, without its weights.

    Raises:
        UserError: Nothing can be loaded under that name, or it names code from the hub, which needs
            ``trust_remote_code``.
    """
    from transformers import AutoConfig

    where = {**_locate_reachable(name_or_path), "revision": revision or "main"}
    try:
        _check_config(where, trust_remote_code)
        return AutoConfig.from_pretrained(**where, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config is data of others: what reading it raises has no end
        raise _make_loading_error("config", name_or_path, error) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars of transformers for weights read or written. Downloads, which the hub's package does, keep theirs."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils.logging import set_tqdm_hook

    bar_of_gguf = getattr(gguf, "tqdm", None)  # which the hook does not reach
    before = set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    gguf.tqdm = partial(bar_of_gguf, disable=True) if bar_of_gguf else None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        set_tqdm_hook(before)
        gguf.tqdm = bar_of_gguf  # type: ignore[attr-defined]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What torch makes floats of while this lasts."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@without_bars()
def load_policy(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantize: str | None = None,
    needs_head: bool = True,
) -> PreTrainedModel:
    """A causal language model in the dtype asked for, ready to be trained.

    Args:
        name_or_path: A hub name, a Hugging Face folder or a ``.gguf`` file.
        revision: Commit or tag of a hub model.
        trust_remote_code: Run Python code that comes with a hub model.
        dtype: Of its weights.
        attn_implementation: The attention of ``transformers`` to use.
        quantize: The 4-bit format of ``bitsandbytes`` to pack the linear layers in, ``nf4`` or ``fp4``. Packed weights
            cannot be trained. None: they are not packed.
        needs_head: Whether it is to predict tokens. If not, a head that the folder lacks, as a reward model's does, is
            drawn, the same each time.

    Raises:
        UserError: Nothing can be loaded under that name; the message names what was tried.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    check_model(name_or_path, attn_implementation, trust_remote_code, needs_head)
    where = {**_locate_reachable(name_or_path), "revision": revision or "main"}
    try:
        config = _check_config(where, trust_remote_code)
        if needs_head:
            _refuse_classifier(config, name_or_path)
        if "gguf_file" not in where and (index := _download_index(where)):
            _files_of_index(index, name_or_path)  # of a hub's model too
        if quantize is not None:
            if "gguf_file" in where:
                raise UserError(
                    "a .gguf file cannot be loaded with model.adapter.quantize. Give a Hugging Face folder."
                )
            where |= {
                "quantization_config": _four_bits(quantize, dtype),
                "device_map": {"": torch.get_default_device()},
            }
        if "gguf_file" in where:
            where["quantization_config"] = GgufConfig(dequantize=True)  # packed weights cannot be trained
        else:
            where["use_safetensors"] = True  # a pytorch_model.bin is a pickle, and is not opened
        is_here = Path(where["pretrained_model_name_or_path"]).is_dir()  # else the bar of a download is shown
        # the 16 values of 4-bit weights are kept in the default dtype, which bf16-true makes bfloat16 in training
        exact = nullcontext() if quantize is None else default_dtype(torch.float32)
        with progress("loading the model") if is_here else nullcontext(), exact:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **where,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
                output_loading_info=True,
            )
        model, report = loaded
        missing = sorted(report["missing_keys"])
        head = model.get_output_embeddings()
        if not needs_head and missing == [name for name, weight in model.named_parameters() if weight is head.weight]:
            missing = []
            with torch.no_grad():
                head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))
        if missing:
            raise UserError(
                f"{name_or_path!r} has no values for {len(missing)} of the weights of a {type(model).__name__}, such "
                f"as {missing[0]}; they would be random. Give the whole model, with the config that belongs to it."
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _make_loading_error("model", name_or_path, error) from error
    for module in model.modules():
        # bitsandbytes packs 4-bit weights anew in evaluation mode, in place, and then no gradient goes through them
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if "gguf_file" in where:  # the weights are plain tensors now; a saved folder must not claim otherwise
        forget_packing(model)
    policy: PreTrainedModel = model
    return policy


def forget_packing(model: Any) -> None:
    """Take what says that its weights are packed from a model whose weights are plain tensors now."""
    model.config.__dict__.pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit"):
        model.__dict__.pop(name, None)
    if conversions := getattr(model, "_weight_conversions", None):  # of loading, which saving would take back
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(hasattr(step, "hf_quantizer") for step in getattr(conversion, "operations", ()))
        ]


def _four_bits(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def as_policy(model: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model object in the dtype asked for, ready to be trained. It is changed in place.

    Raises:
        UserError: Its weights are packed, none of them may be trained, or what is exported would load as another class.
    """
    from transformers import AutoModelForCausalLM

    name = type(model).__name__
    if getattr(model, "is_quantized", False):
        raise UserError(f"the weights of this {name} are packed and cannot be trained. Load it unpacked.")
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(
            f"no weight of this {name} has requires_grad, so nothing can be trained. Set it where it should be."
        )
    try:
        with torch.device("meta"):
            reloaded = AutoModelForCausalLM.from_config(model.config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"a saved {name} could not be loaded again: {reason} Register it with AutoModelForCausalLM."
        ) from error
    if not isinstance(model, type(reloaded)):
        raise UserError(
            f"a saved {name} would be loaded again as {type(reloaded).__name__}, by AutoModelForCausalLM. Give a model "
            "with a head that predicts the next token, as that class makes it."
        )
    kept = _find_kept_by_loading(model, dtype)
    policy: PreTrainedModel = model.to(dtype)
    for name, tensor in (*policy.named_parameters(), *policy.named_buffers()):
        if name in kept:
            tensor.data = kept[name]
    return policy


def _find_kept_by_loading(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What ``from_pretrained`` does not convert when it loads a model in some dtype.

    The frequencies of rotary positions and other buffers that are not saved. Of 16 bits also what the model's class
    wants in float32, as routers.
    """
    saved, kept = model.state_dict(), {name: tensor.clone() for name, tensor in model.named_buffers()}
    kept = {name: tensor for name, tensor in kept.items() if name not in saved}
    if dtype in (torch.bfloat16, torch.float16):
        in_float32 = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        for name, tensor in saved.items():
            if any(part in name for part in in_float32):
                kept[name] = tensor.detach().float().clone()
    return kept


def stored_dtype(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> str | None:
    """The dtype that a model's config says its weights are stored in, such as ``bfloat16``; None if it says nothing."""
    try:
        config = load_config(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except UserError:  # loading the model itself says what is wrong
        return None
    dtype = getattr(config, "dtype", None)
    return None if dtype is None else dtype_name(dtype)


def dtype_name(dtype: Any) -> str:
    """The name of a dtype without its module, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def tokenizer_state(tokenizer: Any) -> Any:
    """Everything but a chat template that decides how text becomes ids, as JSON knows it: to be hashed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    return state


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, under the same name.

    Raises:
        UserError: Nothing can be loaded under that name.
    """
    from transformers import AutoTokenizer

    where = _locate_reachable(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            **where, revision=revision or "main", trust_remote_code=trust_remote_code
        )
        limit, templates = tokenizer.model_max_length, tokenizer.chat_template
        if not isinstance(limit, int | float):
            raise ValueError(f"its model_max_length must be a number, got {limit!r}")
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            if not isinstance(template, str | None):
                raise ValueError(f"its chat template must be text, got {template!r}")
        return tokenizer
    except Exception as error:
        raise _make_loading_error("tokenizer", name_or_path, error) from error


def refuse_without_causal_head(config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
    """Make sure that a config is one of a causal language model that can be built. No weights are made.

    Raises:
        UserError: It is not.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _make_loading_error("model", config._name_or_path, error) from error


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens a model takes, prompt and answer together, if its config tells."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def refuse_ids_beyond(rows: int | None, tokenizer: PreTrainedTokenizerBase, *ids: int) -> None:
    """Make sure that every id has a row in a model's embedding. More rows than ids are fine.

    Args:
        rows: Of the embedding. None, where a config does not tell: nothing is asked.
        tokenizer: Whose ids are looked at.
        ids: Further ids that a batch may hold.

    Raises:
        UserError: An id has no row; the message names both sizes.
    """
    largest = max([*tokenizer.get_vocab().values(), tokenizer.pad_token_id or 0, *ids])
    if rows is not None and largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest) if largest < len(tokenizer) else None
        raise UserError(
            f"the model's embedding has {rows} rows, for the ids 0 to {rows - 1}, but the tokenizer's ids go up to "
            f"{largest} ({token!r}). Use the tokenizer that belongs to the model; where tokens were added on purpose, "
            f"give the model rows for them: model.resize_token_embeddings({largest + 1}), and save it."
        )


def end_ids_of(model: Any) -> list[int]:
    """The tokens that end a response by a model's own settings: those of its generation config, else of its config."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return _as_list(found if found is not None else getattr(model.config, "eos_token_id", None))


def end_ids(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[int]:
    """The tokens that end a response by a model's settings, not loaded yet. A ``.gguf`` file has the tokenizer's alone.

    Raises:
        UserError: Nothing can be loaded under that name.
    """
    from transformers import GenerationConfig

    where = _locate_reachable(name_or_path)
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
    config = load_config(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    return _as_list(getattr(config, "eos_token_id", None))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to zero, also those kept as a plain number and applied inside attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if re.search("dropout|layerdrop|drop_path", name) and isinstance(value, float):
                setattr(module, name, 0.0)


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _locate_reachable(name_or_path: str) -> dict[str, Any]:
    """What ``locate`` gives; where that is a hub name, after a short look whether the hub answers."""
    where = locate(name_or_path)
    if not Path(where["pretrained_model_name_or_path"]).is_dir():
        hub.is_reachable()
    return where


def _download_index(where: dict[str, Any]) -> Path | None:
    """The index of a model's weights, downloaded if need be; None if it has none."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        where["pretrained_model_name_or_path"],
        _INDEX,
        revision=where["revision"],
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def _check_config(where: dict[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    """Refuse what ``transformers`` would run, or leave out with no more than a warning, because a config says so.

    Returns:
        The config; of a ``.gguf`` file nothing.
    """
    from transformers import PreTrainedConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    if "gguf_file" in where:
        return {}
    config: dict[str, Any]
    config, _ = PreTrainedConfig.get_config_dict(**where)
    _refuse_kernels(config, f"the config of {where['pretrained_model_name_or_path']!r}", trust_remote_code)
    weights = config.get("transformers_weights")
    if weights is not None and not re.fullmatch(r"[\w.-]+\.safetensors(\.index\.json)?", str(weights)):
        raise ValueError(f"its config names {weights!r} as the weights, and only safetensors beside it are opened")
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise UserError(
            f"the model's embedding has {rows} rows (vocab_size), for the ids 0 to {rows - 1}, but its config's "
            f"pad_token_id is {pad}. Set pad_token_id in config.json to an id below, or to null."
        )
    packed = config.get("quantization_config")
    if packed is not None and not AutoHfQuantizer.supports_quant_method(packed):
        raise ValueError(f"its weights are packed in a way that transformers does not know: {packed!r}")
    return config


def _refuse_kernels(config: Any, whose: str, trust_remote_code: bool, key: str = "") -> None:
    """Look for implementations that are code on the hub, at any depth: ``transformers`` would download and run it."""
    if isinstance(config, dict):
        for name, value in config.items():
            _refuse_kernels(value, whose, trust_remote_code, f"{key} {name}")
    elif isinstance(config, list | tuple):
        for value in config:
            _refuse_kernels(value, whose, trust_remote_code, key)
    elif isinstance(config, str) and "_implementation" in key and not trust_remote_code and _is_from_hub(config):
        raise UserError(
            f"{whose} names code from the hub: {key.split()[-1]} {config!r}. Read that code, and set "
            "model.trust_remote_code to run it; or use an implementation of transformers, such as sdpa."
        )


def _is_from_hub(implementation: str) -> bool:
    """A name on the hub, or FlashAttention where its package is missing and ``kernels`` would fetch one from there."""
    is_fetched = implementation.startswith("flash_attention_") and find_spec("kernels") is not None
    return "/" in implementation or (is_fetched and find_spec("flash_attn") is None)


def _make_adapter_error(name_or_path: str, config: str) -> UserError:
    try:
        base = json.loads(config)["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError):
        base = "ITS_BASE_MODEL"
    return UserError(
        f"{name_or_path!r} holds a LoRA adapter (adapter_config.json), not a whole model. To go on with it, give its "
        f"base: --model.model_name_or_path {base} --model.adapter LoraAdapter --model.adapter.path {name_or_path}. Or "
        f'merge it into its base first, and give that folder: python -c "from peft import AutoPeftModelForCausalLM '
        "as M; from transformers import "
        f"AutoTokenizer as T; M.from_pretrained({name_or_path!r}).merge_and_unload().save_pretrained('merged'); "
        f"T.from_pretrained({base!r}).save_pretrained('merged')\". If its weights are merged already, remove "
        "adapter_config.json."
    )


def _make_loading_error(what: str, name_or_path: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = (str(error).strip().splitlines() or [""])[0][:400]
    if not isinstance(error, OSError | ValueError | ImportError) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    if "custom code" in reason:
        return UserError(f"{reason} Read that code, and set model.trust_remote_code to run it.")
    path, advice = _path_of(name_or_path), "Give a Hugging Face folder, a .gguf file, or the name of a model "
    if packed := sorted(path.glob("*.gguf")) if path.is_dir() else []:
        advice = f"Name the file, if you mean {packed[0]}; or give a Hugging Face folder or the name of a model "
    if not path.exists() and not hub.is_reachable():
        return UserError(
            f"no {what} could be loaded from {name_or_path!r}: it is no folder here, and the hub cannot be asked (no "
            "network, or HF_HUB_OFFLINE is set), nor is it whole in the local cache. Download it where there is a "
            f"network: hf download {name_or_path}; or give a local folder."
        )
    reason += "" if reason.endswith((".", "!", "?")) else "."
    return UserError(
        f"no {what} could be loaded from {name_or_path!r}: {reason} {advice}that the hub has and you may read."
    )
