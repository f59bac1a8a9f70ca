"""Answers on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from games import FakeGenerator, Game
from transformers import AutoTokenizer

from spin_lightning import (
    ShowAnswers,
)
from spin_lightning.stages.samples import side_by_side


def test_answers_are_shown_side_by_side_without_control_characters(
    model: str, rows: str, tmp_path: Path, capsys: Any
) -> None:
    evil = "\x1b[2J\x07no\r\x9b1mway"
    ids = AutoTokenizer.from_pretrained(model).encode(evil, add_special_tokens=False)
    data = {"generator": FakeGenerator(lambda prompt, seed: ids, max_new_tokens=50)}
    Game(model, rows, tmp_path, callbacks=[ShowAnswers(2)], data=data, play={"iterations": 1, "epochs": 1}).play()
    shown = capsys.readouterr().out
    assert (
        shown.count(r"  iteration 0  \x1b[2J\x07no \x9b1mway") == 2
        and "  real         " in shown
        and "  prompt       " in shown
    )
    assert not set(shown) & {chr(code) for code in [*range(32), *range(127, 160)] if chr(code) != "\n"}
    assert side_by_side({"a": "", "bb": "word " * 99}, 30).splitlines()[0] == "  a   (empty)"
    assert len(side_by_side({"bb": "word " * 99}, 30).splitlines()) == 3
