"""A stopped game continues as if nothing had happened: the same losses, the same weights, bit by bit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from games import CountingGenerator, Do, DoLast, Game, Recorder, Stopped, moments_of, read, weight_bits, without_seconds
from helpers import QUIET
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from spin_lightning import (
    AlphaSpinLoss,
    AtomicCheckpointIO,
    ExportPolicy,
    Health,
    RunCheckpoint,
    SftLightningModule,
    SyntheticDataModule,
    TransformersGenerator,
    TSpinLoss,
    UserError,
    last_checkpoint,
)
from spin_lightning.generation.pair_store import PairStore

#: The games that are stopped. Each has several shards, a held-out set, and two epochs in each of two iterations.
VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "stored opponent, AdamW": dict,
    "resident opponent, RMSprop, accumulated gradients": lambda: {
        "module": {"opponent": "resident", "optimizer": lambda p: torch.optim.RMSprop(p, momentum=0.5)},
        "trainer": {"accumulate_grad_batches": 2},
    },
    "alpha-SPIN, history of none": lambda: {
        "module": {"loss": AlphaSpinLoss(0.3), "opponent": "resident"},
        "data": {"history": 0},
    },
    "triplet SPIN, kept optimizer": lambda: {"module": {"loss": TSpinLoss()}, "play": {"reset_optimizer": False}},
    "float32 master weights, learning rates by iteration": lambda: {
        "module": {"learning_rate": [1e-2, 3e-3], "lr_schedule": "cosine"},
        "trainer": {"precision": "bf16-true"},
    },
}


@dataclass
class Moment:
    """The run's folder as a kill would leave it, and how many batches had been trained on then."""

    folder: Path
    batches: int


@dataclass
class Undisturbed:
    """A whole game, and every state its folder was ever in."""

    game: Game
    folder: Path
    moments: list[Moment]


def play_undisturbed(settings: dict[str, Any], model: str, rows: str, tmp_path: Path) -> Undisturbed:
    """Play a game, and keep every state of its folder."""
    folder = tmp_path / "run"
    game = Game(model, rows, folder, **settings)
    progress = game.trainer.fit_loop.epoch_loop.batch_progress
    moments = moments_of(folder, tmp_path / "moments", game.play, lambda: progress.total.processed)
    return Undisturbed(game, folder, [Moment(*moment) for moment in moments])


def batches_in(checkpoint: str | None) -> int:
    if checkpoint is None:
        return 0
    loops = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
    return int(loops["epoch_loop.batch_progress"]["total"]["ready"])


def assert_same_outcome(game: Game, folder: Path, whole: Undisturbed) -> None:
    """The game that was continued in ``folder`` ended where the undisturbed one did."""
    assert game.weights == whole.game.weights
    for name in ("game.json", "start.json", "iteration_0/summary.json", "iteration_1/summary.json"):
        assert without_seconds(read(folder / name)) == without_seconds(read(whole.folder / name)), name
    for k in range(2):
        name = f"iteration_{k}/policy/model.safetensors"
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
        for shard in PairStore(folder / f"iteration_{k}" / "pairs").manifest["shards"]:
            assert (folder / f"iteration_{k}" / "pairs" / shard["file"]).is_file()


