"""The settings a run began with, kept in its folder: a resume with others is refused, setting by setting.

Recorded is whatever a constructor takes, also what it hands on to those of its bases, except what cannot change the
results; a new setting is therefore guarded without being named here.
"""

from __future__ import annotations

import inspect
import platform
import re
from pathlib import Path
from typing import Any

import lightning as L
import tokenizers
import torch
import transformers

from spin_lightning import __version__
from spin_lightning.runs import processes
from spin_lightning.runs.files import read_json, write_json
from spin_lightning.runs.redaction import redacted
from spin_lightning.terminal import say
from spin_lightning.types import UserError

SETTINGS = "run.json"
#: What may change freely: where things are, how they are shown, and how much is done at once.
HARMLESS = {
    "self_play.output_dir",
    "export.output_dir",
    "self_play.iterations",  # a game may be made longer; the settings of the iterations played are compared
    "self_play.stage",
    "rollouts.output_dir",
    "rollouts.iterations",
    "rollouts.eval_every",
    "rollouts.export_every",
    "data.train_data",  # what was read is compared, not where it lay
    "data.val_data",
    "data.other_data",  # measured only
    "data.tokenizer_name_or_path",
    "data.on_bad_row",
    "data.num_workers",
    "data.micro_batch_tokens",
    "data.generator",  # its sampling is compared
    "model.optimizer",  # what it made is compared
    "model.gradient_checkpointing",
    "model.on_non_finite",
}
#: What the data holds, by the names in the record.
OF_DATA = ("data.prompts_sha256", "data.held_out_sha256", "data.encoding_sha256")
_OF_TRAINER = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
)
_OF_SAMPLING = ("data.generator.", "data.answers_per_prompt", "data.history", "data.keep_prompts_together")
_LIMITS = ("limit_train_batches", "limit_val_batches", "overfit_batches")


