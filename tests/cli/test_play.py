"""Stages in processes of their own play the game of ``fit``, to the bit, whatever ends one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import several
from games import Game, pairs_of, read, without_seconds
from several import Forked, environment_of, free_port, thorough

from spin_lightning import UserError
from spin_lightning.cli import children, play
from spin_lightning.cli.commands import main
from spin_lightning.cli.play import find_next, take_options


def play_by_stages(model: str, rows: str, folder: Path, **settings: Any) -> list[Game]:
    games = []
    for stage in ("generate", "train", "generate", "train"):
        asked = {**settings, "play": {**settings.get("play", {}), "stage": stage}}
        games.append(Game(model, rows, folder, **asked).play())
    return games


def assert_same_game(found: Path, expected: Path) -> None:
    for name in ("game.json", "start.json", "iteration_0/summary.json", "iteration_1/summary.json"):
        assert without_seconds(read(found / name)) == without_seconds(read(expected / name)), name
    for k in range(2):
        name = f"iteration_{k}/policy/model.safetensors"
        assert (found / name).read_bytes() == (expected / name).read_bytes()
        assert pairs_of(found, k) == pairs_of(expected, k)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "trainer": {"precision": "bf16-true"},
            "play": {"reset_optimizer": False},
            "module": {"lr_schedule": "cosine"},
        },
    ],
    ids=["float32", "master weights, kept optimizer"],
)
def test_stages_one_by_one_are_the_game(
    settings: dict[str, Any], model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Game(model, rows, tmp_path / "whole", **settings).play()
    capsys.readouterr()
    games = play_by_stages(model, rows, tmp_path / "run", **settings)
    assert [game.losses for game in games[::2]] == [[], []]
    assert games[1].losses + games[3].losses == whole.losses
    assert games[3].weights == whole.weights
    assert_same_game(tmp_path / "run", tmp_path / "whole")
    told = [line for line in capsys.readouterr().out.splitlines() if "next stage" in line]
    assert [line.partition(" (")[0] for line in told] == [
        "iteration 0: its pairs are complete. The next stage is train",
        "iteration 0 was trained and exported. The next stage is generate",
        "iteration 1: its pairs are complete. The next stage is train",
    ]
    assert not any("stage" in name for name in read(tmp_path / "run" / "run.json")["settings"])


def test_a_stage_that_is_not_next_does_nothing(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(name: str) -> str:
        Game(model, rows, tmp_path, play={"stage": name}).play()
        return capsys.readouterr().out

    assert "iteration 0: there is nothing to train. The next stage is generate" in stage("train")
    stage("generate")
    assert "iteration 0: there is nothing to generate. The next stage is train" in stage("generate")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_no_optimizer_takes_memory_while_the_opponent_responds(model: str, rows: str, tmp_path: Path) -> None:
    """Neither a checkpoint's state nor float32 master weights; one of a small weight stands in."""
    kept = []
    settings: dict[str, Any] = {"trainer": {"precision": "bf16-true"}}
    for stage in ("generate", "train", "generate"):
        game = Game(model, rows, tmp_path, play={"stage": stage}, **settings)
        make = game.module.configure_optimizers

        def remember(make: Callable[[], Any] = make) -> Any:
            made = make()
            kept.append(sum(weight.numel() for weight in made["optimizer"].master_weights))
            return made

        game.module.configure_optimizers = remember  # type: ignore[method-assign]
        game.play()
    generating, *training, again = kept
    assert generating == again == 16 and min(training) > 8000


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({}, (0, "generate")),
        ({"pairs 0": False}, (0, "generate")),
        ({"pairs 0": True}, (0, "train")),
        ({"pairs 0": True, "step": 3}, (0, "train")),
        ({"pairs 0": True, "updates 0": 4, "step": 3}, (0, "train")),  # exported, without a checkpoint yet
        ({"pairs 0": True, "updates 0": 4, "step": 4}, (1, "generate")),
        ({"pairs 0": True, "updates 0": 4, "step": 4, "pairs 1": True}, (1, "train")),
        ({"pairs 0": True, "updates 0": 4, "step": 6, "pairs 1": True}, (1, "train")),
    ],
)
def test_the_next_stage_is_read_off_the_folder(made: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    for name, value in made.items():
        kind, _, number = name.partition(" ")
        folder = tmp_path / ("checkpoints" if kind == "step" else f"iteration_{number}")
        folder.mkdir(exist_ok=True)
        if kind == "step":
            (folder / f"step_{value:09d}.ckpt").touch()
        elif kind == "pairs":
            (folder / "pairs_manifest.json").write_text(f'{{"complete": {str(value).lower()}}}')
        else:
            (folder / "summary.json").write_text(f'{{"updates": {value}}}')
    assert find_next(tmp_path) == expected


# --- the command ------------------------------------------------------------------------------------------------------


def flags_of(*args: Any) -> list[str]:
    return ["play", *several.flags_of(*args)[1:]]


@pytest.fixture(scope="module")
def fitted(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same game, played by ``fit``."""
    folder = tmp_path_factory.mktemp("fitted") / "run"
    main(several.flags_of(model, rows, folder))
    return folder


def stages_of(forked: type[Forked]) -> list[str]:
    return [command[-1].removeprefix("--self_play.stage=") for command in forked.commands]


@pytest.mark.parametrize(
    ("number", "fate", "after"),
    [
        (1, "0 generation 3 killed", ["generate", "train", "generate", "train"]),
        pytest.param(2, "0 training 2 killed", ["train", "generate", "train"], marks=thorough),
        pytest.param(2, "0 export 1 killed", ["train", "generate", "train"], marks=thorough),
        pytest.param(3, "0 generation 5 killed", ["generate", "train"], marks=thorough),
        pytest.param(4, "0 export 1 killed", ["train"], marks=thorough),
    ],
)
def test_a_stage_that_is_killed_ends_play_and_the_same_command_continues(
    number: int, fate: str, after: list[str], model: str, rows: str, fitted: Path, tmp_path: Path,
    forked: type[Forked], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    forked.fates[number] = fate
    with pytest.raises(SystemExit) as ended:
        main(flags_of(model, rows, tmp_path / "run"))
    stage = stages_of(forked)[-1]
    assert ended.value.code == 137 and len(forked.commands) == number
    sentences = capsys.readouterr().err.splitlines()
    assert sentences[-1].startswith(
        f"spin-lightning: error: the stage {stage} of iteration {(number - 1) // 2} was killed by SIGKILL."
    )
    forked.commands.clear()
    forked.fates.clear()
    main(flags_of(model, rows, tmp_path / "run"))
    assert stages_of(forked) == after
    assert_same_game(tmp_path / "run", fitted)
    assert "\n  stage:" not in (tmp_path / "run" / "config.yaml").read_text()


def test_a_signal_ends_the_stage_and_play(
    model: str, rows: str, fitted: Path, tmp_path: Path, forked: type[Forked], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def send() -> None:
        while not list(run.glob("iteration_0/pairs/*.parquet")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(SystemExit) as ended:
        main(flags_of(model, rows, run))
    sender.join()
    assert ended.value.code == 143 and stages_of(forked) == ["generate"]
    assert signal.getsignal(signal.SIGTERM) == before
    assert "spin-lightning: stopped by SIGTERM; what is finished is saved" in capsys.readouterr().err
    main(flags_of(model, rows, run))
    assert_same_game(run, fitted)


@thorough
def test_a_wrong_guess_costs_a_stage(
    model: str, rows: str, fitted: Path, tmp_path: Path, forked: type[Forked], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(play, "find_next", lambda folder: (0, "generate"))
        main(flags_of(model, rows, tmp_path / "run"))
    assert stages_of(forked) == ["generate", "generate", "train", "generate", "generate", "train"]
    assert_same_game(tmp_path / "run", fitted)


def test_where_neither_stage_comes_to_its_end_play_ends(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(children.Children, "run", lambda self, command, what: ran.append(what))
    main(flags_of(model, rows, tmp_path))
    assert ran == ["the stage generate of iteration 0", "the stage train of iteration 0"]
    assert "neither stage came to its end: something stops them, such as a callback" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--launcher"], "--launcher must be a command, got ''. Give what takes the place of python"),
        (["--launcher", "'x"], '--launcher must be a command, got "\'x": No closing quotation'),
        (["--generate-launcher=no_such_program x"], "--generate-launcher: there is no program 'no_such_program'"),
        (["--self_play.stage=train"], "self_play.stage cannot be 'train' with play"),
        (["--self_play.stage=score"], "self_play.stage"),
        (["--ckpt_path=x"], "ckpt_path cannot be 'x' with play"),
        (["--trainer.fast_dev_run=true"], "trainer.fast_dev_run cannot be True with play"),
        (["--trainer.max_time=00:01:00:00"], "trainer.max_time cannot be '00:01:00:00' with play"),
        (["--trainer.no_such=1"], "trainer.no_such"),
    ],
)
def test_what_cannot_be_played_is_refused(
    flags: list[str], words: str, model: str, rows: str, tmp_path: Path, forked: type[Forked],
    refusal: Callable[[Sequence[str]], str],
) -> None:  # fmt: skip
    assert words in refusal(flags_of(model, rows, tmp_path / "run", *flags))
    assert not forked.commands


def test_it_is_started_once(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[[Sequence[str]], str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "was started several times (WORLD_SIZE is '2')" in refusal(flags_of(model, rows, tmp_path / "run"))


def test_a_launcher_takes_the_place_of_python() -> None:
    alone = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
    options, rest = take_options(["--launcher=torchrun --nproc_per_node 8", "--config", "x"])
    train, generate = options.command("train", rest), options.command("generate", rest)
    assert Path(train[0]).name == "torchrun" and train[1:3] == ["--nproc_per_node", "8"]
    assert train[3:] == ["-m", "spin_lightning", "fit", "--config", "x", "--self_play.stage=train"]
    assert generate == [
        sys.executable, *["-m", "spin_lightning", "fit", "--config", "x"], *alone, "--self_play.stage=generate"
    ]  # fmt: skip
    options, rest = take_options(["--launcher", "torchrun", "--generate-launcher", "env A=b"])
    assert options.command("generate", rest)[1:] == ["A=b", "-m", "spin_lightning", "fit", "--self_play.stage=generate"]


def test_a_stage_setting_is_one_of_two() -> None:
    from spin_lightning import SelfPlay

    with pytest.raises(UserError, match=r"self_play.stage must be 'generate' or 'train', or be left out, got 'score'"):
        SelfPlay(stage="score")  # type: ignore[arg-type]


@thorough
def test_two_processes_that_a_launcher_starts_train_as_one_does(
    model: str, rows: str, fitted: Path, tmp_path: Path
) -> None:
    """The command line as it is typed."""
    two = ("--trainer.devices=2", "--trainer.strategy=ddp", "--launcher", "torchrun --nproc_per_node 2")
    two = (*two[:3], f"{two[3]} --master_port {free_port()}")
    command = [sys.executable, "-m", "spin_lightning", *flags_of(model, rows, tmp_path / "run", *two)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    for name in environment_of(0, 1, 1):
        environment.pop(name, None)
    subprocess.run(command, check=True, env=environment)
    for k in range(2):
        expected, found = (read(folder / f"iteration_{k}" / "summary.json") for folder in (fitted, tmp_path / "run"))
        for name in ("first_loss", "last_loss"):
            assert found[name] == pytest.approx(expected[name], abs=1e-5)
        ids = [[pair["generated_ids"] for pair in pairs_of(folder, k)] for folder in (fitted, tmp_path / "run")]
        assert ids[0] == ids[1]
