"""Two questions about a trainer that several callbacks ask."""

from __future__ import annotations

from typing import Any


def was_cut_short(trainer: Any) -> bool:
    """Whether the epoch that is ending was stopped before its last batch, as ``max_time`` does: it is not over."""
    return bool(trainer.should_stop and not trainer.is_last_batch)


def starting_metrics(trainer: Any) -> dict[str, float]:
    """Held-out metrics of the model a run starts from, after the sanity check.

    Empty where there are none to compare with: on a resume, or if the check did not go over all held-out rows.
    """
    data = trainer.datamodule
    if trainer.global_step or trainer.num_sanity_val_steps * data.batch_size < len(data.val_prompts):
        return {}
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def starts_processes(trainer: Any) -> bool:
    """Whether a fit starts processes of its own, even if it is one, as ``ddp_spawn`` does."""
    return type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"


def attach(trainer: Any, module: Any, data: Any) -> None:
    """Let data be read before a fit as in one: the data module knows the trainer, and that the module."""
    data.trainer = trainer
    trainer.strategy.connect(module)


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
