"""``--help`` of a stage: at once, and the same settings, defaults and words that the parser has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from spin_lightning.cli import commands
from spin_lightning.cli.commands import COMMANDS, STAGES, main
from spin_lightning.cli.short_help import OF_TRAINER, settings_of
from spin_lightning.cli.stage_cli import parse_settings

REQUIRED = {"model.model_name_or_path": "a/b", "data.train_data": "c"}


@pytest.mark.parametrize("word", ["fit", "sft", "ppo", "validate"])
def test_it_imports_nothing_heavy_and_takes_no_time(word):
    code = (
        f"import sys, time; from spin_lightning.cli import main; main([{word!r}, '--help'])\n"
        "assert not {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules)\n"
        "assert time.process_time() < 3"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith(f"usage: spin-lightning {word} --config FILE")


def parsed(word: str) -> Any:
    return parse_settings(word, [f"--{name}={value}" for name, value in REQUIRED.items()])


@pytest.mark.parametrize("word", STAGES)
def test_settings_and_defaults_are_those_of_the_parser(word):
    settings, shown = parsed(word), settings_of(STAGES[word])
    follow = {"checkpoint.dirpath", "report.output_dir", *({"trainer.max_epochs"} if word in ("fit", "ppo") else ())}
    for section, (title, of_section) in shown.items():
        assert title.endswith(".")
        expected = {}
        for name, value in vars(settings[section]).items():
            expected[f"{section}.{name}"] = value
            if section != "trainer" and getattr(value, "class_path", None) and "optimizer" not in name:
                expected[f"{section}.{name}"] = value.class_path.rpartition(".")[2]
                expected |= {f"{section}.{name}.{key}": item for key, item in vars(value.init_args).items()}
        names = {setting.name for setting in of_section}
        if section == "trainer":
            assert names == {f"trainer.{name}" for name in OF_TRAINER} - follow
        else:
            assert names == set(expected) - follow
        for name, default, text in ((setting.name, setting.default, setting.text) for setting in of_section):
            assert text.endswith((".", "...")), name
            if name == "model.optimizer":
                assert default == expected[name].class_path.replace("torch.optim.adamw.", "torch.optim.")
            elif name in (*REQUIRED, "rollouts.reward"):
                assert default == "required"
            else:
                shown_value = default.partition(";")[0]
                is_text = isinstance(expected[name], str)
                assert (shown_value if is_text else json.loads(shown_value)) == expected[name], name


def plain(text: str) -> str:
    return re.sub(r"\bNone\b", "null", " ".join(text.split()).replace("``", "")).replace("- ", "-")


@pytest.mark.parametrize("word", STAGES)
def test_texts_are_those_of_the_parser_which_all_of_the_help_is(word, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as stop:
        main([word, "--help=all"])
    everything = capsys.readouterr().out
    assert stop.value.code == 0 and everything.startswith(f"usage: spin-lightning {word} ")
    assert "--trainer.detect_anomaly" in everything and "known subclasses" in everything
    for section, (_, settings) in settings_of(STAGES[word]).items():
        for setting in settings if section != "trainer" else ():
            if setting.name.count(".") == 1:  # those of classes are in --model.loss.help
                assert plain(setting.text) in plain(everything), setting.name


@pytest.mark.parametrize("columns", ["40", "80", "300"])
def test_it_is_as_wide_as_the_terminal_within_reason(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    main(["fit", "-h"])
    printed = capsys.readouterr().out
    width = min(max(int(columns), 80), 100)
    assert width - 10 < max(map(len, printed.splitlines())) <= width
    beta = printed.partition("--model.beta ")[2].splitlines()[0]
    assert beta.split() == ["The", "paper's", "lambda.", "[1.0]"]
    assert "[equilibrium; or harm, never]" in " ".join(printed.split())


def test_help_of_a_class_is_the_parser_s(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.loss.help=SpaceLoss"])
    assert stop.value.code == 0 and "--model.loss.mu" in capsys.readouterr().out


def test_a_class_hands_its_settings_on(tmp_path, monkeypatch, capsys):
    """A stage in one file outside of the package: bases, keyword-only settings, and no constructor at all."""
    (tmp_path / "further_stage.py").write_text(
        '''
from typing import Literal
from spin_lightning import RunCheckpoint as Kept
from spin_lightning.stages.stage import Stage

class Base:
    """Below.

    Args:
        rate: How fast. And more.
        kind: Which ``one``.
    """
    def __init__(self, rate: float = 3e-7, kind: "int" | Literal["a", "b"] = "a"): ...

class Module(Base):
    """Trains.

    Args:
        size: How large (e.g. 3). None: as large as can be.
    """
    def __init__(self, *, size: int | None = None, rate: float = 0.5, **more): super().__init__(**more)

class Data(Module):
    pass

STAGE = Stage(module="further_stage.Module", data="further_stage.Data", callbacks={"kept": "further_stage.Kept"},
              folder="kept", over_file="x", mark="x", defaults={"model.size": 7}, links={"data.kind": ((), str)})
'''
    )
    monkeypatch.syspath_prepend(tmp_path)
    shown = settings_of("further_stage.STAGE")
    lines = [(item.name, item.text, item.default) for _, settings in shown.values() for item in settings]
    assert lines[:5] == [
        ("model.size", "How large (e.g. 3).", "7"),
        ("model.rate", "", "0.5"),
        ("model.kind", "Which one.", "a; or b"),
        ("data.size", "How large (e.g. 3).", "null"),
        ("data.rate", "", "0.5"),
    ]
    assert lines[5][0] == "kept.dirpath" and shown["model"][0] == "Trains."
    monkeypatch.setitem(commands.COMMANDS, "further", commands.Command("train on", "further_stage.STAGE"))
    main(["further", "--help"])
    assert "usage: spin-lightning further" in capsys.readouterr().out and "further" in COMMANDS


def test_the_first_page_names_adapters_devices_and_servers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    main(["fit", "--help"])
    first = " ".join(capsys.readouterr().out.split())
    for words in ("--model.adapter.r 16", "--trainer.devices", "--trainer.strategy With several devices ddp, or fsdp2",
                  "(its python has vLLM)", "(its url is a vLLM's)"):  # fmt: skip
        assert words in first, words
    main([])
    overview = capsys.readouterr().out
    for words in ("--model.adapter.r 16", "--trainer.devices 2 --trainer.strategy ddp", "--data.generator.python"):
        assert words in overview, words
    assert max(map(len, overview.splitlines())) <= 80


def test_words_of_a_reward_and_of_a_cap_tell_what_is_to_be_given():
    texts = {setting.name: setting.text for _, settings in settings_of(STAGES["ppo"]).values() for setting in settings}
    assert "must be given: NumberMatch, TextMatch, FunctionReward, ModelReward, JudgeReward" in texts["rollouts.reward"]
    defaults = {s.name: s.default for _, settings in settings_of(STAGES["ppo"]).values() for s in settings}
    assert (defaults["rollouts.reward"], defaults["data.train_data"]) == ("required", "required")
    assert [name for name, default in defaults.items() if default == "required"] == [
        *("model.model_name_or_path", "data.train_data", "rollouts.reward")
    ]
    texts = {s.name: s.text for _, settings in settings_of(STAGES["reward"]).values() for s in settings}
    assert "or left out where too_long is drop" in texts["data.max_response_tokens"]


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["fit", "--help"], ["push", "--help"], ["schema", "sft"]])
def test_what_is_printed_ends_quietly_when_its_reader_has_had_enough(args: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head` leaves
    command = [sys.executable, "-c", "from spin_lightning.cli import main; main()", *args]
    with os.fdopen(writer, "wb") as stdout:
        ended = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (141, "")
