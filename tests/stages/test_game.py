"""A whole game: who plays whom, in which order, and what it leaves behind."""

from __future__ import annotations

import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from games import CountingGenerator, Do, Game, answers_of, pairs_of, read, weight_bits
from helpers import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_lightning import (
    TransformersGenerator,
    UserError,
)
from spin_lightning.generation.pair_store import PairStore
from spin_lightning.models.saving import weights_hash


def test_third_party_callbacks_are_told_of_each_iteration_in_order(plain: Game) -> None:
    epoch = [("on_train_epoch_start",), ("on_validation_end",)]
    iteration = [
        [("on_iteration_start", k), ("on_generation_end", k), *epoch, *epoch, ("on_iteration_end", k)] for k in range(2)
    ]
    whole = [("on_validation_end",), *iteration[0], *iteration[1], ("on_fit_end",)]
    assert plain.hooks == whole  # type: ignore[attr-defined]


def test_what_a_callback_sets_as_an_iteration_begins_is_in_what_its_pairs_are_bound_to(
    model: str, rows: str, tmp_path: Path
) -> None:
    def steer(trainer: Any, module: Any, iteration: int) -> None:
        trainer.datamodule.generator.temperature = 1.0 + iteration
        torch.nn.init.constant_(module.policy.model.norm.weight, 2.0)

    game = Game(model, rows, tmp_path, callbacks=[Do(on_iteration_start=steer)], data={"history": 0}).play()
    bindings = [PairStore(tmp_path / f"iteration_{k}" / "pairs").binding for k in range(2)]
    assert [binding["sampling"]["temperature"] for binding in bindings] == [1.0, 2.0]
    first = AutoModelForCausalLM.from_pretrained(model)
    torch.nn.init.constant_(first.model.norm.weight, 2.0)
    assert bindings[0]["opponent_sha256"] == weights_hash(first)
    assert game.losses[0] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize("resets", [True, False])
def test_while_pairs_are_made_no_optimiser_is_in_memory_that_the_iteration_does_not_go_on_with(
    model: str, rows: str, tmp_path: Path, resets: bool
) -> None:
    ended: list[Any] = []
    alive: list[bool] = []

    def note(trainer: Any, module: Any, iteration: int, summary: Any) -> None:
        ended.append(weakref.ref(trainer.optimizers[0]))

    def look(trainer: Any, module: Any, iteration: int, store: Any, report: Any) -> None:
        alive.extend(optimizer() is not None for optimizer in ended)

    watch = Do(on_iteration_end=note, on_generation_end=look)
    Game(model, rows, tmp_path, callbacks=[watch], play={"reset_optimizer": resets}).play()
    assert alive == [not resets]


def test_the_opponent_of_an_iteration_is_the_policy_the_last_one_exported(plain: Game, model: str) -> None:
    run = plain.clock.output_dir
    for k, opponent in enumerate([model, str(run / "iteration_0" / "policy")]):
        manifest = read(run / f"iteration_{k}/pairs_manifest.json")
        weights = weights_hash(load(opponent))
        assert manifest["binding"]["opponent_sha256"] == weights
        own = [row for row in pairs_of(run, k) if row["iteration"] == k]
        assert {row["opponent_sha256"] for row in own} == {weights}
    final = load(run / "iteration_1" / "policy")
    assert weight_bits(final) == plain.weights


def test_negatives_are_sampled_from_the_frozen_opponent(plain: Game, model: str) -> None:
    """Each stored answer is what the exported opponent says to that prompt and seed; the trained policy says else."""
    run = plain.clock.output_dir
    generator = TransformersGenerator(max_new_tokens=5)
    for opponent, k in ((model, 0), (str(run / "iteration_0/policy"), 1)):
        own = sorted((row for row in pairs_of(run, k) if row["iteration"] == k), key=lambda row: row["prompt_id"])
        said = {}
        for player in (opponent, str(run / f"iteration_{k}/policy")):
            weights = load(player).eval()
            prompts, seeds = [row["prompt_ids"] for row in own], [row["seed"] for row in own]
            encoder = plain.data.encoder
            answers = answers_of(generator, weights, prompts, seeds, encoder.terminator_id, encoder.pad_id)
            said[player] = [response.ids for response in answers]
        assert said[opponent] == [row["generated_ids"] for row in own]
        assert said[str(run / f"iteration_{k}/policy")] != said[opponent]


