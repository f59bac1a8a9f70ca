"""A run of several processes is the run of one: the same pairs, losses and weights; and they end together."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from filelock import FileLock
from games import (
    Do,
    DoLast,
    FromModel,
    Game,
    Stopped,
    pairs_of,
    read,
    serving,
    weight_bits,
    without_seconds,
)
from helpers import QUIET, load, save_tiny_model, write_rows
from lightning.pytorch.strategies import DDPStrategy
from several import FATE, IS_THOROUGH, Several, flags_of, free_port, run_command, thorough, together

from spin_lightning import ExportPolicy, LoraAdapter, OpenAIGenerator, RowDataModule, RunCheckpoint, SftLightningModule
from spin_lightning.models import kernels
from spin_lightning.runs.files import sha256_of

#: Games that are played by two processes and by one. Two shards at least, held-out rows, two epochs in each iteration.
GAMES: dict[str, dict[str, Any]] = {
    "float64, clipped, two answers, two passes each": {
        "trainer": {"precision": "64-true", "gradient_clip_val": 1.0},
        "data": {"answers_per_prompt": 2, "batch_size": 6, "micro_batch_tokens": 60},
    },
    "float32, accumulated, a last update of one pair, resident opponent": {
        "trainer": {"accumulate_grad_batches": 2},
        "module": {"opponent": "resident"},
        "data": {"batch_size": 5},
    },
}


def play(model: str, rows: str, folder: Path, settings: dict[str, Any], strategy: str = "") -> None:
    """Play a game, by two processes if there is a strategy, and leave beside it what it was like."""
    losses: list[float] = []
    note = Do(on_train_batch_end=lambda trainer, module, *_: losses.append(float(module.update_loss)))
    trainer = {**settings.get("trainer", {}), **({"devices": 2, "strategy": strategy} if strategy else {})}
    game = Game(model, rows, folder, **{**settings, "trainer": trainer}, callbacks=[note]).play()
    rank = game.trainer.global_rank
    (folder / f"losses_{rank}.json").write_text(json.dumps(losses))
    (folder / f"weights_{rank}").write_bytes(weight_bits(game.module.gather_policy()))


def compare(one: Path, two: Path, loss: float, weight: float) -> None:
    """Both games were the same, but for so much in losses and weights."""
    losses, *others = (
        json.loads((folder / f"losses_{n}.json").read_text()) for folder, n in ((one, 0), (two, 0), (two, 1))
    )
    assert others == [pytest.approx(losses, abs=loss, rel=0)] * 2
    assert (two / "weights_0").read_bytes() == (two / "weights_1").read_bytes()
    for k in range(2):
        mine, theirs = (load(folder / f"iteration_{k}" / "policy", torch.float64).state_dict() for folder in (one, two))
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, atol=weight, rtol=0)
        pairs = [pairs_of(folder, k) for folder in (one, two)]
        for pair, other in zip(*pairs, strict=True):
            columns = [name for name in pair if not name.endswith(("_log_prob", "sha256"))]
            assert {name: pair[name] for name in columns} == {name: other[name] for name in columns}
        summaries = [without_seconds(read(folder / f"iteration_{k}" / "summary.json")) for folder in (one, two)]
        assert_close(summaries[1], summaries[0], 100 * max(loss, 1e-7))
    assert_close(read(two / "start.json"), read(one / "start.json"), 100 * max(loss, 1e-7))
    assert {path.name for path in (two / "iteration_0" / "pairs").iterdir()} == {
        path.name for path in (one / "iteration_0" / "pairs").iterdir()
    }


def assert_close(found: Any, expected: Any, allowed: float) -> None:
    """Two summaries are the same, but for so much in their numbers."""
    if isinstance(expected, dict):
        # the KL to the start is measured in runs of one process only
        assert found.keys() == expected.keys() - {"retention"}
        for key, value in found.items():
            assert_close(value, expected[key], allowed)
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=allowed, abs_tol=allowed), (found, expected)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def more_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 14)


ALLOWED = dict(zip(GAMES, ((1e-14, 1e-13), (1e-5, 1e-3)), strict=True))
ROUNDS = list(itertools.product(GAMES, ["ddp", "fsdp2"]))


@pytest.mark.parametrize(
    ("name", "strategy"), [ROUNDS[0], ROUNDS[3], *(pytest.param(*ROUNDS[n], marks=thorough) for n in (1, 2))]
)
def test_two_processes_play_the_game_of_one(
    name: str, strategy: str, model: str, more_rows: str, tmp_path: Path
) -> None:
    """Also where each has one half of the weights."""
    play(model, more_rows, tmp_path / "one", GAMES[name])
    ended = together(tmp_path, play, model, more_rows, tmp_path / "two", GAMES[name], strategy)
    assert ended.codes == [0, 0], ended.printed
    assert "iteration 1: " in ended.printed[0] and "iteration" not in ended.printed[1]  # the first one speaks for both
    compare(tmp_path / "one", tmp_path / "two", *ALLOWED[name])


def fine_tune(model: str, rows: str, folder: Path, strategy: str = "") -> None:
    """Fine-tune in batches of five rows, the last of which has one."""
    module, losses = SftLightningModule(model, 1e-2), []
    note = Do(on_train_batch_end=lambda *_: losses.append(float(module.update_loss)))
    trainer = L.Trainer(
        max_epochs=2,
        precision="64-true",
        num_sanity_val_steps=-1,
        callbacks=[note, ExportPolicy(str(folder)), RunCheckpoint(str(folder / "checkpoints"))],
        **QUIET,
        **({"devices": 2, "strategy": strategy} if strategy else {}),
    )
    trainer.fit(module, RowDataModule(rows, batch_size=5, val_fraction=0.2, max_response_tokens=5))
    (folder / f"losses_{trainer.global_rank}.json").write_text(json.dumps(losses))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=thorough)])
def test_two_processes_fine_tune_as_one_does(strategy: str, model: str, more_rows: str, tmp_path: Path) -> None:
    fine_tune(model, more_rows, tmp_path / "one")
    ended = together(tmp_path, fine_tune, model, more_rows, tmp_path / "two", strategy)
    assert ended.codes == [0, 0], ended.printed
    losses = [json.loads((tmp_path / name).read_text()) for name in ("one/losses_0.json", "two/losses_0.json")]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], abs=1e-14, rel=0)
    summaries = [without_seconds(read(tmp_path / name / "summary.json")) for name in ("one", "two")]
    assert_close(summaries[1], summaries[0], 1e-6)


@thorough
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_two_processes_train_an_adapter_as_one_does(quantize: Any, strategy: str, rows: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    if quantize:
        pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "tie_word_embeddings": False}
    wide = save_tiny_model(tmp_path / "wide", **sizes)  # whose rows fill a block of 64 weights
    module = {"adapter": LoraAdapter(r=4, quantize=quantize), "learning_rate": 1e-3}
    settings: dict[str, Any] = {"module": module, "data": {"batch_size": 3}}
    play(wide, rows, tmp_path / "one", settings)
    run_as(strategy, tmp_path, play_until, 5, wide, rows, tmp_path / "two", settings)
    run_as(strategy, tmp_path, play, wide, rows, tmp_path / "two", settings)
    losses = [json.loads((tmp_path / name / "losses_0.json").read_text()) for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0][-len(losses[1]) :], abs=1e-5)
    assert (tmp_path / "two" / "weights_0").read_bytes() == (tmp_path / "two" / "weights_1").read_bytes()
    ids = [[pair["generated_ids"] for pair in pairs_of(tmp_path / name, 1)] for name in ("one", "two")]
    assert ids[0] == ids[1]


def play_served(model: str, rows: str, folder: Path, url: str, strategy: str) -> None:
    settings = {
        "module": {"adapter": LoraAdapter(r=4), "learning_rate": 1e-2},
        "data": {"batch_size": 3, "generator": OpenAIGenerator(url, max_new_tokens=5, batch_size=4)},
    }
    play(model, rows, folder, settings, strategy)


@thorough
def test_two_processes_train_an_adapter_on_the_responses_of_one_server(model: str, rows: str, tmp_path: Path) -> None:
    """It reads each opponent once, base and adapter merged, and samples what this package would."""
    pytest.importorskip("peft")
    module = {"adapter": LoraAdapter(r=4), "learning_rate": 1e-2}
    play(model, rows, tmp_path / "one", {"module": module, "data": {"batch_size": 3}})
    with serving(FromModel(model)) as server:
        ended = together(tmp_path, play_served, model, rows, tmp_path / "two", server.url, "ddp")
    assert ended.codes == [0, 0], ended.printed
    paths = server.paths()
    assert paths.count("/collective_rpc") == paths.count("/reset_prefix_cache") == 2
    assert paths.count("/v1/completions") == 2 * len(pairs_of(tmp_path / "two", 0))
    losses = [json.loads((tmp_path / name / "losses_0.json").read_text()) for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert (tmp_path / "two" / "weights_0").read_bytes() == (tmp_path / "two" / "weights_1").read_bytes()
    for k in range(2):
        ids = [[pair["generated_ids"] for pair in pairs_of(tmp_path / name, k)] for name in ("one", "two")]
        assert ids[0] == ids[1]
        names = {path.name for path in (tmp_path / "two" / f"iteration_{k}").iterdir()}
        assert {"adapter", "policy"} <= names and "opponent" not in names


def play_impatiently(model: str, rows: str, folder: Path, dies: bool) -> None:
    """With a time-out of two seconds for each collective operation, and a process that generates for five more."""
    strategy = DDPStrategy(timeout=timedelta(seconds=2))

    def wait(trainer: Any, module: Any, iteration: int) -> None:
        if trainer.global_rank == 1 and iteration == 0:
            time.sleep(5)
            if dies:
                os._exit(7)

    game = Game(
        model,
        rows,
        folder,
        trainer={"devices": 2, "strategy": strategy},
        play={"iterations": 1, "epochs": 1},
        callbacks=[Do(on_iteration_start=wait)],
    )
    game.play()


def test_a_process_may_generate_for_longer_than_the_others_wait_elsewhere(
    model: str, rows: str, tmp_path: Path
) -> None:
    ended = together(tmp_path, play_impatiently, model, rows, tmp_path / "run", False)
    assert ended.codes == [0, 0], ended.printed


@thorough
def test_a_process_that_is_waited_for_is_missed_at_once(model: str, rows: str, tmp_path: Path) -> None:
    gone = together(tmp_path, play_impatiently, model, rows, tmp_path / "gone", True)
    assert gone.codes == [1, 7] and "Connection closed by peer" in gone.printed[0]


def play_with_another_trial(model: str, rows: str, folder: Path) -> None:
    """Each process would find another kernel the fastest."""
    kernels._try_candidates = lambda *_: "grouped" if os.environ["RANK"] == "1" else "folded"
    trainer = {"devices": 2, "strategy": "ddp", "precision": "bf16-true"}
    game = Game(model, rows, folder, trainer=trainer, module={"kernels": {"prompt_attention": "kernel"}}).play()
    assert kernels.kernel_of(game.module.policy, "decode_attention") == "folded"


@thorough
def test_all_processes_take_the_kernels_that_the_first_finds_fastest(model: str, rows: str, tmp_path: Path) -> None:
    ended = together(tmp_path, play_with_another_trial, model, rows, tmp_path / "run")
    assert ended.codes == [0, 0], ended.printed
    assert read(tmp_path / "run" / "run.json")["kernels"]["decode_attention"] == "folded"


# --- stopped, and continued -------------------------------------------------------------------------------------------


def play_until(batch: int, model: str, rows: str, folder: Path, settings: dict[str, Any], strategy: str = "") -> None:
    """The same game, stopped after a batch and its checkpoint."""

    def stop(trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == batch:
            raise Stopped

    trainer = {**settings.get("trainer", {}), **({"devices": 2, "strategy": strategy} if strategy else {})}
    last = [DoLast(on_train_batch_end=stop)]
    with pytest.raises(Stopped):
        Game(model, rows, folder, **{**settings, "trainer": trainer}, last=last, every_n_steps=1).play()


def run_as(strategy: str, folder: Path, function: Any, *args: Any) -> None:
    """In this process, or where there is a strategy in two."""
    if not strategy:
        function(*args)
    else:
        ended = together(folder, function, *args, strategy)
        assert ended.codes == [0, 0], ended.printed


@pytest.mark.parametrize(
    ("first", "then"),
    [("ddp", ""), ("", "fsdp2"), *(pytest.param(*both, marks=thorough) for both in (("fsdp2", "ddp"), ("", "ddp")))],
)
def test_another_number_of_processes_continues_a_game(
    first: str, then: str, model: str, rows: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"trainer": {"precision": "64-true"}, "data": {"answers_per_prompt": 2, "batch_size": 6}}
    play(model, rows, tmp_path / "whole", settings)
    run = tmp_path / "run"
    # in the middle of the second iteration's first epoch
    run_as(first, tmp_path, play_until, 8, model, rows, run, settings)
    run_as(then, tmp_path, play, model, rows, run, settings)
    losses = [json.loads((folder / "losses_0.json").read_text()) for folder in (tmp_path / "whole", run)]
    assert 0 < len(losses[1]) < len(losses[0])
    assert losses[1] == pytest.approx(losses[0][-len(losses[1]) :], abs=1e-14, rel=0)
    summaries = [without_seconds(read(folder / "iteration_1" / "summary.json")) for folder in (tmp_path / "whole", run)]
    assert_close(summaries[1], summaries[0], 1e-6)


@thorough
def test_sharded_float32_masters_of_bfloat16_weights_continue_bit_for_bit(
    model: str, rows: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "trainer": {"precision": "bf16-true", "gradient_clip_val": 1.0},
        "module": {"learning_rate": 1e-3},
    }
    run_as("fsdp2", tmp_path, play, model, rows, tmp_path / "whole", settings)
    run_as("fsdp2", tmp_path, play_until, 6, model, rows, tmp_path / "run", settings)
    run_as("fsdp2", tmp_path, play, model, rows, tmp_path / "run", settings)
    assert (tmp_path / "run" / "weights_1").read_bytes() == (tmp_path / "whole" / "weights_0").read_bytes()
    play(model, rows, tmp_path / "one", settings)
    losses = [json.loads((tmp_path / name / "losses_0.json").read_text()) for name in ("one", "whole")]
    assert losses[1] == pytest.approx(losses[0], abs=0.03)
    checkpoints = [sorted((tmp_path / name / "checkpoints").glob("*.ckpt"))[-1] for name in ("one", "whole")]
    shapes = [
        {key: value.shape for key, value in torch.load(path, weights_only=True)["state_dict"].items()}
        for path in checkpoints
    ]
    assert shapes[0] == shapes[1]  # a checkpoint is whole


TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")

#: What happens to a process: its rank, where, at which number there, and what.
FATES = ["1 generation 3 killed", "0 training 3 killed fsdp2"]
if IS_THOROUGH:
    PLACES = ("generation 3", "generation 7", "training 1", "training 3", "validation 1", "export 1")
    FATES = [
        f"{rank} {place} {what}" for rank in (0, 1) for place in PLACES for what in ("killed", "signalled", "broken")
    ]


@pytest.fixture(scope="module")
def undisturbed(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The game that the fates befall, played by two processes without any."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = together(folder, run_command, flags_of(model, rows, folder / "run", *TWO))
    assert ended.codes == [0, 0], ended.printed
    return folder / "run"


@pytest.mark.parametrize("fate", FATES)
def test_what_ends_one_process_ends_all_with_one_sentence_and_the_same_command_continues(
    fate: str, model: str, rows: str, undisturbed: Path, tmp_path: Path
) -> None:
    fate, is_sharded = fate.removesuffix(" fsdp2"), fate.endswith("fsdp2")
    command = flags_of(model, rows, tmp_path / "run", *TWO, *(["--trainer.strategy=fsdp2"] if is_sharded else []))
    ended = together(tmp_path, run_command, command, fate)
    printed, rank = "".join(ended.printed), int(fate[0])
    assert "Traceback" not in printed
    sentences = [line for line in printed.splitlines() if line.startswith("spin-lightning: ")]
    if fate.endswith("killed"):
        expected, code = "error: another process of this run is gone", 75
    elif fate.endswith("signalled"):
        expected, code = "stopped by SIGTERM; what is finished is saved", 143
    else:
        expected, code = "error: a plug was pulled", 2
    assert len(sentences) == 1 and f"spin-lightning: {expected}" in sentences[0], printed
    codes = list(ended.codes)
    if fate.endswith("killed"):
        assert codes.pop(rank) == -signal.SIGKILL
    assert codes[0] == code, codes  # that of the first process, or else of the one that is left
    assert not (tmp_path / "run" / "game.json").exists()
    continued = together(tmp_path, run_command, command)
    assert continued.codes == [0, 0], continued.printed
    for name in ("game.json", "iteration_1/summary.json"):
        found, expected = (without_seconds(read(folder / name)) for folder in (tmp_path / "run", undisturbed))
        assert_close(found, expected, 1e-4) if is_sharded else None
        assert is_sharded or found == expected
    for k in range(2):
        pairs, policy = pairs_of(tmp_path / "run", k), f"iteration_{k}/policy/model.safetensors"
        assert [pair["generated_ids"] for pair in pairs] == [pair["generated_ids"] for pair in pairs_of(undisturbed, k)]
        assert is_sharded or pairs == pairs_of(undisturbed, k)
        assert is_sharded or (tmp_path / "run" / policy).read_bytes() == (undisturbed / policy).read_bytes()
    assert not list((tmp_path / "run").rglob(".ended_*"))


@thorough
def test_what_is_refused_is_refused_once(model: str, rows: str, tmp_path: Path) -> None:
    """Data, a folder in use, other settings than the run began with: before, while and after the processes meet."""
    bad, run = tmp_path / "bad.jsonl", tmp_path / "run"
    bad.write_text(Path(rows).read_text() + '{"messages": 3}\n')
    run.mkdir()
    with FileLock(run / ".lock"):
        refused = [
            Several(tmp_path, run_command, flags_of(model, str(bad), run, *TWO)).wait(ends_all=True),
            together(tmp_path, run_command, flags_of(model, rows, run, *TWO)),
        ]
    (run / "run.json").write_text('{"settings": {"model.beta": 3.0}, "changes": [], "versions": {}}')
    (run / "checkpoints").mkdir()
    for name in ("step_000000001.ckpt", "step_000000001.ckpt.sha256"):
        (run / "checkpoints" / name).write_text("")
    (run / "checkpoints" / "step_000000001.ckpt.sha256").write_text(f"{sha256_of(b'')}  step_000000001.ckpt")
    refused.append(together(tmp_path, run_command, flags_of(model, rows, run, *TWO)))
    for ended, words in zip(refused, ("messages", "another process is at work in", "cannot be read"), strict=True):
        printed = "".join(ended.printed)
        assert printed.count("spin-lightning: error: ") == 1 and words in printed and "Traceback" not in printed, (
            printed
        )
        assert ended.codes[0] == 2


# --- as a user starts them --------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


@thorough
def test_one_command_starts_its_processes_and_ends_with_the_code_of_the_one_that_fails(
    model: str, rows: str, undisturbed: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "spin_lightning", *flags_of(model, rows, tmp_path / "run", *TWO)]
    for fate, code, words in (
        ("1 generation 2 killed", 75, "is gone"),
        ("1 training 3 broken", 2, "a plug was pulled"),
    ):
        done = subprocess.run(command, env=environment(**{FATE: fate}), capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert done.stderr.count("spin-lightning: ") == 1 and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    subprocess.run(command, env=environment(), capture_output=True, check=True)
    policy = "iteration_1/policy/model.safetensors"
    assert (tmp_path / "run" / policy).read_bytes() == (undisturbed / policy).read_bytes()


TWO_MACHINES = ("--trainer.num_nodes=2", "--trainer.strategy=ddp")


def assert_same_policies(folder: Path, expected: Path) -> None:
    for k in range(2):
        policy = f"iteration_{k}/policy/model.safetensors"
        assert (folder / policy).read_bytes() == (expected / policy).read_bytes()


def test_two_machines_play_one_game(model: str, rows: str, undisturbed: Path, tmp_path: Path) -> None:
    command = flags_of(model, rows, tmp_path / "run", *TWO_MACHINES)
    ended = together(tmp_path, run_command, command, machines=2)
    assert ended.codes == [0, 0], ended.printed
    assert "the game is over" in ended.printed[0] and "iteration 0" not in ended.printed[1]
    assert_same_policies(tmp_path / "run", undisturbed)


@thorough
def test_two_machines_play_one_game_by_torchrun(model: str, rows: str, undisturbed: Path, tmp_path: Path) -> None:
    flags = flags_of(model, rows, tmp_path / "run", *TWO_MACHINES)
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}",
                "-m", "spin_lightning", *flags,
            ],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    printed = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert "the game is over" in printed[0] and "iteration 0" not in printed[1]
    assert_same_policies(tmp_path / "run", undisturbed)
