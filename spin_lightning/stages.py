"""One LightningCLI a stage: which module it trains, its defaults, its links. A further stage has its place here.

Imports everything, so ``cli`` imports it only when a stage runs.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import spin_lightning
from spin_lightning.callbacks import ExportPolicy, Health, RunCheckpoint, SelfPlay, ShowAnswers
from spin_lightning.callbacks.settings import SETTINGS, check_finished
from spin_lightning.checkpoints import AtomicCheckpointIO, checkpoint_folder, last_checkpoint
from spin_lightning.class_defaults import own_defaults
from spin_lightning.data import SyntheticDataModule
from spin_lightning.files import read_json, replacing
from spin_lightning.models import load_tokenizer
from spin_lightning.module import SpinLightningModule
from spin_lightning.policy import PolicyModule
from spin_lightning.redaction import redacted
from spin_lightning.sft import SftLightningModule
from spin_lightning.types import UserError


class RunIsOver(Exception):
    """The run this command would continue has ended, and its results are there."""


def total_epochs(iterations: int, epochs: int | list[int]) -> int:
    return sum(epochs) if isinstance(epochs, list) else iterations * epochs


class SaveRunConfig(SaveConfigCallback):
    """Keeps the resolved config as ``config.yaml`` in the run's folder, whatever the logger."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Too early: the command may yet be refused, and must not have changed the record of the run it would continue."""

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save_config(trainer, pl_module, "fit")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.state.fn == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            (folder,) = (
                callback.output_dir for callback in trainer.callbacks if isinstance(callback, SelfPlay | ExportPolicy)
            )  # type: ignore[attr-defined]
            folder.mkdir(parents=True, exist_ok=True)
            config = redacted(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
            with replacing(folder / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


class StageCLI(LightningCLI):
    """What the stages share: a run folder with checkpoint, loggers and config, and continuing where it was."""

    module_class: type[PolicyModule]
    run_key: str  # the section that holds output_dir
    over_file: str  # written last in the run's folder
    is_over = False

    def __init__(self, args: Sequence[str]) -> None:
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_not_a_tip)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch's
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # collating ids takes no time
        super().__init__(
            self.module_class,
            SyntheticDataModule,
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={"allow_abbrev": False, "exit_on_error": False},
            trainer_defaults={
                "reload_dataloaders_every_n_epochs": 1,
                "num_sanity_val_steps": -1,
                "log_every_n_steps": 1,
                "devices": 1,
            },
            args=list(args),
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.link_arguments(f"{self.run_key}.output_dir", "checkpoint.dirpath", compute_fn=checkpoint_folder)
        parser.set_defaults({"data.generator": {"class_path": "spin_lightning.ContinuousGenerator"}})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def parse_arguments(self, parser: Any, args: Any) -> None:
        try:
            # Lightning's own also warns that `args` were given: here they always are
            with own_defaults():
                self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UserError(f"{error}{self._did_you_mean(str(error))}") from error

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # the parser wraps what a class says about its settings; the user needs only that
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__
            raise (cause or error) from None
        if self.is_over:
            self._end()

    def _did_you_mean(self, message: str) -> str:
        """The settings that read like the words of an error message."""
        known = {key for parser in self._subcommand_parsers.values() for key, _ in parser.get_defaults().items()}
        known |= set(spin_lightning.__all__)
        words = [word for word in re.findall(r"[\w.]+", message) if len(word) > 3 and not word.endswith(tuple(known))]
        close = {match for word in words for match in get_close_matches(word, known, 3, 0.75)}
        return f" Did you mean {' or '.join(sorted(close))}?" if close else ""

    def _parse_ckpt_path(self) -> None:
        """Lightning lets hyper-parameters in a checkpoint silently override flags. Ours has none, and flags win."""

    def before_instantiate_classes(self) -> None:
        if self.subcommand != "fit":
            return
        config = self.config["fit"]
        if config.trainer.fast_dev_run:  # a trial neither continues a run nor minds one that is over
            return
        output_dir = Path(config[self.run_key].output_dir)
        if self._is_over(output_dir, config):
            self.is_over = True
            return
        config.weights_only = True
        if config.ckpt_path is None and (checkpoint := last_checkpoint(str(output_dir))):
            print(f"continuing the run in {output_dir} from {checkpoint}")
            config.ckpt_path = checkpoint

    def _is_over(self, output_dir: Path, config: Any) -> bool:
        return (output_dir / self.over_file).exists()

    def _end(self) -> None:
        """Say that the run is over, if it is the one that this command would play. No model is loaded.

        Raises:
            RunIsOver: It is.
            UserError: It was another; the message shows each setting that differs.
        """
        config = self.config["fit"]
        output_dir = Path(config[self.run_key].output_dir)
        if self._names_other_data(output_dir / "config.yaml"):  # which may hold the same rows
            if self.datamodule.tokenizer_name_or_path is None:
                model = self.model
                self.datamodule.tokenizer = load_tokenizer(
                    model.model_name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
                )
            self.datamodule.setup("fit")
        allowed = config.checkpoint.allow_changes or []
        check_finished(self.trainer, self.model, self.datamodule, output_dir / SETTINGS, allowed)
        print(
            f"the run in {output_dir} is over; its models are in {output_dir}. For another run set --{self.run_key}.output_dir."
        )
        raise RunIsOver

    def _names_other_data(self, path: Path) -> bool:
        if not path.exists():
            return True
        before = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data", {})
        now = redacted({name: self.config["fit"]["data"][name] for name in ("train_data", "val_data")})
        return any(before.get(name) != value for name, value in now.items())

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        plugins = config["trainer"].get("plugins") or []
        kwargs.setdefault("plugins", [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()])
        if config["trainer"].get("logger") in (None, True):
            output_dir = config[self.run_key]["output_dir"]
            kwargs["logger"] = [
                CSVLogger(output_dir, name="logs", flush_logs_every_n_steps=1),  # a kill loses no row
                TensorBoardLogger(output_dir, name="tensorboard", version=""),
            ]
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.loggers:
            trainer.callbacks.insert(0, LearningRateMonitor("step"))  # type: ignore[attr-defined]
        return trainer


class SpinCLI(StageCLI):
    """``spin-lightning fit``: the game."""

    module_class = SpinLightningModule
    run_key = "self_play"
    over_file = "game.json"

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_lightning_class_args(SelfPlay, "self_play")
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(ShowAnswers, "samples")
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"model.loss": {"class_path": "spin_lightning.SpinLoss"}})
        parser.link_arguments(
            ("self_play.iterations", "self_play.epochs"), "trainer.max_epochs", compute_fn=total_epochs
        )

    def _is_over(self, output_dir: Path, config: Any) -> bool:
        game = read_json(output_dir / self.over_file)
        if game is None:
            return False
        return not game["ended_because"].startswith("all ") or len(game["iterations"]) >= config.self_play.iterations


class SftCLI(StageCLI):
    """``spin-lightning sft``: supervised fine-tuning on the same data, encoding and loader."""

    module_class = SftLightningModule
    run_key = "export"
    over_file = "summary.json"

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_lightning_class_args(ExportPolicy, "export")
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"trainer.max_epochs": 1})


def _is_not_a_tip(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "Tip:" not in record.getMessage()
