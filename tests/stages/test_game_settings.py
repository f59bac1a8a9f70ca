"""Settings of a game: one for each iteration, refused before a model loads, or not changed under way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
from games import Do, FakeGenerator, Game, read
from lightning import Trainer

from spin_lightning import (
    Health,
    RunCheckpoint,
    SelfPlay,
    SftLightningModule,
    ShowAnswers,
    SpaceLoss,
    SpinLightningModule,
    SpinLoss,
    SyntheticDataModule,
    TransformersGenerator,
    UserError,
)


def test_lists_give_each_iteration_its_own_settings(model: str, rows: str, tmp_path: Path) -> None:
    betas, smoothing = [0.5, 2.0], [0.0, 0.2]
    module = {
        "beta": betas,
        "learning_rate": [1e-3, 4e-4],
        "loss": SpinLoss(label_smoothing=smoothing),
        "warmup_ratio": 0.0,
    }
    outputs: list[tuple[int, float, float]] = []

    def check(trainer: Trainer, module: SpinLightningModule, outputs_: Any, batch: Any, index: int) -> None:
        outputs.append((module.iteration, float(trainer.callback_metrics["rewards/margins"]), float(outputs_["loss"])))

    game = Game(
        model,
        rows,
        tmp_path,
        module={**module},
        play={"epochs": [1, 2]},
        data={"batch_size": 8, "history": 0},
        callbacks=[Do(on_train_batch_end=check)],
    )
    log_ratios: list[float] = []
    original = SpinLightningModule.pair_log_probs

    def watched(self: SpinLightningModule, batch: Any) -> Any:
        policy = original(self, batch)
        log_ratios.append(
            ((policy.real - batch.opponent.real) - (policy.generated - batch.opponent.generated)).mean().item()
        )
        return policy

    with patch.object(SpinLightningModule, "pair_log_probs", watched):
        game.play()
    # one batch an epoch: one step in iteration 0, two in iteration 1
    assert [iteration for iteration, *_ in outputs] == [0, 1, 1]
    assert list(game.recorder.rates.values()) == pytest.approx([1e-3, 4e-4, 2e-4])
    assert game.losses[0] == pytest.approx(math.log(2)) == game.losses[1]
    margin = 2.0 * log_ratios[2]
    assert outputs[2][1] == pytest.approx(margin, rel=1e-4) and margin != 0
    summary = read(tmp_path / "iteration_1/summary.json")
    assert summary["beta"] == 2.0 and summary["updates"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module": {"beta": [1.0]}}, r"model.beta is a list of 1 values \[1.0\], but the game has 2 iterations"),
        ({"module": {"learning_rate": [1e-3] * 3}}, "model.learning_rate is a list of 3 values"),
        ({"module": {"loss": SpinLoss(nll_weight=[0.1] * 3)}}, "model.loss.nll_weight is a list of 3 values"),
        ({"play": {"epochs": [1]}}, "self_play.epochs is a list of 1 values"),
        ({"play": {"iterations": 0}}, "self_play.iterations must be at least 1, got 0"),
        ({"play": {"epochs": 0}}, "self_play.epochs must be at least 1 in every iteration, got 0"),
        ({"play": {"epochs": [1, 0]}}, r"self_play.epochs must be at least 1 in every iteration, got \[1, 0\]"),
        ({"play": {"shard_size": 0}}, "self_play.shard_size must be at least 1, got 0"),
        ({"module": {"beta": 0.0}}, "model.beta must be positive, got 0.0"),
        ({"module": {"beta": [1.0, -1.0]}}, "model.beta must be positive, got -1.0"),
        ({"module": {"beta": math.nan}}, "model.beta must be positive, got nan"),
        ({"module": {"learning_rate": 0.0}}, "model.learning_rate must be positive, got 0.0"),
        ({"module": {"warmup_ratio": 1.0}}, r"model.warmup_ratio must be in \[0, 1\), got 1.0"),
        (
            {"module": {"opponent": "absent"}},
            r"model.opponent must be one of \['resident', 'stored'\] or an Opponent, got 'absent'",
        ),
        ({"module": {"lr_schedule": "step"}}, "model.lr_schedule must be one of .*, got 'step'"),
        ({"module": {"loss": SpaceLoss(), "beta": 0.5}}, "SpaceLoss needs model.beta: 1, got 0.5"),
        ({"data": {"answers_per_prompt": 0}}, "data.answers_per_prompt must be at least 1, got 0"),
        ({"data": {"history": -1}}, "data.history must be at least 0, got -1"),
        ({"data": {"batch_size": 0}}, "data.batch_size must be at least 1, got 0"),
        ({"data": {"max_prompt_tokens": 0}}, "data.max_prompt_tokens must be at least 1, got 0"),
        ({"data": {"val_fraction": 1.0}}, r"data.val_fraction must be in \[0, 1\), got 1.0"),
        ({"data": {"max_prompt_tokens": 3}}, "all 8 prompts of .* are longer than max_prompt_tokens=3"),
        ({"every_n_steps": 0}, "checkpoint.every_n_steps must be at least 1, got 0"),
        ({"trainer": {"max_epochs": 3}}, r"trainer.max_epochs must be 4, the sum of self_play.epochs \[2, 2\], got 3"),
        ({"trainer": {"reload_dataloaders_every_n_epochs": 0}}, "reload_dataloaders_every_n_epochs must be 1.*got 0"),
        ({"trainer": {"reload_dataloaders_every_n_epochs": 2}}, "reload_dataloaders_every_n_epochs must be 1.*got 2"),
        ({"trainer": {"max_steps": 7}}, "trainer.max_steps cannot be used with SelfPlay, got 7"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_model_loads(
    settings: dict[str, Any], message: str, model: str, rows: str, tmp_path: Path
) -> None:
    with (
        patch("spin_lightning.stages.policy.load_policy", side_effect=AssertionError("loaded")),
        pytest.raises(UserError, match=message),
    ):
        Game(model, rows, tmp_path / "run", **settings).play()
    assert not (tmp_path / "run").exists()


def test_callbacks_refuse_settings_out_of_range() -> None:
    with pytest.raises(UserError, match=r"health.stop must be equilibrium, harm or never, got 'maybe'"):
        Health("maybe")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"samples.num_prompts must be 0 or more, got -1"):
        ShowAnswers(-1)


def test_what_does_not_fit_together_is_refused(model: str, rows: str, tmp_path: Path) -> None:
    def trainer(*callbacks: L.Callback) -> Trainer:
        return Trainer(
            accelerator="cpu",
            logger=False,
            max_epochs=4,
            reload_dataloaders_every_n_epochs=1,
            callbacks=list(callbacks),
        )

    game = SelfPlay(str(tmp_path), iterations=2)
    data, other = SyntheticDataModule(rows, tokenizer_name_or_path=model), L.LightningDataModule()
    with pytest.raises(UserError, match="needs the SelfPlay callback"):
        trainer().fit(SpinLightningModule(model), data)
    with pytest.raises(UserError, match=r"SelfPlay plays with a SpinLightningModule, .* got SftLightningModule"):
        trainer(game).fit(SftLightningModule(model), data)
    other.train_dataloader = other.val_dataloader = lambda: []  # type: ignore[method-assign]
    with pytest.raises(UserError, match="SelfPlay needs a SyntheticDataModule, got LightningDataModule"):
        trainer(game).fit(SpinLightningModule(model), other)
    with pytest.raises(UserError, match="RunCheckpoint needs a dirpath where there is no SelfPlay callback"):
        trainer(RunCheckpoint()).fit(SftLightningModule(model), SyntheticDataModule(rows))
    with pytest.raises(UserError, match=r"data.tokenizer_name_or_path is needed outside of a Trainer"):
        SyntheticDataModule(rows).setup()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("reset", [True, False])
def test_the_schedule_restarts_each_iteration_and_the_optimizer_if_asked(
    reset: bool, schedule: Any, model: str, rows: str, tmp_path: Path
) -> None:
    steps_taken: list[float] = []

    def look(trainer: Trainer, *_: Any) -> None:
        state = trainer.optimizers[0].state
        steps_taken.append(max((float(values["step"]) for values in state.values()), default=0.0))

    module = {"learning_rate": 1e-3, "lr_schedule": schedule, "warmup_ratio": 0.25}
    game = Game(
        model, rows, tmp_path, module=module, play={"reset_optimizer": reset}, callbacks=[Do(on_train_batch_start=look)]
    ).play()
    expected = []
    for total in (4, 8):  # 8 pairs, then 16 with those of the last iteration: 2 and 4 batches of 4, in 2 epochs
        warmup = total // 4
        expected += [(step + 1) / (warmup + 1) for step in range(warmup)]
        progress = [step / (total - warmup) for step in range(total - warmup)]
        shape = {
            "linear": lambda p: 1 - p,
            "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
            "constant": lambda p: 1.0,
        }[schedule]
        expected += map(shape, progress)
    assert list(game.recorder.rates.values()) == pytest.approx([1e-3 * factor for factor in expected])
    assert steps_taken == [0, 1, 2, 3, *range(0 if reset else 4, 8 if reset else 12)]


def test_pairs_of_other_settings_are_not_mixed_in(model: str, rows: str, tmp_path: Path) -> None:
    """A longer cap changes the real answers' ids: the earlier pairs no longer fit those of a later iteration."""
    Game(model, rows, tmp_path / "run", play={"iterations": 1}).play()
    longer = {"generator": FakeGenerator(lambda prompt, seed: [5, 6], max_new_tokens=2)}
    changed = [
        "data.generator.generator",
        "data.generator.max_new_tokens",
        "data.prompts_sha256",
        "data.held_out_sha256",
        "self_play.shard_size",
    ]
    with pytest.raises(UserError, match="made with other settings than this run has now; what differs: prompts_sha256"):
        Game(model, rows, tmp_path / "run", data=longer, allow_changes=changed).play()
    with pytest.raises(UserError, match="what differs: shard_size"):
        Game(model, rows, tmp_path / "run", play={"shard_size": 4}, allow_changes=changed).play()


def test_another_batch_size_in_the_middle_of_an_epoch_is_refused(model: str, rows: str, tmp_path: Path) -> None:
    def stop(trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 7

    Game(model, rows, tmp_path / "run", callbacks=[Do(on_train_batch_end=stop)]).play()
    with pytest.raises(UserError, match=r"in the middle of an epoch with data.batch_size 4, got 2"):
        Game(model, rows, tmp_path / "run", data={"batch_size": 2}, allow_changes=["data.batch_size"]).play()


def test_a_prompt_longer_than_the_model_s_context_is_refused(model: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"but the model takes 512. Lower data.max_prompt_tokens"):
        Game(model, rows, tmp_path / "run", data={"generator": TransformersGenerator(max_new_tokens=600)}).play()
