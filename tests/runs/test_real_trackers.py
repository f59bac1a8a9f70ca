"""The trackers themselves, each on this machine alone. ``make trackers`` installs them in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import args_of, write_rows

SECRET = "sk-abcdefghijklmnopqrstuvwx0123"
METRICS = {"loss", "rewards/margins", "rewards/accuracies", "logps/real", "val/nll", "lr", "grad_norm", "iteration"}
pytestmark = pytest.mark.no_cover


@pytest.fixture
def fit(tmp_path, model):
    rows = write_rows(tmp_path / "rows.jsonl")

    def play(iterations: int, *flags: str, expect: int = 0) -> str:
        args = args_of("fit", model, rows, tmp_path / "run", f"--self_play.iterations={iterations}")
        args += ["--self_play.epochs=1", "--trainer.accelerator=cpu", "--data.batch_size=4", "--data.val_fraction=0.2"]
        args += ["--data.generator.max_new_tokens=4", "--model.loss=games.SecretiveLoss"]
        args += [f"--model.loss.push_token={SECRET}", *flags]
        done = subprocess.run(
            [sys.executable, "-m", "spin_lightning", *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == expect, done.stdout + done.stderr
        assert SECRET not in done.stdout + done.stderr
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
        return done.stdout + done.stderr

    return play


def records_of(path: Path) -> Iterator[Any]:
    """What is in a file of wandb: the log format of LevelDB, behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_offline(fit, tmp_path):
    pytest.importorskip("wandb")
    for iterations in (1, 2):
        fit(
            iterations,
            "--trainer.logger+=WandbLogger",
            "--trainer.logger.offline=true",
            "--trainer.logger.project=mine",
        )
    runs, names, settings = set(), set(), {}
    for path in tmp_path.rglob("*.wandb"):
        for record in records_of(path):
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.project, record.run.run_id))
            for item in record.history.item:
                names.add("/".join(item.nested_key) or item.key)
            for item in record.config.update:
                settings[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    ((project, number),) = runs  # two commands, one run
    assert project == "mine" and json.loads((tmp_path / "run" / "trackers.json").read_text()).popitem()[1] == number
    assert names >= METRICS and settings["model"]["loss"]["init_args"]["push_token"] == "***"


def test_mlflow_in_a_file(fit, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    place = f"sqlite:///{tmp_path}/mlflow.db"
    for iterations in (1, 2):
        fit(iterations, "--trainer.logger+=MLFlowLogger", f"--trainer.logger.tracking_uri={place}")
    client = mlflow.MlflowClient(place)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert set(run.data.metrics) >= METRICS
    assert run.data.params["model/loss/init_args/push_token"] == "***" and run.data.params["model/beta"] == "1.0"
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == sorted(set(steps)) and len(steps) > 4  # of both commands, each once


def test_mlflow_that_does_not_answer(fit, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    flags = ("--trainer.logger+=MLFlowLogger", "--trainer.logger.tracking_uri=http://localhost:9")
    said = fit(1, *flags, expect=2)
    assert "the tracker MLFlowLogger cannot begin: " in said and "leave it out of trainer.logger" in said
    assert not (tmp_path / "run" / "iteration_0").exists()


def test_trackio_on_this_machine(fit, tmp_path):
    pytest.importorskip("trackio")
    for iterations in (1, 2):
        fit(iterations, "--trainer.logger+=TrackioLogger", "--trainer.logger.folder=kept")
    code = (
        "import json, trackio; (run,) = trackio.Api().runs('spin-lightning'); "
        "from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps([run.config, S.get_logs('spin-lightning', run.name)], default=str))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "kept")},
    )
    settings, logs = json.loads(done.stdout.splitlines()[-1])
    assert {name for row in logs for name in row} >= METRICS
    assert settings["model"]["loss"]["init_args"]["push_token"] == "***"


def test_all_at_once_beside_the_run_s_own_logs(fit, tmp_path):
    for package in ("wandb", "mlflow", "trackio"):
        pytest.importorskip(package)
    fit(
        1,
        "--trainer.logger+=WandbLogger",
        "--trainer.logger.offline=true",
        "--trainer.logger+=MLFlowLogger",
        f"--trainer.logger.tracking_uri=sqlite:///{tmp_path}/mlflow.db",
        "--trainer.logger+=TrackioLogger",
        "--trainer.logger.folder=kept",
    )
    assert len(json.loads((tmp_path / "run" / "trackers.json").read_text())) == 3
    for pattern in ("wandb/offline-run-*/*.wandb", "mlflow.db", "kept/*.db", "run/logs/*/metrics.csv"):
        assert list(tmp_path.glob(pattern)), pattern
