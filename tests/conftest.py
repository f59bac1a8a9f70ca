"""What the tests of whole games play with, unless a file has its own."""

from __future__ import annotations

import pytest
from helpers import save_tiny_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model of a few thousand weights, with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten short sums."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 10)
