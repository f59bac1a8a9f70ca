"""``spin-lightning schema``: a JSON Schema of configs, by which an editor completes, explains and checks them.

The parser of a stage gives it, by jsonargparse's own generator. What is done here beside it: every class that a setting
can name is there with its settings; ranges and settings that follow from others are said; a config may leave out
whatever a flag or another config can give; and one schema knows the configs of all stages and the files of ``chain``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ArgumentParser  # type: ignore[attr-defined]

# the generator behind ArgumentParser.get_completion_script("jsonschema"), which has no hook for classes
from jsonargparse._completions_jsonschema import ParserJsonschema, schema_uri
from jsonargparse._optionals import get_doc_short_description
from jsonargparse._typehints import get_all_subclass_paths
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

import spin_lightning
from spin_lightning.cli.chain_file import OF_A_STAGE, WORDS
from spin_lightning.cli.commands import COMMANDS
from spin_lightning.cli.compare_file import STAGES as ARMS
from spin_lightning.cli.compare_file import Comparison
from spin_lightning.cli.score import make_parser
from spin_lightning.cli.short_help import OF_TRAINER as WORDS_OF_TRAINER
from spin_lightning.cli.stage_cli import parser_of
from spin_lightning.stages.stage import Stage
from spin_lightning.types import UserError

#: Classes of others that are listed with their settings, and where those of them are that are meant for users.
OF_OTHERS: Mapping[type, str] = {
    Callback: "lightning.pytorch.callbacks.",
    Logger: "lightning.pytorch.loggers.",
    Optimizer: "torch.optim.",
}
_COUNT, _POSITIVE, _SHARE = {"minimum": 1}, {"exclusiveMinimum": 0}, {"minimum": 0, "maximum": 1}
#: The ranges of our own numbers, wherever a setting has this name: what is outside of it is refused by the run, too.
RANGES: Mapping[str, Mapping[str, float]] = {
    "answers_per_prompt": {"minimum": 0},
    "batch_size": _COUNT,
    "beta": _POSITIVE,
    "ppo.model.beta": {"minimum": 0},
    "epochs": _COUNT,
    "iterations": _COUNT,
    "label_smoothing": {"minimum": 0},
    "learning_rate": {"minimum": 0},
    "max_new_tokens": _COUNT,
    "max_prompt_tokens": _COUNT,
    "max_response_tokens": _COUNT,
    "micro_batch_tokens": _COUNT,
    "shard_size": _COUNT,
    "temperature": {"minimum": 0},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "val_fraction": {"minimum": 0, "exclusiveMaximum": 1},
    "warmup_ratio": _SHARE,
}
#: Of the Trainer's numbers, as ``stage_cli`` has them.
OF_TRAINER: Mapping[str, Mapping[str, float]] = {
    "accumulate_grad_batches": _COUNT,
    "gradient_clip_val": {"minimum": 0},
}
#: A class path of somebody else: names joined by dots.
_OTHER_PATH = {"type": "string", "pattern": r"^(?!spin_lightning\.)[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$"}
_LINK = {
    "type": "object",
    "description": "What an earlier stage made: the model that it exported, or a file in its folder.",
    "properties": {"from": {"type": "string"}, "path": {"type": "string"}},
    "required": ["from"],
    "additionalProperties": False,
}


def main(args: Sequence[str]) -> None:
    """Print the schema of one stage's configs, or of all.

    Args:
        args: Nothing, or the word of a stage, ``chain`` or ``compare``.

    Raises:
        UserError: It is no such word.
    """
    if args and args[0] not in (words := (*WORDS, "chain", "compare")):
        raise UserError(f"schema takes one of {', '.join(words)}, or nothing; got {args[0]!r}.")
    json.dump(make_schema(args[0] if args else None), sys.stdout, indent=1, ensure_ascii=False)
    print()


def make_schema(word: str | None = None) -> dict[str, Any]:
    """The schema (JSON Schema 2020-12) of the configs of a stage.

    Args:
        word: The stage, ``chain`` or ``compare``. None: of all, each known by its sections.
    """
    for name in spin_lightning.__all__:  # the parser knows the classes that are imported
        getattr(spin_lightning, name)
    generator = SettingsSchema()
    stages = {each: schema_of(each, generator) for each in ([word] if word in WORDS else WORDS)}
    defs: dict[str, Any] = generator.defs
    if word in WORDS:
        top = stages[word]
    else:
        compare = _compare_of({each: stages[each] for each in ARMS}, generator)
        linked = _with_links(stages)
        defs = {**stages, **_with_links(defs), "compare": compare, "chain": _chain_of(linked), "link": _LINK}
        top = {"$ref": f"#/$defs/{word}"} if word else _choose(stages)
    wanted = set(_refs_in(top))
    while more := {name for known in wanted for name in _refs_in(defs[known])} - wanted:
        wanted |= more
    return {
        "$schema": schema_uri,
        "title": f"A config of spin-lightning {word or ''}".strip(),
        **top,
        "$defs": {name: definition for name, definition in defs.items() if name in wanted},
    }


class SettingsSchema(ParserJsonschema):
    """jsonargparse's, with an entry for each class that a setting can name, under any name that the parser takes."""

    def add_properties(self, parser: Any, schema: dict[str, Any]) -> None:
        super().add_properties(parser, schema)
        _relax(schema)

    def callable_schema(self, typehint: Any, action: Any) -> dict[str, Any]:
        either = super().callable_schema(typehint, action).get("anyOf", [{"type": "string"}])
        return either[-1]  # the class that it returns, which may be named by a string, too

    def define_class(self, path: str, action: Any) -> dict[str, Any]:
        """The settings of a class, which is in ``defs`` from now on."""
        if path not in self.defs:
            self.defs[path] = self.class_parser_schema(path, action, get_doc_short_description(resolve_name(path)))
        return self.defs[path]

    def subclass_def(self, class_type: Any, action: Any) -> dict[str, Any]:
        where = OF_OTHERS.get(class_type, "spin_lightning." if class_type.__module__.startswith("spin_") else None)
        if where is None:  # a strategy, a profiler: whatever Lightning takes
            return {"anyOf": [{"type": "string"}, _spec({"type": "string"}, [])]}
        paths = [
            path
            for path in get_all_subclass_paths(class_type)
            if path.rpartition(".")[0] + "." in (where, "spin_lightning.")  # those that are for users
            and (resolve_name(path) is not class_type or class_type.__module__.startswith("spin_lightning.models"))
        ]
        for path in paths:
            self.define_class(path, action)
            if path.startswith("spin_lightning."):
                _bound(self.defs[path]["properties"], RANGES)
        names = f"name of {class_type.__name__}"
        self.defs[names] = {"anyOf": [{"enum": [name for path in paths for name in _names_of(path)]}, _OTHER_PATH]}
        which = {"$ref": f"#/$defs/{names}"}
        of_any = {"anyOf": [{"$ref": f"#/$defs/{path}"} for path in paths]}  # of the default, or of another config's
        by_class = [
            {
                "if": {"properties": {"class_path": {"enum": _names_of(path)}}, "required": ["class_path"]},
                "then": {"properties": {"init_args": {"$ref": f"#/$defs/{path}"}}},
            }
            for path in paths
        ]
        unnamed = {"if": {"not": {"required": ["class_path"]}}, "then": {"properties": {"init_args": of_any}}}
        return {
            "if": {"type": "string"},
            "then": which,
            "else": {
                "if": {"anyOf": [{"required": [key]} for key in ("class_path", "init_args", "dict_kwargs")]},
                "then": _spec(which, [*by_class, unnamed]),
                "else": of_any,
            },
        }


