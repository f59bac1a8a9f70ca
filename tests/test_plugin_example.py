"""A package of somebody else: it installs, its classes work by class path, and its own contract tests pass."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import args_of, write_rows

from spin_lightning.cli.commands import main, run
from spin_lightning.cli.stage_cli import parse_settings

SOURCE = Path(__file__).parent / "plugin_example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder in which pip put it, without asking any index."""
    target = tmp_path_factory.mktemp("site")
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    sys.path.insert(0, str(target))
    yield target
    sys.path.remove(str(target))
    for name in [name for name in sys.modules if name.partition(".")[0] == "spin_plugin"]:
        del sys.modules[name]


def test_it_is_installed_as_a_package(installed):
    import spin_plugin

    assert Path(spin_plugin.__file__).is_relative_to(installed)
    assert list(installed.glob("spin_plugin_example-0.1.0.dist-info"))


def test_its_classes_play_a_game_by_class_path(installed, tmp_path, model, capsys):
    rows = write_rows(tmp_path / "rows.jsonl")
    flags = [
        "--model.loss=spin_plugin.HuberLoss",
        "--model.loss.delta=[0.5,0.25]",
        "--data.generator=spin_plugin.NoRepeat",
        "--data.generator.max_new_tokens=4",
        "--data.answers_per_prompt=2",
        "--self_play.pairs=real_wrong",
        "--self_play.reward=spin_plugin.ShortAndRight",
        "--self_play.reward.length=2",
        "--trainer.callbacks+=spin_plugin.CountUpdates",
        "--self_play.iterations=2",
        "--self_play.epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
        "--data.val_fraction=0.2",
    ]
    run(args_of("fit", model, rows, tmp_path / "run", *flags))
    assert "iteration 1: " in capsys.readouterr().out
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert "[0.5, 0.25]" in json.dumps(kept["model.loss"]) and kept["data.generator.generator"] == "no repeat"
    made = json.loads((tmp_path / "run" / "iteration_0" / "pairs_manifest.json").read_text())
    assert '"length": 2' in json.dumps(made)


def test_its_settings_are_checked_as_those_of_the_package(installed, capsys):
    flags = ["--model.model_name_or_path=a", "--data.train_data=b", "--model.loss=spin_plugin.HuberLoss"]
    assert parse_settings("fit", flags).model.loss.init_args.target == 1.0
    with pytest.raises(SystemExit):
        main(["fit", *flags, "--model.loss.delta=-1"])
    assert "model.loss.delta must be positive, got -1" in capsys.readouterr().err


def contracts():
    return ["test_the_loss", "test_the_generator", "test_the_reward", "test_the_callback"]


@pytest.mark.parametrize(
    "name",
    [*contracts()[:-1], pytest.param(contracts()[-1], marks=pytest.mark.slow)],  # it plays two games
)
def test_its_own_contract_tests_pass(name, installed):
    spec = importlib.util.spec_from_file_location("contracts", SOURCE / "tests" / "test_contracts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [each for each in vars(module) if each.startswith("test_")] == contracts()
    getattr(module, name)()
