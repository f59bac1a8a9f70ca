"""A stage that plays in iterations and is not self-play: the policy imitates its own responses.

They are sampled anew each iteration. It brings an ``Iteration`` of its own, and the clock, the checkpoints and the
export know nothing of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pytest
from games import CountingGenerator, DoLast, Recorder, Stopped, read, weight_bits
from transformers import AutoModelForCausalLM

from spin_lightning import AtomicCheckpointIO, Health, RunCheckpoint, SelfPlay, ShowAnswers, SyntheticDataModule
from spin_lightning.generation.base import Player, opened, seed_of
from spin_lightning.generation.synthetic_data import TrainingSet
from spin_lightning.models.batches import pack_rows
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.models.modes import evaluating
from spin_lightning.models.saving import weights_hash
from spin_lightning.runs.shards import ShardStore
from spin_lightning.stages.iteration import Iteration, Run
from spin_lightning.stages.iterative import IterativeModule

IDS = pa.list_(pa.int32())


class OwnResponses(ShardStore):
    schema = pa.schema([("prompt_id", pa.int64()), ("prompt_ids", IDS), ("response_ids", IDS)])
    rows_are = "responses"


class ImitationIteration(Iteration):
    def open(self, known: str | None, is_fresh: bool) -> OwnResponses:
        binding = {"iteration": self.number, "policy_sha256": weights_hash(self.policy.model)}
        return OwnResponses(self.folder / "responses", binding if is_fresh else None)

    def fill(self, store: OwnResponses) -> None:
        data, model = self.run.data, self.policy.model
        if store.is_complete:
            return
        seeds = [seed_of(data.seed, self.number, prompt.prompt_id, 0) for prompt in data.prompts]
        prompts = [prompt.prompt_ids for prompt in data.prompts]
        with opened(data.generator, Player(model)), evaluating(model):
            said = dict(data.generator.generate(prompts, seeds, data.encoder.end_ids, data.encoder.pad_id))
        rows = [{"prompt_id": n, "prompt_ids": ids, "response_ids": said[n].ids} for n, ids in enumerate(prompts)]
        store.write_shard("all.parquet", rows)
        store.finish(["all.parquet"])

    def training_set(self, store: OwnResponses) -> TrainingSet:
        return TrainingSet(store.read(), collate, sentence=f"iteration {self.number}: imitating")


def collate(rows: Any, max_tokens: int) -> list[Any]:
    return [batch for _, batch, _ in pack_rows(rows, ["response_ids"], max_tokens)]


class ImitationModule(IterativeModule):
    def make_iteration(self, number: int, run: Run) -> Iteration:
        return ImitationIteration(number, run, self.policy_view)

    def training_step(self, batch: list[Any], batch_idx: int) -> Any:
        count = sum(map(len, batch))
        return self.mean_of_update(lambda part: -response_log_probs(self.policy, part).sum(), batch, count)


def imitate(model: str, rows: str, folder: Path, stop_after: int | None = None) -> tuple[L.Trainer, Recorder]:
    clock, recorder = SelfPlay(str(folder), iterations=2, epochs=2), Recorder()

    def stop(trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == stop_after:
            raise Stopped

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=clock.total_epochs,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            clock,
            recorder,
            RunCheckpoint(every_n_steps=1),
            DoLast(on_train_batch_end=stop),
            ShowAnswers(),
            Health(),
        ],
    )
    data = SyntheticDataModule(rows, batch_size=4, val_fraction=0.2, generator=CountingGenerator(max_new_tokens=5))
    trainer.fit(ImitationModule(model, learning_rate=1e-2), data, ckpt_path=clock.last_checkpoint)
    return trainer, recorder


def test_a_stage_brings_its_own_iteration(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, recorder = imitate(model, rows, tmp_path)
    assert read(tmp_path / "game.json")["ended_because"] == "all 2 iterations were played"
    assert "iteration 1: imitating" in capsys.readouterr().out
    losses = list(recorder.losses.values())  # 8 rows: two updates an epoch, two epochs an iteration
    assert sum(losses[2:4]) < sum(losses[:2]) and sum(losses[6:8]) < sum(losses[4:6])
    # the policy that iteration 0 exported is the one whose responses iteration 1 trains on, token by token
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "iteration_0" / "policy")
    stores = [OwnResponses(tmp_path / f"iteration_{k}" / "responses") for k in range(2)]
    assert stores[1].binding["policy_sha256"] == weights_hash(exported) != stores[0].binding["policy_sha256"]
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "iteration_1" / "policy")
    assert weight_bits(last) == weight_bits(trainer.lightning_module.policy)
    summary = read(tmp_path / "iteration_1" / "summary.json")
    assert (summary["updates"], summary["first_loss"]) == (4, pytest.approx(losses[4]))


@pytest.mark.parametrize("stop_after", [3, 4, 6])
def test_it_continues_bit_for_bit_after_a_stop(model: str, rows: str, tmp_path: Path, stop_after: int) -> None:
    whole, _ = imitate(model, rows, tmp_path / "whole")
    with pytest.raises(Stopped):
        imitate(model, rows, tmp_path / "run", stop_after)
    continued, _ = imitate(model, rows, tmp_path / "run")
    assert weight_bits(continued.lightning_module.policy) == weight_bits(whole.lightning_module.policy)
