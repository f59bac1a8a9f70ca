"""LoRA adapters, by ``peft``: small matrices are trained beside the weights of a model, which stay as they are.

The base is never merged in place: rounding would change it, and base + adapter would not be what was trained. Where
merged weights are wanted, they are those of a copy (``merging``).
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from spin_lightning.models.loading import default_dtype, dtype_name
from spin_lightning.models.saving import save_folder, weights_hash
from spin_lightning.runs.checkpoints import refuse_non_finite
from spin_lightning.runs.files import read_json
from spin_lightning.terminal import say
from spin_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The settings of an adapter, by the names that ``peft`` keeps them under.
_NAMES = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
    "ensure_weight_tying": "ensure_weight_tying",
}
_CONFIG, _WEIGHTS, _BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"


@dataclass(frozen=True)
class Base:
    """The frozen model below an adapter, by its name and its weights. Kept with an exported adapter."""

    name: str
    dtype: str
    sha256: str


class LoraAdapter:
    """Trains a LoRA adapter (Hu et al. 2021, arXiv:2106.09685) on the frozen model, instead of all weights.

    Args:
        r: Rank of the two matrices beside each layer.
        alpha: Their product is scaled by ``alpha / r``. None: twice ``r``.
        dropout: Of what goes into an adapter. Needs ``model.dropout``, which self-play wants off.
        target_modules: Which layers get one: ``all-linear`` (all but the head), a list of names, or a regular
            expression.
        modules_to_save: Names of layers that are trained whole, such as ``lm_head``.
        use_dora: Learn the length of each row by itself (DoRA, arXiv:2402.09353).
        use_rslora: Scale by ``alpha / sqrt(r)`` (rsLoRA, arXiv:2312.03732), for a large ``r``.
        ensure_weight_tying: Where a model ties its embeddings and its head, ``modules_to_save`` trains them as one.
            Without it they are refused there; an adapter beside them is in any case.
        path: Folder of an adapter to go on with, as ``adapter/`` of an earlier run. Its settings are the folder's. The
            model is the base that it was trained on.
        merged: Also export base and adapter as one model, ``policy/``. Without it only ``adapter/`` is exported.
        quantize: Keep the base's linear layers packed in 4 bits while it is trained (QLoRA, arXiv:2305.14314), in
            this format of ``bitsandbytes``; ``nf4`` is the paper's. None: they have the dtype of ``trainer.precision``.

    Raises:
        UserError: A setting is outside its range, there is no adapter at ``path``, or ``peft`` is not installed.

    Example:
        >>> LoraAdapter(r=8).alpha
        16
    """

    def __init__(
        self,
        r: int = 16,
        alpha: int | None = None,
        dropout: float = 0.0,
        target_modules: list[str] | str = "all-linear",
        modules_to_save: list[str] | None = None,
        use_dora: bool = False,
        use_rslora: bool = False,
        ensure_weight_tying: bool = False,
        path: str | None = None,
        merged: bool = True,
        quantize: Literal["nf4", "fp4"] | None = None,
    ) -> None:
        if find_spec("peft") is None:
            raise UserError("model.adapter needs the package peft. Install it: pip install 'spin-lightning[lora]'.")
        if quantize not in (None, "nf4", "fp4"):
            raise UserError(f"model.adapter.quantize must be nf4, fp4 or null, got {quantize!r}.")
        if quantize is not None and not (find_spec("bitsandbytes") and find_spec("accelerate")):
            raise UserError(
                "model.adapter.quantize needs the packages bitsandbytes and accelerate. Install them: pip install "
                "'spin-lightning[qlora]'."
            )
        if r < 1:
            raise UserError(f"model.adapter.r must be at least 1, got {r!r}.")
        if alpha is not None and alpha < 1:
            raise UserError(f"model.adapter.alpha must be at least 1, got {alpha!r}.")
        if not 0 <= dropout < 1:
            raise UserError(f"model.adapter.dropout must be in [0, 1), got {dropout!r}.")
        self.path = path
        self.r = r
        self.alpha = 2 * r if alpha is None else alpha
        self.dropout = dropout
        self.target_modules = target_modules
        self.modules_to_save = modules_to_save
        self.use_dora = use_dora
        self.use_rslora = use_rslora
        self.ensure_weight_tying = ensure_weight_tying
        self.merged = merged
        self.quantize = quantize
        if path is not None:
            self._take_over(path, given_alpha=alpha)

    def _take_over(self, path: str, given_alpha: int | None) -> None:
        """Have the settings of an adapter that is there. What was given beside its path must agree with them.

        Raises:
            UserError: It does not, or there is no adapter of this kind.
        """
        config, defaults = _read_config(path), signature(LoraAdapter).parameters
        for name, key in _NAMES.items():
            own, given = (
                config.get(key, defaults[name].default),
                given_alpha if name == "alpha" else getattr(self, name),
            )
            if given != defaults[name].default and _sorted(given) != _sorted(own):
                raise UserError(
                    f"model.adapter.{name} {given!r} does not go with model.adapter.path: that adapter was made with "
                    f"{own!r}, and keeps it. Leave model.adapter.{name} out."
                )
            if name != "dropout":
                setattr(self, name, _sorted(own))

    @property
    def shape(self) -> dict[str, Any]:
        """The settings that decide which tensors are trained, and what they do."""
        return {name: value for name, value in vars(self).items() if name not in ("path", "merged", "dropout")}

    def apply(self, model: Any, seed: int = 0) -> Any:
        """Put the adapter into a model, whose own weights are frozen.

        Args:
            model: The base. It is changed in place, but none of its weights.
            seed: The first matrices are drawn from it alone, the same in every dtype up to its rounding.

        Returns:
            A ``PeftModel`` around it.

        Raises:
            UserError: No layer of the model has such a name, its tied weights would be untied, or the adapter at
                ``path`` is of another base.
        """
        from peft import LoraConfig, PeftModel, get_peft_model

        names = [name for name, _ in model.named_modules()]
        targets = self.target_modules if isinstance(self.target_modules, list) else []
        for setting, wanted_names in (("modules_to_save", self.modules_to_save or []), ("target_modules", targets)):
            for wanted in wanted_names if self.path is None else []:
                if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                    raise UserError(
                        f"model.adapter.{setting} names {wanted!r}, and no layer of this {type(model).__name__} is "
                        f"called so. There are {', '.join(sorted({name.rpartition('.')[2] for name in names} - {''}))}."
                    )
        is_packed = getattr(model, "is_quantized", False)
        packed = f", packed ({self.quantize or 'as it came'})" if is_packed else ""
        base = Base(model.name_or_path, dtype_name(model.dtype) + packed, weights_hash(model))
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = head is not None and getattr(head, "weight", None) is embeddings.weight
        try:
            with _drawing(seed):
                if self.path is not None:
                    _refuse_other_base(self.path, base)
                    policy: Any = PeftModel.from_pretrained(
                        model, _folder(self.path), is_trainable=True, autocast_adapter_dtype=False, torch_device="cpu"
                    )
                    _refuse_incomplete(self.path, policy)
                else:
                    config = LoraConfig(
                        task_type="CAUSAL_LM",
                        r=self.r,
                        lora_alpha=self.alpha,
                        lora_dropout=self.dropout,
                        target_modules=copy.copy(self.target_modules),  # peft changes what it is given
                        modules_to_save=copy.copy(self.modules_to_save),
                        use_dora=self.use_dora,
                        use_rslora=self.use_rslora,
                        ensure_weight_tying=self.ensure_weight_tying,
                    )
                    policy = get_peft_model(model, config, autocast_adapter_dtype=False)
        except UserError:
            raise
        except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
            where = f"The adapter {self.path!r} cannot be put" if self.path else "An adapter cannot be put"
            raise UserError(f"{where} into a {type(model).__name__}: {error} Change model.adapter.") from error
        if is_packed:  # of other layers they have the dtype already
            for weight in policy.parameters():
                weight.data = weight.to(model.dtype) if weight.requires_grad else weight.data
        causal = policy.get_base_model()
        trained = [
            {id(weight) for weight in part.parameters() if weight.requires_grad}
            for part in (causal.get_input_embeddings(), causal.get_output_embeddings())
            if part is not None
        ]
        if is_tied and trained[0] != trained[1]:
            raise UserError(
                f"the embeddings and the head of this {type(model).__name__} are one matrix (tie_word_embeddings), and "
                "an adapter on one of them would make them two, unnoticed. Leave them out of "
                "model.adapter.target_modules and modules_to_save; or train them whole, and as one: modules_to_save "
                "[lm_head] with ensure_weight_tying: true."
            )
        policy.adapter_base, policy.adapter_merged = base, self.merged
        return policy


def base_of(model: Any) -> Base | None:
    """The base of a model that ``LoraAdapter`` put an adapter into; None of any other."""
    base = getattr(model, "adapter_base", None)
    return base if isinstance(base, Base) else None


def exports_merged(model: Any) -> bool:
    """Whether the export of a model holds a whole one: of one with an adapter base and adapter merged, if wanted."""
    return base_of(model) is None or bool(model.adapter_merged)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of a model with an adapter, by the names that ``peft`` saves them under."""
    from peft import get_peft_model_state_dict

    # as it is, it would ask the hub whether the base has more embeddings there
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def trained_names(model: nn.Module) -> set[str]:
    """The names of what training changes: weights with gradients, and buffers that are saved."""
    trained = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)} & model.state_dict().keys()
    return trained | buffers


