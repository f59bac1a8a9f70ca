"""The scripts in examples/ run as a user would run them, and say what they reached."""

from __future__ import annotations

import re
import runpy
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
REACHED = {
    "play_the_game": r"iteration 1: first loss 0\.693\d, last loss 0\.[0-6]\d+, held-out NLL \d\.\d+",
    "own_loss": r"iteration 0: first loss 1\.0000, .*\niteration 1: first loss 4\.0000",  # (target - 0)**2
    "own_generator": r"iteration 1: 38 pairs, answers of \d\.\d tokens",
}


def test_there_is_a_promise_for_each_example():
    assert {path.stem for path in EXAMPLES} == set(REACHED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_says_what_it_reached(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runpy.run_path(str(path), run_name="__main__")  # in a process of its own all but the imports would be the same
    said = capsys.readouterr().out
    assert re.search(REACHED[path.stem], said), said
    assert len(path.read_text().splitlines()) <= 80
    assert {made.name for made in tmp_path.iterdir()} <= {
        made.name for made in tmp_path.glob("tmp*")
    }  # nothing where it was run