def _spec(which: Mapping[str, Any], more: Sequence[Any]) -> dict[str, Any]:
    """An object that names a class, and has its settings."""
    properties = {"class_path": which, "init_args": {"type": "object"}, "dict_kwargs": {"type": "object"}}
    spec = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**spec, "allOf": list(more)} if more else spec


def _names_of(path: str) -> list[str]:
    """The names by which a config can call a class."""
    kind = resolve_name(path)
    return list(dict.fromkeys([path, path.rpartition(".")[2], f"{kind.__module__}.{kind.__qualname__}"]))


def schema_of(word: str, generator: SettingsSchema) -> dict[str, Any]:
    """What a config of a stage may hold; the classes that its settings can name are in ``generator.defs`` then."""
    stage: Stage = resolve_name(WORDS.get(word) or str(COMMANDS[word].stage))
    schema = generator.generate(make_parser() if word == "score" else parser_of(word))
    for key in ("$schema", "$defs"):
        schema.pop(key, None)
    sections = {name: part["properties"] for name, part in schema["properties"].items() if "properties" in part}
    for section in ("model", "data", *stage.callbacks):
        own = {name: RANGES[key] for name in sections[section] if (key := f"{word}.{section}.{name}") in RANGES}
        _bound(sections[section], {**RANGES, **own})
    _bound(sections["trainer"], OF_TRAINER)
    for name, text in WORDS_OF_TRAINER.items():
        if name in sections["trainer"]:
            sections["trainer"][name]["description"] = text
    follow = {target: sources for target, (sources, _) in stage.links.items()}
    for target in ("checkpoint.dirpath", "report.output_dir"):
        if target.partition(".")[0] in sections:
            follow[target] = (f"{stage.folder}.output_dir",)
    for target, sources in follow.items():
        section, _, name = target.partition(".")
        sections[section][name] = {"not": {}, "description": f"Follows from {' and '.join(sources)}: leave it out."}
    for setting in stage.reads_over:
        section, _, name = setting.partition(".")
        sections[section][name] = {"description": f"Of other stages: {word} reads over it."}
    schema["properties"]["$schema"] = {"type": "string", "description": "Where this schema is. For editors."}
    return schema


def _relax(schema: dict[str, Any]) -> None:
    """Take out, in place, what holds for whole configs only, and write descriptions in Markdown, on one line."""
    schema.pop("required", None)  # a flag or another config may have it
    schema["properties"].pop("$schema", None)
    for part in (schema, *schema["properties"].values()):
        if text := part.get("description"):
            text = re.sub(r":\w+:`+~?([^`]+)`+", r"`\1`", " ".join(text.split()).replace("``", "`"))
            part["description"] = re.sub(
                r"\bNone\b", "null", re.sub(r" ?\(default: [^)]*\)| ?Default: `[^`]*`\.$", "", text)
            )
    for part in schema["properties"].values():
        if isinstance(part.get("properties"), dict):
            _relax(part)


