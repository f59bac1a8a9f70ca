"""The schema of configs: what ships is valid by it, what a run would refuse is not; it says what the parser knows."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from spin_lightning.cli.chain_file import WORDS
from spin_lightning.cli.commands import STAGES, config_folder, main
from spin_lightning.cli.schema import RANGES, make_schema
from spin_lightning.cli.stage_cli import parse_settings
from spin_lightning.types import UserError

CONFIGS = sorted(config_folder().rglob("*.yaml"))


class Yaml12(yaml.SafeLoader):
    """As editors read it: 1e-5 is a number."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def read(text: str) -> Any:
    return yaml.load(text, Loader=Yaml12)


@cache
def schema_of(word: str | None) -> dict[str, Any]:
    """Of a stage as that of all has it, which takes less time than one of its own."""
    if word is None:
        return make_schema()
    defs = schema_of(None)["$defs"]
    return {**defs[word], "$defs": defs}


@cache
def validator(word: str | None) -> Draft202012Validator:
    schema = schema_of(word)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def problems(word: str | None, config: Any) -> list[str]:
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator(word).iter_errors(config)
    ]


def word_of(text: str) -> str:
    """The command that a shipped config is for, by its sections."""
    content = yaml.safe_load(text)
    if "stages" in content or "compare" in content:
        return "chain" if "stages" in content else "compare"
    if "export" in content or re.search(r"spin-lightning dpo --config|\bsft\b.*demo", text):
        return "dpo" if "dpo --config" in text else "sft"
    return "ppo" if "rollouts" in content else "fit"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_by_the_schema_of_its_stage_and_of_all(path):
    text = path.read_text()
    assert problems(word_of(text), read(text)) == []
    assert problems(None, read(text)) == []


GOOD = """
model: {model_name_or_path: a/b, beta: [1.0, 0.5], learning_rate: 1e-5, loss: SpaceLoss, opponent: resident}
data:
  train_data: rows.jsonl
  generator: {class_path: my_package.MyGenerator, init_args: {anything: 1}}
self_play: {output_dir: runs/x, iterations: 2, epochs: [1, 2]}
trainer:
  max_time: 00:12:00:00
  precision: bf16-true
  strategy: fsdp2
  callbacks:
  - {class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/nll, mode: min}}
  - my_package.MyCallback
  logger: {class_path: CSVLogger, init_args: {save_dir: x}}
"""

MISTAKES = {
    "model.betta": 1.0,
    "data.batch_size": "eight",
    "model.beta": 0,
    "model.learning_rate": [1e-5, "fast"],
    "model.lr_schedule": "cosin",
    "model.opponent": 3,
    "model.loss": "SpinLos",
    "model.loss.class_path": "spin_lightning.SpinLos",
    "model.dropout": 1,
    "data.val_fraction": 1.0,
    "data.generator": {"class_path": "ContinuousGenerator", "init_args": {"max_tokens": 3}},
    "data.generator.init_args": {"max_new_token": 3},
    "data.generator.max_new_tokens": "many",
    "self_play.iterations": 0,
    "self_play.epochs": [1, 0],
    "selfplay": {"iterations": 2},
    "checkpoint.dirpath": "here",
    "trainer.max_epochs": 3,
    "trainer.precision": "bf16_true",
    "trainer.callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitr": "val/nll"}}],
    "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"wd": 0.1}},
}


@pytest.mark.parametrize("setting", MISTAKES)
@pytest.mark.parametrize("word", ["fit", None])
def test_a_mistake_is_marked_and_nothing_else(setting, word):
    config = read(GOOD)
    assert problems(word, config) == []
    place, keys = config, setting.split(".")
    if setting.startswith(("data.generator.", "model.loss.")):
        place[keys[0]][keys[1]] = {}
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = MISTAKES[setting]
    found = problems(word, config)
    assert found and all(setting.split(".")[0] in problem for problem in found), found


