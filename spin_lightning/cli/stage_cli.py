"""LightningCLI for a stage, built from the stage's record: the same for all, whatever they train.

Imports everything heavy, so ``commands`` imports it only when a stage runs.
"""

from __future__ import annotations

import inspect
import re
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from spin_lightning.cli.class_defaults import own_defaults
from spin_lightning.cli.commands import COMMANDS, STAGES
from spin_lightning.cli.quiet import silence_libraries
from spin_lightning.cli.settings_errors import explaining_settings, refusal_of_arguments
from spin_lightning.cli.short_help import TRAINER_DEFAULTS
from spin_lightning.progress import display
from spin_lightning.reports.callback import WriteReport
from spin_lightning.runs import trackers
from spin_lightning.runs.checkpoints import AtomicCheckpointIO, checkpoint_folder, existing_checkpoint, last_checkpoint
from spin_lightning.runs.files import read_json, refuse_links, replacing, run_folder
from spin_lightning.runs.lightning_internals import FlagsWin, attach, made_for_trainer, parsers_of
from spin_lightning.runs.processes import is_first, refuse_strategy, refuse_strategy_by_name
from spin_lightning.runs.redaction import redacted
from spin_lightning.runs.run_checkpoint import RunCheckpoint
from spin_lightning.runs.settings import SETTINGS, check_finished
from spin_lightning.stages.optim import refuse_unusable
from spin_lightning.stages.progress import ShowProgress
from spin_lightning.stages.stage import Stage
from spin_lightning.terminal import say
from spin_lightning.types import UserError


class RunIsOver(Exception):
    """The run this command would continue has ended, and its results are there."""


