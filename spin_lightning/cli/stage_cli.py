"""One LightningCLI a stage: which module it trains, its defaults, its links. A further stage has its place here.

Imports everything, so ``cli`` imports it only when a stage runs.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, LearningRateMonitor
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from spin_lightning.cli.class_defaults import own_defaults
from spin_lightning.cli.settings_errors import check_configs, explaining_settings, refusal_of_arguments
from spin_lightning.data.module import RowDataModule
from spin_lightning.generation.synthetic_data import SyntheticDataModule
from spin_lightning.runs.checkpoints import AtomicCheckpointIO, checkpoint_folder, existing_checkpoint, last_checkpoint
from spin_lightning.runs.files import read_json, refuse_links, replacing, run_folder
from spin_lightning.runs.redaction import redacted
from spin_lightning.runs.run_checkpoint import RunCheckpoint
from spin_lightning.runs.settings import SETTINGS, check_finished
from spin_lightning.stages.clock import SelfPlay
from spin_lightning.stages.export import ExportPolicy
from spin_lightning.stages.health import Health
from spin_lightning.stages.optim import refuse_unusable
from spin_lightning.stages.policy import PolicyModule
from spin_lightning.stages.samples import ShowAnswers
from spin_lightning.stages.sft import SftLightningModule
from spin_lightning.stages.spin import SpinLightningModule
from spin_lightning.terminal import say
from spin_lightning.types import UserError


class RunIsOver(Exception):
    """The run this command would continue has ended, and its results are there."""


def total_epochs(iterations: int, epochs: int | list[int]) -> int:
    return sum(epochs) if isinstance(epochs, list) else iterations * epochs


#: Settings of the Trainer that would break a run or do nothing, what is fine, and what to do else.
_TRAINER: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("overfit_batches", lambda value: not value, "Set trainer.limit_train_batches, or data.max_rows for fewer rows."),
    (
        "barebones",
        lambda value: not value,
        "It leaves out checkpoints and validation, which a run rests on. Leave it out.",
    ),
    ("enable_checkpointing", lambda value: value is not False, "A run rests on its checkpoints. Leave it out."),
    (
        "limit_train_batches",
        lambda value: value is None or value != 0,
        "Nothing would be trained on. Give more, or leave it out.",
    ),
    ("accumulate_grad_batches", lambda value: value >= 1, "Give the number of batches in one update, at least 1."),
    (
        "val_check_interval",
        lambda value: value is None or value > 0,
        "Give after which share of an epoch the held-out NLL is measured, or leave it out.",
    ),
    (
        "gradient_clip_val",
        lambda value: value is None or value >= 0,  # below 0 every update would be turned around
        "Give the largest norm of a gradient, or leave it out.",
    ),
)


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
    data_class: type[RowDataModule]
    command: str
    run_key: str  # the section that holds output_dir
    foreign: dict[str, str]  # sections that other commands have, by the name of the command
    over_file: str  # written last in the run's folder
    is_over = False

    def __init__(self, args: Sequence[str]) -> None:
        for library in ("lightning.pytorch.utilities.rank_zero", "transformers.utils.generic"):
            logging.getLogger(library).addFilter(_is_for_users)
        warnings.filterwarnings("ignore", message=".*past_key_values", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch's
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # collating ids takes no time
        super().__init__(
            self.module_class,
            self.data_class,
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={"allow_abbrev": False, "exit_on_error": False, "prog": "spin-lightning"},
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

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def parse_arguments(self, parser: Any, args: Any) -> None:
        check_configs(args)
        for name, of_subcommand in self._subcommand_parsers.items():  # for --help
            of_subcommand.prog = f"spin-lightning {self.command if name == 'fit' else name}"
        try:
            # Lightning's own also warns that `args` were given: here they always are
            with own_defaults():
                self.config = parser.parse_args(args)
        except Exception as error:
            if (sentence := refusal_of_arguments(error, args)) is None:
                raise
            sentence += "" if sentence.endswith((".", "?")) else "."
            raise UserError(f"{sentence}{self._did_you_mean(sentence)}") from error

    def instantiate_classes(self) -> None:
        with explaining_settings():
            super().instantiate_classes()
            if self.subcommand == "fit":
                self._try_optimizer()
        if self.is_over:
            self._end()

    def _try_optimizer(self) -> None:
        """Refuse an optimiser that cannot be used before the model is loaded.

        Raises:
            UserError: It cannot be made, or its step fails.
        """
        chosen = self.config[self.subcommand].model.optimizer
        settings = dict(chosen.get("init_args") or {}) if chosen else {}
        if "lr" in settings and settings["lr"] != _default_lr(chosen.class_path):
            say(f"note: model.optimizer.lr {settings['lr']!r} is not used: model.learning_rate is.")
        refuse_unusable(self.model.optimizer)

    def _did_you_mean(self, message: str) -> str:
        """The settings that read like the one that is not known, or the command that has it."""
        if not re.search("unrecognized|there is no setting", message):
            return ""
        words = [word.strip(".") for word in re.findall(r"[A-Za-z_][\w.]+", message)]
        for section in (word.partition(".")[0] for word in words if "." in word):
            if section in self.foreign:
                return f" The section {section} is of spin-lightning {self.foreign[section]}; this is {self.command}."
            if section in ("fit", "sft", "validate"):
                return f" Sections stand alone, as model, data and trainer, and not in one called {section}."
        known = {key for parser in self._subcommand_parsers.values() for key, _ in parser.get_defaults().items()}
        wrong = [word for word in words if len(word) > 3 and not word.endswith(tuple(known))]
        close = {match for word in wrong for match in get_close_matches(word, known, 3, 0.75)}
        for last in (word.rpartition(".")[2] for word in words):  # output_dir, lr
            close |= {
                key
                for key in known
                if ".init_args." not in key and last in (name := key.rpartition(".")[2], _initials(name))
            }
        return f" Did you mean {' or '.join(sorted(close))}?" if close else ""

    def _parse_ckpt_path(self) -> None:
        """Lightning lets hyper-parameters in a checkpoint silently override flags. Ours has none, and flags win."""

    @property
    def _output_dir(self) -> Path:
        return run_folder(self.config[self.subcommand][self.run_key].output_dir, f"{self.run_key}.output_dir")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        output_dir = self._output_dir
        refuse_links(output_dir)  # loggers and what continues a run use it before any callback can look
        for name, is_fine, advice in _TRAINER:
            if not is_fine(value := config.trainer[name]):
                raise UserError(f"trainer.{name} cannot be {value!r} here. {advice}")
        if config.ckpt_path is not None:  # now, and not after the model was loaded
            existing_checkpoint(config.ckpt_path)
        if (
            self.subcommand != "fit" or config.trainer.fast_dev_run
        ):  # a trial neither continues a run nor minds one that is over
            return
        if self._is_over(output_dir, config):
            self.is_over = True
            return
        config.weights_only = True
        if config.ckpt_path is None and (checkpoint := last_checkpoint(str(output_dir))):
            self._refuse_other_stage(output_dir)
            say(f"continuing the run in {output_dir} from {checkpoint}")
            config.ckpt_path = checkpoint

    def _refuse_other_stage(self, output_dir: Path) -> None:
        settings = (read_json(output_dir / SETTINGS) or {}).get("settings", {})
        is_game = any(key.startswith("self_play.") for key in settings)
        if settings and is_game != (self.run_key == "self_play"):
            raise UserError(
                f"{output_dir} holds a run of another stage ({'fit' if is_game else 'sft'}). "
                f"Set --{self.run_key}.output_dir to another folder."
            )

    def _is_over(self, output_dir: Path, config: Any) -> bool:
        return (output_dir / self.over_file).exists()

    def _end(self) -> None:
        """Say that the run is over, if it is the one that this command would play. No model is loaded.

        Raises:
            RunIsOver: It is.
            UserError: It was another; the message shows each setting that differs.
        """
        config = self.config["fit"]
        output_dir = self._output_dir
        if self._names_other_data(output_dir / "config.yaml"):  # which may hold the same rows
            self._read_data("fit")
        allowed = config.checkpoint.allow_changes or []
        check_finished(self.trainer, self.model, self.datamodule, output_dir / SETTINGS, allowed)
        say(
            f"the run in {output_dir} is over; its models are in {output_dir}. For another run set --{self.run_key}.output_dir."
        )
        raise RunIsOver

    def _read_data(self, stage: str) -> None:
        self.datamodule.trainer = self.trainer  # as in a fit: the model's tokenizer, and the folder's date
        self.trainer.strategy.connect(self.model)
        self.datamodule.setup(stage)

    def before_fit(self) -> None:
        """Data that are refused leave nothing behind: loggers write as soon as a fit begins."""
        self._read_data("fit")

    def before_validate(self) -> None:
        self._read_data("validate")

    def _names_other_data(self, path: Path) -> bool:
        if not path.exists():
            return True
        before = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data", {})
        now = redacted({name: self.config["fit"]["data"][name] for name in ("train_data", "val_data")})
        return any(before.get(name) != value for name, value in now.items())

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        plugins = self.config_init[self.subcommand]["trainer"].get("plugins") or []  # made, not their settings
        kwargs.setdefault("plugins", [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()])
        if config["trainer"].get("logger") in (None, True):
            output_dir = self._output_dir
            kwargs["logger"] = [
                CSVLogger(output_dir, name="logs", flush_logs_every_n_steps=1),  # a kill loses no row
                TensorBoardLogger(output_dir, name="tensorboard", version=""),
            ]
        defaults = self._subcommand_parsers[str(self.subcommand)].get_defaults()["trainer"]
        given = {f"trainer.{name}": value for name, value in config["trainer"].items() if value != defaults.get(name)}
        with explaining_settings(given):
            trainer = super().instantiate_trainer(**kwargs)
        starts_others = (
            type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"
        )  # even one, with ddp_spawn
        if trainer.world_size > 1 or starts_others:
            got = repr(config["trainer"]["strategy"]) if starts_others else trainer.world_size
            raise UserError(
                f"a run is one process so far, got {got}. Set trainer.devices: 1, num_nodes: 1, strategy: auto."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BatchSizeFinder | LearningRateFinder):
                raise UserError(
                    f"{type(callback).__name__} trains before the run and takes it back, which a run that can be continued does not "
                    "allow. Leave it out."
                )
        if trainer.loggers:
            trainer.callbacks.insert(0, LearningRateMonitor("step"))  # type: ignore[attr-defined]
        return trainer


class SpinCLI(StageCLI):
    """``spin-lightning fit``: the game."""

    module_class = SpinLightningModule
    data_class = SyntheticDataModule
    command = "fit"
    run_key = "self_play"
    foreign = {"export": "sft"}
    over_file = "game.json"

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_lightning_class_args(SelfPlay, "self_play")
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(ShowAnswers, "samples")
        super().add_arguments_to_parser(parser)
        parser.set_defaults(
            {
                "model.loss": {"class_path": "spin_lightning.SpinLoss"},
                "data.generator": {"class_path": "spin_lightning.ContinuousGenerator"},
            }
        )
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
    data_class = RowDataModule
    command = "sft"
    run_key = "export"
    foreign = dict.fromkeys(("self_play", "health", "samples"), "fit")
    over_file = "summary.json"

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_lightning_class_args(ExportPolicy, "export")
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"trainer.max_epochs": 1})

    def parse_arguments(self, parser: Any, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except UserError as error:
            of_sampling = r"\bdata\.(generator|answers_per_prompt|history|keep_prompts_together)\b"
            if (setting := re.search(of_sampling, str(error))) is None:
                raise
            raise UserError(
                f"sft samples no responses, so it takes no {setting[0]}: leave it out, and cap the real responses with "
                "--data.max_response_tokens."
            ) from error

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        limits = [config.model.get("max_updates"), config.trainer.max_time, config.trainer.max_steps != -1 or None]
        if config.trainer.max_epochs == -1 and not any(limits):
            raise UserError(
                "trainer.max_epochs -1 has no end. Give a number, or an end: model.max_updates or trainer.max_time."
            )
        if self.subcommand == "fit" and 0 in (config.trainer.max_epochs, config.trainer.max_steps):
            raise UserError("trainer.max_epochs and max_steps must be at least 1, got 0: nothing would be trained.")
        super().before_instantiate_classes()


def _default_lr(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    parameter = inspect.signature(getattr(import_module(module), name)).parameters.get("lr")
    return parameter and parameter.default


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def _is_for_users(record: logging.LogRecord) -> bool:
    """No advertisement; nor that ``past_key_values`` has a new name, which transformers 5.23 does not know."""
    return not any(word in record.getMessage() for word in ("litlogger", "Tip:", "past_key_values"))
