"""A model object in the place of a name, and the dtype of what came in and what goes out."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from games import DoLast, Game, Stopped, read, weight_bits, without_seconds
from helpers import QUIET, byte_tokenizer, load, tiny_model
from lightning import Trainer
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel

from spin_lightning import (
    AlphaSpinLoss,
    ExportPolicy,
    SftLightningModule,
    SpinLightningModule,
    SyntheticDataModule,
    UserError,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "resident": {"module": {"opponent": "resident"}, "play": {"epochs": 1}},
    "alpha-SPIN": {"module": {"loss": AlphaSpinLoss(0.3)}, "play": {"epochs": 1}},
    "bf16-true": {"trainer": {"precision": "bf16-true"}, "play": {"epochs": 1}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_object_plays_the_game_that_its_name_plays(name: str, model: str, rows: str, tmp_path: Path) -> None:
    named = Game(model, rows, tmp_path / "named", **SETTINGS[name]).play()
    given = load(model)
    game = Game(given, rows, tmp_path / "given", **SETTINGS[name]).play()  # its name leads to the tokenizer
    assert game.module.policy is given
    assert game.losses == named.losses and game.weights == named.weights
    for file in ("run.json", "game.json", "iteration_1/pairs_manifest.json"):
        ours, theirs = (without_seconds(read(tmp_path / folder / file)) for folder in ("given", "named"))
        assert ours == theirs, file
    checkpoint = torch.load(game.clock.last_checkpoint, weights_only=True)["state_dict"]
    assert {key.partition(".")[0] for key in checkpoint} == {"policy", "metrics"}


@pytest.mark.parametrize(("name", "batch"), [("resident", 1), ("alpha-SPIN", 1)])  # both in iteration 0
def test_a_stopped_game_of_a_model_object_continues(
    name: str, batch: int, model: str, rows: str, tmp_path: Path
) -> None:
    def stop(trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == batch:
            raise Stopped

    whole = Game(model, rows, tmp_path / "whole", **SETTINGS[name]).play()
    with pytest.raises(Stopped):
        Game(load(model), rows, tmp_path / "run", last=[DoLast(on_train_batch_end=stop)], **SETTINGS[name]).play()
    game = Game(load(model), rows, tmp_path / "run", **SETTINGS[name]).play()
    assert game.weights == whole.weights


def test_a_stopped_game_is_not_continued_with_an_object_that_was_trained_already(
    model: str, rows: str, tmp_path: Path
) -> None:
    def stop(trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 0:
            raise Stopped

    given = load(model)
    settings = SETTINGS["alpha-SPIN"]
    with pytest.raises(Stopped):
        Game(given, rows, tmp_path, last=[DoLast(on_train_epoch_end=stop)], **settings).play()
    with pytest.raises(UserError, match="does not hold the weights that this game began with"):
        Game(given, rows, tmp_path, **settings).play()


def test_an_object_without_a_name_needs_its_tokenizer(rows: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"an object that knows no name, LlamaForCausalLM, so its tokenizer .* data.tokenizer = "
    ):
        Game(tiny_model(len(byte_tokenizer())), rows, tmp_path / "none").play()
    game = Game(tiny_model(len(byte_tokenizer())), rows, tmp_path / "run")
    game.data.tokenizer = byte_tokenizer()
    game.play()
    assert read(tmp_path / "run/run.json")["settings"]["model.model_name_or_path"] == "LlamaForCausalLM"
    assert read(tmp_path / "run/iteration_0/pairs_manifest.json")["opponent"] == "LlamaForCausalLM"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run/iteration_1/policy")
    assert weight_bits(exported) == game.weights


def test_weights_that_are_frozen_in_the_object_stay(model: str, rows: str, tmp_path: Path) -> None:
    given = load(model)
    frozen = given.model.embed_tokens.weight.requires_grad_(False)
    before, other = frozen.clone(), given.model.layers[0].mlp.up_proj.weight.clone()
    Game(given, rows, tmp_path, module={"opponent": "resident"}).play()
    assert torch.equal(frozen, before) and not torch.equal(given.model.layers[0].mlp.up_proj.weight, other)


def test_supervised_fine_tuning_takes_an_object_too(model: str, rows: str, tmp_path: Path) -> None:
    ends = []
    for first in (model, load(model), Path(model)):
        module = SftLightningModule(first, learning_rate=1e-2)
        trainer = Trainer(max_epochs=1, enable_checkpointing=False, callbacks=[ExportPolicy(str(tmp_path))], **QUIET)
        trainer.fit(module, SyntheticDataModule(rows, val_fraction=0.0))
        ends.append(weight_bits(module.policy))
    assert ends[0] == ends[1] == ends[2]


class Unregistered(PreTrainedModel):
    config_class = type("UnregisteredConfig", (LlamaConfig,), {"model_type": "unregistered"})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))


TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), {}, "must be a name or a model of transformers, got Linear"),
        (lambda: None, {}, "must be a name or a model of transformers, got NoneType"),
        (tiny_model, {"revision": "main"}, "revision 'main' says how a model is loaded, but this LlamaForCausalLM is"),
        (tiny_model, {"attn_implementation": "eager"}, "attn_implementation 'eager' says how a model is loaded"),
    ],
)
def test_what_is_no_model_of_transformers_is_refused_at_once(given: Any, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SpinLightningModule(given(), **settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: LlamaModel(LlamaConfig(**TINY)), "a saved LlamaModel would be loaded again as LlamaForCausalLM"),
        (lambda: BertModel(BertConfig(**TINY)), "a saved BertModel would be loaded again as BertLMHeadModel"),
        (lambda: Unregistered(Unregistered.config_class()), "a saved Unregistered could not be loaded again: "),
        (lambda: tiny_model().requires_grad_(False), "no weight of this LlamaForCausalLM has requires_grad"),
    ],
)
def test_objects_that_cannot_be_trained_or_exported_are_refused_before_anything_is_generated(
    given: Any, message: str, rows: str, tmp_path: Path
) -> None:
    game = Game(given(), rows, tmp_path / "run")
    game.data.tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match=message):
        game.play()
    assert not (tmp_path / "run" / "iteration_0").exists()


# --- dtype ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with its weights in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    shutil.copytree(model, folder, dirs_exist_ok=True)
    load(model, torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("precision", "is_object"), [("32-true", False), ("32-true", True), ("bf16-mixed", False), ("bf16-true", False)]
)
def test_a_larger_export_than_what_came_in_is_said_and_explained(
    precision: str, is_object: bool, half: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = load(half, torch.bfloat16) if is_object else half
    Game(first, rows, tmp_path, trainer={"precision": precision}, play={"epochs": 1, "iterations": 1}).play()
    said = capsys.readouterr().out
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    grows = dtype == "float32"
    assert said.count("are stored in bfloat16; they are trained and exported in float32, twice as large") == grows
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "iteration_0/policy")
    assert exported.dtype == getattr(torch, dtype)
    summary = read(tmp_path / "iteration_0/summary.json")
    assert (summary["dtype"], summary["stored_dtype"]) == (dtype, "bfloat16")
    card = (tmp_path / "iteration_0/policy/README.md").read_text()
    assert f"| weights | {dtype}; those it began with: bfloat16 |" in card
    assert ("dtype=torch.bfloat16)" in card) == grows  # how to make it as small again


def test_nothing_is_said_where_nothing_grows(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Game(model, rows, tmp_path, play={"epochs": 1, "iterations": 1}).play()
    assert "twice as large" not in capsys.readouterr().out
    assert "dtype=torch" not in (tmp_path / "iteration_0/policy/README.md").read_text()


def test_the_cast_command_of_the_card_halves_the_folder_and_rounds_the_weights(
    half: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Game(half, rows, tmp_path, play={"epochs": 1, "iterations": 1}).play()
    folder = tmp_path / "iteration_0/policy"
    card = (folder / "README.md").read_text()
    (code,) = (found for found in re.findall(r"```python\n(.*?)\n```", card, re.S) if "bfloat16" in found)
    monkeypatch.chdir(folder.parent)
    exec(code, {})
    whole, cast = (load(str(path)) for path in (folder, folder.with_name("policy_bfloat16")))
    rounded = copy.deepcopy(whole).to(torch.bfloat16).float()
    assert weight_bits(cast) == weight_bits(rounded)
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, folder.with_name("policy_bfloat16"))]
    assert sizes[1] < 0.6 * sizes[0]
    assert (folder.with_name("policy_bfloat16") / "tokenizer.json").exists()


def test_most_of_what_small_steps_change_is_lost_in_bfloat16(half: str, rows: str, tmp_path: Path) -> None:
    """Why the export is not rounded: at the learning rates of self-play a rounded policy is the opponent again."""
    game = Game(half, rows, tmp_path, module={"learning_rate": 1e-6}, play={"iterations": 1}).play()
    before = load(half, torch.bfloat16)
    after = game.module.policy
    moved = sum(int((a.float() != b).sum()) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    kept = sum(int((a != b.bfloat16()).sum()) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert moved > 5000 and kept < 0.05 * moved