class _OnlyParsed(Exception):
    """Carries the parsed settings out of the command line, before anything is made of them."""


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
    """Keeps the resolved config as ``config.yaml`` in the run's folder, whatever the logger.

    Args:
        folder: Section of the config that has the run's folder as its ``output_dir``.
        trackers: Loggers that are told the config, too.
    """

    def __init__(self, *args: Any, folder: str, trackers: list[Logger], **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})
        self.trackers = trackers
        self.folder = run_folder(self.config[folder].output_dir, f"{folder}.output_dir")

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the command may yet be refused, and must not change the record of the run it would continue."""

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save_config(trainer, pl_module, "fit")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.state.fn == "fit" and not trainer.fast_dev_run and trainer.is_global_zero:  # type: ignore[attr-defined]
            self.folder.mkdir(parents=True, exist_ok=True)
            config = redacted(yaml.safe_load(self.parser.dump(self.config, skip_unset=False)))
            config.get("self_play", {}).pop("stage", None)  # of this command, and not of the run
            with replacing(self.folder / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
            for name in ("config", "ckpt_path"):  # of this command, and not of the run
                config.pop(name, None)
            config["trainer"].pop("logger", None)
            trackers.tell(self.trackers, config)
            self.trackers = []  # it is told once


class StageCLI(FlagsWin, LightningCLI):
    """Run a command of a stage: a run folder with checkpoint, loggers and config, and continuing where it was.

    Args:
        word: The command, as in ``COMMANDS``.
        args: What follows it on the command line.
    """

    is_over = False

    def __init__(self, word: str, args: Sequence[str]) -> None:
        self.word, command = word, COMMANDS[word]
        assert command.stage is not None
        self.stage: Stage = resolve_name(command.stage)
        self.trackers: list[Logger] = []
        silence_libraries()
        super().__init__(
            resolve_name(self.stage.module),
            resolve_name(self.stage.data),
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"folder": self.stage.folder, "trackers": self.trackers},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={"allow_abbrev": False, "exit_on_error": False, "prog": "spin-lightning"},
            trainer_defaults=dict(TRAINER_DEFAULTS),
            args=[command.method, *args],
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        for section, kind in self.stage.callbacks.items():
            parser.add_lightning_class_args(resolve_name(kind), section)
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(WriteReport, "report")
        for setting in self.stage.reads_over:
            parser.add_argument(f"--{setting}", type=dict | Any, help=SUPPRESS, default=SUPPRESS)
        parser.set_defaults(dict(self.stage.defaults))
        parser.link_arguments(f"{self.stage.folder}.output_dir", "checkpoint.dirpath", compute_fn=checkpoint_folder)
        parser.link_arguments(f"{self.stage.folder}.output_dir", "report.output_dir")
        for target, (sources, follow) in self.stage.links.items():
            parser.link_arguments(sources, target, compute_fn=follow)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # it is static there
        method = COMMANDS[self.word].method
        return {method: LightningCLI.subcommands()[method]}

    def parse_arguments(self, parser: Any, args: Any) -> None:
        own = parsers_of(self)[COMMANDS[self.word].method]
        own.prog = f"spin-lightning {self.word}"  # for --help
        if any(arg.partition("=")[0] == "--print_config" for arg in args):
            from spin_lightning.cli.comments import print_commented

            args = print_commented(own, self.word, args)
        try:
            # Lightning's own also warns that `args` were given: here they always are
            with own_defaults():
                self.config = parser.parse_args(args)
        except Exception as error:
            if (sentence := refusal_of_arguments(error, args)) is None:
                raise
            sentence += "" if sentence.endswith((".", "?")) else "."
            raise UserError(f"{sentence}{self._did_you_mean(sentence)}") from error
        self._read_over_others(self.config[COMMANDS[self.word].method])

    def _read_over_others(self, config: Any) -> None:
        """Take settings of other stages out of the config, and what follows from them into it."""
        defaults = parsers_of(self)[COMMANDS[self.word].method].get_defaults()
        for setting, follow in self.stage.reads_over.items():
            if setting not in config:
                continue
            value = config.pop(setting)
            follows = follow(value) if follow is not None else {}
            own = {key: wanted for key, wanted in follows.items() if config[key] == defaults[key]}
            for key, value in own.items():
                config[key] = value
            taken = "".join(f"; {key} {value!r} is taken from it" for key, value in own.items())
            say(f"note: {self.word} has no {setting}{taken}.")

    def instantiate_classes(self) -> None:
        with explaining_settings():
            super().instantiate_classes()
            if self.subcommand == "fit":
                self._try_optimizer()
        if self.is_over:
            self._end_if_over()

    def _try_optimizer(self) -> None:
        """Refuse an optimiser that cannot be used before the model is loaded.

        Raises:
            UserError: It cannot be made, or its step fails.
        """
        chosen = self.config[self.subcommand].model.optimizer
        settings = dict(chosen.get("init_args") or {}) if chosen else {}
        if "lr" in settings and settings["lr"] != _find_default_lr(chosen.class_path):
            say(f"note: model.optimizer.lr {settings['lr']!r} is not used: model.learning_rate is.")
        refuse_unusable(self.model.optimizer)

    def _did_you_mean(self, message: str) -> str:
        """The settings that read like the one that is not known, or the command that has it."""
        if not re.search("unrecognized|there is no setting", message):
            return ""
        words = [word.strip(".") for word in re.findall(r"[A-Za-z_][\w.]+", message)]
        for section in (word.partition(".")[0] for word in words if "." in word):
            for other, path in STAGES.items():
                if section in resolve_name(path).callbacks and section not in self.stage.callbacks:
                    return f" The section {section} is of spin-lightning {other}; this is {self.word}."
            if section in COMMANDS:
                return f" Sections stand alone, as model, data and trainer, and not in one called {section}."
        known = sorted({key for parser in parsers_of(self).values() for key, _ in parser.get_defaults().items()})
        wrong = [word for word in words if len(word) > 3 and not word.endswith(tuple(known))]
        close = [match for word in wrong for match in get_close_matches(word, known, 3, 0.75)]
        for last in (word.rpartition(".")[2] for word in words):  # output_dir, lr
            close += [
                key
                for key in known
                if ".init_args." not in key and last in (name := key.rpartition(".")[2], _initials_of(name))
            ]
        return f" Did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""

    @property
    def _output_dir(self) -> Path:
        section = self.stage.folder
        return run_folder(self.config[self.subcommand][section].output_dir, f"{section}.output_dir")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if self.subcommand == "fit":
            self.stage.refuse(config)
        output_dir = self._output_dir
        start = Path(config.model.model_name_or_path or "").expanduser()
        if self.subcommand == "fit" and output_dir.resolve() == start.resolve() and start.is_dir():
            raise UserError(
                f"{output_dir} is the folder of the model that the run starts from, and a run has a folder of its "
                f"own. Set --{self.stage.folder}.output_dir to another one."
            )
        refuse_links(output_dir)  # loggers and what continues a run use it before any callback can look
        for name, is_fine, advice in _TRAINER:
            if not is_fine(value := config.trainer[name]):
                raise UserError(f"trainer.{name} cannot be {value!r} here. {advice}")
        strategy = config.trainer.strategy
        refuse_strategy_by_name(str(strategy.get("class_path") if hasattr(strategy, "get") else strategy))
        if config.ckpt_path is not None:  # now, and not after the model was loaded
            existing_checkpoint(config.ckpt_path)
        if (
            self.subcommand != "fit" or config.trainer.fast_dev_run
        ):  # a trial neither continues a run nor minds one that is over
            return
        result = read_json(output_dir / self.stage.over_file)
        checkpoint = last_checkpoint(str(output_dir)) if config.ckpt_path is None else None
        ends = {self.stage.over_file, *(resolve_name(path).over_file for path in STAGES.values())}
        if checkpoint or any((output_dir / end).exists() for end in ends):
            self._refuse_other_stage(output_dir)
        if result is not None and self.stage.is_over(result, config):
            self.is_over = True
            return
        config.weights_only = True
        trackers.continue_in(self._tracker_specs, output_dir)
        if checkpoint:
            say(f"continuing the run in {output_dir} from {checkpoint}")
            config.ckpt_path = checkpoint

    def _refuse_other_stage(self, output_dir: Path) -> None:
        settings = (read_json(output_dir / SETTINGS) or {}).get("settings", {})
        if any(key.startswith(self.stage.mark) for key in settings):
            return  # of a stage made from another one, whose settings it has too
        for other, path in STAGES.items():
            if (stage := resolve_name(path)) is not self.stage and any(key.startswith(stage.mark) for key in settings):
                raise UserError(
                    f"{output_dir} holds a run of another stage ({other}). "
                    f"Set --{self.stage.folder}.output_dir to another folder."
                )

    def _end_if_over(self) -> None:
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
        why = self.stage.why_untrained(output_dir)
        result = f"it trained nothing, because {why}" if why else f"its models are in {output_dir}"
        say(f"the run in {output_dir} is over; {result}. For another run set --{self.stage.folder}.output_dir.")
        raise RunIsOver

    @property
    def _tracker_specs(self) -> list[Any]:
        """The loggers that somebody named, as the parser has them."""
        given = self.config[self.subcommand].trainer.logger
        return [spec for spec in (given if isinstance(given, list) else [given]) if hasattr(spec, "class_path")]

    def _read_data(self, stage: str) -> None:
        attach(self.trainer, self.model, self.datamodule)  # which has the model's tokenizer, and the folder's date
        self.datamodule.setup(stage)

    def before_fit(self) -> None:
        """Data that are refused leave nothing behind: loggers write as soon as a fit begins."""
        if is_first():  # the others read them when it has, so that it alone says what is wrong
            self._read_data("fit")
            if not self.config["fit"].trainer.fast_dev_run:
                trackers.begin(self.trackers, self._tracker_specs, self._output_dir)

    def before_validate(self) -> None:
        if is_first():
            self._read_data("validate")

    def _names_other_data(self, path: Path) -> bool:
        if not path.exists():
            return True
        before = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data", {})
        now = redacted({name: self.config["fit"]["data"][name] for name in ("train_data", "val_data")})
        return any(before.get(name) != value for name, value in now.items())

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        kwargs.setdefault("plugins", [*made_for_trainer(self, "plugins"), AtomicCheckpointIO()])
        callbacks = made_for_trainer(self, "callbacks")
        display.is_on = config["trainer"]["enable_progress_bar"] is not False
        if display.is_on and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            kwargs.setdefault("callbacks", [ShowProgress(), *callbacks])
        if config["trainer"].get("logger") is not False:
            output_dir = self._output_dir
            own = [
                CSVLogger(output_dir, name="logs", flush_logs_every_n_steps=1),  # a kill loses no row
                TensorBoardLogger(output_dir, name="tensorboard", version=""),
            ]
            named = [logger for logger in made_for_trainer(self, "logger") if logger is not True]
            self.trackers += named
            for tracker in named:
                trackers.outlive(tracker)
            kwargs["logger"] = [*named, *(logger for logger in own if type(logger) not in map(type, named))]
        defaults = parsers_of(self)[str(self.subcommand)].get_defaults()["trainer"]
        given = {f"trainer.{name}": value for name, value in config["trainer"].items() if value != defaults.get(name)}
        with explaining_settings(given):
            trainer = super().instantiate_trainer(**kwargs)
        refuse_strategy(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BatchSizeFinder | LearningRateFinder):
                raise UserError(
                    f"{type(callback).__name__} trains before the run and takes it back, which a run that can be "
                    "continued does not allow. Leave it out."
                )
        if trainer.loggers:
            trainer.callbacks.insert(0, LearningRateMonitor("step"))  # type: ignore[attr-defined]
        return trainer


def parse_settings(word: str, args: Sequence[str], may_read_over: bool = True) -> Any:
    """The settings that a command would run with, parsed and linked. Nothing is made of them.

    Args:
        word: The command.
        args: What follows it.
        may_read_over: Whether settings of other stages may be among them.

    Raises:
        UserError: They are not as the classes want them.
    """

    class ParseOnly(StageCLI):
        def _read_over_others(self, config: Any) -> None:
            if others := [setting for setting in self.stage.reads_over if setting in config and not may_read_over]:
                raise UserError(f"{word} has no {others[0]}.")
            super()._read_over_others(config)

        def parse_arguments(self, parser: Any, args: Any) -> None:
            super().parse_arguments(parser, args)
            raise _OnlyParsed(self.config[COMMANDS[word].method])

    try:
        ParseOnly(word, args)
    except _OnlyParsed as parsed:
        return parsed.args[0]


def parser_of(word: str) -> Any:
    """The parser of a command that runs a stage. Nothing is parsed with it."""

    class MakeParser(StageCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise _OnlyParsed(parsers_of(self)[COMMANDS[word].method])

    try:
        MakeParser(word, [])
    except _OnlyParsed as made:
        return made.args[0]


def _find_default_lr(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    parameter = inspect.signature(getattr(import_module(module), name)).parameters.get("lr")
    return parameter and parameter.default


def _initials_of(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))