def exported_bytes(model: nn.Module) -> int:
    """How large the export of a model will be: of one with an adapter the adapter, and base and adapter if merged."""
    is_whole, width = exports_merged(model), next(model.parameters()).element_size()
    weights = [weight for weight in model.parameters() if is_whole or weight.requires_grad]
    # of packed weights two are in a byte, and are exported as two
    return sum(weight.nbytes if weight.is_floating_point() else 2 * width * weight.numel() for weight in weights)


def save_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Write an adapter as ``peft`` reads it, reload its tensors, and only then give the folder its name.

    Raises:
        NonFiniteError: A weight is NaN or infinite.
        RuntimeError: The reloaded tensors differ from those in memory.
        StorageError: There is no room, or the folder cannot be written to.
    """
    from safetensors.torch import load_file

    refuse_non_finite(model)
    with save_folder(folder) as partial:
        model.save_pretrained(partial, selected_adapters=["default"], save_embedding_layers=False)
        tokenizer.save_pretrained(partial)
        (partial / _BASE).write_text(json.dumps(asdict(model.adapter_base), indent=1) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")
        own, reloaded = adapter_tensors(model), load_file(partial / _WEIGHTS)
        if own.keys() != reloaded.keys() or not all(torch.equal(own[name].cpu(), reloaded[name]) for name in own):
            raise RuntimeError(
                f"the adapter saved in {partial} reloads with other weights; the disk may be faulty. Nothing was "
                "replaced."
            )


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """On the CPU, in float32 and from a seed: what is drawn does not depend on where and how a run computes."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        with torch.device("cpu"), default_dtype(torch.float32), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft: what matters is looked at here
            yield
    finally:
        torch.default_generator.set_state(state)