def test_exports_load_as_hugging_face_folders(plain: Game, model: str) -> None:
    for k in range(2):
        folder = plain.clock.folder(k) / "policy"
        policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": "1+2?"}]
        assert (
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            == "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert policy.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        ids = torch.tensor([plain.data.prompts[0].prompt_ids])
        assert policy.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2).shape[1] <= ids.shape[1] + 2
        card = (folder / "README.md").read_text()
        opponent = Path(model).name if k == 0 else "iteration_0/policy"
        assert f"| opponent | `{opponent}`" in card and f"iteration {k}" in card and "| beta | 1 |" in card
        assert not list(plain.clock.folder(k).glob("*.partial"))
    game = read(plain.clock.output_dir / "game.json")
    assert game["ended_because"] == "all 2 iterations were played" and [s["iteration"] for s in game["iterations"]] == [
        0,
        1,
    ]


def test_a_game_started_again_without_its_checkpoint_reuses_its_pairs(
    plain: Game, model: str, rows: str, tmp_path: Path
) -> None:
    first = Game(model, rows, tmp_path, data={"generator": CountingGenerator(5)}, every_n_steps=None).play()
    shutil.rmtree(tmp_path / "checkpoints")
    again = Game(model, rows, tmp_path, data={"generator": CountingGenerator(5)}, every_n_steps=None).play()
    assert (first.data.generator.answered, again.data.generator.answered) == (16, 0)
    assert again.losses == first.losses == plain.losses and again.weights == first.weights


def test_one_trainer_plays_two_games_after_each_other(plain: Game, model: str, rows: str, tmp_path: Path) -> None:
    game = Game(model, rows, tmp_path).play()
    other = Game(model, rows, tmp_path / "other")
    other.play()
    assert game.losses == other.losses == plain.losses


@pytest.mark.parametrize("epochs", [1, 2])
def test_fast_dev_run_takes_one_step_and_leaves_nothing_to_continue_from(
    epochs: int, plain: Game, model: str, rows: str, tmp_path: Path
) -> None:
    game = Game(model, rows, tmp_path, trainer={"fast_dev_run": True}, play={"epochs": epochs}).play()
    assert game.losses == [pytest.approx(math.log(2), abs=1e-5)]
    assert game.clock.last_checkpoint is None and not (tmp_path / "game.json").exists()
    if epochs == 2:
        assert Game(model, rows, tmp_path).play().losses == plain.losses


def test_a_notebook_needs_ten_lines(model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cell = f"""
from lightning import Trainer
from spin_lightning import *

module = SpinLightningModule({model!r}, beta=1.0, learning_rate=1e-3)
data = SyntheticDataModule({rows!r}, generator=TransformersGenerator(max_new_tokens=4))
game = SelfPlay("runs/mine", iterations=2, epochs=1)
trainer = Trainer(
    callbacks=[game, RunCheckpoint(), ShowAnswers(), Health()], max_epochs=game.total_epochs,
    reload_dataloaders_every_n_epochs=1, accelerator="cpu", logger=False,
)
trainer.fit(module, data, ckpt_path=game.last_checkpoint)
"""
    assert len(cell.strip().splitlines()) <= 15
    exec(cell, {})
    assert read(Path("runs/mine/game.json"))["ended_because"] == "all 2 iterations were played"
    assert {path.name for path in Path().iterdir()} == {"runs"}
    exec(cell, {})  # run the cell again: nothing is played twice, nothing breaks


def test_a_second_run_in_the_same_folder_is_told_who_is_there(model: str, rows: str, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(UserError, match="another process is at work in"):
        Game(model, rows, tmp_path / "run").play()
    Game(model, rows, tmp_path / "run").play()  # and plays once the other has gone


def test_a_game_cut_short_is_not_over(model: str, rows: str, tmp_path: Path) -> None:
    """As by ``max_time``: an epoch that did not reach its last batch is continued, not exported."""
    whole = Game(model, rows, tmp_path / "whole").play()

    def stop(trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == 7

    Game(model, rows, tmp_path / "run", callbacks=[Do(on_train_batch_end=stop)]).play()
    assert not (tmp_path / "run" / "game.json").exists()
    assert not (tmp_path / "run" / "iteration_1" / "summary.json").exists()
    assert Game(model, rows, tmp_path / "run").play().weights == whole.weights
