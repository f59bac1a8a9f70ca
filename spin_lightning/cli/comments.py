"""``--print_config``: each setting with its sentence as a comment, in YAML that reads back to the same settings."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import yaml

from spin_lightning.cli.schema import SettingsSchema, schema_of
from spin_lightning.cli.short_help import first_sentence
from spin_lightning.types import UserError

WIDTH = 120
#: What may follow ``--print_config=``.
_WORDS = ("plain", "skip_default")
#: Where comments begin that stand behind a setting.
COLUMN = 44


def print_commented(parser: Any, word: str, args: list[str]) -> list[str]:
    """Let ``--print_config`` comment what it prints, unless it is ``--print_config=plain``.

    Args:
        parser: The parser that prints, which is changed.
        word: The command.
        args: What is on the command line.

    Returns:
        The arguments as the parser knows them.

    Raises:
        UserError: ``--print_config`` was given a word that is unknown.
    """
    taken, is_plain = [], False
    for arg in args:
        flag, _, words = arg.partition("=")
        if flag == "--print_config":
            given = {given for given in words.split(",") if given}
            if unknown := given - {*_WORDS, "comments", "skip_unset"}:
                raise UserError(f"--print_config takes {' and '.join(_WORDS)} behind =, got {min(unknown)!r}.")
            is_plain = "plain" in given
            kept = ",".join(sorted(given - {"plain", "comments"}))
            arg = f"{flag}={kept}" if kept else flag
        taken.append(arg)
    if not is_plain:
        dump = parser.dump
        parser.dump = lambda *args, **kwargs: with_comments(dump(*args, **kwargs), word)
    return taken


def with_comments(text: str, word: str) -> str:
    """A config with a comment at each setting: behind it, or above it where that would be too wide.

    Args:
        text: The config, as YAML.
        word: The command that it is for.
    """
    settings = SettingsSchema()
    schema = schema_of(word, settings)
    lines, above = text.splitlines(), {}
    root = yaml.compose(text)
    for key, value, comment in _walk(root, schema, settings) if isinstance(root, yaml.MappingNode) else ():
        number, indent = key.start_mark.line, key.start_mark.column
        behind = f"{lines[number].ljust(COLUMN)}  # {comment}"
        ends_there = not isinstance(value, yaml.ScalarNode) or value.end_mark.line == number
        if len(behind) <= WIDTH and ends_there:
            lines[number] = behind
        else:
            above[number] = textwrap.wrap(comment, WIDTH - indent - 2, break_long_words=False)
            above[number] = [f"{' ' * indent}# {line}" for line in above[number]]
    return "\n".join(line for number, text in enumerate(lines) for line in (*above.get(number, ()), text)) + "\n"


def _walk(
    node: yaml.MappingNode, schema: Mapping[str, Any], settings: SettingsSchema
) -> Iterator[tuple[yaml.Node, yaml.Node, str]]:
    """Each setting in a map: its name, its value, and what is to be said of it."""
    for key, value in node.value:
        setting = schema.get("properties", {}).get(key.value, {})
        if comment := _comment_on(setting, value):
            yield key, value, comment
        for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(part, yaml.MappingNode):
                yield from _walk(part, _schema_inside(part, setting, settings), settings)


def _comment_on(setting: Mapping[str, Any], value: yaml.Node) -> str:
    """The setting's first sentence, and the choices that it leaves out, if they are few."""
    sentence = first_sentence(setting.get("description", "").replace("`", ""))
    forms = [setting, *setting.get("anyOf", ())]
    choices = dict.fromkeys(str(choice) for form in forms for choice in form.get("enum", ()))
    others = [choice for choice in choices if choice != value.value and choice not in sentence]
    return f"{sentence} Or: {', '.join(others)}" if 0 < len(others) < 6 else sentence


def _schema_inside(node: yaml.MappingNode, setting: Mapping[str, Any], settings: SettingsSchema) -> Mapping[str, Any]:
    """Of the settings in a map: of a section, or of the class that it names."""
    given = {key.value: value.value for key, value in node.value}
    if not isinstance(path := given.get("class_path"), str):
        return setting
    what = settings.define_class(path, SimpleNamespace(sub_add_kwargs={}, logger=logging.getLogger(__name__)))
    inside = {"properties": what.get("properties", {})}
    return {"properties": {"class_path": {"description": what.get("description", "")}, "init_args": inside}}