def _folder(path: str) -> Path:
    return Path(path).expanduser()


def _read_config(path: str) -> dict[str, Any]:
    """The settings of the adapter in a folder.

    Raises:
        UserError: There is none, it is of another kind than LoRA, or its weights are a pickle.
    """
    folder = _folder(path)
    if not (folder / _CONFIG).is_file():
        raise UserError(
            f"model.adapter.path {path!r} is no folder of an adapter: {folder / _CONFIG} does not exist. Give the "
            "folder adapter/ that a run exported, or one of peft; download one of the hub first: hf download NAME."
        )
    if not (folder / _WEIGHTS).is_file():
        raise UserError(
            f"model.adapter.path {path!r} has no {_WEIGHTS}. An adapter_model.bin is a pickle, and is not opened: load "
            "and save it with peft, where you trust where it comes from."
        )
    config: dict[str, Any] = read_json(folder / _CONFIG) or {}
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"the adapter in {path!r} is of the kind {config.get('peft_type')!r}, and only LORA is trained here."
        )
    return config


def base_name_of(path: str) -> str:
    """The name of the model that the adapter in a folder was trained on.

    Raises:
        UserError: There is no adapter of this kind, or it does not say.
    """
    config = _read_config(path)
    name = (read_json(_folder(path) / _BASE) or {}).get("name") or config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"the adapter in {path!r} does not say which model it was trained on. Name that model.")
    return str(name)


def _sorted(value: Any) -> Any:
    """Names of layers have no order."""
    return sorted(value) if isinstance(value, list) else value


def _refuse_other_base(path: str, base: Base) -> None:
    """Make sure that an adapter goes onto the weights it was trained on, as far as its folder tells."""
    kept = read_json(_folder(path) / _BASE) or {}
    if kept.get("dtype") == base.dtype and kept.get("sha256") != base.sha256:
        raise UserError(
            f"the adapter {path!r} was trained on other weights than those of {base.name!r}: on {kept.get('name')!r}, "
            "whose sha256 is another. Give that model; a merged policy/ has the adapter in it already."
        )
    name = kept.get("name") or (read_json(_folder(path) / _CONFIG) or {}).get("base_model_name_or_path")
    before, now = (name, kept.get("dtype")), (base.name, base.dtype)
    if before != now and (kept or name != base.name):
        say(f"note: the adapter {path} was trained on {_both(*before)}, and goes onto {_both(*now)} now.")


def _both(name: str | None, dtype: str | None) -> str:
    return f"{name} ({dtype})" if dtype else str(name)


def _refuse_incomplete(path: str, policy: nn.Module) -> None:
    from safetensors import safe_open

    with safe_open(_folder(path) / _WEIGHTS, "pt") as file:
        there = set(file.keys())
    if differing := sorted(there ^ adapter_tensors(policy).keys()):
        raise UserError(
            f"the weights in {path!r} are not those that its {_CONFIG} tells of: {differing[0]} is in one of them only "
            f"({len(differing)} in all). Give the folder as it was saved."
        )
