"""The first page of a stage's help, at once: its settings are read from the sources, and nothing heavy is imported.

Names, defaults and choices are those of the signatures, each text is the first sentence of a setting's docstring. The
parser, which ``--help=all`` asks, imports all classes and lists every setting of each of them.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docstring_parser import parse

#: Sections that every stage has beside its own.
OF_EVERY_STAGE = {
    "checkpoint": "spin_lightning.runs.run_checkpoint.RunCheckpoint",
    "report": "spin_lightning.reports.callback.WriteReport",
}
TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
#: Settings of the trainer whose defaults are not Lightning's here.
TRAINER_DEFAULTS = {
    "reload_dataloaders_every_n_epochs": 1,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 1,
    "devices": 1,
    "enable_model_summary": False,
}
#: Settings of the trainer that decide what is computed and how a run ends, in the words of this package. There are 40
#: more.
OF_TRAINER = {
    "accelerator": "What computes: cpu, gpu, mps; auto takes the best that is there.",
    "devices": "How many GPUs, or processes on a CPU. auto takes all GPUs.",
    "strategy": "With several devices ddp, or fsdp2 for weights that one does not hold.",
    "precision": "32-true, bf16-mixed, or bf16-true with float32 master weights. null is 32-true.",
    "max_epochs": "Passes over the data.",
    "max_time": "End after this time, 00:12:00:00 for twelve hours. The same command continues.",
    "accumulate_grad_batches": "Batches in one update.",
    "gradient_clip_val": "Largest norm of an update's gradient.",
    "val_check_interval": "Share of an epoch, or number of batches, after which the held-out NLL is measured.",
    "callbacks": "Callbacks by class path. --trainer.callbacks+=my_module.MyCallback adds one.",
    "logger": "A logger by class path, or false. null writes CSV and TensorBoard files.",
    "fast_dev_run": "A trial: train and validate on one batch, and keep nothing.",
}
#: Where the texts begin. A flag that is longer has a line of its own.
COLUMN = 34


@dataclass(frozen=True)
class Setting:
    """A setting by its name on the command line; ``default`` as YAML has it, with the other choices if any.

    ``type`` is its annotation, ``whole`` all that its docstring says of it, of which ``text`` is the first sentence.
    """

    name: str
    default: str
    text: str
    type: str = ""
    whole: str = ""


def page(word: str, usage: str, summary: str, record: str) -> str:
    """The help of a command that runs a stage, as wide as the terminal, between 80 and 100 columns.

    Args:
        word: The command.
        usage: What follows it.
        summary: What it does.
        record: Import path of the stage's record.
    """
    width = min(max(shutil.get_terminal_size((80, 24)).columns, 80), 100)
    lines = [f"usage: spin-lightning {word} {usage}", "", f"{summary[0].upper()}{summary[1:]}."]
    for section, (title, settings) in settings_of(record).items():
        lines += ["", *textwrap.wrap(f"{section}: {title}", width, subsequent_indent="  ")]
        for setting in settings:
            lines += _lay_out_entry(f"--{setting.name}", f"{setting.text} [{setting.default}]", width)
    lines += ["", "More:"]
    for flag, text in {
        "-c, --config FILE": "A YAML file of settings by section. Flags that follow it win.",
        "--print_config": "All settings with their values and what they are, as a file to start from. "
        "=plain leaves the comments out, =skip_default what has its default.",
        "--model.optimizer.help CLASS": "The settings of a class; so for every setting that names one.",
        "--help=all": "All settings, and the classes that they can name.",
    }.items():
        lines += _lay_out_entry(flag, text, width)
    return "\n".join(lines)


def _lay_out_entry(flag: str, text: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(text, width - COLUMN, break_long_words=False, break_on_hyphens=False)
    lines = [" " * COLUMN + line for line in wrapped]
    if len(flag) + 4 > COLUMN:
        return [f"  {flag}", *lines]
    return [f"  {flag}".ljust(COLUMN) + wrapped[0], *lines[1:]]


def settings_of(record: str) -> dict[str, tuple[str, list[Setting]]]:
    """What each section of a stage is, and its settings, without those that follow from others.

    Args:
        record: Import path of the stage's record.
    """
    stage = _literals_of(record)
    follow = {*stage.get("links", ()), "checkpoint.dirpath", "report.output_dir"}
    found = {}
    defaults = {f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()} | stage.get("defaults", {})
    for section, path in {
        "model": stage["module"],
        "data": stage["data"],
        **stage["callbacks"],
        **OF_EVERY_STAGE,
        "trainer": TRAINER,
    }.items():
        module, node = _find_class(path)
        settings = _settings_of_class(module, node, section, defaults)
        found[section] = (
            first_sentence(ast.get_docstring(node) or ""),
            [setting for setting in settings if setting.name not in follow],
        )
    words = {f"trainer.{name}": text for name, text in OF_TRAINER.items()}
    of_trainer = {setting.name: setting for setting in found["trainer"][1]}
    found["trainer"] = (
        "Lightning's Trainer.",
        [replace(of_trainer[name], text=text, whole=text) for name, text in words.items() if name in of_trainer],
    )
    return found


def settings_of_class(path: str) -> list[Setting]:
    """The settings of a class that a setting can name, such as a loss, without its name before them.

    Args:
        path: Its import path.
    """
    module, node = _find_class(path)
    found = []
    with suppress(LookupError):  # a base class from elsewhere has no settings
        for setting in _settings_of_class(module, node, "", {}):
            found.append(replace(setting, name=setting.name.removeprefix(".")))
    return found


def _settings_of_class(module: str, node: ast.ClassDef, prefix: str, defaults: Mapping[str, Any]) -> Iterator[Setting]:
    """The settings of a class, each followed by those of the class it names, and those that go on to the base class."""
    init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    names = set()
    if init is not None:
        docs = [param for part in (node, init) for param in parse(ast.get_docstring(part) or "").params]
        texts = {param.arg_name: param.description or "" for param in docs}
        values: list[ast.expr | None] = [*init.args.defaults, *init.args.kw_defaults]
        arguments = [*init.args.args, *init.args.kwonlyargs][1:]
        for argument, value in zip(arguments, [None] * (len(arguments) - len(values)) + values, strict=True):
            names.add(name := f"{prefix}.{argument.arg}")
            default = defaults.get(name, _write_yaml(value))
            named = default["class_path"] if isinstance(default, dict) else ""
            choices = [choice for choice in _choices_of(argument.annotation) if choice != default]
            shown = [
                named.rpartition(".")[2] or (default if isinstance(default, str) else json.dumps(default)),
                *([f"or {', '.join(choices)}"] if choices else []),
            ]
            text = texts.get(argument.arg, "")
            if "must be given" in text:  # where a default of null is refused by a sentence
                shown[0] = "required"
            yield Setting(name, "; ".join(shown), first_sentence(text), _name_type(argument.annotation), text)
            if named:
                yield from _settings_of_class(*_find_class(named), name, defaults)
    if init is None or init.args.kwarg is not None:
        base = _find_class(f"{module}.{ast.unparse(node.bases[0])}")
        yield from (setting for setting in _settings_of_class(*base, prefix, defaults) if setting.name not in names)


def _write_yaml(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    if not isinstance(value, ast.Constant):
        return ast.unparse(value)
    return str(value.value) if isinstance(value.value, str) else json.dumps(value.value).replace("e-0", "e-")


def _name_type(annotation: ast.expr | None) -> str:
    return "" if annotation is None else ast.unparse(annotation)


def _choices_of(annotation: ast.expr | None) -> list[str]:
    """The values of each ``Literal`` in an annotation."""
    literals = [
        ast.unparse(node.slice).strip("()")
        for node in (ast.walk(annotation) if annotation is not None else ())
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal"
    ]
    return [str(choice) for literal in literals for choice in ast.literal_eval(f"[{literal}]")]


def first_sentence(text: str) -> str:
    r"""In plain text, with the words of YAML.

    Example:
        >>> first_sentence("Of ``beta``, by Chen et al. (2024).  None: 1.\n``0`` is greedy.")
        'Of beta, by Chen et al. (2024).'
        >>> first_sentence("None takes the model's.")
        "null takes the model's."
    """
    sentence = re.split(r"(?<=[.!?])(?<! al\.)(?<!\.g\.)(?<! Eq\.) (?=[A-Z0-9`{])", " ".join(text.split()), maxsplit=1)[
        0
    ]
    return re.sub(r"\bNone\b", "null", sentence.replace("``", ""))


def _literals_of(record: str) -> dict[str, Any]:
    """The texts, numbers and dicts in a stage's record; of links, those that follow. Functions are left out."""
    module, _, name = record.rpartition(".")
    for node in _parse_module(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.Call):
            given = {str(keyword.arg): keyword.value for keyword in node.value.keywords}
            return {
                "links": [ast.literal_eval(key) for key in getattr(given.pop("links", None), "keys", [])],
                "reads_over": [ast.literal_eval(key) for key in getattr(given.pop("reads_over", None), "keys", [])],
                **{name: ast.literal_eval(value) for name, value in given.items() if not isinstance(value, ast.Name)},
            }
    raise LookupError(f"{record} is no record of a stage that is written out")


def _find_class(path: str) -> tuple[str, ast.ClassDef]:
    """The module in which a class is written, by whatever name it was imported, and its source."""
    module, _, name = path.rpartition(".")
    for node in ast.walk(_parse_module(module)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find_class(f"{node.module}.{alias.name}")
    raise LookupError(f"there is no class {path}")


@cache
def _parse_module(name: str) -> ast.Module:
    package, *inside = name.split(".")
    spec = find_spec(package)  # which imports nothing, as a name with dots would
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin)
    if inside:
        path = path.parent.joinpath(*inside)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        raise LookupError(f"{name} is no module with a source")
    return ast.parse(path.read_text(encoding="utf-8"))