@pytest.mark.no_cover
@pytest.mark.parametrize("stride", [12, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_game_killed_at_any_moment_continues_with_the_same_losses_and_weights(
    variant: str, stride: int, model: str, rows: str, tmp_path: Path
) -> None:
    """By default at every twelfth moment, another one in each game; test_promises.py ends a game at every one."""
    whole = play_undisturbed(VARIANTS[variant](), model, rows, tmp_path)
    reference = whole.game.recorder.losses
    assert len(whole.moments) > 40
    start = list(VARIANTS).index(variant) % stride
    seen: set[tuple[Any, ...]] = set()
    for moment in whole.moments[start::stride]:
        names = [path for path in sorted(moment.folder.rglob("*")) if path.is_file() and not path.name.endswith(".tmp")]
        state = tuple((str(path.relative_to(moment.folder)), path.read_bytes()) for path in names)
        if (
            state in seen
        ):  # the moment before a file is replaced is the one after the last was, but for a temporary file
            continue
        seen.add(state)
        game = Game(model, rows, moment.folder, **VARIANTS[variant]())
        done = batches_in(game.clock.last_checkpoint)
        # a checkpoint an update, except that an epoch's last one is saved after validation and export
        assert moment.batches - done <= 2 * game.trainer.accumulate_grad_batches
        game.play()
        assert game.recorder.losses == {number: loss for number, loss in reference.items() if number >= done}
        assert {n: game.recorder.rates[n] for n in game.recorder.losses} == {
            n: whole.game.recorder.rates[n] for n in game.recorder.losses
        }
        assert_same_outcome(game, moment.folder, whole)


@pytest.mark.no_cover
def test_a_game_stopped_by_an_error_in_any_hook_of_its_second_iteration_continues(
    model: str, rows: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"module": {"opponent": "resident"}, "every_n_steps": 3, "play": {"epochs": 1}}
    whole = Game(model, rows, tmp_path / "whole", **settings).play()

    def stop(trainer: Trainer, module: Any, *_: Any) -> None:
        if module.iteration == 1:
            raise Stopped

    hooks = (
        "iteration_start",
        "generation_end",
        "train_batch_start",
        "validation_batch_end",
        "validation_epoch_end",
        "train_epoch_end",
    )
    for hook in (*hooks, "iteration_end", "train_epoch_end after the checkpoint"):
        stopping = {f"on_{hook.split()[0]}": stop}
        where = {"last": [DoLast(**stopping)]} if "after" in hook else {"callbacks": [Do(**stopping)]}
        with pytest.raises(Stopped):
            Game(model, rows, tmp_path / hook, **where, **settings).play()
        game = Game(model, rows, tmp_path / hook, **settings).play()
        assert game.weights == whole.weights, hook
        assert game.losses == whole.losses[len(whole.losses) - len(game.losses) :], hook
        ends = [without_seconds(read(folder / "game.json")) for folder in (tmp_path / hook, tmp_path / "whole")]
        assert ends[0] == ends[1], hook


def test_a_game_stopped_twice_in_accumulated_batches_continues(model: str, rows: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trainer": {"accumulate_grad_batches": 2}, "every_n_steps": 1}
    whole = Game(model, rows, tmp_path / "whole", **settings).play()
    for number in (7, 7, 10):  # between the two halves of an update, and again right after the resume
        stopped_at(number, model, rows, tmp_path / "run", **settings)
    game = Game(model, rows, tmp_path / "run", **settings).play()
    assert game.weights == whole.weights
    assert game.recorder.losses == {number: whole.recorder.losses[number] for number in game.recorder.losses}


def stop_at(trainer: Trainer, number: int) -> None:
    if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == number:
        raise Stopped(number)


def test_at_most_one_shard_is_generated_again_after_a_stop_in_generation(model: str, rows: str, tmp_path: Path) -> None:
    whole = Game(model, rows, tmp_path / "whole", data={"generator": CountingGenerator(5)}, play={"shard_size": 3})
    assert whole.play().data.generator.answered == 16  # 8 prompts, twice
    for breaks_after in (3, 7, 8, 10):
        folder, generator = tmp_path / str(breaks_after), CountingGenerator(5)
        generator.breaks_after = breaks_after
        settings: dict[str, Any] = {"play": {"shard_size": 3}, "every_n_steps": None}
        with pytest.raises(Stopped):
            Game(model, rows, folder, data={"generator": generator}, **settings).play()
        game = Game(model, rows, folder, data={"generator": CountingGenerator(5)}, **settings).play()
        in_shards = breaks_after // 8 * 8 + breaks_after % 8 // 3 * 3  # of 3, 3 and 2 prompts
        assert game.data.generator.answered == 16 - in_shards
        assert game.weights == whole.weights


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the callback that wrote it is not needed
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # the epoch is over as it begins
def test_a_checkpoint_of_lightning_saved_after_an_epochs_last_batch_continues(
    model: str, rows: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"module": {"beta": [0.5, 2.0]}}
    whole = Game(model, rows, tmp_path / "whole", **settings).play()
    for last in (2, 4, 8, 12):
        folder = tmp_path / str(last)
        theirs = ModelCheckpoint(folder / "theirs", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        stop = DoLast(on_train_batch_end=lambda trainer, *_, n=last: stop_at(trainer, n))
        with pytest.raises(Stopped):
            Game(model, rows, folder, every_n_steps=None, last=[theirs, stop], **settings).play()
        game = Game(model, rows, folder, **settings)
        game.module.on_load_checkpoint = lambda checkpoint: None  # type: ignore[method-assign]  # as a module of a user may
        game.trainer.fit(game.module, game.data, ckpt_path=str(folder / "theirs" / f"step={last}.ckpt"))
        assert game.weights == whole.weights
        assert game.losses == whole.losses[last:]
        for k in range(2):  # also exported where the stop came before the export
            ours, expected = (path / f"iteration_{k}/policy/model.safetensors" for path in (folder, tmp_path / "whole"))
            assert ours.read_bytes() == expected.read_bytes()
        names = [f"iteration_{k}/summary.json" for k in range(2)]
        for ours, expected in [[read(path / name) for path in (folder, tmp_path / "whole")] for name in names]:
            for key in ("beta", "epoch_metrics", "first_loss", "last_loss", "updates", "pairs"):
                assert ours[key] == expected[key], key


@pytest.mark.parametrize("opponent", ["stored", "resident"])
def test_the_checkpoint_holds_one_model_and_loads_with_weights_only(
    opponent: str, model: str, rows: str, tmp_path: Path
) -> None:
    game = Game(model, rows, tmp_path / "run", module={"opponent": opponent}, trainer={"max_epochs": 4}).play()
    checkpoint = torch.load(game.clock.last_checkpoint, weights_only=True)
    names = set(checkpoint["state_dict"])
    assert {name for name in names if name.startswith("policy.")} == {
        f"policy.{name}" for name in game.module.policy.state_dict()
    }
    assert not any("opponent" in name for name in names)
    assert not any("hyper_parameters" in key for key in checkpoint)


def test_a_copied_run_folder_resumes(model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Game(model, rows, tmp_path / "whole", module={"opponent": "resident"}).play()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    stop = DoLast(on_train_batch_end=lambda trainer, *_: stop_at(trainer, 7))
    with pytest.raises(Stopped):
        Game(model, rows, "run", module={"opponent": "resident"}, last=[stop]).play()
    (tmp_path / "there" / "deeper").mkdir(parents=True)
    shutil.move("run", tmp_path / "there" / "deeper" / "moved")
    monkeypatch.chdir(tmp_path / "there")
    game = Game(model, rows, "deeper/moved", module={"opponent": "resident"}).play()
    assert game.weights == whole.weights
    assert str(tmp_path / "here") not in (tmp_path / "there/deeper/moved/iteration_1/pairs_manifest.json").read_text()


def stopped_at(number: int, model: str, rows: str, folder: Path, **settings: Any) -> None:
    stop = DoLast(on_train_batch_end=lambda trainer, *_: stop_at(trainer, number))
    with pytest.raises(Stopped):
        Game(model, rows, folder, last=[stop], **settings).play()


def test_pairs_that_something_else_made_are_refused_on_resume(model: str, rows: str, tmp_path: Path) -> None:
    stopped_at(7, model, rows, tmp_path / "run")
    manifest = tmp_path / "run" / "iteration_1" / "pairs_manifest.json"
    kept = manifest.read_text()
    manifest.write_text(kept.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(
        UserError,
        match=r"not those that iteration 1 began with.*Restore the folder, or use another output_dir",
    ):
        Game(model, rows, tmp_path / "run").play()
    manifest.unlink()
    with pytest.raises(UserError, match=r"pairs_manifest.json is missing"):
        Game(model, rows, tmp_path / "run").play()
    manifest.write_text(kept)
    shard = manifest.parent / "pairs" / "iteration_1-000000005.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with pytest.raises(UserError, match="is not the file that was written"):
        Game(model, rows, tmp_path / "run").play()
    shard.write_bytes(whole)
    assert len(Game(model, rows, tmp_path / "run").play().losses) == 5


def test_pairs_of_other_settings_are_refused_where_an_iteration_begins(model: str, rows: str, tmp_path: Path) -> None:
    stopped_at(1, model, rows, tmp_path / "run", every_n_steps=None)
    with pytest.raises(UserError, match=r"what differs: prompts_sha256, seed. Use another output_dir"):
        Game(model, rows, tmp_path / "run", data={"seed": 1}).play()


def test_a_finished_game_is_not_played_again_and_can_be_extended(model: str, rows: str, tmp_path: Path) -> None:
    whole = Game(model, rows, tmp_path / "whole", play={"iterations": 3}, module={"lr_schedule": "constant"}).play()
    settings: dict[str, Any] = {"module": {"lr_schedule": "constant"}}
    first = Game(model, rows, tmp_path / "run", **settings).play()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    again = Game(model, rows, tmp_path / "run", **settings).play()
    assert again.losses == [] and again.weights == first.weights
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    longer = Game(model, rows, tmp_path / "run", play={"iterations": 3}, **settings).play()
    assert longer.weights == whole.weights and longer.losses == whole.losses[len(first.losses) :]
    assert len(read(tmp_path / "run" / "game.json")["iterations"]) == 3


def test_a_game_that_health_ended_stays_ended(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spin_lightning.stages.health.HARM_SHARE", -0.99)
    first = Game(model, rows, tmp_path / "run", health=Health("harm")).play()
    game = read(tmp_path / "run" / "game.json")
    assert game["ended_because"].startswith("harm: held-out NLL") and len(game["iterations"]) == 1
    (tmp_path / "run" / "game.json").unlink()  # a kill between the checkpoint and this file
    again = Game(model, rows, tmp_path / "run", health=Health("harm")).play()
    assert again.losses == [] and again.weights == first.weights
    assert read(tmp_path / "run" / "game.json") == game
    assert not (tmp_path / "run" / "iteration_1").exists()


def test_what_health_compares_with_survives_a_stop(model: str, rows: str, tmp_path: Path) -> None:
    """The held-out NLL of the model the game started from, and those after the iterations before the stop."""
    whole = Game(model, rows, tmp_path / "whole", every_n_steps=None).play()
    stopped_at(7, model, rows, tmp_path / "run", every_n_steps=None)
    continued = Game(model, rows, tmp_path / "run", every_n_steps=None).play()
    assert len(whole.health.nll) == 3 and continued.health.nll == whole.health.nll
    assert continued.health.remarks[-1] == whole.health.remarks[-1]


def sft(
    model: str, rows: str, folder: Path, *callbacks: Any, **trainer: Any
) -> tuple[Trainer, SftLightningModule, Recorder]:
    """Play or continue a stage of supervised fine-tuning, as its command line does."""
    module, recorder = SftLightningModule(model, learning_rate=1e-2), Recorder()
    data = SyntheticDataModule(rows, batch_size=2, val_fraction=0.2)
    checkpoint = RunCheckpoint(str(folder / "checkpoints"), every_n_steps=1)
    settings: dict[str, Any] = {
        **QUIET,
        "max_epochs": 2,
        "reload_dataloaders_every_n_epochs": 1,
        "plugins": [AtomicCheckpointIO()],
        "callbacks": [ExportPolicy(str(folder)), recorder, checkpoint, *callbacks],
    }
    trainer_ = Trainer(**{**settings, **trainer})
    trainer_.fit(module, data, ckpt_path=last_checkpoint(folder))
    return trainer_, module, recorder


@pytest.mark.no_cover
@pytest.mark.parametrize("accumulate", [1, 3])
def test_supervised_fine_tuning_stopped_anywhere_continues(
    accumulate: int, model: str, rows: str, tmp_path: Path
) -> None:
    _, module, whole = sft(model, rows, tmp_path / "whole", accumulate_grad_batches=accumulate)
    assert len(whole.losses) == 8
    places: list[tuple[str, Any]] = [
        (str(n), DoLast(on_train_batch_end=lambda t, *_, n=n: stop_at(t, n)))
        for n in (range(1, 9) if accumulate > 1 else (4, 5))
    ]
    for hook in ("on_validation_epoch_end", "on_train_epoch_end", "on_train_end"):
        places.append((hook, (Do if "val" in hook else DoLast)(**{hook: lambda t, *_: stop_unless_sane(t)})))
    for name, stop in places:
        with pytest.raises(Stopped):
            sft(model, rows, tmp_path / name, stop, accumulate_grad_batches=accumulate)
        _, continued, recorder = sft(model, rows, tmp_path / name, accumulate_grad_batches=accumulate)
        assert recorder.losses == {n: whole.losses[n] for n in recorder.losses}, name
        assert weight_bits(continued.policy) == weight_bits(module.policy), name
        assert without_seconds(read(tmp_path / name / "summary.json")) == without_seconds(
            read(tmp_path / "whole" / "summary.json")
        )
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name / "policy")
        assert weight_bits(exported) == weight_bits(module.policy)


def stop_unless_sane(trainer: Trainer) -> None:
    if not trainer.sanity_checking:
        raise Stopped


#: Plays a game as a script would, slowly enough to be killed; prints where it is.
SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from games import CountingGenerator, Do, Game
from helpers import *

def slowly(where, seconds):
    print(where, flush=True)
    time.sleep(seconds)

class SlowGenerator(CountingGenerator):
    def generate(self, *args):
        for number, item in enumerate(super().generate(*args)):
            slowly("generating", {seconds})
            yield item

tell = Do(on_train_batch_start=lambda trainer, *_: slowly(f"training {{trainer.global_step}}", {seconds}))
game = Game({model!r}, {rows!r}, {folder!r}, callbacks=[tell], data={{"generator": SlowGenerator(5)}}).play()
open({folder!r} + "/weights", "wb").write(game.weights)
"""


@pytest.mark.slow  # test_promises.py kills a process by the same signal
def test_the_same_command_continues_after_sigkill(model: str, rows: str, tmp_path: Path) -> None:
    whole = Game(model, rows, tmp_path / "whole", data={"generator": CountingGenerator(5)}).play()
    script = tmp_path / "game.py"
    folder = tmp_path / "run"
    script.write_text(
        SCRIPT.format(tests=str(Path(__file__).parents[1]), model=model, rows=rows, folder=str(folder), seconds=0.02)
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    for place, count in (("generating", 7), ("training 6", 1)):  # in the second shard; in the second iteration
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            seen = 0
            for line in process.stdout:
                seen += line.strip() == place
                if seen == count:
                    time.sleep(0.01)
                    process.send_signal(signal.SIGKILL)
                    break
            process.wait()
            assert process.returncode == -signal.SIGKILL
    assert not (folder / "game.json").exists()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert (folder / "weights").read_bytes() == whole.weights
    assert (folder / "iteration_1/policy/model.safetensors").read_bytes() == (
        tmp_path / "whole/iteration_1/policy/model.safetensors"
    ).read_bytes()


@pytest.mark.no_cover
@pytest.mark.parametrize("updates", [7, 8])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_sft_with_a_number_of_updates_resumes_from_every_step_and_epoch(
    model: str, rows: str, tmp_path: Path, hook: str, updates: int
) -> None:
    """The end is once at an epoch's end, and once in the middle of one."""

    def play(folder: Path, stop: int | None = None) -> list[int] | None:
        module = SftLightningModule(model, 1e-2, max_updates=updates)
        data = SyntheticDataModule(
            rows, batch_size=4, val_fraction=0.2, generator=TransformersGenerator(max_new_tokens=5)
        )
        last = DoLast(**{hook: lambda trainer, *_: stop_at(trainer, stop) if stop else None})
        trainer = Trainer(
            max_epochs=100,
            callbacks=[ExportPolicy(str(folder)), RunCheckpoint(str(folder / "checkpoints")), last],
            **QUIET,
        )
        trainer.fit(module, data, ckpt_path=last_checkpoint(folder))
        assert trainer.global_step == updates
        return weight_bits(module)

    whole = play(tmp_path / "whole")
    for stop in (1, 4, 7, updates) if hook == "on_train_batch_end" else range(2, updates + 1, 2):  # of two batches each
        with contextlib.suppress(Stopped):
            play(tmp_path / str(stop), stop)
        assert play(tmp_path / str(stop)) == whole, stop
