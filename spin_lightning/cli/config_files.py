"""Config files that cannot be read are refused before anything heavy is imported, with their line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from spin_lightning.types import UserError


def check_configs(args: Sequence[str]) -> None:
    """Refuse config files that are missing or cannot be read, naming file and line; the parser would name neither.

    Raises:
        UserError: There is one.
    """
    for number, arg in enumerate(args):
        if arg in ("-c", "--config") and args[number + 1 :]:
            _check_config(args[number + 1])
        elif arg.startswith("--config="):
            _check_config(arg.removeprefix("--config="))


def _check_config(name: str) -> None:
    path = Path(name).expanduser()
    try:
        if not _is_file(path) and ":" in name and isinstance(yaml.safe_load(name), dict):
            return  # settings in place of a file
    except yaml.YAMLError:
        pass
    expected = "Give a YAML file with sections such as 'model:' and 'data:'; the folder configs/ has examples."
    config = read_yaml(path, f"the config {name!r}", expected)
    for section, settings in config.items():
        if not isinstance(section, str) or isinstance(settings, list):
            raise UserError(
                f"in the config {name!r}, {section!r} must be the name of a section with settings under it, or of one "
                f"setting; it has {'a list' if isinstance(settings, list) else f'{settings!r}'}. {expected}"
            )


def read_yaml(path: Path, what: str, expected: str) -> dict[Any, Any]:
    """The settings in a YAML file, each key once.

    Args:
        path: The file.
        what: What to call it.
        expected: What it should hold, as a sentence for who gave another one.

    Raises:
        UserError: It is no such file; the message has the line.
    """
    if not _is_file(path):
        raise UserError(f"{what} is no file (looked at {path.absolute()}). {expected}")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)  # it is a SafeLoader
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text ({error.reason} at byte {error.start}). {expected}") from None
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, f"{error.context or ''} {error.problem or ''}".strip()
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{what}{place} is not YAML: {problem}. Mend that line.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not YAML: {' '.join(str(error).split())}. {expected}") from None
    if not isinstance(config, dict):
        kind = "nothing" if config is None else f"a {type(config).__name__}"
        raise UserError(f"{what} must hold sections with settings, got {kind}. {expected}")
    try:
        json.dumps(config, default=str, skipkeys=True)
    except (ValueError, RecursionError):
        raise UserError(f"in {what} an alias (*...) is inside of what it stands for. {expected}") from None
    return config


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False


class _EachKeyOnce(yaml.SafeLoader):
    """Of a key that is there twice, the parser would take the second one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"{key.value!r} is there a second time", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)
