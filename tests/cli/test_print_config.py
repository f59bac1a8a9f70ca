"""``--print_config``: commented, and the same settings again when it is read."""

from __future__ import annotations

from functools import partial

import pytest
import yaml

from spin_lightning.cli import score
from spin_lightning.cli.commands import COMMANDS, main
from spin_lightning.cli.comments import WIDTH, with_comments
from spin_lightning.cli.stage_cli import parse_settings
from spin_lightning.types import UserError

LONG = "a folder with a name of many words/" * 4 + "rows.jsonl"
REQUIRED = ["--model.model_name_or_path=a/b", f"--data.train_data={LONG}"]


def printed(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*args])
    assert stop.value.code == 0
    return capsys.readouterr().out


#: The commands that are tested by default, and those that are left for ``make slow``.
WORDS = [
    pytest.param(word, marks=[] if word in ("fit", "validate", "score") else pytest.mark.slow)
    for word in [*(word for word, command in COMMANDS.items() if command.stage), "score"]
]


@pytest.mark.parametrize("word", WORDS)
def test_it_is_commented_and_reads_back_to_the_same_settings(word, capsys, tmp_path):
    text, plain = (printed(capsys, word, *REQUIRED, f"--print_config{form}") for form in ("", "=plain"))
    assert yaml.safe_load(text) == yaml.safe_load(plain) and "#" not in plain.partition("\n")[2]
    assert max(map(len, text.splitlines())) <= WIDTH == 120
    path = tmp_path / "config.yaml"
    path.write_text(text)
    parse = score.parse if word == "score" else partial(parse_settings, word)
    reward = ["--score.reward=NumberMatch"] if word == "score" else []
    again, before = parse(["--config", str(path), *reward]), parse([*REQUIRED, *reward])
    assert again.pop("config") and not before.pop("config") and again == before
    assert "note:" not in capsys.readouterr().out
    lines = text.splitlines()
    for number, line in enumerate(lines):  # every setting of ours has its sentence
        if line.startswith("  ") and ":" in line.partition("#")[0] and "#" not in line:
            indent = len(line) - len(line.lstrip())
            assert lines[number - 1].startswith(" " * indent + "# ") or line.strip() in (
                "init_args:",
                "output_dir: null",
            )


def test_it_is_what_the_command_prints_and_knows_the_classes_that_were_chosen(capsys):
    text = printed(capsys, "fit", "--print_config", "--model.loss=games.SecretiveLoss", "--model.loss.push_token=x")
    for line in (
        "model:\n",
        "  beta: 1.0                                   # The paper's lambda.\n",
        "# Self-play fine-tuning of one language model (Chen et al. 2024, arXiv:2401.01335)\n",
        "# Has a setting that its run must not keep.\n",
        "  lr_schedule: linear\n",
    ):
        assert line in text
    assert "restarted each iteration. Or: cosine, constant" in text
    flat = " ".join(text.split())
    assert "SecretiveLoss" in flat and "push_token: x" in flat


def test_only_changes_can_be_printed_commented_too(capsys):
    text = printed(capsys, "sft", *REQUIRED, "--model.warmup_ratio=0.2", "--print_config=skip_default")
    assert yaml.safe_load(text)["model"] == {"model_name_or_path": "a/b", "warmup_ratio": 0.2}
    assert "# Share of the steps" in text


def test_a_text_of_several_lines_keeps_its_comment_above_it():
    text = with_comments(yaml.safe_dump({"data": {"train_data": LONG}}, width=60), "sft")
    assert yaml.safe_load(text) == {"data": {"train_data": LONG}}
    assert (
        "  # A file (JSON, JSONL, CSV, TSV, Parquet; also .gz or .zst), a folder, or a hub name.\n  train_data:" in text
    )


def test_an_unknown_form_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="takes plain and skip_default behind =, got 'yaml'"):
        parse_settings("fit", ["--print_config=yaml"])
