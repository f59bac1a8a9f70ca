"""Exports a policy: a Hugging Face folder, verified by reloading it, with a summary beside it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
from torch import Tensor

from spin_lightning.data.sources import looks_local, names_in
from spin_lightning.models.adapters import base_of, exports_merged, save_adapter
from spin_lightning.models.loading import dtype_name
from spin_lightning.models.model_card import Origin, add_adapter, read_origin, render_plain_card
from spin_lightning.models.saving import save_model
from spin_lightning.runs import processes
from spin_lightning.runs.files import iteration_folders, read_json, refuse_links, run_folder, write_json
from spin_lightning.runs.lightning_internals import validate_now, validation_follows, was_cut_short
from spin_lightning.runs.settings import versions
from spin_lightning.runs.sharding import ShardedStrategy
from spin_lightning.stages.averaging import WeightAverage, exchange
from spin_lightning.stages.metrics import count_tokens, describe_retention, starting_metrics
from spin_lightning.terminal import say
from spin_lightning.types import UserError


def export_policy(
    model: Any, encoder: Any, folder: Path, card: str, summary: Mapping[str, Any], trust_remote_code: bool = False
) -> None:
    """Write ``policy/`` and ``summary.json`` into a folder. The summary comes last: where it is, the policy is whole.

    Of a model with an adapter ``adapter/`` is written, and ``policy/`` is a merged copy of base and adapter, if that is
    wanted.

    Raises:
        NonFiniteError: A weight is NaN or infinite.
        StorageError: There is no room, or the folder cannot be written to.
    """
    base = base_of(model)
    if base is not None:
        save_adapter(model, encoder.tokenizer, folder / "adapter", add_adapter(card, base.name, is_merged=False))
        card = add_adapter(card, base.name, is_merged=True)
    if exports_merged(model):
        tokenizer = encoder.tokenizer
        save_model(model, tokenizer, folder / "policy", card, encoder.end_ids, trust_remote_code=trust_remote_code)
    else:
        shutil.rmtree(folder / "policy", ignore_errors=True)  # of an earlier export, with other weights
    write_json(folder / "summary.json", summary)


def name_models(folder: Path, within: str = "") -> str:
    """Where models are that were exported into a folder, or into those of a pattern within it: merged, and as adapters.

    Empty where there are none.

    Example:
        >>> name_models(Path("/no/run/is/here"), "iteration_*/")
        ''
    """
    kinds = [kind for kind in ("policy", "adapter") if any(folder.glob(f"{within}{kind}"))]
    return " and ".join(f"{folder}/{within}{kind}" for kind in kinds)


def find_exported(folder: Path, iteration: int | None = None) -> Path:
    """The model in a folder: the folder itself, or what a run, or an iteration of it, has exported there last.

    Args:
        folder: Of a model, an adapter, a run or an iteration.
        iteration: Of a run with iterations. None: the last one with a model.

    Raises:
        UserError: There is none, or none of that iteration.
    """
    is_model = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    if is_model and iteration is None:
        return folder
    numbered = {n: place for n, place in iteration_folders(folder).items() if _export_in(place) is not None}
    if iteration is not None and iteration not in numbered:
        if not numbered:
            raise UserError(f"iteration {iteration} is of a run with iterations, and {str(folder)!r} has none.")
        there = ", ".join(map(str, sorted(numbered)))
        raise UserError(f"{folder} has no model of iteration {iteration}; it has those of {there}.")
    last = max(numbered, default=None) if iteration is None else iteration
    found = _export_in(folder if last is None else numbered[last])
    if found is not None:
        return found
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"there is no model in {str(folder)!r}: it has {there}. Give a Hugging Face folder, a run's folder that has "
        "finished an iteration, or a name on the hub."
    )


def _export_in(place: Path) -> Path | None:
    """What was exported here, if that is finished: the summary is written last."""
    if not (place / "summary.json").is_file():
        return None
    return next((place / kind for kind in ("policy", "adapter", "reward_model") if (place / kind).is_dir()), None)


def plain_card(tag: str, title: str, summary: Mapping[str, Any], origin: Origin | None = None) -> str:
    """The README of an exported policy: what its summary says, and what it comes from."""
    return render_plain_card(tag, title, summary, origin, versions())


def origin_of(model: str, data: Any) -> Origin:
    """What a policy comes from, as its card may say it.

    Args:
        model: The name of the model that the run started from.
        data: The data module that it was trained with.
    """
    names = names_in(getattr(data, "train_data", ()))
    return read_origin(model, [name for name in names if not looks_local(name)])


class ExportPolicy(L.Callback):
    """Writes ``policy/`` (a Hugging Face folder, verified by reloading it) and ``summary.json`` when training ends.

    Args:
        output_dir: Folder of the run.
        keep: ``last`` exports the weights of the last update; ``best`` those with the lowest held-out NLL of all that
            were measured, those of the start among them. ``trainer.val_check_interval`` says how often that is.
        patience: With ``best``: end the training after so many measurements in a row without a new best one. None: go
            on to its end.
        average_weights: Measure and export the mean of the weights after each update, each of which counts this share
            of the next one: 0.95 is mostly the last 20 updates. Training itself stays as it is. None: no mean.

    Raises:
        UserError: A setting is outside its range.
    """

    settings_section: ClassVar[str] = "export"

    def __init__(
        self,
        output_dir: str = "runs/sft",
        keep: Literal["last", "best"] = "last",
        patience: int | None = None,
        average_weights: float | None = None,
    ) -> None:
        if keep not in ("last", "best"):
            raise UserError(f"export.keep must be last or best, got {keep!r}.")
        if patience is not None and (patience < 1 or keep != "best"):
            raise UserError(
                "export.patience must be at least 1, the number of measurements without a new best held-out NLL after "
                f"which training ends, and goes with export.keep: best; got {patience!r} with {keep!r}."
            )
        if average_weights is not None and not 0 < average_weights < 1:
            raise UserError(
                f"export.average_weights must be between 0 and 1, got {average_weights!r}. 0.95 is mostly the last 20 "
                "updates."
            )
        self.output_dir = run_folder(output_dir, f"{self.settings_section}.output_dir")
        self.keep, self.patience, self.average_weights = keep, patience, average_weights
        self._average = None if average_weights is None else WeightAverage(average_weights)
        self._raw: dict[str, Tensor] | None = None  # the weights under training, while their mean is measured
        self._state: dict[str, Any] = {"seconds": 0.0, "trained_tokens": 0}
        self._started = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            processes.refuse_strategy(trainer)
            refuse_links(self.output_dir)
            self._refuse_unmeasured(trainer)

    def _refuse_unmeasured(self, trainer: L.Trainer) -> None:
        if self.keep == "best" and not trainer.datamodule.val_prompts:  # type: ignore[attr-defined]
            raise UserError(
                "export.keep best takes the weights with the lowest held-out NLL, and no row is held out. Give "
                "data.val_data or raise data.val_fraction."
            )
        if (self.keep == "best" or self._average is not None) and isinstance(trainer.strategy, ShardedStrategy):
            raise UserError(
                "export.keep best and export.average_weights hold a second copy of the weights, which "
                "trainer.strategy fsdp2 shards. Leave them out, or use ddp."
            )

    def state_dict(self) -> dict[str, Any]:
        average = {} if self._average is None else {"average": self._average.state_dict()}
        return {**self._state, **average, "seconds": self._count_seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)
        average = self._state.pop("average", None)
        if self._average is not None and average is not None:
            self._average.load_state_dict(average)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The held-out NLL of the model that training starts from."""
        start = starting_metrics(trainer)
        if start and not trainer.fast_dev_run and processes.is_first():  # type: ignore[attr-defined]
            write_json(self.output_dir / "start.json", start)
        if "val/nll" in start:
            self._note_best(0, {"val_nll": start["val/nll"], **describe_retention(start, start)}, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.datamodule.write_report(self.output_dir)  # type: ignore[attr-defined]
        if self._state.pop("is_due", False) and self.keep == "best":
            validate_now(trainer)  # which the checkpoint was saved just before
        if self._state.get("is_over"):
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        module: Any = pl_module
        if "trained_tokens" in self._state:  # not of a run that was begun by a version without it
            self._state["trained_tokens"] += count_tokens(args[0])
        if not module.update_is_complete:
            return
        if module.update_loss.isfinite():
            self._state["last_loss"] = float(module.update_loss)
            self._state.setdefault("first_loss", self._state["last_loss"])
        if self._average is not None:
            self._average.add(_trained_weights(module))
        if self.keep == "best":
            self._state["is_due"] = validation_follows(trainer) or _is_last_update(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._average is not None and self._average.updates and trainer.state.fn == "fit":
            self._raw = exchange(_trained_weights(pl_module), self._average.weights)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:  # which may look at some of the rows only
            held_out = self.read_held_out(trainer)
            self._state |= held_out
            if trainer.state.fn == "fit" and "val_nll" in held_out:
                self._state.pop("is_due", None)
                self._note_best(trainer.global_step, held_out, pl_module)
                if self.patience is not None and self._state["best"]["since"] >= self.patience:
                    self._state["is_over"] = trainer.should_stop = True
        if self._raw is not None:
            exchange(_trained_weights(pl_module), self._raw)
            self._raw = None

    def _note_best(self, step: int, held_out: dict[str, Any], module: Any) -> None:
        """Keep the weights that were just measured, if they are the best so far, with what was found."""
        best = self._state.get("best")
        if self.keep != "best":
            return
        if best is not None and not held_out["val_nll"] < best["val_nll"]:
            self._state["best"] = {**best, "since": best["since"] + 1}
            return
        weights = {name: weight.detach().cpu().clone() for name, weight in _trained_weights(module).items()}
        self._state["best"] = {"step": step, **held_out, "since": 0, "weights": weights}

    def read_held_out(self, trainer: L.Trainer) -> dict[str, Any]:
        """What the summary says of the held-out rows, after they were measured."""
        found = trainer.callback_metrics
        if "val/nll" not in found:
            return {}
        return {
            "val_nll": float(found["val/nll"]),
            **describe_retention(found, read_json(self.output_dir / "start.json")),
        }

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A hook that Lightning also calls when it resumes and finds nothing left to train on."""
        if trainer.fast_dev_run or (not self._started and (self.output_dir / "summary.json").exists()):  # type: ignore[attr-defined]
            return
        if was_cut_short(trainer) and not self._state.get("is_over") and not _is_last_update(trainer):
            return  # by max_time, say: the same command continues
        module: Any = trainer.lightning_module
        chosen = self._choose_weights(module)
        unsaid = {"best", "is_due", "is_over"} | ({"retention"} if "best" in self._state else set())  # of other weights
        summary = {
            "val_nll": None,
            **{name: value for name, value in self._state.items() if name not in unsaid},
            **chosen,
            "updates": trainer.global_step,
            "seconds": self._count_seconds(),
            "dtype": dtype_name(module.policy.dtype),
            "stored_dtype": module.stored_dtype,
        }
        policy = module.gather_policy()
        if processes.is_first():
            self.write(policy, trainer, summary)
        processes.wait()
        adapter = self.output_dir / "adapter"  # merged in the model, or what there is of it
        folders = dict.fromkeys([self.find_model(), *([adapter] if adapter.exists() else [])])
        say(f"the model is in {' and '.join(map(str, folders))}")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_export"):
                callback.on_export(trainer, module, self.output_dir)

    def _choose_weights(self, module: Any) -> dict[str, Any]:
        """Put the weights that are wanted into the model, and return what the summary says of them."""
        best, last_nll = self._state.get("best"), self._state.get("val_nll")
        averaged = {} if self._average is None else {"average_weights": self.average_weights}
        if best is not None:
            exchange(_trained_weights(module), best["weights"])
            is_start = "those of the start" if best["step"] == 0 else f"those after update {best['step']}"
            last = "" if last_nll is None else f", after the last measurement {last_nll:.3f}"
            say(f"the weights with the lowest held-out NLL are kept, {is_start}: {best['val_nll']:.3f}{last}")
            averaged = averaged if best["step"] else {}
            measured = {name: best[name] for name in ("val_nll", "retention") if name in best}
            return {**measured, "best_step": best["step"], "last_val_nll": last_nll, **averaged}
        if self.keep == "best":
            say("note: no held-out row was measured, so there are no best weights; those of the end are exported")
        if self._average is not None and self._average.updates:
            exchange(_trained_weights(module), self._average.weights)
            say(f"the mean of the weights over the updates is kept (export.average_weights {self.average_weights})")
        return averaged

    def write(self, policy: Any, trainer: L.Trainer, summary: dict[str, Any]) -> None:
        """Write the model, and then the summary. In the first process."""
        module: Any = trainer.lightning_module
        data = trainer.datamodule  # type: ignore[attr-defined]
        origin = origin_of(module.model_name_or_path, data)
        card = plain_card("sft", "Supervised fine-tuned policy", summary, origin)
        export_policy(policy, data.encoder, self.output_dir, card, summary, module.trust_remote_code)

    def find_model(self) -> Path:
        """Where the model is."""
        return self.output_dir / ("policy" if (self.output_dir / "policy").exists() else "adapter")

    def _count_seconds(self) -> float:
        return self._state["seconds"] + (time.monotonic() - self._started if self._started else 0.0)


def _trained_weights(module: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in module.policy.named_parameters() if weight.requires_grad}


def _is_last_update(trainer: L.Trainer) -> bool:
    """Whether a module that ends after a number of updates has had them."""
    return trainer.global_step == getattr(trainer.lightning_module, "max_updates", None)
