"""Every use of what Lightning does not document, one function each.

``tests/runs/test_lightning_internals.py`` has a test for each of them, which tells what a new version of Lightning
broke.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision


def epoch_to_begin(trainer: Any) -> int:
    """The number of the epoch that begins next. ``current_epoch`` is one behind after resuming at an epoch's end."""
    return int(trainer.fit_loop.epoch_progress.current.processed)


def resumes_inside_epoch(trainer: Any) -> bool:
    """Whether a fit continues from a checkpoint that was saved after some batches of an epoch, and before its end."""
    loop = trainer.fit_loop
    return bool(loop.restarting and loop.epoch_loop.batch_progress.current.ready > 0)


def end_finished_epoch(checkpoint: dict[str, Any]) -> None:
    """Rewrite a checkpoint that was saved after an epoch's last batch but before its end.

    It becomes one that was saved at the epoch's end. Lightning would resume inside of the finished epoch, and skip the
    start of the next.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epoch, batch = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if batch["is_last_batch"] and epoch["current"]["processed"] == epoch["current"]["started"] - 1:
        for scope in ("current", "total"):
            epoch[scope]["processed"] += 1
            batch[scope]["completed"] = batch[scope]["processed"]
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def was_cut_short(trainer: Any) -> bool:
    """Whether the epoch that is ending was stopped before its last batch, as ``max_time`` does: it is not over."""
    return bool(trainer.should_stop and not trainer.is_last_batch)


def validation_follows(trainer: Any) -> bool:
    """Whether the held-out rows are measured right after the training batch that is ending."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def validate_now(trainer: Any) -> None:
    """Measure the held-out rows at once, as after a training batch.

    A fit that continues from a checkpoint which was saved between a batch and its measurement leaves that out.
    """
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def remake_optimizers(trainer: Any) -> None:
    """Call ``configure_optimizers`` again: new optimisers, new schedules."""
    trainer.strategy.setup_optimizers(trainer)


def forget_optimizers(trainer: Any) -> None:
    """Let go of the optimisers and their schedules, whose memory is free until others are made."""
    trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = [], []


def received_sigterm(trainer: Any) -> bool:
    """Whether Lightning's own handler noted a SIGTERM. Lightning itself looks at it only after a training batch."""
    return bool(trainer.received_sigterm)


def starts_processes(trainer: Any) -> bool:
    """Whether a fit starts processes of its own, even if it is one, as ``ddp_spawn`` does."""
    return type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"


def children_of(trainer: Any) -> list[Any]:
    """The processes that a fit started on this machine and that run the same command, as ``ddp`` does."""
    return list(getattr(trainer.strategy.launcher, "procs", []))


def let_children_explain(seconds: float) -> None:
    """Give this process so long to end by itself after one that a fit started has failed, before it is killed.

    Lightning looks every five seconds, and then kills without a word.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            observer: Any = thread
            observer._run = partial(_look_later, observer, observer._run, seconds, [])


def _look_later(observer: Any, look: Callable[[], bool], seconds: float, failed_at: list[float]) -> bool:
    """What Lightning's observer does every five seconds, but for so long after it first saw a child that failed."""
    if any(child.poll() for child in observer._child_processes):
        failed_at.append(time.monotonic())
    return bool((not failed_at or time.monotonic() - failed_at[0] >= seconds) and look())


def attach(trainer: Any, module: Any, data: Any) -> None:
    """Let data be read before a fit as in one: the data module knows the trainer, and that the module."""
    data.trainer = trainer
    trainer.strategy.connect(module)


def trainer_of(module: Any) -> Any | None:
    """The trainer that a module is attached to, or None. Its ``trainer`` raises an error instead."""
    return module._trainer


def forward_context(trainer: Any) -> AbstractContextManager[Any]:
    """The numerics of a training step, for passes outside of one."""
    context: AbstractContextManager[Any] = trainer.precision_plugin.forward_context()
    return context


def keep_weights_as_loaded(trainer: Any) -> None:
    """For ``bf16-true`` and the like: a model is loaded in that dtype, except what it keeps in float32, as routers."""
    plugin: Any = trainer.precision_plugin
    if isinstance(plugin, HalfPrecision | DoublePrecision):
        plugin.convert_module = _keep_batch  # type: ignore[method-assign, assignment]


def keep_batches_as_collated(trainer: Any) -> None:
    """Keep the floats of a batch: ``bf16-true`` would round stored log-probs to 8 bits, off by up to half a nat."""
    trainer.precision_plugin.convert_input = _keep_batch


def _keep_batch(value: Any) -> Any:
    return value


# --- the command line -------------------------------------------------------------------------------------------------


class FlagsWin:
    """For a LightningCLI: what ``--ckpt_path`` names is left unread, whatever hyper-parameters it holds.

    Lightning sets the model's settings from a checkpoint's hyper-parameters, silently and over the flags.
    """

    def _parse_ckpt_path(self) -> None:
        """In place of Lightning's own, which loads the whole file."""


def parsers_of(cli: Any) -> dict[str, Any]:
    """The parser of each subcommand."""
    return dict(cli._subcommand_parsers)


def made_for_trainer(cli: Any, name: str) -> list[Any]:
    """The objects that were made of a setting of the trainer, such as ``plugins``, which is about to be made itself.

    Later the trainer adds callbacks of its own to the same list.
    """
    made = cli.config_init[cli.subcommand]["trainer"].get(name)
    return list(made) if isinstance(made, list) else [] if made is None else [made]
