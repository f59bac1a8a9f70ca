"""A run's screen holds what this package says and what was asked for, and no library's news."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest
from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from spin_lightning.cli.commands import run
from spin_lightning.cli.quiet import NEWS, SHARED, silence_libraries


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log, as loud as it is without the command line."""
    before = {name: logging.getLogger(name).level for name in (*NEWS, SHARED)}
    for name in before:
        logging.getLogger(name).setLevel(logging.INFO)
    yield caplog
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def fit(model, rows, tmp_path):
    flags = [f"--model.model_name_or_path={model}", f"--data.train_data={rows}", "--data.generator.max_new_tokens=4"]
    quick = ["--self_play.iterations=1", "--self_play.epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    off = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    return ["fit", *flags, *quick, *off, f"--self_play.output_dir={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    "flags", [[], ["--model.opponent=resident", "--data.val_fraction=0", "--model.gradient_checkpointing=true"]]
)
def test_a_run_passes_on_no_news_and_no_warning_of_a_library(said, fit, flags):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does
        run([*fit, *flags])
    assert said.messages == []
    assert [str(warning.message) for warning in caught] == []


def test_what_a_setting_asks_for_is_said(said, fit):
    run([*fit, "--trainer.profiler=simple"])
    (report,) = said.messages
    assert "FIT Profiler Report" in report


def test_other_warnings_of_libraries_pass(said):
    silence_libraries()
    Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    rank_zero_info("a callback of the user's own says something")
    logging.getLogger(SHARED).warning("a disk is full")
    assert said.messages == ["a callback of the user's own says something", "a disk is full"]
    with pytest.warns(UserWarning, match="GPU available but not used"):
        rank_zero_warn("GPU available but not used.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_libraries()
        rank_zero_warn("Found 3 module(s) in eval mode at the start of training.")
    assert caught == []