def _bound(settings: dict[str, Any], ranges: Mapping[str, Mapping[str, float]]) -> None:
    """Write ranges into the schemas of settings, in place; one with a value an iteration has it for each."""
    for name in settings.keys() & ranges.keys():
        settings[name].update(ranges[name])
        for form in settings[name].get("anyOf", []):
            if "items" in form:
                form["items"] = {**form["items"], **ranges[name]}


def _merge(kinds: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of several classes, each with the forms that any of them takes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for settings in kinds:
        for name, setting in settings.items():
            forms = found.setdefault(name, [])
            bare = {key: value for key, value in setting.items() if key not in ("description", "default")}
            if bare not in [{**form, "description": None} | bare for form in forms if form.keys() >= bare.keys()]:
                forms.append(setting)
    return {name: forms[0] if len(forms) == 1 else {"anyOf": forms} for name, forms in found.items()}


def _with_links(tree: Any) -> Any:
    """A schema in which a link may stand for each text, as the files of ``chain`` take it."""
    if isinstance(tree, list):
        return [_with_links(item) for item in tree]
    if not isinstance(tree, Mapping):
        return tree
    changed = {key: _with_links(value) for key, value in tree.items()}
    for key, setting in changed.get("properties", {}).items():
        if key not in ("class_path", "$schema") and isinstance(setting, dict) and _takes_text(setting):
            outside = {name: setting.pop(name) for name in ("description", "default") if name in setting}
            changed["properties"][key] = {"anyOf": [setting, {"$ref": "#/$defs/link"}], **outside}
    return changed


def _takes_text(setting: Mapping[str, Any]) -> bool:
    kind = setting.get("type", [])
    return "string" in ([kind] if isinstance(kind, str) else kind) or any(map(_takes_text, setting.get("anyOf", [])))


def _chain_of(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a file of ``chain`` may hold, from what a config of each stage may, with links."""
    of_a_stage: dict[str, Any] = {
        "name": {"type": "string", "pattern": r"^[A-Za-z][\w-]*$", "description": "That of its folder, and of links."},
        "config": {"type": ["string", "array"], "items": {"type": "string"}, "description": "Files of settings."},
        "launcher": {"type": "string", "description": "What starts its processes, such as `torchrun ...`."},
    }
    assert of_a_stage.keys() == set(OF_A_STAGE)
    entries = {
        word: {**schema, "type": ["object", "null"], "properties": {**schema["properties"], **of_a_stage}}
        for word, schema in stages.items()
    }
    entry = {"type": "object", "properties": entries, "additionalProperties": False, "maxProperties": 1}
    return {
        "type": "object",
        "properties": {
            "$schema": {"type": "string"},
            "output_dir": {"type": "string", "description": "The folder of all runs."},
            "common": {"type": "object", "properties": _common_of(stages), "additionalProperties": False},
            "stages": {
                "type": "array",
                "minItems": 1,
                "items": {"if": {"type": "string"}, "then": {"enum": list(stages)}, "else": entry},
            },
        },
        "additionalProperties": False,
    }


def _common_of(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sections of several stages, each with the settings that any of them has."""
    names = dict.fromkeys(name for schema in stages.values() for name in schema["properties"] if name != "$schema")
    having = {
        name: [schema["properties"][name] for schema in stages.values() if name in schema["properties"]]
        for name in names
    }
    return {
        name: {
            **parts[0],
            **({"properties": _merge(part["properties"] for part in parts)} if "properties" in parts[0] else {}),
        }
        for name, parts in having.items()
    }


def _compare_of(stages: Mapping[str, Mapping[str, Any]], generator: SettingsSchema) -> dict[str, Any]:
    """What a file of ``compare`` may hold: settings of every arm that has them, and its own section."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Comparison, "compare")
    own = generator.generate(parser)["properties"]["compare"]
    properties = {"$schema": {"type": "string"}, **_common_of(stages), "compare": own}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _choose(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the one stage whose sections a config has; of any, where it has none of its own."""
    sections = {word: resolve_name(WORDS[word]).callbacks for word in stages}
    schema: dict[str, Any] = {"anyOf": [{"$ref": f"#/$defs/{word}"} for word in stages]}
    for word, own in sections.items():
        others = {section for other, theirs in sections.items() if other != word for section in theirs}
        for section in own:
            if section not in others:
                schema = {"if": {"required": [section]}, "then": {"$ref": f"#/$defs/{word}"}, "else": schema}
    for section, word in (("compare", "compare"), ("stages", "chain")):
        schema = {"if": {"required": [section]}, "then": {"$ref": f"#/$defs/{word}"}, "else": schema}
    return schema


def _refs_in(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference.removeprefix("#/$defs/")
        for value in schema.values():
            yield from _refs_in(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _refs_in(item)
