"""A package of somebody else: it installs, its classes work by class path, and its own contract tests pass.

All of it runs in processes of its own: a class that was imported once stays among the subclasses of its base.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import args_of, write_rows

SOURCE = Path(__file__).parent / "plugin_example"
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which pip put it, without asking any index."""
    target: Path = tmp_path_factory.mktemp("site")
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


@pytest.fixture
def python(installed: Path, tmp_path: Path) -> Python:
    """Runs Python where the package is installed, in an empty folder."""
    paths = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run([sys.executable, *args], env=env, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_it_is_installed_as_a_package(installed: Path):
    assert (installed / "spin_plugin").is_dir()
    assert list(installed.glob("spin_plugin_example-0.1.0.dist-info"))


def test_its_classes_play_a_game_by_class_path(python: Python, tmp_path: Path, model: str):
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
    ended = python("-m", "spin_lightning", *args_of("fit", model, rows, tmp_path / "run", *flags))
    assert ended.returncode == 0, ended.stderr
    assert "iteration 1: " in ended.stdout
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert "[0.5, 0.25]" in json.dumps(kept["model.loss"]) and kept["data.generator.generator"] == "no repeat"
    made = json.loads((tmp_path / "run" / "iteration_0" / "pairs_manifest.json").read_text())
    assert '"length": 2' in json.dumps(made)


def test_its_settings_are_checked_as_those_of_the_package(python: Python):
    flags = ["--model.model_name_or_path=a", "--data.train_data=b", "--model.loss=spin_plugin.HuberLoss"]
    refused = python("-m", "spin_lightning", "fit", *flags, "--model.loss.delta=-1")
    assert refused.returncode == 2
    assert "model.loss.delta must be positive, got -1" in refused.stderr


@pytest.mark.parametrize(
    "chosen",
    ["not test_the_callback", pytest.param("test_the_callback", marks=pytest.mark.slow)],  # it plays two games
)
def test_its_own_contract_tests_pass(chosen: str, python: Python):
    tests = str(SOURCE / "tests" / "test_contracts.py")
    ended = python("-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir=.", "-k", chosen, tests)
    assert ended.returncode == 0, ended.stdout
    assert f"{1 if chosen == 'test_the_callback' else 3} passed" in ended.stdout
