"""A run writes in its own folder and nowhere else: names that are refused, and links that would lead out of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from games import Game
from helpers import args_of

from spin_lightning import ExportPolicy, RunCheckpoint, SelfPlay, UserError, last_checkpoint
from spin_lightning.cli.commands import main
from spin_lightning.runs.files import hold, refuse_links, run_folder

# --- names of folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "Give a name"),
        ("  ", "Give a name"),
        ("s3://bucket/run", "is a URL"),
        ("s3:/bucket/run", "is a URL"),  # what a Path makes of it
        ("gs://bucket", "is a URL"),
        ("file:///tmp/run", "is a URL"),
        ("hdfs:run", "is a URL"),
        ("C:\\runs\\mine", "one of Windows"),
        ("C:/runs", "one of Windows"),
        ("/proc/run", "not on a disk"),
        ("runs/a\nb", "control character"),
        ("runs/a\0b", "control character"),
        ("runs/\x1b[2J", "control character"),
        ("runs/" + "a" * 300, "too long"),
        ("~nobody-of-this-name/run", "Give another name"),
        ("runs/$JOB_ID", "write out what it stands for"),
        ("${HOME}/run", "write out what it stands for"),
    ],
)
def test_what_is_no_local_folder_is_refused_wherever_it_is_given(name: str, why: str) -> None:
    for make in (
        lambda: SelfPlay(name),
        lambda: ExportPolicy(name),
        lambda: RunCheckpoint(name),
        lambda: last_checkpoint(name),
    ):
        with pytest.raises(UserError, match=why) as caught:
            make()
        assert repr(name) in str(caught.value)


def test_a_file_is_no_folder_nor_is_what_would_be_in_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    for name in ("rows.jsonl", "rows.jsonl/run"):
        with pytest.raises(UserError, match=r"rows\.jsonl is no folder"):
            run_folder(tmp_path / name, "export.output_dir")


def test_unusual_names_are_names(tmp_path: Path) -> None:
    for name in ("ünï [x] {a}* \u202e", "exp:3", "2026-01-01T10:00", "a=b,c", "100%"):
        assert run_folder(tmp_path / name, "x") == tmp_path / name
    (tmp_path / "$kept").mkdir()  # it is there: somebody meant it
    assert run_folder(tmp_path / "$kept", "x") == tmp_path / "$kept"


def test_the_home_folder_is_meant_alike_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SelfPlay("~/run").output_dir == ExportPolicy("~/run").output_dir == tmp_path / "run"
    assert RunCheckpoint("~/run").folder == tmp_path / "run"
    assert last_checkpoint("~/run") is None
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_000000001.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match=f"every checkpoint in {tmp_path}/run/checkpoints is damaged"):
        last_checkpoint("~/run")


def test_fit_in_the_home_folder_makes_no_folder_called_tilde(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    args = [
        *args_of("fit", model, rows, "~/run"),
        "--self_play.iterations=1",
        "--self_play.epochs=1",
        "--data.generator.max_new_tokens=4",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    main(args)
    assert {"game.json", "config.yaml", "logs", "tensorboard", "checkpoints"} <= {
        path.name for path in (tmp_path / "home" / "run").iterdir()
    }
    assert not (tmp_path / "~").exists()
    capsys.readouterr()
    main(args)
    assert f"the run in {tmp_path}/home/run is over" in capsys.readouterr().out


def test_a_relative_name_that_reads_like_a_scheme_takes_pairs(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Game(model, rows, "exp:3", play={"iterations": 1, "epochs": 1}).play()
    assert list((tmp_path / "exp:3" / "iteration_0" / "pairs").glob("*.parquet"))


# --- links ------------------------------------------------------------------------------------------------------------

NAMES = [
    ".lock",
    ".lock_holder",
    ".probe",
    ".run.json.tmp",
    "run.json",
    "data_report.json",
    "start.json",
    "game.json",
    "config.yaml",
    "checkpoints",
    "logs",
    "tensorboard",
    "fast_dev_run",
    "policy",
    "policy.partial",
    "iteration_0",
    "iteration_0/pairs",
    "iteration_0/pairs_manifest.json",
    "iteration_0/policy.partial",
    "iteration_0/policy/model.safetensors",
    "iteration_0/laws",
    "start_laws",
    "start_laws/laws-000000000.parquet",
    "held_out_laws.safetensors",
    "evaluation",
    "checkpoints/step_000000003.ckpt",
    "checkpoints/step_000000003.ckpt.sha256",
    "logs/version_0",
]


@pytest.mark.parametrize("is_dangling", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_link_at_a_name_that_a_run_uses_is_refused(tmp_path: Path, name: str, is_dangling: bool) -> None:
    outside, link = tmp_path / "outside", tmp_path / "run" / name
    if not is_dangling:
        outside.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(UserError) as caught:
        refuse_links(tmp_path / "run")
    assert f"{link} is a link to '{outside}'" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_at_a_name_that_a_run_uses_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        hold(tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["logs", "iteration_0", "iteration_0/pairs", "iteration_0/laws", "start_laws", "evaluation", "checkpoints"]
)
def test_a_file_where_a_folder_belongs_and_the_reverse_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("")
    with pytest.raises(UserError, match="is a file, and a run has a folder of that name"):
        refuse_links(tmp_path / "run")
    (tmp_path / "other" / "run.json").mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder, and a run has a file of that name"):
        refuse_links(tmp_path / "other")


def test_other_links_and_a_run_folder_that_is_a_link_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "disk" / "iteration_0").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "run" / "notes").symlink_to(tmp_path)
    (tmp_path / "run" / ".venv").symlink_to(tmp_path / "nowhere")
    refuse_links(tmp_path / "run")
    hold(tmp_path / "run").release()
    assert (tmp_path / "disk" / ".lock_holder").read_text().startswith("process ")


def test_files_with_a_second_name_elsewhere_keep_their_text_there(tmp_path: Path) -> None:
    """Hard links: what is there is replaced, never written to."""
    run, outside = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    outside.write_text("precious")
    (run / ".lock_holder").hardlink_to(outside)
    hold(run).release()
    assert outside.read_text() == "precious" and "process" in (run / ".lock_holder").read_text()


def folders_with_links(tmp_path: Path) -> dict[str, Path]:
    """Somebody's folder, and runs with a link to it at each of four names."""
    precious = tmp_path / "precious"
    (precious / "pairs").mkdir(parents=True)
    (precious / "policy").mkdir()
    for name in ("pairs/thesis.txt", "policy/insurance.txt", "README.md", "config.json", ".step.tmp"):
        (precious / name).write_text("mine")
    runs = {}
    for number, name in enumerate([".lock_holder", "iteration_0", "iteration_0/policy.partial", "checkpoints"]):
        link = tmp_path / f"run_{number}" / name
        link.parent.mkdir(parents=True)
        link.symlink_to(precious / "README.md" if name == ".lock_holder" else precious)
        runs[name] = tmp_path / f"run_{number}"
    return runs


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_game_and_sft_leave_what_is_behind_a_link_as_it_was(
    model: str, rows: str, tmp_path: Path, refusal: Callable[[list[str]], str]
) -> None:
    runs = folders_with_links(tmp_path)
    before = contents(tmp_path / "precious")
    for run in runs.values():
        with pytest.raises(UserError, match="is a link to"):
            Game(model, rows, run, play={"iterations": 1, "epochs": 1}).play()
    runs["policy.partial"] = tmp_path / "run_4"
    runs["policy.partial"].mkdir()
    (runs["policy.partial"] / "policy.partial").symlink_to(tmp_path / "precious")
    for run in runs.values():
        assert "is a link to" in refusal(args_of("sft", model, rows, run, "--trainer.accelerator=cpu"))
    assert contents(tmp_path / "precious") == before
    for run in runs.values():
        assert not (run / "logs").exists()  # refused before the loggers are made
