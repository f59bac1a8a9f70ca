"""What the processes of a run tell each other, and which trainers they may have."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from helpers import QUIET, args_of
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from several import together

from spin_lightning import terminal
from spin_lightning.runs import processes
from spin_lightning.runs.shards import ShardStore
from spin_lightning.types import EndedElsewhere, LostProcess, UserError


def talk(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = processes.rank()
    assert (processes.world_size(), processes.is_first(), terminal.speaks()) == (3, rank == 0, rank == 0)
    assert processes.deal("abcdefg") == ["adg", "be", "cf"][rank]
    assert processes.share({"told": rank}) == {"told": 0}
    assert processes.add_up(torch.tensor([1.0, 10.0 * rank])).tolist() == [3.0, 30.0]
    assert processes.join(torch.full((2, rank), float(rank))).tolist() == [[1.0, 2.0, 2.0]] * 2
    assert processes.largest(rank % 2 * 15) == 15
    processes.refuse_different("same", "the weights")
    with pytest.raises(UserError, match="the weights of process 2 differ from those of process 0"):
        processes.refuse_different("other" if rank == 2 else "same", "the weights")
    terminal.say(f"process {rank} says")
    terminal.say(f"process {rank} insists", from_any=True)
    write_table(folder / "table", rank)


class Numbers(ShardStore):
    schema = pa.schema([("number", pa.int64())])


def write_table(folder: Path, rank: int) -> None:
    """Each writes its own shards; the manifest is that of one process."""
    store = Numbers(folder, {"made": "here"})
    store.write_shard(f"part-{rank}.parquet", [{"number": rank}])
    again = Numbers(folder)  # as a process would that was killed now
    assert again.has_shard(f"part-{rank}.parquet") and not again.is_complete
    store.gather()
    store.finish([f"part-{number}.parquet" for number in range(3)])
    assert Numbers(folder).read()["number"].to_pylist() == [0, 1, 2]
    assert Numbers(folder).sha256 == store.sha256


def test_three_processes_talk(tmp_path: Path) -> None:
    ended = together(tmp_path, talk, tmp_path, world=3)
    assert ended.codes == [0, 0, 0], ended.printed
    assert [line for text in ended.printed for line in text.splitlines() if "process" in line] == [
        "process 0 says", "process 0 insists", "process 1 insists", "process 2 insists",
    ]  # fmt: skip
    names = [f"part-{number}.parquet" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "table").iterdir()) == names
    alone = Numbers(tmp_path / "alone", {"made": "here"})
    for number, name in enumerate(names):
        alone.write_shard(name, [{"number": number}])
    alone.finish(names)
    assert alone.sha256 == Numbers(tmp_path / "table").sha256  # one process writes the same manifest


def test_a_shard_that_is_not_the_one_of_its_voucher_counts_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Numbers(tmp_path / "table", {"made": "here"})
    with monkeypatch.context() as patch:
        patch.setattr(processes, "world_size", lambda: 2)
        for number, name in enumerate(("a.parquet", "b.parquet")):
            store.write_shard(name, [{"number": number}])
    assert '"shards": []' in store.manifest_path.read_text()
    (store.folder / "a.parquet").write_bytes((store.folder / "b.parquet").read_bytes())
    again = Numbers(tmp_path / "table", {"made": "here"})
    assert again.has_shard("b.parquet") and not again.has_shard("a.parquet")
    again.write_shard("a.parquet", [{"number": 0}])
    again.finish(["a.parquet", "b.parquet"])
    assert Numbers(tmp_path / "table").read()["number"].to_pylist() == [0, 1]
    assert sorted(path.name for path in again.folder.iterdir()) == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, True),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"WORLD_SIZE": "1", "RANK": "0"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, False),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, True),
    ],
)
def test_the_first_process_is_known_before_they_are_connected(
    told: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert processes.is_first() is expected


def test_no_other_file_asks_torch_distributed() -> None:
    package = Path(__file__).parents[2] / "spin_lightning"
    found = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if "torch.distributed" in path.read_text()
    }
    assert found == {"runs/processes.py", "runs/sharding.py", "models/sharding.py"}


def trainer_with(strategy: Any, **settings: Any) -> L.Trainer:
    return L.Trainer(strategy=strategy, **{**QUIET, "devices": 2, **settings})


def test_strategies_with_which_a_run_would_not_learn_the_same_are_refused() -> None:
    for strategy in ("ddp", "ddp_find_unused_parameters_true", "fsdp2"):
        processes.refuse_strategy(trainer_with(strategy))
    processes.refuse_strategy(trainer_with("auto", devices=1))
    with pytest.raises(UserError, match=r"ModelParallelStrategy leaves it open how .* \(fsdp2 does it\). Set trainer"):
        processes.refuse_strategy(trainer_with(ModelParallelStrategy()))
    for strategy in ("ddp_spawn", "ddp_fork", "ddp_notebook"):
        with pytest.raises(UserError, match="DDPStrategy starts its processes by spawn or fork"):
            processes.refuse_strategy(trainer_with(strategy))
    sharded = trainer_with("auto", devices=1)
    sharded.strategy.__class__ = type("DeepSpeedStrategy", (type(sharded.strategy).__mro__[1],), {})  # needs a GPU
    with pytest.raises(UserError, match="DeepSpeedStrategy shards optimiser and weights out of sight"):
        processes.refuse_strategy(sharded)
    sharded.strategy.__class__ = FSDPStrategy
    with pytest.raises(UserError, match="FSDPStrategy shards weights in a form that the passes"):
        processes.refuse_strategy(sharded)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("fsdp", "trainer.strategy 'fsdp' shards weights in a form that the passes of a batch do not go through"),
        ("fsdp_cpu_offload", "trainer.strategy 'fsdp_cpu_offload' shards weights in a form"),
        ("deepspeed", "trainer.strategy 'deepspeed' shards optimiser and weights out of sight"),
        ("lightning.pytorch.strategies.DeepSpeedStrategy", "Strategy' shards optimiser and weights out of sight"),
    ],
)
def test_a_strategy_that_is_refused_is_so_before_others_give_advice(
    strategy: str, words: str, model: str, rows: str, tmp_path: Path, refusal: Callable[[Sequence[str]], str]
) -> None:
    said = " ".join(refusal(args_of("fit", model, rows, tmp_path / "run", f"--trainer.strategy={strategy}")).split())
    assert words in said and "Set trainer.strategy: ddp for several devices, fsdp2 for weights" in said
    processes.refuse_strategy_by_name("fsdp2")


def test_an_error_of_a_single_process_stays_what_it_is() -> None:
    for error in (UserError("x"), RuntimeError("Connection closed by peer")):
        assert processes.settle(error) is error
    processes.end_if_another_did()


def end(folder: Path) -> None:
    """The third fails, the second finds its connection broken, and the first was just about to look."""
    dist.init_process_group("gloo")
    trainer = trainer_with("ddp")
    processes.meet(folder, trainer)
    rank = processes.rank()
    if rank == 2:
        error = UserError("mine")
        assert processes.settle(error) is error and processes.settle(error) is error
        return
    if rank == 1:
        with pytest.raises(RuntimeError) as broken:
            processes.wait()
        found = processes.settle(broken.value)
    else:
        while True:
            try:
                processes.end_if_another_did()
            except EndedElsewhere as ended:
                found = ended
                break
    assert isinstance(found, EndedElsewhere) and found.exit_code == 2
    assert processes.settle(found) is found
    with pytest.raises(SystemExit) as left:
        processes.leave(found.exit_code)
    assert left.value.code == (2 if rank == 0 else 0)


def test_the_first_that_ends_says_why_and_the_others_are_quiet(tmp_path: Path) -> None:
    assert together(tmp_path, end, tmp_path, world=3).codes == [0, 0, 0]
    assert len(list(tmp_path.glob(".ended_*"))) == 1
    processes.forget_notices(tmp_path)
    assert not list(tmp_path.glob(".ended_*"))


def lose(folder: Path) -> None:
    dist.init_process_group("gloo")
    processes.meet(folder, trainer_with("ddp"))
    if processes.rank() == 0:
        os._exit(9)
    with pytest.raises(RuntimeError) as broken:
        processes.wait()
    found = processes.settle(broken.value)
    assert isinstance(found, LostProcess | EndedElsewhere) and found.exit_code == 75
    print(type(found).__name__)


def test_of_those_that_lose_one_only_one_says_so(tmp_path: Path) -> None:
    ended = together(tmp_path, lose, tmp_path, world=3)
    assert ended.codes == [9, 0, 0], ended.printed
    assert sorted(text.split()[-1] for text in ended.printed[1:]) == ["EndedElsewhere", "LostProcess"]
