"""What tests play with, unless a file has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import save_tiny_model, write_rows

from spin_lightning.cli.commands import main

torch.set_num_threads(1)  # sums are added up in the same order on every machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model of a few thousand weights, with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten short sums."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 10)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], str]:
    """What the command line prints to stderr as it ends with exit code 2."""

    def run(args: Sequence[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(args)
        printed = capsys.readouterr().err
        assert stop.value.code == 2, printed
        assert "Traceback" not in printed
        return printed

    return run