def test_the_schema_of_a_chain_knows_links_and_refuses_what_the_chain_would():
    chain = read((config_folder() / "rlhf.yaml").read_text())
    for word in ("chain", None):
        assert problems(word, chain) == []
        for change, sign in (
            (lambda c: c["stages"].append("sfft"), "sfft"),
            (lambda c: c["stages"].append({"sft": {"model": {"betta": 1}}}), "betta"),
            (lambda c: c["common"].setdefault("data", {}).update(batch_sise=4), "batch_sise"),
            (lambda c: c.update(output="runs/x"), "output"),
            (lambda c: c["stages"].append({"sft": {"data": {"train_data": {"form": "score"}}}}), "form"),
        ):
            changed = copy.deepcopy(chain)
            change(changed)
            assert any(sign in problem for problem in problems(word, changed)), sign


def settings_in(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{section}.{name}": setting
        for section, part in schema["properties"].items()
        for name, setting in part.get("properties", {}).items()
    }


@pytest.mark.parametrize("word", ["fit", *(pytest.param(word, marks=pytest.mark.slow) for word in list(STAGES)[1:])])
def test_it_has_every_setting_of_the_parser_with_default_and_description(word):
    required = {"model.model_name_or_path": "a/b", "data.train_data": "c"}
    parsed = parse_settings(word, [f"--{name}={value}" for name, value in required.items()])
    shown = settings_in(schema_of(word))
    ours = {
        f"{section}.{name}"
        for section in parsed.keys(branches=True)
        if "." not in section
        for name in (vars(parsed[section]) if hasattr(parsed[section], "__dict__") else ())
    }
    read_over = {name for name, setting in shown.items() if "reads over" in setting.get("description", "")}
    assert shown.keys() - read_over == ours
    for name, setting in shown.items():
        assert setting["description"] and "``" not in setting["description"] and "\n" not in setting["description"]
        if "default" in setting and not isinstance(setting["default"], dict | list):
            assert setting["default"] == parsed[name], name


def test_what_follows_from_others_says_from_which():
    assert settings_in(schema_of("fit"))["trainer.max_epochs"] == {
        "not": {},
        "description": "Follows from self_play.iterations and self_play.epochs: leave it out.",
    }


def outside(bounds: Mapping[str, float]) -> list[float]:
    """The nearest numbers that are not in a range."""
    step = 1 if bounds == {"minimum": 1} else 0.001
    beyond = {"minimum": -step, "maximum": step, "exclusiveMinimum": 0, "exclusiveMaximum": 0}
    return [bound + beyond[name] for name, bound in bounds.items()]


REQUIRED = {
    "model_name_or_path": "a/b",
    "train_data": "c",
    "output_dir": "d",
    "url": "http://localhost:1/v1",
    "python": "python",
    "model": "m",
}


def places_of_ranges() -> Iterator[tuple[str, str]]:
    """Each class with a setting that has a range, and the settings as the schema has them."""
    for word in STAGES:
        schema, stage = schema_of(word), resolve_name(STAGES[word])
        for section, path in {"model": stage.module, "data": stage.data, **stage.callbacks}.items():
            yield path, schema["properties"][section]["properties"]
        for path, definition in schema["$defs"].items():
            if path.startswith("spin_lightning.") and "Reward" not in path:
                yield path, definition["properties"]


def test_what_is_outside_of_a_range_is_refused_by_the_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = set()
    for path, settings in places_of_ranges():
        kind = resolve_name(path)
        needed = {
            name: REQUIRED.get(name)
            for name, parameter in inspect.signature(kind).parameters.items()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }
        for name in settings.keys() & RANGES.keys():
            bounds = {key: settings[name][key] for key in settings[name] if "imum" in key}
            for value in outside(bounds):
                tried.add(name)
                with pytest.raises(UserError, match=name):
                    pytest.fail(f"{path} takes {name}={kind(**{**needed, name: value})}, outside of {bounds}")
    assert tried == {name for name in RANGES if "." not in name}


def test_an_unknown_word_is_refused_with_the_words(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["schema", "dppo"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and all(word in said for word in (*WORDS, "chain", "'dppo'"))


def test_the_command_prints_it(capsys):
    main(["schema", "sft"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["properties"] == schema_of("sft")["properties"]
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert printed["properties"]["model"]["properties"]["warmup_ratio"]["maximum"] == 1
