"""The config of ``spin-lightning compare``: the settings of its own section, and the arms, read and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

from spin_lightning.cli.chain_file import WORDS
from spin_lightning.cli.compute import COUNTED
from spin_lightning.cli.config_files import check_configs, read_yaml
from spin_lightning.cli.settings_errors import explaining_settings, full_stop_of, refusal_of_arguments
from spin_lightning.rewards.base import Reward
from spin_lightning.runs.files import run_folder
from spin_lightning.types import UserError

#: What an arm may hold beside sections of settings.
OF_AN_ARM = ("name", "stage", "config", "equal_updates", "equal_compute", "learning_rates")
STAGES = tuple(word for word in WORDS if word not in ("score", "reward"))
#: The arms where none are listed. ``learning_rates`` of the last are ``compare.learning_rates``.
DEFAULT_ARMS: tuple[dict[str, Any], ...] = (
    {"name": "self_play", "stage": "fit"},
    {"name": "sft_equal_updates", "stage": "sft", "equal_updates": "self_play"},
    {"name": "sft_equal_compute", "stage": "sft", "equal_compute": "self_play"},
    {
        "name": "sft_tuned",
        "stage": "sft",
        "equal_compute": "self_play",
        "learning_rates": True,
        "export": {"keep": "best", "patience": 5, "average_weights": 0.95},
    },
)
_EXAMPLE = "Give `compare: {output_dir: runs/compare, seeds: 3}` beside `model:` and `data:`; see configs/compare.yaml."


class Comparison:
    """Plays arms from one start on one data set, over seeds, and says which is better.

    Args:
        output_dir: Folder of the comparison, with a run's folder for each arm and seed.
        seeds: How often each arm is played. Each time with another order of the rows, other samples and other dropout.
        arms: What is compared, each with a ``name``, its ``stage`` (fit, sft, dpo, ppo) and settings by section.
            ``equal_updates`` or ``equal_compute`` names another arm whose updates or token-passes an ``sft`` gets;
            ``learning_rates`` are tried with the first seed, and the best is kept. None: self-play, continued SFT with
            as many updates, with as much compute, and tuned.
        reward: What responses are judged by beside an exact match: ``NumberMatch`` and the like. None: nothing else.
        temperatures: At which responses are sampled. 0 is the most likely one.
        samples: Responses to a prompt at temperatures above 0.
        learning_rates: What the tuned SFT tries.

    Raises:
        UserError: A setting is outside its range.
    """

    def __init__(
        self,
        output_dir: str = "runs/compare",
        seeds: int = 3,
        arms: list[dict[str, Any]] | None = None,
        reward: Reward | None = None,
        temperatures: list[float] = [0.0, 0.7, 1.0],  # noqa: B006  # read only
        samples: int = 4,
        learning_rates: list[float] = [1e-5, 3e-5, 1e-4],  # noqa: B006
    ) -> None:
        if seeds < 1 or samples < 1:
            raise UserError(f"compare.seeds and compare.samples must be at least 1, got {seeds!r} and {samples!r}.")
        if not temperatures or min(temperatures) < 0:
            raise UserError(f"compare.temperatures must be a list of numbers from 0 up, got {temperatures!r}.")
        if not learning_rates or min(learning_rates) <= 0:
            raise UserError(f"compare.learning_rates must be a list of positive numbers, got {learning_rates!r}.")
        self.output_dir = run_folder(output_dir, "compare.output_dir")
        self.seeds, self.samples = seeds, samples
        self.temperatures = tuple(dict.fromkeys(float(temperature) for temperature in temperatures))
        self.reward = reward
        self.learning_rates = tuple(learning_rates)
        self.arms = read_arms(DEFAULT_ARMS if arms is None else arms, self.learning_rates)


@dataclass(frozen=True)
class Arm:
    """What is played once with each seed.

    Attributes:
        name: That of its folders.
        word: The command of its stage.
        configs: Files of settings, below those that stand in the arm.
        settings: By section.
        like: An arm that it gets as many updates or token-passes as.
        shares: ``updates`` or ``compute``. None: it ends by its own settings.
        learning_rates: Those to try with the first seed. Empty: that of its settings.
    """

    name: str
    word: str
    configs: tuple[Path, ...]
    settings: Mapping[str, Any]
    like: str | None = None
    shares: str | None = None
    learning_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A comparison, as files and command line have it.

    Attributes:
        comparison: Its own section.
        reward: The reward as settings, for those who are asked to judge by it.
        file: Where the rest stands, for messages.
        common: Settings of every arm that has them.
        flags: The same from the command line, by name.
    """

    comparison: Comparison
    reward: Any
    file: Path
    common: Mapping[str, Any]
    flags: tuple[tuple[str, str], ...]


