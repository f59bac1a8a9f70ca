"""The file of ``spin-lightning chain``, read and checked as far as it can be without knowing any stage's settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from spin_lightning.cli.children import read_launcher
from spin_lightning.cli.commands import STAGES
from spin_lightning.cli.config_files import check_configs, read_yaml
from spin_lightning.runs.files import run_folder
from spin_lightning.stages.stage import Stage
from spin_lightning.types import UserError

#: ``spin-lightning score`` in a line: it makes rows for the stages after it, and no policy.
SCORE = Stage(
    module="spin_lightning.stages.policy.PolicyModule",
    data="spin_lightning.generation.synthetic_data.SyntheticDataModule",
    callbacks={"score": "spin_lightning.stages.scoring.Scoring"},
    folder="score",
    over_file="summary.json",
    mark="score.",
    makes_policy=False,
)
#: The records of what can be a stage of a line, by its word.
WORDS = {**{word: str(record) for word, record in STAGES.items()}, "score": f"{__name__}.SCORE"}
#: What the file may hold.
KEYS = ("output_dir", "common", "stages")
#: What a stage may hold beside sections of settings.
OF_A_STAGE = ("name", "config", "launcher")
START = "model.model_name_or_path"
_EXAMPLE = (
    "Give `output_dir: runs/line` and `stages: [sft: {...}, fit: {...}]`; configs/sft_spin_dpo.yaml is an example."
)


@dataclass(frozen=True)
class Link:
    """In the place of a path: what another stage made.

    Attributes:
        stage: Its name.
        path: A file or folder in that stage's run folder. None: the model that it exported.
    """

    stage: str
    path: str | None = None


@dataclass(frozen=True)
class Step:
    """A stage of the line, as the file has it.

    Attributes:
        name: Its own, which is that of its folder.
        word: Its command.
        configs: Files of settings, which everything in the chain's file goes over.
        launcher: What takes the place of ``python``. None: one process.
        settings: By section, with links.
        flags: Settings from the command line, by name.
    """

    name: str
    word: str
    configs: tuple[Path, ...]
    launcher: tuple[str, ...] | None
    settings: Mapping[str, Any]
    flags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Chain:
    """A line of stages.

    Attributes:
        file: Where it is written.
        output_dir: Folder of all runs.
        common: Settings of each stage that has them.
        common_flags: The same from the command line.
        steps: The stages, in order.
    """

    file: Path
    output_dir: Path
    common: Mapping[str, Any]
    common_flags: tuple[tuple[str, str], ...]
    steps: tuple[Step, ...]


def read_chain(args: Sequence[str]) -> Chain:
    """The line of stages in a file, with what the command line says over it.

    Raises:
        UserError: It is no such file, or what it says cannot be.
    """
    file = Path(args[0]).expanduser()
    content = read_yaml(file, f"the chain {args[0]!r}", _EXAMPLE)
    flags = _read_flags(args[1:])
    if unknown := [key for key in content if key not in KEYS]:
        raise UserError(
            f"in the chain {args[0]!r}, {unknown[0]!r} is not one of {', '.join(KEYS)}. Settings of every stage stand "
            f"under `common`, those of one under its word. {_EXAMPLE}"
        )
    stages = content.get("stages")
    if not isinstance(stages, list) or not stages:
        raise UserError(f"in the chain {args[0]!r}, `stages` must be a list of stages, got {stages!r}. {_EXAMPLE}")
    steps: list[Step] = []
    for number, entry in enumerate(stages):
        step = _read_step(entry, f"stage {number} of {args[0]!r}", file.parent)
        if step.name in (earlier.name for earlier in steps):
            raise UserError(
                f"two stages of {args[0]!r} are called {step.name!r}. Give one a name of its own: "
                f"`{step.word}: {{name: {step.word}_{number}, ...}}`."
            )
        _check_links(step, [earlier.name for earlier in steps], args[0])
        steps.append(step)
    names = [step.name for step in steps]
    for name, _, _ in flags:
        if name not in ("output_dir", "common", *names):
            raise UserError(
                f"--{name}: a setting on the command line begins with --common or the name of a stage, such as "
                f"--{names[0]}.{START}; the stages are {', '.join(names)}."
            )
    launchers = {name: read_launcher(f"--{name}.launcher", value) for name, key, value in flags if key == "launcher"}
    if "common" in launchers:
        raise UserError(f"--common.launcher: a launcher is a stage's own, as --{names[0]}.launcher.")
    of = {
        name: tuple((key, value) for owner, key, value in flags if owner == name and key != "launcher")
        for name in ("common", *names)
    }
    folders = [value for name, _, value in flags if name == "output_dir"]
    common = content.get("common") or {}
    if not isinstance(common, dict):
        raise UserError(f"in the chain {args[0]!r}, `common` must hold sections of settings, got {common!r}.")
    return Chain(
        file=file,
        output_dir=run_folder(folders[-1] if folders else content.get("output_dir") or "", "output_dir"),
        common=common,
        common_flags=of["common"],
        steps=tuple(
            replace(step, flags=of[step.name], launcher=launchers.get(step.name, step.launcher)) for step in steps
        ),
    )


def _read_flags(args: Sequence[str]) -> list[tuple[str, str, str]]:
    """Whose setting each flag is, the setting, and its value.

    Example:
        >>> _read_flags(["--output_dir", "runs/x", "--sft.model.learning_rate=1e-5"])
        [('output_dir', '', 'runs/x'), ('sft', 'model.learning_rate', '1e-5')]
    """
    found, remaining = [], iter(args)
    for arg in remaining:
        flag, equals, value = arg.partition("=")
        value = value if equals else next(remaining, "")
        owner, _, key = flag.removeprefix("--").partition(".")
        if not flag.startswith("--") or not value or (key == "") != (owner == "output_dir"):
            raise UserError(
                f"after its file, chain takes --output_dir FOLDER, --common.SECTION.SETTING VALUE and "
                f"--STAGE.SECTION.SETTING VALUE, got {arg!r}."
            )
        found.append((owner, key, value))
    return found


def _read_step(entry: Any, where: str, folder: Path) -> Step:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(
            f"{where} must be a word, or a word with settings under it, as `sft: {{model: {{learning_rate: 2e-5}}}}`; "
            f"got {entry!r}."
        )
    ((word, settings),) = entry.items()
    if word not in WORDS:
        close = get_close_matches(str(word), WORDS, 1)
        raise UserError(
            f"{where} is called {word!r}; the words are {', '.join(WORDS)}."
            f"{f' Did you mean {close[0]}?' if close else ''}"
        )
    settings = settings or {}
    if not isinstance(settings, dict):
        raise UserError(f"{where} ({word}) must hold sections of settings, got {settings!r}.")
    name = settings.get("name", word)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name) or name in ("common", "output_dir"):
        raise UserError(f"the name of {where} must be letters, digits, - and _, as it names a folder, got {name!r}.")
    configs = settings.get("config", [])
    configs = [configs] if isinstance(configs, str) else configs
    if not isinstance(configs, list) or not all(isinstance(config, str) for config in configs):
        raise UserError(f"config of {where} ({name}) must be a file or a list of files, got {configs!r}.")
    paths = tuple(folder / Path(config).expanduser() for config in configs)
    for path in paths:
        try:
            check_configs(["--config", str(path)])
        except UserError as error:
            raise UserError(f"in {where} ({name}): {error}") from error
    launcher = settings.get("launcher")
    return Step(
        name=name,
        word=word,
        configs=paths,
        launcher=None if launcher is None else read_launcher(f"launcher of {name}", str(launcher)),
        settings=_read_links({key: value for key, value in settings.items() if key not in OF_A_STAGE}, where),
    )


def _read_links(value: Any, where: str) -> Any:
    """The settings with a ``Link`` for each map that has ``from``."""
    if isinstance(value, dict):
        if isinstance(value.get("from"), str):
            if not value.keys() <= {"from", "path"} or not isinstance(value.get("path", ""), str):
                raise UserError(
                    f"a link of {where} has `from`, the name of a stage, and may have `path`, a file in its folder; "
                    f"got {value!r}."
                )
            return Link(value["from"], value.get("path"))
        return {key: _read_links(item, where) for key, item in value.items()}
    return [_read_links(item, where) for item in value] if isinstance(value, list) else value


def links_in(value: Any) -> Iterator[Link]:
    """Every link in some settings."""
    if isinstance(value, Link):
        yield value
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from links_in(item)


def _check_links(step: Step, earlier: Sequence[str], file: str) -> None:
    for link in links_in(step.settings):
        if link.stage not in earlier:
            are = f"before it are {', '.join(earlier)}" if earlier else "there is none before it"
            raise UserError(
                f"in the chain {file!r}, the stage {step.name!r} takes something from {link.stage!r}, which is no "
                f"stage before it: {are}. Correct the name, or the order."
            )


def with_paths(value: Any, places: Mapping[Link, Path]) -> Any:
    """Settings with a path in the place of each link."""
    if isinstance(value, Link):
        return str(places[value])
    if isinstance(value, Mapping):
        return {key: with_paths(item, places) for key, item in value.items()}
    return [with_paths(item, places) for item in value] if isinstance(value, list) else value
