"""The ten promises of docs/reliability.md, each with the test that is named after it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from games import CountingGenerator, Do, DoLast, FakeGenerator, Game, Stopped, read
from helpers import args_of, save_tiny_model

from spin_lightning import (
    AlphaSpinLoss,
    AtomicCheckpointIO,
    DpopLoss,
    Health,
    Interrupted,
    NonFiniteError,
    StorageError,
    UserError,
    last_checkpoint,
)
from spin_lightning.cli import commands
from spin_lightning.generation.pair_store import PairStore
from spin_lightning.runs import signals
from spin_lightning.runs.checkpoints import checkpoints_in, damage, hash_file
from spin_lightning.runs.files import sha256_of
from spin_lightning.runs.settings import HARMLESS

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Game:
    """The game that nothing disturbed."""
    return small(model, rows, tmp_path_factory.mktemp("whole")).play()


def small(model: str, rows: str, folder: Path, **settings: Any) -> Game:
    return Game(model, rows, folder, **{"module": {"opponent": "resident"}, **settings})


@contextmanager
def copying_at_every_write(
    folder: Path, moments: Path, keeps: Callable[[int], bool] = lambda number: True
) -> Iterator[list[Path]]:
    """Copies of a run's folder as a kill would leave it: before and after each rename and each removal in it, and once
    more with what was being written cut in half. Only those are made whose number, from 1, is to be kept."""
    taken: list[Path] = []
    numbers = itertools.count(1)

    def copy() -> Path | None:
        if not keeps(number := next(numbers)):
            return None
        taken.append(moments / f"{number:04d}")
        shutil.copytree(folder, taken[-1])
        return taken[-1]

    def around(function: Callable[..., Any], has_source: bool) -> Callable[..., Any]:
        def kept(path: Any, *args: Any, **kwargs: Any) -> Any:
            if Path(path).absolute().is_relative_to(folder):
                copy()
                if has_source and Path(path).is_file() and (moment := copy()) is not None:
                    half = moment / Path(path).absolute().relative_to(folder)
                    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
            result = function(path, *args, **kwargs)
            if Path(path).absolute().is_relative_to(folder):
                copy()
            return result

        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", around(os.replace, True))
        patch.setattr(Path, "rename", around(Path.rename, False))
        patch.setattr(Path, "unlink", around(Path.unlink, False))
        patch.setattr(shutil, "rmtree", around(shutil.rmtree, False))
        yield taken


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file of a run that is read again."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files if not path.name.startswith(".")}


def distinct(moments: list[Path]) -> list[Path]:
    """One moment of each state of the files that are read again, drawn by lot: they differ in what was half written."""
    states: dict[str, list[Path]] = {}
    for moment in moments:
        states.setdefault(json.dumps(contents(moment)), []).append(moment)
    return [random.Random(number).choice(alike) for number, alike in enumerate(states.values())]


@pytest.mark.no_cover
@pytest.mark.parametrize("every", [8, pytest.param(2, marks=pytest.mark.slow)])
def test_p1_killed_at_any_point_the_same_command_ends_with_the_same_weights(
    every: int, model: str, rows: str, tmp_path: Path
) -> None:
    """Every single crash; for one in so many a second one, while it recovers."""
    short = {"play": {"epochs": [2, 1]}}
    with copying_at_every_write(tmp_path / "run", tmp_path / "moments") as moments:
        whole = small(model, rows, tmp_path / "run", **short).play()
    states = distinct(moments)
    assert len(moments) > 200 and len(states) > 45
    for number, moment in enumerate(states):
        shutil.copytree(moment, tmp_path / "again")
        lot = random.Random(number)
        # the last that is kept is one of all, drawn evenly
        keeps = (lambda count, lot=lot: lot.random() * count < 1) if number % every == 0 else lambda count: False
        with copying_at_every_write(tmp_path / "again", tmp_path / "second", keeps) as seconds:
            assert small(model, rows, tmp_path / "again", **short).play().weights == whole.weights, moment.name
        if seconds:
            second = small(model, rows, seconds[-1], **short).play()
            assert second.weights == whole.weights, f"{moment.name}, {seconds[-1].name}"
            shutil.rmtree(tmp_path / "second")
        shutil.rmtree(tmp_path / "again")


@pytest.mark.no_cover
def test_p2_a_kill_costs_at_most_a_shard_or_the_steps_between_two_checkpoints(
    model: str, rows: str, tmp_path: Path, whole: Game
) -> None:
    for steps, stops in ((1, (1, 4, 12)), (3, (2, 3, 4, 8, 11))):  # in the middle and at the end of epochs
        for stop in stops:
            folder = tmp_path / f"{steps}_{stop}"
            last = DoLast(on_train_batch_end=lambda trainer, *_, n=stop: stop_after(trainer, n))
            with pytest.raises(Stopped):
                small(model, rows, folder, last=[last], every_n_steps=steps).play()
            game = small(model, rows, folder, every_n_steps=steps).play()
            redone = stop - (len(whole.losses) - len(game.losses))
            assert 0 <= redone <= max(steps, 2)  # an epoch's last step is saved with the epoch's end
            assert game.weights == whole.weights
    for stop in (4, 9):  # more in test_resume.py
        folder, generator = tmp_path / f"answer_{stop}", CountingGenerator(5)
        generator.breaks_after = stop
        with pytest.raises(Stopped):
            small(model, rows, folder, data={"generator": generator}, play={"shard_size": 2}).play()
        continued = CountingGenerator(5)
        small(model, rows, folder, data={"generator": continued}, play={"shard_size": 2}).play()
        assert 16 - continued.answered > stop - 2  # of 16 answers, all but those of the shard in progress were kept


def stop_after(trainer: Any, number: int) -> None:
    if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == number:
        raise Stopped(number)


def test_p3_at_no_instant_is_there_no_valid_checkpoint(model: str, rows: str, tmp_path: Path) -> None:
    with copying_at_every_write(tmp_path / "run", tmp_path / "moments") as moments:
        small(model, rows, tmp_path / "run").play()
    was_saved, most = False, 0
    for moment in moments:
        valid = [path for path in checkpoints_in(moment / "checkpoints") if damage(path) is None]
        assert valid or not was_saved, moment.name
        was_saved, most = was_saved or bool(valid), max(most, len(valid))
    assert was_saved and most == 3  # the two that are kept, and a new one before the oldest is removed
    assert len(checkpoints_in(tmp_path / "run" / "checkpoints")) == 2


def test_p3_a_run_that_goes_back_sets_its_later_checkpoints_aside(
    model: str, rows: str, tmp_path: Path, whole: Game, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Stopped):
        small(model, rows, tmp_path, last=[DoLast(on_train_batch_end=lambda t, *_: stop_after(t, 7))]).play()
    newest, older = checkpoints_in(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step_000000005 (copy).ckpt").write_bytes(b"of a person")
    hash_file(newest).write_bytes(b"\xff\xfe")  # damaged itself
    game = small(model, rows, tmp_path, last=[DoLast(on_train_batch_end=lambda t, *_: stop_after(t, 7))])
    with pytest.raises(Stopped):
        game.play()
    assert f"note: the run continues from step 6; set aside {newest}" in capsys.readouterr().out
    assert [damage(path) for path in checkpoints_in(tmp_path / "checkpoints")] == [None, None]
    assert newest.exists() and older.exists() and newest.with_name(f"{newest.name}.set_aside").exists()
    assert small(model, rows, tmp_path).play().weights == whole.weights


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :],
    "emptied": lambda data: b"",
}


@pytest.mark.parametrize("how", [*DAMAGES, "swapped"])
def test_p4_nothing_damaged_is_read(
    how: str, model: str, rows: str, tmp_path: Path, whole: Game, capsys: pytest.CaptureFixture[str]
) -> None:
    last = DoLast(on_train_batch_end=lambda trainer, *_: stop_after(trainer, 7))
    with pytest.raises(Stopped):
        small(model, rows, tmp_path / "run", last=[last]).play()
    newest, older = checkpoints_in(tmp_path / "run" / "checkpoints")
    shards = sorted((tmp_path / "run" / "iteration_1" / "pairs").iterdir())
    others = {newest: older, shards[0]: shards[1]}
    refused = {
        tmp_path / "run/iteration_1/pairs_manifest.json": "not those that iteration 1 began with|is damaged",
        shards[0]: "is not the file that was written",
        tmp_path
        / "run/iteration_0/policy/model.safetensors": r"the opponent .* cannot be read|does not hold the weights",
    }
    for path in (newest, *refused):
        if how == "swapped" and path not in others:
            continue
        data = path.read_bytes()
        path.write_bytes(others[path].read_bytes() if how == "swapped" else DAMAGES[how](data))
        if path == newest:  # the one before it is whole, and leads to the same weights
            capsys.readouterr()
            assert last_checkpoint(tmp_path / "run") == str(older)
            assert f"{newest} is not the file that was written; trying the one before it" in capsys.readouterr().out
            with pytest.raises(UserError, match=f"{newest.name} is not the file that was written. Restore it"):
                AtomicCheckpointIO().load_checkpoint(newest)
            shutil.copytree(tmp_path / "run", tmp_path / "fallen_back")
            assert small(model, rows, tmp_path / "fallen_back").play().weights == whole.weights
        else:
            with pytest.raises(UserError, match=refused[path]):
                small(model, rows, tmp_path / "run").play()
        path.write_bytes(data)
    for path in (newest, older):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged. Restore one"):
        small(model, rows, tmp_path / "run").play()


def test_p5_pairs_of_another_opponent_data_set_or_sampling_are_not_trained_on(
    model: str, rows: str, tmp_path: Path
) -> None:
    last = DoLast(on_train_batch_end=lambda trainer, *_: stop_after(trainer, 7))
    with pytest.raises(Stopped):
        small(model, rows, tmp_path / "run", last=[last]).play()
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # then the game begins anew, and meets what is there
    manifest = tmp_path / "run" / "iteration_0" / "pairs_manifest.json"
    binding = read(manifest)["binding"]
    assert {"opponent_sha256", "prompts_sha256", "encoding_sha256", "sampling", "seed"} <= binding.keys()
    for key in binding:
        changed = {**read(manifest), "binding": {**binding, key: "another"}}
        (tmp_path / "changed").mkdir()
        shutil.copytree(tmp_path / "run", tmp_path / "changed" / "run")
        (tmp_path / "changed/run/iteration_0/pairs_manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"what differs: {key}"):
            small(model, rows, tmp_path / "changed" / "run").play()
        shutil.rmtree(tmp_path / "changed")
    # the pairs of iteration 0 in the place of those of iteration 1
    shutil.rmtree(tmp_path / "run" / "iteration_1" / "pairs")
    shutil.copytree(tmp_path / "run" / "iteration_0" / "pairs", tmp_path / "run" / "iteration_1" / "pairs")
    shutil.copy(manifest, tmp_path / "run" / "iteration_1")
    with pytest.raises(UserError, match="what differs: iteration, opponent_sha256"):
        small(model, rows, tmp_path / "run").play()


def test_p4_a_damaged_shard_of_unfinished_pairs_is_made_again(
    model: str, rows: str, tmp_path: Path, whole: Game
) -> None:
    for how in ("truncated", "swapped"):
        generator = CountingGenerator(5)
        generator.breaks_after = 6
        with pytest.raises(Stopped):
            small(model, rows, tmp_path / how, data={"generator": generator}).play()
        (shard,) = (tmp_path / how / "iteration_0" / "pairs").iterdir()
        shard.write_bytes(shard.read_bytes()[:99] if how == "truncated" else Path(model, "config.json").read_bytes())
        game = small(model, rows, tmp_path / how, data={"generator": CountingGenerator(5)})
        assert game.play().weights == whole.weights


def test_p5_pairs_and_models_of_another_game_are_not_mixed_in(
    model: str, rows: str, tmp_path: Path, whole: Game
) -> None:
    for name, seed in (("run", 0), ("other", 1)):
        last = DoLast(on_train_epoch_end=lambda trainer, *_: stop_after_epoch(trainer, 1))
        with pytest.raises(Stopped):
            small(model, rows, tmp_path / name, data={"seed": seed}, last=[last]).play()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for name in ("pairs", "pairs_manifest.json"):
        shutil.move(tmp_path / "run" / "iteration_0" / name, tmp_path / f"own {name}")
        shutil.move(tmp_path / "other" / "iteration_0" / name, tmp_path / "run" / "iteration_0" / name)
    with pytest.raises(
        UserError, match=r"run/iteration_0/pairs are not those that this game made for iteration 0|differs"
    ):
        small(model, rows, tmp_path / "run").play()
    assert small(model, rows, tmp_path / "copy").play().weights == whole.weights


@pytest.mark.parametrize("exchanged_after", [0, 1])
def test_p5_pairs_of_a_game_that_differs_in_its_model_alone_are_not_mixed_in(
    exchanged_after: int, model: str, rows: str, tmp_path: Path
) -> None:
    """Same rows, tokenizer, settings and seeds: only the chain of manifests tells that another model made the pairs."""
    other = save_tiny_model(tmp_path / "other_model", seed=1)
    play = {"iterations": 3, "epochs": 1}
    for name, first, stop in (("run", model, exchanged_after), ("other", other, 0)):
        last = DoLast(on_train_epoch_end=lambda trainer, *_, stop=stop: stop_after_epoch(trainer, stop))
        with pytest.raises(Stopped):
            small(first, rows, tmp_path / name, last=[last], play=play).play()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for name in ("pairs", "pairs_manifest.json"):
        (tmp_path / "run/iteration_0" / name).rename(tmp_path / f"own {name}")
        shutil.move(tmp_path / "other/iteration_0" / name, tmp_path / "run/iteration_0" / name)
    with pytest.raises(UserError, match=r"iteration_0/pairs are not those that this game made for iteration 0"):
        small(model, rows, tmp_path / "run", play=play).play()
    assert not (tmp_path / "run" / f"iteration_{exchanged_after + 1}" / "pairs").exists()
    small(model, rows, tmp_path / "copy", play=play).play()


def stop_after_epoch(trainer: Any, number: int) -> None:
    if trainer.current_epoch == number:
        raise Stopped(number)


def test_p5_a_game_whose_first_model_was_exchanged_is_not_continued_where_its_loss_needs_it(
    model: str, rows: str, tmp_path: Path
) -> None:
    first = tmp_path / "model"
    shutil.copytree(model, first)
    last = DoLast(on_train_epoch_end=lambda trainer, *_: stop_after_epoch(trainer, 1))
    settings: dict[str, Any] = {"module": {"loss": AlphaSpinLoss()}}
    with pytest.raises(Stopped):
        Game(str(first), rows, tmp_path / "run", last=[last], **settings).play()
    shutil.copy(tmp_path / "run/iteration_0/policy/model.safetensors", first)
    with pytest.raises(
        UserError, match=r"does not hold the weights that this game began with, whose log-probs AlphaSpin"
    ):
        Game(str(first), rows, tmp_path / "run", **settings).play()


CHANGES: dict[str, dict[str, Any]] = {
    "model.beta": {"module": {"beta": 0.5}},
    "model.loss": {"module": {"loss": DpopLoss()}},
    "model.learning_rate": {"module": {"learning_rate": 1e-3}},
    "model.lr_schedule": {"module": {"lr_schedule": "cosine"}},
    "model.warmup_ratio": {"module": {"warmup_ratio": 0.5}},
    "model.opponent": {"module": {"opponent": "stored"}},
    "model.optimizer.class": {"module": {"optimizer": torch.optim.NAdam}},
    "model.optimizer.weight_decay": {"module": {"optimizer": lambda p: torch.optim.AdamW(p, weight_decay=0.5)}},
    "data.batch_size": {"data": {"batch_size": 2}},
    "data.seed": {"data": {"seed": 3}},
    "data.history": {"data": {"history": 0}},
    "data.answers_per_prompt": {"data": {"answers_per_prompt": 2}},
    "data.val_fraction": {"data": {"val_fraction": 0.5}},
    "data.keep_prompts_together": {"data": {"keep_prompts_together": True}},
    "data.generator.temperature": {"data": {"generator": CountingGenerator(5, temperature=0.5)}},
    "data.generator.max_new_tokens": {"data": {"generator": CountingGenerator(4)}},
    "self_play.epochs": {"play": {"epochs": [2, 3]}},
    "self_play.reset_optimizer": {"play": {"reset_optimizer": False}},
    "self_play.shard_size": {"play": {"shard_size": 3}},
    "trainer.accumulate_grad_batches": {"trainer": {"accumulate_grad_batches": 2}},
    "trainer.gradient_clip_val": {"trainer": {"gradient_clip_val": 0.5}},
    "trainer.limit_train_batches": {"trainer": {"limit_train_batches": 1}},
    "health.stop": {"health": Health(stop="never")},
    "trainer.precision": {"trainer": {"precision": "bf16-mixed"}},
}


@pytest.fixture(scope="module")
def stopped_run(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    last = DoLast(on_train_batch_end=lambda trainer, *_: stop_after(trainer, 3))
    with pytest.raises(Stopped):
        small(model, rows, folder, last=[last], data={"generator": CountingGenerator(5)}).play()
    return folder


@pytest.mark.parametrize("key", CHANGES)
def test_p6_a_resume_with_changed_settings_is_refused_with_a_diff(
    key: str, model: str, rows: str, tmp_path: Path, stopped_run: Path
) -> None:
    shutil.copytree(stopped_run, tmp_path / "run")
    change = CHANGES[key]
    settings = {
        "module": {"opponent": "resident", **change.get("module", {})},
        "data": {"generator": CountingGenerator(5), **change.get("data", {})},
        "play": change.get("play", {}),
        "trainer": change.get("trainer", {}),
    }
    with pytest.raises(UserError) as refusal:
        Game(model, rows, tmp_path / "run", health=change.get("health"), **settings).play()
    message = str(refusal.value)
    assert "began with other settings than this command gives" in message and f"\n  {key}: " in message
    assert " -> " in message and key in message[message.index("--checkpoint.allow_changes '[") :]
    assert read(tmp_path / "run" / "run.json")["changes"] == []
    assert (tmp_path / "run/data_report.json").read_bytes() == (stopped_run / "data_report.json").read_bytes()


def test_p6_a_resume_without_a_record_of_its_settings_is_refused(
    model: str, rows: str, tmp_path: Path, stopped_run: Path
) -> None:
    shutil.copytree(stopped_run, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UserError, match=r"run.json is missing, so nothing tells"):
        small(model, rows, tmp_path / "run", data={"generator": CountingGenerator(5)}).play()


def test_p6_harmless_settings_may_change_and_an_allowed_change_is_recorded(
    model: str, rows: str, tmp_path: Path, stopped_run: Path, whole: Game
) -> None:
    shutil.copytree(stopped_run, tmp_path / "moved" / "elsewhere")
    shutil.copy(rows, tmp_path / "moved.jsonl")
    game = Game(
        model,
        str(tmp_path / "moved.jsonl"),
        tmp_path / "moved" / "elsewhere",
        module={"opponent": "resident"},
        data={"generator": CountingGenerator(5, batch_size=2), "num_workers": 1},
        trainer={"log_every_n_steps": 5, "enable_progress_bar": True},
    ).play()
    assert game.weights == whole.weights
    shutil.copytree(stopped_run, tmp_path / "run")
    settings: dict[str, Any] = {
        "module": {"opponent": "resident", "beta": 0.5},
        "data": {"generator": CountingGenerator(5)},
    }
    changed = Game(model, rows, tmp_path / "run", allow_changes=["model.beta"], **settings).play()
    assert changed.weights != whole.weights
    record = read(tmp_path / "run" / "run.json")
    change = {"from_checkpoint": "step_000000003.ckpt", "setting": "model.beta", "from": 1.0, "to": 0.5}
    assert record["changes"] == [change]
    assert record["settings"]["model.beta"] == 0.5 and not HARMLESS & record["settings"].keys()


# the children come from a server without threads: a fork of this process could inherit a lock that nobody opens
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_promises"])


class Forked:
    """A game in a process of its own, as its command line plays it: slow enough for signals to meet it somewhere."""

    def __init__(self, model: str, rows: str, folder: Path, seconds: float = 0.03) -> None:
        self.output, self.errors = folder.with_suffix(".output"), folder.with_suffix(".errors")
        self.output.write_text("")
        self.process = PROCESSES.Process(target=self.run, args=(model, rows, folder, seconds, self.output, self.errors))
        self.process.start()
        self.read = 0

    @staticmethod
    def run(model: str, rows: str, folder: Path, seconds: float, output: Path, errors: Path) -> None:
        sys.stdout, sys.stderr = output.open("a", buffering=1), errors.open("w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        if Path("/dev/shm").is_dir():  # another file system
            tempfile.tempdir = "/dev/shm"
        with patch.object(commands, "run", lambda args: Forked.play(model, rows, folder, seconds)):
            commands.main(["fit"])

    @staticmethod
    def play(model: str, rows: str, folder: Path, seconds: float) -> None:
        def tell(where: str) -> None:
            print(where, flush=True)
            time.sleep(seconds)

        class Slow(CountingGenerator):
            def generate(self, *args: Any) -> Iterator[Any]:
                for item in super().generate(*args):
                    tell("generating")
                    yield item

        where = Do(
            on_train_batch_start=lambda trainer, *_: tell(f"training {trainer.global_step}"),
            on_validation_batch_start=lambda trainer, *_: trainer.sanity_checking or tell("evaluating"),
        )
        game = small(model, rows, folder, callbacks=[where], data={"generator": Slow(5)}, every_n_steps=None).play()
        (folder / "weights").write_bytes(game.weights)

    def wait_for(self, line: str) -> None:
        for _ in range(6000):
            said = self.output.read_text()[self.read :]
            if f"{line}\n" in said:
                self.read += said.index(f"{line}\n") + len(line)
                return
            if not self.process.is_alive():
                break
            time.sleep(0.01)
        raise AssertionError(f"never said {line!r}: {self.errors.read_text()}")

    def send(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str, str]:
        """Exit code (minus the signal that killed it), what it said since, and its errors."""
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
        assert self.process.exitcode is not None, "did not end"
        return self.process.exitcode, self.output.read_text()[self.read :], self.errors.read_text()


def test_p1_killed_by_the_system_at_random_moments(model: str, rows: str, tmp_path: Path, whole: Game) -> None:
    moments, kills, run = random.Random(0), 0, 0
    while kills < 10:  # as many runs as they last
        run += 1
        folder, ended = tmp_path / f"run {run}", False
        while not ended:
            game = Forked(model, rows, folder, seconds=0.01)
            time.sleep(moments.uniform(0.05, 0.8))
            if kills < 10:
                game.send(signal.SIGKILL)
            code, _, errors = game.end()
            assert code in (0, -signal.SIGKILL), errors
            ended, kills = code == 0, kills + (code != 0)
        assert (folder / "weights").read_bytes() == whole.weights


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)], ids=lambda v: str(v)
)
def test_p7_a_signal_saves_everything_and_the_exit_code_says_so(
    number: signal.Signals, code: int, model: str, rows: str, tmp_path: Path, whole: Game
) -> None:
    folder = tmp_path / "run"
    for where in ("generating", "training 1", "evaluating"):
        game = Forked(model, rows, folder)
        game.wait_for(where)
        game.send(number)
        exit_code, said, errors = game.end()
        assert exit_code == code, errors[-3000:]
        assert f"{number.name} received: ending at the next point that can be continued from" in errors
        assert f"stopped by {number.name}; what is finished is saved, and the same command continues" in errors
        assert "Traceback" not in errors
        if where == "training 1":  # although checkpoints were asked for at epoch ends only
            assert Path(last_checkpoint(folder)).name == "step_000000002.ckpt"  # type: ignore[arg-type]
            assert "training" not in said
    exit_code, _, errors = Forked(model, rows, folder, seconds=0).end()
    assert exit_code == 0, errors[-3000:]
    assert (folder / "weights").read_bytes() == whole.weights


def test_p7_a_signal_in_the_middle_of_accumulated_gradients_waits_for_the_update(
    model: str, rows: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "trainer": {"accumulate_grad_batches": 2},
        "data": {"batch_size": 2},
        "every_n_steps": None,
    }
    whole = small(model, rows, tmp_path / "whole", **settings).play()
    for stop in (2, 3, 4, 5):  # of four batches an epoch

        def send(trainer: Any, *_: Any, stop: int = stop) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        folder = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            small(model, rows, folder, callbacks=[Do(on_train_batch_start=send)], **settings).play()
        game = small(model, rows, folder, **settings).play()
        assert game.weights == whole.weights
        assert stop - 1 <= len(whole.losses) - len(game.losses) <= stop + 1


def test_p7_a_second_signal_ends_at_once(model: str, rows: str, tmp_path: Path) -> None:
    game = Forked(model, rows, tmp_path / "run", seconds=0.2)
    game.wait_for("evaluating")
    game.send(signal.SIGTERM)
    time.sleep(0.05)
    game.send(signal.SIGINT)
    code, _, errors = game.end()
    assert code == 130 and "what is finished is saved, and the same" not in errors


def test_p7_two_copies_of_one_run_do_not_meet(model: str, rows: str, tmp_path: Path) -> None:
    first = Forked(
        model, rows, tmp_path / "run", seconds=60
    )  # silent until the other has ended: both write to one file
    first.wait_for("generating")
    second = Forked(model, rows, tmp_path / "run")
    code, said, errors = second.end()
    assert code == 2 and "generating" not in said
    assert f"another process is at work in {tmp_path / 'run'} (process {first.process.pid} on " in errors
    first.send(signal.SIGKILL)
    assert first.end()[0] == -signal.SIGKILL


def test_p7_a_disk_that_fills_up_costs_nothing_and_asks_to_try_again(
    model: str, rows: str, tmp_path: Path, whole: Game, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (0, 2, 5, 9):
        folder = tmp_path / str(step)

        def fill(trainer: Any, *_: Any, step: int = step) -> None:
            if trainer.global_step == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))

        game = small(model, rows, folder, callbacks=[Do(on_iteration_start=fill, on_train_batch_start=fill)])
        try:
            with pytest.raises(
                StorageError, match=r"cannot write .* File too large; .* are free there. What was there"
            ):
                game.play()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(folder.rglob("*.tmp"))
        assert small(model, rows, folder).play().weights == whole.weights
    assert StorageError.exit_code == 75

    monkeypatch.setattr("spin_lightning.runs.files.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"needs about .* MiB in .*, and 0.0 MiB are free. Make room"):
        small(model, rows, tmp_path / "full").play()


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # it is what is tested
def test_p8_no_pickle_is_ever_loaded(model: str, rows: str, tmp_path: Path, stopped_run: Path) -> None:
    shutil.copytree(stopped_run, tmp_path / "run")
    newest = checkpoints_in(tmp_path / "run" / "checkpoints")[0]
    touched = tmp_path / "touched"
    for save in (
        lambda: torch.save({"state_dict": _Payload(touched)}, newest),
        lambda: newest.write_bytes(pickle.dumps(_Payload(touched))),
        lambda: torch.save(_Payload(touched), newest, _use_new_zipfile_serialization=False),
    ):
        save()
        hash_file(newest).write_text(f"{sha256_of(newest)}  {newest.name}\n")  # by somebody who can also write the hash
        for weights_only in (None, False, True):
            with pytest.raises(UserError, match=r"cannot be read|is not opened: reading it could run code"):
                AtomicCheckpointIO().load_checkpoint(newest, weights_only=weights_only)
        with pytest.raises(UserError):
            small(model, rows, tmp_path / "run", data={"generator": CountingGenerator(5)}).play()
    assert not touched.exists()
    for use in (AtomicCheckpointIO().load_checkpoint, lambda url: AtomicCheckpointIO().save_checkpoint({}, url)):
        with pytest.raises(UserError, match="on a local disk only"):
            use("https://example.org/last.ckpt")
    with pytest.raises(UserError, match="there is no checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "nothing.ckpt")
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert suffixes <= {"", ".json", ".parquet", ".safetensors", ".ckpt", ".sha256", ".md", ".jinja"}


def test_p9_no_secret_is_in_any_file_of_a_run(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    canary = "hf_CANARYcanaryCANARYcanary123"
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, canary)
    monkeypatch.chdir(tmp_path)
    flags = ["--data.batch_size=4", "--data.generator.max_new_tokens=4", "--self_play.iterations=1"]
    flags += ["--trainer.callbacks+=games.Secretive", f"--trainer.callbacks.api_key={canary}"]
    flags += ["--model.loss=games.SecretiveLoss", f"--model.loss.push_token={canary}", "--trainer.accelerator=cpu"]
    monkeypatch.setattr(sys, "argv", ["spin-lightning", *args_of("fit", model, rows, tmp_path / "run", *flags)])
    commands.main()
    assert (tmp_path / "run" / "game.json").exists()
    assert canary not in "".join(capfd.readouterr())
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and canary.encode() in path.read_bytes()]
    assert holding == []
    assert "api_key: '***'" in (tmp_path / "run" / "config.yaml").read_text()


def test_p10_every_dropped_cut_or_degenerate_row_is_counted(model: str, tmp_path: Path) -> None:
    def row(prompt: str, answer: str) -> str:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": turns})

    lines = [row(f"say {n}", "a b") for n in range(8)]
    lines += [row("say 0", "a b"), row("say 1", "b a"), row("long " * 30, "a"), row("cut", "a b c d e f g h")]
    lines += [row("nul", "a\0b"), "not json", row("blank", "  "), json.dumps({"messages": "text"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = {"on_bad_row": "drop", "max_prompt_tokens": 24, "val_fraction": 0.0, "batch_size": 2}
    fake = FakeGenerator(lambda prompt, seed: [] if seed % 2 else [5], max_new_tokens=5)
    Game(
        model, str(tmp_path / "rows.jsonl"), tmp_path / "run", data={**data, "generator": fake}, play={"iterations": 1}
    ).play()
    report = read(tmp_path / "run" / "data_report.json")
    assert report["train_data"]["rows_read"] == 16 and report["train_data"]["rows_kept"] == 12
    counted = json.dumps(report)
    for number, line in ((13, "line 13"), (14, "line 14"), (15, "line 15"), (16, "line 16")):
        assert line in counted, number
    assert report["train"]["cut_answers"]["count"] == 1 and report["train"]["long_prompts"]["count"] == 1
    statistics = PairStore(tmp_path / "run" / "iteration_0" / "pairs").manifest["statistics"]  # type: ignore[index]
    seeds = [r["generated_ids"] for r in PairStore(tmp_path / "run/iteration_0/pairs").read().to_pylist()]
    assert statistics["empty"] == sum(len(ids) == 1 for ids in seeds) > 0
    assert statistics["empty_share"] == pytest.approx(sum(len(ids) == 1 for ids in seeds) / len(seeds))


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_numbers_that_are_not_finite_never_reach_weights_or_checkpoints(
    action: str, model: str, rows: str, tmp_path: Path, whole: Game, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == 5 and not poisoned:
            poisoned.append(True)
            next(module.policy.parameters()).grad[0, 0] = float("nan")

    poisoned: list[bool] = []
    settings: dict[str, Any] = {"module": {"opponent": "resident", "on_non_finite": action}}
    game = small(model, rows, tmp_path / "run", callbacks=[Do(on_after_backward=poison)], **settings)
    if action == "stop":
        with pytest.raises(
            NonFiniteError, match=r"update 5 is NaN or infinite \(norm nan\).*from these rows:\n  \.\.\."
        ):
            game.play()
        path = Path(last_checkpoint(tmp_path / "run"))  # type: ignore[arg-type]
        assert path.name == "step_000000005.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(weight.isfinite().all() for weight in state.values())
        assert small(model, rows, tmp_path / "run").play().weights == whole.weights
        return
    game.play()
    assert poisoned and game.weights != whole.weights
    assert all(weight.isfinite().all() for weight in game.module.policy.parameters())
    said = capsys.readouterr().out
    assert "The update is skipped. It came from these rows" in said
    assert ("step_000000005.ckpt again" in said) == (action == "rollback")
    assert list(game.recorder.losses)[:6] == list(whole.recorder.losses)[:6]


def test_numbers_that_stay_not_finite_end_the_run(model: str, rows: str, tmp_path: Path) -> None:
    def poison(trainer: Any, module: Any, *_: Any) -> None:
        next(module.policy.parameters()).grad[0, 0] = float("inf")

    game = small(
        model,
        rows,
        tmp_path,
        callbacks=[Do(on_after_backward=poison)],
        module={"on_non_finite": "skip"},
        play={"epochs": 9},
    )
    with pytest.raises(NonFiniteError, match="update 10 is NaN or infinite"):
        game.play()


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")  # so they are
def test_weights_that_are_not_finite_are_not_exported(model: str, rows: str, tmp_path: Path) -> None:
    def poison(trainer: Any, module: Any, *_: Any) -> None:
        if trainer.is_last_batch:
            with torch.no_grad():
                next(module.policy.parameters())[0, 0] = float("inf")

    with pytest.raises(NonFiniteError, match="is NaN or infinite, so nothing is saved"):
        small(model, rows, tmp_path, callbacks=[Do(on_train_batch_end=poison)], play={"epochs": 1}).play()
    assert not (tmp_path / "iteration_0" / "policy").exists() and not checkpoints_in(tmp_path / "checkpoints")[2:]
    assert all(
        weight.isfinite().all()
        for path in checkpoints_in(tmp_path / "checkpoints")
        for weight in torch.load(path, weights_only=True)["state_dict"].values()
    )


def test_rolling_back_stops_at_the_beginning_of_an_iteration(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(trainer: Any, module: Any, *_: Any) -> None:
        if module.iteration == 1 and not poisoned:
            poisoned.append(trainer.global_step)
            next(module.policy.parameters()).grad[0, 0] = float("nan")

    poisoned: list[int] = []
    settings: dict[str, Any] = {"module": {"opponent": "resident", "on_non_finite": "rollback"}}
    small(model, rows, tmp_path, callbacks=[Do(on_after_backward=poison)], **settings).play()
    assert poisoned
    assert "there is no checkpoint of this iteration yet, so the weights stay" in capsys.readouterr().out


def test_an_error_of_torch_while_saving_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_p8_code_that_comes_with_a_model_is_not_run(model: str, rows: str, tmp_path: Path) -> None:
    folder, touched = tmp_path / "model", tmp_path / "touched"
    shutil.copytree(model, folder)
    config = {**read(folder / "config.json"), "model_type": "theirs"}
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"from pathlib import Path\nPath({str(touched)!r}).touch()\n")
    with pytest.raises(UserError, match=r"custom code.*Read that code, and set model.trust_remote_code to run it"):
        small(str(folder), rows, tmp_path / "run").play()
    assert not touched.exists()


class Greedy(CountingGenerator):
    """Runs out of memory with more than two prompts at a time, in the middle of its work."""

    def generate(self, prompts: Any, *args: Any) -> Iterator[Any]:
        for number, item in enumerate(super().generate(prompts, *args)):
            if len(prompts) > 2 and number == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            yield item


def test_running_out_of_memory_in_generation_asks_for_fewer_and_changes_no_response(
    model: str, rows: str, tmp_path: Path, whole: Game, capsys: pytest.CaptureFixture[str]
) -> None:
    game = small(model, rows, tmp_path, data={"generator": Greedy(5, batch_size=8)}).play()
    assert game.weights == whole.weights and game.data.generator.batch_size == 8  # the user's own setting
    assert (
        capsys.readouterr().out.count("note: out of memory in generation") == game.clock.iterations
    )  # each finds out anew


def test_a_changed_library_version_is_reported(
    model: str, rows: str, tmp_path: Path, stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped_run, tmp_path / "run")
    record = read(tmp_path / "run" / "run.json")
    (tmp_path / "run" / "run.json").write_text(
        json.dumps({**record, "versions": {**record["versions"], "torch": "2.9.9"}})
    )
    small(model, rows, tmp_path / "run", data={"generator": CountingGenerator(5)}).play()
    assert f"torch 2.9.9 -> {torch.__version__}" in capsys.readouterr().out


def test_beginning_anew_in_the_folder_of_a_run_is_refused(
    model: str, rows: str, tmp_path: Path, stopped_run: Path
) -> None:
    shutil.copytree(stopped_run, tmp_path / "run")
    game = small(model, rows, tmp_path / "run")
    with pytest.raises(UserError, match="told to begin anew and would overwrite"):
        game.trainer.fit(game.module, game.data)


def test_signals_are_given_back(model: str, rows: str, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    small(model, rows, tmp_path).play()
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    signals.end_if_asked()
