"""docs/extending.md: its examples are one file that works as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import plugin_of_the_docs, write_rows

from spin_lightning import testing
from spin_lightning.cli import commands

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()


@pytest.fixture
def plugin(monkeypatch):
    module, added = plugin_of_the_docs()
    for word, command in added.items():
        monkeypatch.setitem(commands.COMMANDS, word, command)
    return module


def test_its_classes_keep_the_promises(plugin):
    plugin.test_my_plugin()


def test_its_stage_trains_by_its_word_and_shows_its_settings(plugin, tmp_path, model, capsys):
    commands.main(["tempered", "--help"])
    assert "--model.tail" in capsys.readouterr().out
    args = [f"--model.model_name_or_path={model}", f"--data.train_data={write_rows(tmp_path / 'rows.jsonl')}"]
    args += [f"--export.output_dir={tmp_path}/run", "--model.tail=-30", "--trainer.accelerator=cpu"]
    commands.main(
        ["tempered", *args, "--data.val_fraction=0.2", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    )
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()


def test_every_check_is_in_its_table():
    checks = {name for name in vars(testing) if name.startswith("check_")}
    assert checks == set(re.findall(r"^\| `(check_\w+)\(", PAGE, re.M))
