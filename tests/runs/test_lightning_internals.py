"""What is used of Lightning without being documented: which version of it broke what."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.utilities.exceptions import SIGTERMException
from several import thorough

from spin_lightning.runs import lightning_internals as internals

PACKAGE = Path(__file__).parents[2] / "spin_lightning"


class AsksWhenItLoads(BoringDataModule):
    def __init__(self, seen: list[tuple[int, bool]]) -> None:
        super().__init__()
        self.seen = seen

    def train_dataloader(self) -> Any:
        trainer: Any = self.trainer
        self.seen.append((internals.epoch_to_begin(trainer), internals.resumes_inside_epoch(trainer)))
        return super().train_dataloader()


def trainer_with(folder: Path, **settings: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "max_epochs": 3,
        "limit_train_batches": 4,
        "limit_val_batches": 0,
        "reload_dataloaders_every_n_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**defaults, **settings})


def test_the_epoch_to_begin_is_known_when_its_loader_is_made(tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []
    trainer_with(tmp_path).fit(BoringModel(), AsksWhenItLoads(seen))
    assert seen == [(0, False), (1, False), (2, False)]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the callback that wrote it is not needed
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, [(1, False), (1, False), (2, False)]),  # loaded twice
        ({"every_n_train_steps": 6}, [(1, True), (2, False)]),  # after two batches of the second epoch
    ],
)
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
def test_a_fit_that_continues_knows_where_it_stands(tmp_path: Path, settings: Any, expected: Any) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **settings)
    trainer_with(tmp_path, enable_checkpointing=True, callbacks=[keep]).fit(BoringModel(), BoringDataModule())
    path = tmp_path / f"step={6 if 'every_n_train_steps' in settings else 4}.ckpt"
    seen: list[tuple[int, bool]] = []
    trainer_with(tmp_path).fit(BoringModel(), AsksWhenItLoads(seen), ckpt_path=path, weights_only=True)
    assert seen == expected


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the callback that wrote it is not needed
def test_a_checkpoint_between_last_batch_and_epoch_end_begins_with_the_next_epoch(tmp_path: Path) -> None:
    """Lightning alone resumes inside of the finished epoch and never says that the next one starts."""

    class Ended(BoringModel):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            internals.end_finished_epoch(checkpoint)

    def started(kind: type[BoringModel]) -> list[int]:
        epochs: list[int] = []

        class Started(L.Callback):
            def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                epochs.append(trainer.current_epoch)

        trainer = trainer_with(tmp_path, callbacks=[Started()])
        trainer.fit(kind(), BoringDataModule(), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True)
        assert trainer.global_step == 12
        return epochs

    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    trainer_with(tmp_path, enable_checkpointing=True, callbacks=[keep]).fit(BoringModel(), BoringDataModule())
    assert started(BoringModel) == [2]
    assert started(Ended) == [1, 2]


def test_an_epoch_that_is_cut_short_is_told_from_one_that_ended(tmp_path: Path) -> None:
    def stop_at(batch: int) -> list[bool]:
        found: list[bool] = []

        class Stop(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
                trainer.should_stop = trainer.global_step == batch

            def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
                found.append(internals.was_cut_short(trainer))

        trainer_with(tmp_path, callbacks=[Stop()], min_epochs=0, max_epochs=1).fit(BoringModel(), BoringDataModule())
        return found

    assert stop_at(2) == [True]
    assert stop_at(4) == [False]
    assert stop_at(99) == [False]


def test_optimisers_are_made_anew(tmp_path: Path) -> None:
    made: list[Any] = []

    class Remakes(BoringModel):
        def on_train_epoch_start(self) -> None:
            internals.remake_optimizers(self.trainer)
            made.append(self.trainer.optimizers[0])

    trainer_with(tmp_path).fit(Remakes(), BoringDataModule())
    assert len({id(optimizer) for optimizer in made}) == 3


def test_optimisers_are_gone_until_others_are_made(tmp_path: Path) -> None:
    left: list[Any] = []

    class Forgets(BoringModel):
        def on_train_epoch_start(self) -> None:
            before = weakref.ref(self.trainer.optimizers[0])
            internals.forget_optimizers(self.trainer)
            left.append((before(), self.trainer.optimizers, self.trainer.lr_scheduler_configs))
            internals.remake_optimizers(self.trainer)

    trainer = trainer_with(tmp_path)
    trainer.fit(Forgets(), BoringDataModule())
    assert left == [(None, [], [])] * 3 and len(trainer.optimizers) == 1


def test_lightning_notes_a_sigterm(tmp_path: Path) -> None:
    found: list[bool] = []

    class Signalled(BoringModel):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            found.append(internals.received_sigterm(self.trainer))
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                found.append(internals.received_sigterm(self.trainer))

    with pytest.raises(SIGTERMException):
        trainer_with(tmp_path).fit(Signalled(), BoringDataModule())
    assert found == [False, False, True]


@pytest.mark.parametrize(("strategy", "expected"), [("auto", False), ("ddp_spawn", True)])
def test_strategies_that_start_processes_are_known(tmp_path: Path, strategy: str, expected: bool) -> None:
    assert internals.starts_processes(trainer_with(tmp_path, strategy=strategy, devices=1)) is expected


CHILD_FAILS = """
import os, sys, time
sys.path[:0] = [{package!r}]
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
from spin_lightning.runs import lightning_internals as internals