def settings_of(trainer: L.Trainer, module: Any, data: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every setting that decides a run's results, by the name it has on the command line.

    Those of what the data holds are among them if it was read. Needs neither the model nor a fit.
    """
    found = {
        "model.optimizer.class": type(optimizer).__qualname__,
        **{f"model.optimizer.{key}": _as_json(value) for key, value in optimizer.defaults.items() if key != "lr"},
        **{f"trainer.{name}": _as_json(getattr(trainer, name)) for name in _OF_TRAINER},
        **{f"trainer.{name}": repr(getattr(trainer, name)) for name in _LIMITS},  # 1 batch is not 1.0, all of them
    }
    generator = getattr(data, "generator", None)  # a stage without sampling has none
    found |= {
        f"data.generator.{key}": value for key, value in (generator.sampling if generator is not None else {}).items()
    }
    if data.prompts:
        hashes = (data.hashes_of_rows, data.held_out_hash, data.encoder.fingerprint)
        found |= dict(zip(OF_DATA, hashes, strict=True))
    parts = _parts_of(trainer, module, data)
    for prefix, part in parts.items():
        found |= _arguments_of(part, prefix)
    if generator is not None:
        found.pop("data.max_response_tokens", None)  # the generator's max_new_tokens
    if not any("epochs" in parameters_of(type(part)) for part in parts.values()):  # a clock that they follow from
        found["trainer.max_epochs"] = trainer.max_epochs
    return redacted({key: value for key, value in sorted(found.items()) if key not in HARMLESS})


def _parts_of(trainer: L.Trainer, module: Any, data: Any) -> dict[str, Any]:
    """What the arguments of decide the results, by its name on the command line."""
    parts = {"model": module, "data": data}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if section := getattr(callback, "settings_section", None):
            parts[section] = callback
    return parts


def parameters_of(kind: type) -> dict[str, inspect.Parameter]:
    """What a class takes, by name; where its constructor hands on ``**kwargs``, with what those of its bases take."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            found |= {p.name: p for p in named if p.name not in ("self", *found)}
            if len(named) == len(parameters):
                break
    return found


def _complete_record(record: dict[str, Any], trainer: L.Trainer, module: Any, data: Any) -> dict[str, Any]:
    """The settings of a record as this version has them, with those that its version did not keep."""
    old = dict(record["settings"])
    if not hasattr(data, "generator") and (cap := old.get("data.generator.max_new_tokens")) is not None:
        # every stage had a sampler once; where nothing is sampled, its cap alone decided anything
        old = {key: value for key, value in old.items() if not key.startswith(_OF_SAMPLING)}
        old["data.max_response_tokens"] = cap
    for prefix, part in _parts_of(trainer, module, data).items():
        for name in parameters_of(type(part)):
            key, value = f"{prefix}.{name}", getattr(part, name, None)
            kept = old.get(key)
            if isinstance(kept, dict) and kept.get("class") == type(value).__qualname__:
                old[key] = {**_missing_arguments(kept, value, ""), **kept}
        old = {**_missing_arguments(old, part, prefix), **old}
    return old


def _missing_arguments(old: dict[str, Any], thing: Any, prefix: str) -> dict[str, Any]:
    """The arguments of a thing that a record may lack, as they were when it was made.

    One that the record's version did not know yet had its default. A record with none of those that a class hands on to
    its bases is of a version that did not read them: they are taken to be what they are now.
    """
    now = {key: value for key, value in _arguments_of(thing, prefix).items() if key not in HARMLESS}
    defaults = {f"{prefix}.{name}": _as_json(p.default) for name, p in parameters_of(type(thing)).items()}
    handed_on = now.keys() - {f"{prefix}.{name}" for name in inspect.signature(type(thing).__init__).parameters}
    if handed_on.isdisjoint(old):
        defaults |= {key: now[key] for key in handed_on}
    return {key: defaults[key] for key in now}


def check_finished(trainer: L.Trainer, module: Any, data: Any, path: Path, allow_changes: list[str]) -> None:
    """Make sure that a run that is over is the one this command would play.

    Without model and fit, and with the rows only if they were read.

    Raises:
        UserError: A setting differs that is not in ``allow_changes``; the message shows each, old and new.
    """
    record = read_json(path)
    if record is None:  # removed: nothing to compare with
        return
    optimizer = module.optimizer([torch.zeros(1, 1, requires_grad=True)])
    settings, old = settings_of(trainer, module, data, optimizer), _complete_record(record, trainer, module, data)
    old = {key: value for key, value in old.items() if key in settings or key not in OF_DATA}
    if refused := [key for key in _find_differing(old, settings) if key not in allow_changes]:
        raise UserError(
            f"the run in {path.parent} is over, and had other settings than this command "
            f"gives:{_show_changes(refused, old, settings)}\nUse another folder to play with these settings, or the "
            "settings it had to see that it is over."
        )


def check_settings(trainer: L.Trainer, path: Path, allow_changes: list[str]) -> None:
    """Record a new run's settings and kernels, or compare and take over those of a run that continues.

    Raises:
        UserError: A setting differs that is not in ``allow_changes``; the message shows each, old and new. Or there is
            no record to compare with.
    """
    module: Any = trainer.lightning_module
    data = trainer.datamodule  # type: ignore[attr-defined]
    optimizer = getattr(trainer.optimizers[0], "inner", trainer.optimizers[0])
    settings = settings_of(trainer, module, data, optimizer)
    now, record = versions(), read_json(path)
    changes: list[dict[str, Any]] = []
    if record is None and trainer.ckpt_path is not None and path.name not in allow_changes:
        raise UserError(
            f"{path} is missing, so nothing tells which settings this run began with. Restore it from a copy, or "
            f"continue with those of this command: --checkpoint.allow_changes '[{path.name}]'."
        )
    if record is not None:
        old, changes = (
            redacted(_complete_record(record, trainer, module, data)),
            record["changes"],
        )  # as this version keeps them
        if trainer.ckpt_path is None:
            old, changes = settings, []  # it begins again: only what was installed is compared
        differing = _find_differing(old, settings)
        shown = _show_changes(differing, old, settings)
        if refused := [key for key in differing if key not in allow_changes]:
            raise UserError(
                f"the run in {path.parent} began with other settings than this command gives:{shown}\n"
                "Continue with the settings it began with, or use another folder, or allow the change with "
                f"--checkpoint.allow_changes '[{', '.join(refused)}]'."
            )
        since = {"from_checkpoint": trainer.ckpt_path and Path(str(trainer.ckpt_path)).name}
        changes += [{**since, "setting": key, "from": old.get(key), "to": settings.get(key)} for key in differing]
        if differing:
            say(f"note: this run continues with changed settings, which {path.name} records:{shown}")
        before = record["versions"]
        drifted = [name for name in now if before.get(name) != now[name]]
        if drifted:
            changes += [{**since, "setting": name, "from": before.get(name), "to": now[name]} for name in drifted]
            drift = [f"{name} {before.get(name)} -> {now[name]}" for name in drifted]
            say(
                f"note: what it runs on changed since this run began ({', '.join(drift)}): it continues, but its "
                "weights need not be those of an undisturbed run, bit by bit."
            )
    kernels = module.settle_kernels(None if record is None else record.get("kernels", {}))
    if processes.is_first():
        write_json(path, {"settings": settings, "changes": changes, "versions": now, "kernels": kernels})


def _arguments_of(thing: Any, prefix: str) -> dict[str, Any]:
    names = [name for name in parameters_of(type(thing)) if hasattr(thing, name)]
    return {f"{prefix}.{name}": _as_json(getattr(thing, name)) for name in names}


def _as_json(value: Any) -> Any:
    """A value as JSON knows it; an object as its class with its own settings."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, Path | torch.dtype):
        return str(value)
    if callable(value) and not hasattr(value, "parameters") and not hasattr(value, "check"):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return {"class": type(value).__qualname__, **_arguments_of(value, "")}


def _find_differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [key for key in sorted({*old, *new}) if not _values_agree(old.get(key), new.get(key))]


def _show_changes(keys: list[str], old: dict[str, Any], new: dict[str, Any]) -> str:
    return "".join(f"\n  {key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys)


def _values_agree(old: Any, new: Any) -> bool:
    """Schedules agree if they do for the iterations that both have; a value that was left out, with any."""
    if isinstance(old, list) and isinstance(new, list):
        return all(_values_agree(a, b) for a, b in zip(old, new, strict=False))
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_values_agree(old[key], new[key]) for key in old)
    if isinstance(old, str) and isinstance(new, str) and "***" in old:  # left out by a version that left out more
        return re.fullmatch(".*".join(map(re.escape, old.split("***"))), new, re.DOTALL) is not None
    return bool(old == new)


def versions() -> dict[str, Any]:
    """What a run's numbers depend on beside its settings, to the last bit."""
    return {
        "spin_lightning": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lightning": L.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