def read_comparison(args: Sequence[str]) -> Asked:
    """What is to be compared.

    Raises:
        UserError: A file or a setting cannot be used.
    """
    check_configs(args)
    files, flags = _split(args)
    common: dict[str, Any] = {}
    for file in files:
        common = merged(common, read_yaml(file, f"the config {str(file)!r}", _EXAMPLE))
    own = common.pop("compare", None) or {}
    if not isinstance(own, Mapping):
        raise UserError(f"the section `compare` must hold settings, got {own!r}. {_EXAMPLE}")
    mine = [f"--{key}={value}" for key, value in flags if key.partition(".")[0] == "compare" and key != "compare.arms"]
    # kept from the parser, which would make objects of the classes that an arm's settings name
    given = [yaml.safe_load(value) for key, value in flags if key == "compare.arms"]
    own = dict(own)
    arms = [own.pop("arms", None), *given][-1]
    parser = ArgumentParser(exit_on_error=False, prog="spin-lightning compare")
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_class_arguments(Comparison, "compare")
    try:
        with explaining_settings():
            text = yaml.safe_dump({"compare": own})
            settings = parser.parse_args([*(["--config", text] if own else []), *mine])
            reward = settings.compare.reward
            comparison: Comparison = parser.instantiate_classes(settings).compare
    except UserError:
        raise
    except Exception as error:
        if (sentence := refusal_of_arguments(error, args)) is None:
            raise
        raise UserError(
            f"{sentence}{full_stop_of(sentence)} spin-lightning compare --help shows the settings."
        ) from error
    if arms is not None:
        comparison.arms = read_arms(arms, comparison.learning_rates)
    theirs = tuple((key, value) for key, value in flags if key.partition(".")[0] != "compare")
    return Asked(
        comparison,
        None if reward is None else reward.as_dict(),
        files[-1] if files else Path("the command line"),
        common,
        theirs,
    )


def _split(args: Sequence[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """The config files, and the flags by name."""
    files, flags, remaining = [], [], iter(args)
    for arg in remaining:
        flag, equals, value = arg.partition("=")
        value = value if equals else next(remaining, "")
        if flag in ("-c", "--config"):
            files.append(Path(value).expanduser())
        elif flag.startswith("--") and value:
            flags.append((flag.removeprefix("--"), value))
        else:
            raise UserError(f"compare takes --config FILE and --SECTION.SETTING VALUE, got {arg!r}.")
    return files, flags


def read_arms(entries: Sequence[Mapping[str, Any]], learning_rates: Sequence[float]) -> tuple[Arm, ...]:
    """The arms of a list, checked.

    Args:
        entries: As a file has them.
        learning_rates: Those of an arm whose ``learning_rates`` are true.

    Raises:
        UserError: One cannot be.
    """
    if not isinstance(entries, Sequence) or not entries:
        raise UserError(f"compare.arms must be a list of arms, got {entries!r}. {_EXAMPLE}")
    arms: list[Arm] = []
    for number, entry in enumerate(entries):
        arm = _read_arm(entry, f"arm {number} of compare.arms", learning_rates)
        if arm.name in (earlier.name for earlier in arms):
            raise UserError(f"two arms of compare.arms are called {arm.name!r}. Give each a name of its own.")
        if arm.like is not None and arm.like not in (earlier.name for earlier in arms):
            names = ", ".join(earlier.name for earlier in arms) or "none"
            raise UserError(f"the arm {arm.name!r} gets as much as {arm.like!r}; the arms before it are {names}.")
        if arm.shares == "compute" and (word := _word_of(arm.like, arms)) not in COUNTED:
            raise UserError(
                f"the arm {arm.name!r} gets as much compute as {arm.like!r}, and that of the stage {word} is not "
                "counted. Give it equal_updates, or equal_compute of an arm of fit or sft."
            )
        arms.append(arm)
    return tuple(arms)


def _word_of(name: str | None, arms: Sequence[Arm]) -> str:
    return next(arm.word for arm in arms if arm.name == name)


def _read_arm(entry: Any, where: str, learning_rates: Sequence[float]) -> Arm:
    example = "Such as {name: hot, stage: fit, model: {beta: 5}}."
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} must hold a name, a stage and settings, got {entry!r}. {example}")
    name, word = entry.get("name"), entry.get("stage")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name) or name in ("start", "data"):
        raise UserError(f"the name of {where} must be letters, digits and _, as it names folders, got {name!r}.")
    if word not in STAGES:
        raise UserError(f"the stage of the arm {name!r} must be one of {', '.join(STAGES)}, got {word!r}. {example}")
    shared = [key for key in ("equal_updates", "equal_compute") if entry.get(key) is not None]
    if len(shared) > 1 or (shared and word != "sft"):
        raise UserError(
            f"the arm {name!r} has {' and '.join(shared)}; an arm of the stage sft may have one of equal_updates and "
            "equal_compute, the name of another arm."
        )
    rates = entry.get("learning_rates") or ()
    rates = tuple(learning_rates) if rates is True else tuple(rates) if isinstance(rates, list | tuple) else (None,)
    if not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
        raise UserError(
            f"learning_rates of the arm {name!r} must be a list of positive numbers, got {entry['learning_rates']!r}; "
            "write 1.0e-5 rather than 1e-5, which YAML reads as a text."
        )
    configs = entry.get("config", [])
    configs = [configs] if isinstance(configs, str) else configs
    for config in configs:
        check_configs(["--config", str(config)])
    return Arm(
        name=name,
        word=str(word),
        configs=tuple(Path(config).expanduser() for config in configs),
        settings={key: value for key, value in entry.items() if key not in OF_AN_ARM},
        like=entry[shared[0]] if shared else None,
        shares=shared[0].removeprefix("equal_") if shared else None,
        learning_rates=rates,
    )


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others over them, section by section. A class that is named anew takes nothing of the old one.

    Example:
        >>> merged({"model": {"beta": 1, "loss": "a"}}, {"model": {"beta": 5}})
        {'model': {'beta': 5, 'loss': 'a'}}
    """
    result = dict(below)
    for key, value in above.items():
        known = result.get(key)
        if isinstance(known, Mapping) and isinstance(value, Mapping) and "class_path" not in value:
            value = merged(known, value)
        result[key] = value
    return result