class Model(BoringModel):
    def setup(self, stage):
        if {patient}:
            internals.let_children_explain(60.0)
        if os.environ["LOCAL_RANK"] == "1":
            os._exit(3)
        children = internals.children_of(self.trainer)
        time.sleep(11)
        print("found", [child.poll() for child in children], flush=True)
        os._exit(0)

L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False).fit(Model())
"""


@thorough
@pytest.mark.parametrize("patient", [True, False])
def test_a_process_whose_child_failed_is_killed_within_seconds_unless_it_asks_for_more(
    patient: bool, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(CHILD_FAILS.format(package=str(PACKAGE.parent), patient=patient))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (done.returncode, "found [3]" in done.stdout) == ((0, True) if patient else (-signal.SIGKILL, False))


def test_data_can_be_read_before_a_fit(tmp_path: Path) -> None:
    trainer, module, data = trainer_with(tmp_path), BoringModel(), BoringDataModule()
    assert internals.trainer_of(module) is None
    internals.attach(trainer, module, data)
    assert data.trainer is trainer and trainer.lightning_module is module
    trainer.fit(module, data)
    assert internals.trainer_of(module) is trainer


def test_bf16_true_would_round_batches_and_weights(tmp_path: Path) -> None:
    """And is kept from it: 1 + 2**-10 is no number of bfloat16."""
    value = torch.tensor(1 + 2**-10)
    trainer = trainer_with(tmp_path, precision="bf16-true")
    plugin: Any = trainer.precision_plugin
    layer = torch.nn.Linear(2, 2)
    assert plugin.convert_input(value) != value
    with internals.forward_context(trainer):
        assert torch.tensor(0.5).dtype is torch.bfloat16
    internals.keep_batches_as_collated(trainer)
    internals.keep_weights_as_loaded(trainer)
    assert plugin.convert_input(value) == value
    assert plugin.convert_module(layer).weight.dtype is torch.float32


#: Names that Lightning does not document; a file that has one of them may break with any version.
UNDOCUMENTED = (
    r"(?<!internals\.)\b(fit_loop|epoch_loop|epoch_progress|batch_progress|setup_optimizers|received_sigterm|precision_plugin"
    r"|\._trainer|_subcommand_parsers|strategy\.(launcher|connect|setup)|config_init)\b|\"loops\"|_MultiProcessing"
)


def test_no_other_file_uses_what_is_not_documented() -> None:
    found = {
        str(path.relative_to(PACKAGE)): re.findall(UNDOCUMENTED, path.read_text())
        for path in PACKAGE.rglob("*.py")
        if re.search(UNDOCUMENTED, path.read_text())
    }
    assert set(found) == {"runs/lightning_internals.py"}, found


def test_the_private_name_of_a_model_s_attention_stands_in_one_file() -> None:
    found = [path.name for path in PACKAGE.rglob("*.py") if "._attn_implementation" in path.read_text()]
    assert found == ["attention.py"]


def test_a_measurement_that_follows_a_batch_is_foreseen_and_can_be_made_before_training(tmp_path: Path) -> None:
    told: list[Any] = []

    class Tell(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            internals.validate_now(trainer)
            told.append("training" if trainer.training else "not training")

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            told.append(internals.validation_follows(trainer))

        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            told.append("measured while validating" if trainer.validating else "measured")

    settings = {"max_epochs": 1, "limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 0}
    trainer_with(tmp_path, callbacks=[Tell()], **settings).fit(BoringModel(), BoringDataModule())
    measured = "measured while validating"
    assert told == [measured, "training", False, True, measured, False, True, measured]
