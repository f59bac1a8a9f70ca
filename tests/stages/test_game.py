"""A whole game: who plays whom, on what, with which settings, and how it ends."""

from __future__ import annotations

import csv
import math
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import lightning as L
import pytest
import torch
from games import CountingGenerator, Do, FakeGenerator, Game, Recorder, read, weight_bits
from helpers import save_tiny_model
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_lightning import (
    AlphaSpinLoss,
    DpopLoss,
    ExportPolicy,
    Health,
    IpoLoss,
    LengthNormalizedLoss,
    RunCheckpoint,
    SelfPlay,
    SftLightningModule,
    ShowAnswers,
    SpaceLoss,
    SpinLightningModule,
    SpinLoss,
    SyntheticDataModule,
    TransformersGenerator,
    TSpinLoss,
    UserError,
)
from spin_lightning.data.loader import ResumableLoader
from spin_lightning.generation.pair_store import PairStore
from spin_lightning.models import forward_paths
from spin_lightning.models.saving import weights_hash
from spin_lightning.stages.optim import Float32Master
from spin_lightning.stages.samples import side_by_side

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def plain(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Game:
    """One ordinary game, played once, for the tests that only look at what it left behind."""
    folder = tmp_path_factory.mktemp("plain")
    hooks: list[tuple[Any, ...]] = []
    names = (
        "on_iteration_start",
        "on_generation_end",
        "on_train_epoch_start",
        "on_validation_end",
        "on_iteration_end",
        "on_fit_end",
    )
    tell = Do(**{name: lambda trainer, module, *args, name=name: hooks.append((name, *args[:1])) for name in names})
    game = Game(
        model, rows, folder / "run", callbacks=[tell], trainer={"logger": CSVLogger(folder, name="logs", version="0")}
    ).play()
    game.hooks, game.folder = hooks, folder  # type: ignore[attr-defined]
    return game


def pairs_of(folder: Path, iteration: int) -> list[dict[str, Any]]:
    return PairStore(folder / f"iteration_{iteration}" / "pairs").read().to_pylist()


# --- the order of a game ----------------------------------------------------------------------------------------------


def test_third_party_callbacks_are_told_of_each_iteration_in_order(plain: Game) -> None:
    epoch = [("on_train_epoch_start",), ("on_validation_end",)]
    iteration = [
        [("on_iteration_start", k), ("on_generation_end", k), *epoch, *epoch, ("on_iteration_end", k)] for k in range(2)
    ]
    whole = [("on_validation_end",), *iteration[0], *iteration[1], ("on_fit_end",)]
    assert plain.hooks == whole  # type: ignore[attr-defined]


def test_the_opponent_of_an_iteration_is_the_policy_the_last_one_exported(plain: Game, model: str) -> None:
    run = plain.clock.output_dir
    for k, opponent in enumerate([model, str(run / "iteration_0" / "policy")]):
        manifest = read(run / f"iteration_{k}/pairs_manifest.json")
        weights = weights_hash(AutoModelForCausalLM.from_pretrained(opponent, dtype=torch.float32))
        assert manifest["binding"]["opponent_sha256"] == weights
        own = [row for row in pairs_of(run, k) if row["iteration"] == k]
        assert {row["opponent_sha256"] for row in own} == {weights}
    final = AutoModelForCausalLM.from_pretrained(run / "iteration_1" / "policy", dtype=torch.float32)
    assert weight_bits(final) == plain.weights


def test_negatives_are_sampled_from_the_frozen_opponent(plain: Game, model: str) -> None:
    """Each stored answer is what the exported opponent says to that prompt and seed; the trained policy says else."""
    run = plain.clock.output_dir
    generator = TransformersGenerator(max_new_tokens=5)
    for opponent, k in ((model, 0), (str(run / "iteration_0/policy"), 1)):
        own = sorted((row for row in pairs_of(run, k) if row["iteration"] == k), key=lambda row: row["prompt_id"])
        said = {}
        for player in (opponent, str(run / f"iteration_{k}/policy")):
            weights = AutoModelForCausalLM.from_pretrained(player, dtype=torch.float32).eval()
            prompts, seeds = [row["prompt_ids"] for row in own], [row["seed"] for row in own]
            answers = dict(
                generator.generate(weights, prompts, seeds, plain.data.encoder.terminator_id, plain.data.encoder.pad_id)
            )
            said[player] = [answers[index].ids for index in range(len(own))]
        assert said[opponent] == [row["generated_ids"] for row in own]
        assert said[str(run / f"iteration_{k}/policy")] != said[opponent]


LINKS_AT_0 = {"logistic": math.log(2), "hinge": 1.0, "exponential": 1.0, "correlation": 1.0}


@pytest.mark.parametrize("link", LINKS_AT_0)
def test_loss_at_each_iterations_first_step_is_the_links_value_at_0(
    link: Any, model: str, rows: str, tmp_path: Path
) -> None:
    game = Game(model, rows, tmp_path, module={"loss": SpinLoss(link), "beta": 0.7, "learning_rate": 1e-3}).play()
    assert [game.losses[0], game.losses[4]] == pytest.approx([LINKS_AT_0[link]] * 2, abs=1e-5)
    assert game.losses[1] < LINKS_AT_0[link] - 1e-3


def test_stored_and_resident_opponents_give_the_same_losses_over_a_whole_game(
    plain: Game, model: str, rows: str, tmp_path: Path
) -> None:
    game = Game(model, rows, tmp_path, module={"opponent": "resident"}).play()
    assert game.losses == pytest.approx(plain.losses, abs=1e-4)


# --- settings of each iteration ---------------------------------------------------------------------------------------


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
            float(((policy.real - batch.opponent.real) - (policy.generated - batch.opponent.generated)).mean())
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
        ({"module": {"opponent": "absent"}}, r"model.opponent must be one of \['resident', 'stored'\], got 'absent'"),
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
        ({"trainer": {"max_steps": 7}}, "trainer.max_steps cannot be used with self-play, got 7"),
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
    with pytest.raises(UserError, match="SelfPlay plays with a SpinLightningModule, got SftLightningModule"):
        trainer(game).fit(SftLightningModule(model), data)
    with pytest.raises(UserError, match="SelfPlay needs a SyntheticDataModule, got LightningDataModule"):
        other.train_dataloader = lambda: []  # type: ignore[method-assign]
        trainer(game).fit(SpinLightningModule(model), other)
    with pytest.raises(UserError, match="RunCheckpoint needs a dirpath where there is no SelfPlay callback"):
        trainer(RunCheckpoint()).fit(SftLightningModule(model), SyntheticDataModule(rows))
    with (
        patch.object(Trainer, "world_size", PropertyMock(return_value=2)),
        pytest.raises(UserError, match="one process so far, got 2"),
    ):
        two = trainer(game)
        two.datamodule = data  # type: ignore[attr-defined]
        game.setup(two, SpinLightningModule(model), "fit")
    with pytest.raises(UserError, match=r"data.tokenizer_name_or_path is needed outside of a Trainer"):
        SyntheticDataModule(rows).setup()


# --- optimiser and schedule -------------------------------------------------------------------------------------------


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


# --- which pairs are trained on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [0, 1, 2])
def test_pairs_of_earlier_iterations_are_mixed_in_and_scored_by_the_current_opponent(
    history: int, model: str, rows: str, tmp_path: Path
) -> None:
    game = Game(model, rows, tmp_path, play={"iterations": 3, "epochs": 1}, data={"history": history}).play()
    made = {k: {row["prompt_id"]: row for row in pairs_of(tmp_path, k) if row["iteration"] == k} for k in range(3)}
    opponents = [model, *(str(tmp_path / f"iteration_{k}/policy") for k in range(2))]
    for k in range(3):
        trained = pairs_of(tmp_path, k)
        sources = list(range(k, max(-1, k - 1 - history), -1))
        assert [row["iteration"] for row in trained] == [source for source in sources for _ in range(8)]
        opponent = AutoModelForCausalLM.from_pretrained(opponents[k], dtype=torch.float32).eval()
        for row in trained:
            before = made[row["iteration"]][row["prompt_id"]]
            assert (
                row["generated_ids"] == before["generated_ids"] and row["opponent_sha256"] == before["opponent_sha256"]
            )
            for side in ("real", "generated"):
                score = log_prob_by_hand(opponent, row["prompt_ids"], row[f"{side}_ids"])
                assert row[f"opponent_{side}_log_prob"] == pytest.approx(score, abs=1e-4)
    assert sorted(game.recorder.order_of(2)) == list(range(8 * min(3, history + 1)))


def log_prob_by_hand(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    """One token at a time, from the full distribution: slow, and free of masks and shifts."""
    ids, total = list(prompt), 0.0
    for token in response:
        with torch.no_grad():
            total += float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
        ids.append(token)
    return total


def real_answer(prompt_ids: list[int], tokenizer: Any) -> list[int]:
    """The data's answer to ``a+b?``."""
    text = tokenizer.decode(prompt_ids)
    a, b = text[text.index("user\n") + 5 : text.index("?")].split("+")
    return list(tokenizer.encode(str(int(a) + int(b)), add_special_tokens=False))


def repeating(model: str, share: float) -> FakeGenerator:
    """Repeats the real answer to about a share of the prompts (the small sums), and says ``no`` to the others."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    no = tokenizer.encode("no", add_special_tokens=False)

    def rule(prompt: list[int], seed: int) -> list[int]:
        real = real_answer(prompt, tokenizer)
        return real if int(tokenizer.decode(real)) < 20 * share else no

    return FakeGenerator(rule)


def test_identical_pairs_are_dropped_and_counted(model: str, rows: str, tmp_path: Path) -> None:
    game = Game(model, rows, tmp_path, data={"generator": repeating(model, 0.5), "val_fraction": 0.0}).play()
    summary = read(tmp_path / "iteration_0/summary.json")["pairs"]
    assert (summary["pairs"], summary["training_pairs"], summary["training_pairs_dropped"]) == (10, 5, 5)
    assert summary["identical_share"] == 0.5
    assert [len(ids) for epoch, ids in game.recorder.pairs if epoch == 0] == [4, 1]
    assert (
        0,
        "50% of the pairs are identical and teach nothing, so this iteration is shorter; it may be the last useful one",
    ) in game.health.remarks


class RepeatsMore(FakeGenerator):
    """Repeats no real answer in iteration 0, and the six smallest of the ten sums in iteration 1; says ``no`` otherwise."""

    def generate(self, model: Any, prompts: Any, *args: Any) -> Any:
        inner = repeating(self.model, 0.6 if self.module.iteration else 0.0)
        return inner.generate(model, prompts, *args)


def test_what_is_said_of_an_iteration_s_answers_is_of_its_own_and_not_of_earlier_ones(
    model: str, rows: str, tmp_path: Path
) -> None:
    """Ten pairs of iteration 0 with ``no`` beside ten new ones, six of which are the real answers."""
    generator = RepeatsMore(lambda prompt, seed: [])
    logged: list[float] = []
    hear = Do(on_generation_end=lambda trainer, module, k, store, report: logged.append(report["identical_share"]))
    data = {"generator": generator, "val_fraction": 0.0, "history": 1}
    game = Game(model, rows, tmp_path, data=data, callbacks=[hear], play={"epochs": 1})
    generator.model, generator.module = model, game.module  # type: ignore[attr-defined]
    game.play()
    pairs = [read(tmp_path / f"iteration_{k}/summary.json")["pairs"] for k in range(2)]
    assert [(p["pairs"], p["identical"], p["identical_share"]) for p in pairs] == [(10, 0, 0.0), (10, 6, 0.6)]
    assert logged == [0.0, 0.6]
    assert [(p["training_pairs"], p["training_pairs_dropped"]) for p in pairs] == [(10, 0), (14, 6)]
    # sums 1, 3, ..., 19: five of one digit, five of two; an answer is its digits and a terminator, "no" has three tokens
    real = (5 * 2 + 5 * 3) / 10
    assert [p["real_mean_length"] for p in pairs] == pytest.approx([real, real])
    own = (5 * 2 + 1 * 3 + 4 * 3) / 10  # 1, 3, 5, 7, 9 and 11 repeated, four times "no"
    assert [p["generated_mean_length"] for p in pairs] == pytest.approx([3.0, own])
    assert [p["generated_tokens"] for p in pairs] == [30, round(10 * own)]
    remarks = [said for iteration, said in game.health.remarks if iteration == 1 and "identical" in said]
    assert remarks == [
        "60% of the pairs are identical and teach nothing, so this iteration is shorter; it may be the last useful one"
    ]


@pytest.mark.parametrize(("share", "ends"), [(0.949, False), (0.95, True)])
def test_a_game_is_at_its_equilibrium_from_95_per_cent_of_its_own_answers(share: float, ends: bool) -> None:
    FakeTrainer.datamodule.game.reasons = reasons = []
    Health().on_generation_end(FakeTrainer, None, 2, None, situation(identical_share=share))  # type: ignore[arg-type]
    assert reasons == (["equilibrium: 95% of the answers are identical"] if ends else [])


def test_identical_pairs_are_kept_where_the_loss_learns_from_them(model: str, rows: str, tmp_path: Path) -> None:
    data = {"generator": repeating(model, 0.5), "val_fraction": 0.0}
    game = Game(model, rows, tmp_path, data=data, module={"loss": SpinLoss(nll_weight=[0.1, 0.0])}).play()
    dropped = [read(tmp_path / f"iteration_{k}/summary.json")["pairs"]["training_pairs_dropped"] for k in range(2)]
    assert dropped == [0, 10]  # the second iteration has no such term, and the first one's pairs beside its own
    assert sum(len(ids) for epoch, ids in game.recorder.pairs if epoch == 0) == 10


@pytest.mark.parametrize("stop", ["equilibrium", "never"])
def test_a_game_without_pairs_to_tell_apart_ends_and_says_why(stop: Any, model: str, rows: str, tmp_path: Path) -> None:
    for _ in range(2):  # and again, when the same command is given once more
        game = Game(model, rows, tmp_path, data={"generator": repeating(model, 9.0)}, health=Health(stop)).play()
        assert game.losses == []
        reason = read(tmp_path / "game.json")["ended_because"]
        assert (
            reason
            == {
                "never": "every generated answer equals the real one: there is nothing left to tell apart",
                "equilibrium": "equilibrium: 100% of the answers are identical",
            }[stop]
        )
        assert read(tmp_path / "game.json")["iterations"] == []


class LearnsTheAnswers(FakeGenerator):
    """Says no in iteration 0, and the real answers from then on: a game that reaches its equilibrium."""

    def generate(self, model: Any, prompts: Any, *args: Any) -> Any:
        inner = repeating(self.model, 9.0 if self.module.iteration else 0.0)
        return inner.generate(model, prompts, *args)


def test_a_game_that_reaches_equilibrium_later_ends_there_also_after_a_stop(
    model: str, rows: str, tmp_path: Path
) -> None:
    for name in ("once", "again"):
        generator = LearnsTheAnswers(lambda prompt, seed: [])
        game = Game(
            model, rows, tmp_path, data={"generator": generator, "history": 0}, play={"iterations": 3, "epochs": 1}
        )
        generator.model, generator.module = model, game.module  # type: ignore[attr-defined]
        game.play()
        assert len(game.losses) == (2 if name == "once" else 0)
        end = read(tmp_path / "game.json")
        assert end["ended_because"] == "equilibrium: 100% of the answers are identical" and len(end["iterations"]) == 1
        assert (tmp_path / "iteration_0/policy/model.safetensors").exists() and not (
            tmp_path / "iteration_1/policy"
        ).exists()
        (tmp_path / "game.json").unlink()


def test_data_order_is_a_function_of_seed_and_epoch_and_shows_each_pair_once(
    plain: Game, model: str, rows: str, tmp_path: Path
) -> None:
    for epoch, count in enumerate([8, 8, 16, 16]):
        assert sorted(plain.recorder.order_of(epoch)) == list(range(count))
    epochs = [plain.recorder.order_of(epoch) for epoch in range(4)]
    assert epochs[0] != epochs[1] and epochs[2] != epochs[3]
    torch.rand(7)  # the global state of chance plays no part
    data = plain.data
    loader = data._loader(list(range(8)), list(range(8)), lambda batch, max_tokens: batch)
    loader.sampler.set_epoch(1)
    assert [index for batch in loader for index in batch] == epochs[1]
    other = SyntheticDataModule(rows, seed=1, batch_size=4, tokenizer_name_or_path=model)
    other.setup()
    order = other._loader(list(range(8)), list(range(8)), lambda batch, max_tokens: batch)
    assert isinstance(order, ResumableLoader)
    assert [index for batch in order for index in batch] != epochs[0]


# --- the fast path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers_per_prompt", [1, 3])
def test_batches_in_several_passes_train_the_same(
    model: str, rows: str, tmp_path: Path, answers_per_prompt: int
) -> None:
    data = {"answers_per_prompt": answers_per_prompt, "keep_prompts_together": answers_per_prompt > 1}
    whole, cut = (
        Game(model, rows, tmp_path / str(tokens), data={**data, "micro_batch_tokens": tokens}).play()
        for tokens in (10_000, 60)
    )
    assert cut.losses == pytest.approx(whole.losses, abs=1e-4)
    assert cut.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    for a, b in zip(whole.module.policy.parameters(), cut.module.policy.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-3


def test_fifty_steps_of_the_fast_path_are_those_of_the_plain_one(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared prompts, packed, head in chunks, two passes a step; against padded rows and whole logits in one pass."""
    settings: dict[str, Any] = {"play": {"iterations": 1, "epochs": 17}, "module": {"learning_rate": 3e-3}}
    data = {"answers_per_prompt": 2, "batch_size": 6}
    fast = Game(model, rows, tmp_path / "fast", data={**data, "micro_batch_tokens": 100}, **settings).play()
    monkeypatch.setattr(forward_paths, "forward_path_of", lambda model: forward_paths._plain)
    plain = Game(model, rows, tmp_path / "plain", data={**data, "micro_batch_tokens": 10**6}, **settings).play()
    assert len(fast.losses) == len(plain.losses) >= 50
    assert fast.losses == pytest.approx(plain.losses, abs=2e-3)
    assert min(plain.losses) < 0.5  # and something was learned


# --- what is measured -------------------------------------------------------------------------------------------------


def test_held_out_nll_equals_an_independent_computation(plain: Game) -> None:
    for k in range(2):
        policy = AutoModelForCausalLM.from_pretrained(plain.clock.folder(k) / "policy", dtype=torch.float32).eval()
        nlls = [-log_prob_by_hand(policy, prompt.prompt_ids, prompt.real_ids) for prompt in plain.data.val_prompts]
        assert read(plain.clock.folder(k) / "summary.json")["val_nll"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-4)
    tokens = sum(len(prompt.real_ids) for prompt in plain.data.val_prompts)
    logged = [float(row["val/nll_per_token"]) for row in logged_rows(plain) if row["val/nll_per_token"]]
    assert logged[-1] == pytest.approx(sum(nlls) / tokens, rel=1e-4)
    start = read(plain.clock.output_dir / "start.json")
    model = AutoModelForCausalLM.from_pretrained(plain.module.model_name_or_path, dtype=torch.float32).eval()
    nlls = [-log_prob_by_hand(model, prompt.prompt_ids, prompt.real_ids) for prompt in plain.data.val_prompts]
    assert start["val/nll"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-4)


def logged_rows(game: Game) -> list[dict[str, str]]:
    with (game.folder / "logs" / "0" / "metrics.csv").open() as stream:  # type: ignore[attr-defined]
        return list(csv.DictReader(stream))


def test_metrics_are_logged_under_the_names_people_know(plain: Game) -> None:
    logged = logged_rows(plain)
    names = [
        "loss",
        "val/nll",
        "completions/mean_length",
        "completions/clipped_ratio",
        "completions/identical_ratio",
        "iteration",
    ]
    names += [f"rewards/{name}" for name in ("real", "generated", "margins", "accuracies", "chosen", "rejected")]
    names += [f"logps/{name}" for name in ("real", "generated", "chosen", "rejected")]
    for name in names:
        assert any(row[name] for row in logged), name
    steps = [row for row in logged if row["loss"]]
    assert [float(row["loss"]) for row in steps] == pytest.approx(plain.losses)
    for row in steps:
        assert float(row["rewards/margins"]) == pytest.approx(
            float(row["rewards/real"]) - float(row["rewards/generated"]), abs=1e-5
        )
        assert row["rewards/chosen"] == row["rewards/real"] and row["logps/rejected"] == row["logps/generated"]
    assert [float(row["rewards/accuracies"]) for row in (steps[0], steps[4])] == pytest.approx([0.5, 0.5], abs=0.5)
    assert [row["iteration"] for row in logged if row["iteration"]] == ["0.0", "1.0"]
    whole = read(plain.clock.folder(1) / "summary.json")["epoch_metrics"]
    last_epoch = [float(row["rewards/margins"]) for row in steps[-4:]]
    assert whole["rewards/margins"] == pytest.approx(sum(last_epoch) / 4, rel=1e-4)


# --- health and samples -----------------------------------------------------------------------------------------------


def situation(**changes: float) -> dict[str, Any]:
    calm = {"identical_share": 0.0, "generated_clipped_share": 0.1, "real_clipped_share": 0.1, "empty_share": 0.0}
    return {**calm, "generated_mean_length": 10.0, "real_mean_length": 10.0, **changes}


class FakeTrainer:
    """As much of a Trainer as Health looks at."""

    class datamodule:
        class game:
            reasons: list[str] = []

            @classmethod
            def stop(cls, reason: str) -> None:
                cls.reasons.append(reason)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"identical_share": 0.96}, "96% of the generated answers equal the real ones: the game is at its equilibrium"),
        ({"identical_share": 0.5}, "50% of the pairs are identical and teach nothing"),
        ({"generated_clipped_share": 0.19}, None),  # within a tenth of the real ones
        ({"generated_clipped_share": 0.5}, r"50% of the generated answers hit the length cap \(real 10%\)"),
        ({"empty_share": 0.05}, None),
        ({"empty_share": 0.06}, "6% of the generated answers are empty: check the prompt template"),
        ({"generated_mean_length": 16.0}, "1.6 times as long as real ones"),
        ({"generated_mean_length": 5.0}, "0.5 times as long as real ones"),
        ({}, None),
    ],
)
def test_health_says_what_is_wrong_with_the_answers(changes: dict[str, float], sentence: str | None) -> None:
    FakeTrainer.datamodule.game.reasons = []
    health = Health()
    health.on_generation_end(FakeTrainer, None, 3, None, situation(**changes))  # type: ignore[arg-type]
    assert [iteration for iteration, _ in health.remarks] == ([3] if sentence else [])
    if sentence:
        assert re.search(sentence, health.remarks[0][1])
    assert bool(FakeTrainer.datamodule.game.reasons) == (changes.get("identical_share", 0) > 0.95)


@pytest.mark.parametrize(
    ("metrics", "nll", "sentence"),
    [
        ({"rewards/real": -0.2}, 9.0, r"finds the real answers less likely than the opponent did \(reward -0.200\)"),
        ({"rewards/accuracies": 0.97}, 9.0, "tells 97% of the pairs apart"),
        ({}, 10.5, "held-out NLL is 10.500, worse than the 10.000 measured first"),
        ({}, 9.5, "held-out NLL rose from 9.000 to 9.500 in this iteration"),
        ({}, 8.5, "held-out NLL went from 9.000 to 8.500"),
        ({}, None, None),
    ],
)
def test_health_says_what_training_did(metrics: dict[str, float], nll: float | None, sentence: str | None) -> None:
    health = Health()
    health.nll = [10.0, 9.0]
    summary = {"epoch_metrics": {"rewards/real": 0.1, "rewards/accuracies": 0.8, **metrics}, "val_nll": nll}
    health.on_iteration_end(FakeTrainer, None, 1, summary)  # type: ignore[arg-type]
    spoken = " | ".join(remark for _, remark in health.remarks)
    assert re.search(sentence, spoken) if sentence else spoken == ""


class FakeModule:
    """As much of a module as Health looks at."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss


OPPONENT, MIXTURE = "the opponent did", "its reference between the opponent and the first one did"


@pytest.mark.parametrize(
    ("loss", "reference", "remedy"),
    [
        (SpinLoss(), OPPONENT, "lower the learning rate, raise beta, or give the loss an nll_weight"),
        (SpinLoss(nll_weight=0.1), OPPONENT, "lower the learning rate, raise beta, or raise the loss's nll_weight"),
        (AlphaSpinLoss(), MIXTURE, "lower the learning rate, raise beta, or give the loss an nll_weight"),
        (SpaceLoss(), OPPONENT, "lower the learning rate"),  # it takes no other beta than 1
        (IpoLoss(), OPPONENT, "lower the learning rate or raise beta"),
        (IpoLoss(target=2.0), OPPONENT, "lower the learning rate or lower the loss's target"),
        (DpopLoss(), OPPONENT, "lower the learning rate, raise beta, or raise the loss's penalty_weight"),
        (LengthNormalizedLoss(), OPPONENT, "lower the learning rate or raise beta"),
        (TSpinLoss(), None, None),
    ],
)
def test_health_advises_on_negative_rewards_what_helps_with_this_loss(
    loss: Any, reference: str | None, remedy: str | None
) -> None:
    health = Health()
    summary = {"epoch_metrics": {"rewards/real": -0.2, "rewards/accuracies": 0.8}, "val_nll": None}
    health.on_iteration_end(FakeTrainer, FakeModule(loss), 1, summary)  # type: ignore[arg-type]
    sentence = f"the policy finds the real answers less likely than {reference} (reward -0.200): {remedy}"
    assert health.remarks == ([(1, sentence)] if reference else [])


@pytest.mark.parametrize("loss", [TSpinLoss(), SpinLoss()])
def test_health_explains_a_high_accuracy_by_what_the_loss_compares(loss: Any) -> None:
    health = Health()
    summary = {"epoch_metrics": {"rewards/real": -9.0, "rewards/accuracies": 0.97}, "val_nll": None}
    health.on_iteration_end(FakeTrainer, FakeModule(loss), 1, summary)  # type: ignore[arg-type]
    _, sentence = health.remarks[-1]
    assert ("shorter answers are enough for that" in sentence) == isinstance(loss, TSpinLoss)
    assert ("they are memorised" in sentence) == isinstance(loss, SpinLoss)


@pytest.mark.parametrize(("loss", "is_shorter"), [(SpinLoss(), True), (SpaceLoss(), False), (DpopLoss(), False)])
def test_health_says_that_identical_pairs_teach_nothing_only_where_they_do(loss: Any, is_shorter: bool) -> None:
    health = Health()
    health.on_generation_end(FakeTrainer, FakeModule(loss), 1, None, situation(identical_share=0.6))  # type: ignore[arg-type]
    ((_, sentence),) = health.remarks
    assert sentence.startswith("60% of the pairs are identical") and sentence.endswith("it may be the last useful one")
    assert ("teach nothing, so this iteration is shorter" in sentence) == is_shorter


@pytest.mark.parametrize("stop", ["equilibrium", "harm", "never"])
@pytest.mark.parametrize(("start", "nll"), [([10.0], math.nan), ([10.0], math.inf), ([], math.nan)])
def test_a_held_out_nll_that_is_no_number_is_harm(stop: Any, start: list[float], nll: float) -> None:
    FakeTrainer.datamodule.game.reasons = reasons = []
    health = Health(stop)
    health.nll = list(start)
    summary = {"epoch_metrics": {"rewards/real": 0.1, "rewards/accuracies": 0.8}, "val_nll": nll}
    health.on_iteration_end(FakeTrainer, None, 0, summary)  # type: ignore[arg-type]
    assert f"held-out NLL is {nll}, which is no number, after" in health.remarks[0][1]
    first = "10.000" if start else "nan"
    assert reasons == ([f"harm: held-out NLL {nll} against {first} at the start"] if stop == "harm" else [])


@pytest.mark.parametrize(("nll", "is_harm"), [(10.19, False), (10.21, True)])
def test_harm_begins_at_two_per_cent_over_the_first_nll_not_the_last(nll: float, is_harm: bool) -> None:
    FakeTrainer.datamodule.game.reasons = reasons = []
    health = Health("harm")
    health.nll = [10.0, 5.0]
    summary = {"epoch_metrics": {"rewards/real": 0.1, "rewards/accuracies": 0.8}, "val_nll": nll}
    health.on_iteration_end(FakeTrainer, None, 1, summary)  # type: ignore[arg-type]
    assert bool(reasons) == is_harm and health.nll == [10.0, 5.0, nll]


@pytest.mark.parametrize("stop", ["equilibrium", "harm", "never"])
def test_health_stops_the_game_only_for_the_reasons_it_was_given(stop: Any) -> None:
    FakeTrainer.datamodule.game.reasons = reasons = []
    health = Health(stop)
    health.nll = [10.0]
    health.on_generation_end(FakeTrainer, None, 0, None, situation(identical_share=1.0))  # type: ignore[arg-type]
    summary = {"epoch_metrics": {"rewards/real": 0.1, "rewards/accuracies": 0.8}, "val_nll": 10.3}
    health.on_iteration_end(FakeTrainer, None, 0, summary)  # type: ignore[arg-type]
    equilibrium, harm = (
        "equilibrium: 100% of the answers are identical",
        "harm: held-out NLL 10.300 against 10.000 at the start",
    )
    assert reasons == {"equilibrium": [equilibrium], "harm": [equilibrium, harm], "never": []}[stop]


def test_empty_and_truncated_answers_are_counted_and_trained_on(model: str, rows: str, tmp_path: Path) -> None:
    def rule(prompt: list[int], seed: int) -> list[int]:
        number = real_answer(prompt, tokenizer)
        return (
            [] if len(number) == 1 else [65] * 20
        )  # the five sums below ten get no answer; the others one that is cut

    tokenizer = AutoTokenizer.from_pretrained(model)
    game = Game(
        model, rows, tmp_path, data={"generator": FakeGenerator(rule), "val_fraction": 0.0}, play={"iterations": 1}
    ).play()
    pairs = read(tmp_path / "iteration_0/summary.json")["pairs"]
    assert (pairs["empty_share"], pairs["generated_clipped_share"], pairs["training_pairs"]) == (0.5, 0.5, 10)
    assert pairs["generated_mean_length"] == 0.5 * 1 + 0.5 * 8
    terminator = game.data.encoder.terminator_id
    for row in pairs_of(tmp_path, 0):
        assert row["generated_ids"] in ([terminator], [65] * 8)  # a cut answer has no terminator
    spoken = " | ".join(remark for _, remark in game.health.remarks)
    assert (
        "50% of the generated answers are empty" in spoken
        and "50% of the generated answers hit the length cap" in spoken
    )


def test_answers_are_shown_side_by_side_without_control_characters(
    model: str, rows: str, tmp_path: Path, capsys: Any
) -> None:
    evil = "\x1b[2J\x07no\r\x9b1mway"
    ids = AutoTokenizer.from_pretrained(model).encode(evil, add_special_tokens=False)
    data = {"generator": FakeGenerator(lambda prompt, seed: ids, max_new_tokens=50)}
    Game(model, rows, tmp_path, callbacks=[ShowAnswers(2)], data=data, play={"iterations": 1, "epochs": 1}).play()
    shown = capsys.readouterr().out
    assert (
        shown.count(r"  iteration 0  \x1b[2J\x07no \x9b1mway") == 2
        and "  real         " in shown
        and "  prompt       " in shown
    )
    assert not set(shown) & {chr(code) for code in [*range(32), *range(127, 160)] if chr(code) != "\n"}
    assert side_by_side({"a": "", "bb": "word " * 99}, 30).splitlines()[0] == "  a   (empty)"
    assert len(side_by_side({"bb": "word " * 99}, 30).splitlines()) == 3


# --- what it leaves behind --------------------------------------------------------------------------------------------


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


# --- ways to run it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2])
def test_fast_dev_run_takes_one_step_and_leaves_nothing_to_continue_from(
    epochs: int, plain: Game, model: str, rows: str, tmp_path: Path
) -> None:
    game = Game(model, rows, tmp_path, trainer={"fast_dev_run": True}, play={"epochs": epochs}).play()
    assert game.losses == [pytest.approx(math.log(2), abs=1e-5)]
    assert game.clock.last_checkpoint is None and not (tmp_path / "game.json").exists()
    if epochs == 2:
        assert Game(model, rows, tmp_path).play().losses == plain.losses


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_play_and_pass_the_gate(
    precision: str, plain: Game, model: str, rows: str, tmp_path: Path
) -> None:
    optimizers: set[type] = set()
    note = Do(on_train_batch_end=lambda trainer, *_: optimizers.add(type(trainer.optimizers[0])))
    game = Game(model, rows, tmp_path, trainer={"precision": precision}, callbacks=[note]).play()
    assert [game.losses[0], game.losses[4]] == pytest.approx([math.log(2)] * 2, abs=0.2)
    assert all(map(math.isfinite, game.losses)) and game.losses[-1] < game.losses[4]
    assert optimizers == {Float32Master if precision == "bf16-true" else torch.optim.AdamW}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "iteration_1/policy")
    assert weight_bits(exported) == game.weights


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_the_loss_is_given_the_opponent_s_log_probs_as_they_are_stored(
    precision: str, model: str, rows: str, tmp_path: Path
) -> None:
    seen: dict[int, float] = {}

    def look(trainer: Trainer, module: SpinLightningModule, outputs: Any, batch: Any, *_: Any) -> None:
        for part in batch:
            seen.update(zip(part.pair_ids.tolist(), part.opponent.generated.tolist(), strict=True))

    play = {"iterations": 1, "epochs": 1}
    Game(
        model, rows, tmp_path, play=play, trainer={"precision": precision}, callbacks=[Do(on_train_batch_end=look)]
    ).play()
    table = PairStore(tmp_path / "iteration_0/pairs").read(["opponent_generated_log_prob"])
    stored = table["opponent_generated_log_prob"].to_pylist()
    assert len(seen) == len(stored) and max(map(abs, stored)) > 16  # where bfloat16 has steps of an eighth
    assert [seen[pair] for pair in range(len(stored))] == pytest.approx(stored, abs=1e-5)


def test_float32_master_weights_keep_updates_that_bfloat16_rounds_away(model: str, rows: str, tmp_path: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    moved: list[float] = []

    def look(trainer: Trainer, module: SpinLightningModule, *_: Any) -> None:
        masters = trainer.optimizers[0].master_weights
        moved.append(
            max(float((m - p.float()).abs().max()) for m, p in zip(masters, module.policy.parameters(), strict=True))
        )

    game = Game(
        model,
        rows,
        tmp_path,
        module={"learning_rate": 1e-6},
        trainer={"precision": "bf16-true"},
        callbacks=[Do(on_train_batch_end=look)],
    ).play()
    changed = sum(
        int((a != b).sum()) for a, b in zip(before.parameters(), game.module.policy.parameters(), strict=True)
    )
    assert max(moved) > 0  # what the weights of the model cannot show yet is kept
    assert changed < 200


def test_gradient_checkpointing_changes_nothing_but_memory(plain: Game, model: str, rows: str, tmp_path: Path) -> None:
    game = Game(model, rows, tmp_path, module={"gradient_checkpointing": True}).play()
    assert game.losses == pytest.approx(plain.losses, abs=1e-5)


def test_dropout_is_off_unless_asked_and_the_gate_names_it(rows: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", attention_dropout=0.1)
    game = Game(model, rows, tmp_path / "off").play()
    assert [game.losses[0], game.losses[4]] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    with pytest.raises(
        UserError, match=r"iteration 0 does not start where it should.*so dropout is on. Set model.dropout: false"
    ):
        Game(model, rows, tmp_path / "on", module={"dropout": True}).play()


@pytest.mark.parametrize("loss", [AlphaSpinLoss(0.4), TSpinLoss()])
def test_losses_that_look_back_to_the_start_get_what_they_ask_for(
    loss: Any, model: str, rows: str, tmp_path: Path
) -> None:
    Game(model, rows, tmp_path, module={"loss": loss}, play={"epochs": 1}, data={"answers_per_prompt": 2}).play()
    first = {(row["prompt_id"], row["answer"]): row["generated_ids"] for row in pairs_of(tmp_path, 0)}
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for row in pairs_of(tmp_path, 1)[::5]:
        if loss.needs_initial_response:
            assert row["initial_ids"] == first[row["prompt_id"], row["answer"]]
        for side in ("real", "generated"):
            score = log_prob_by_hand(start, row["prompt_ids"], row[f"{side}_ids"])
            stored = row[f"initial_{side}_log_prob"]
            assert stored == pytest.approx(score, abs=1e-4) if loss.needs_initial_log_probs else stored is None


# --- supervised fine-tuning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["token", "response"])
def test_supervised_fine_tuning_learns_from_response_tokens_only(
    average: Any, model: str, rows: str, tmp_path: Path
) -> None:
    """Its first step's gradient equals that of a loss computed one row at a time."""
    gradients: list[list[torch.Tensor]] = []
    keep = Do(
        on_before_optimizer_step=lambda trainer, module, *_: gradients.append(
            [p.grad.clone() for p in module.policy.parameters()]
        )
    )
    module = SftLightningModule(model, learning_rate=1e-2, average=average, warmup_ratio=0.25)
    data, recorder = SyntheticDataModule(rows, batch_size=8, val_fraction=0.2), Recorder()
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    Trainer(max_epochs=4, callbacks=[keep, recorder, ExportPolicy(str(tmp_path))], **settings).fit(module, data)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total = 0
    for prompt in data.prompts:
        ids = torch.tensor([[*prompt.prompt_ids, *prompt.real_ids]])
        start = len(prompt.prompt_ids)
        total = total + F.cross_entropy(reference(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="sum")
    loss = total / (sum(len(prompt.real_ids) for prompt in data.prompts) if average == "token" else len(data.prompts))
    loss.backward()
    assert recorder.losses[0] == pytest.approx(float(loss), rel=1e-5)
    for found, expected in zip(gradients[0], reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected.grad, rtol=1e-3, atol=1e-5)
    # one step of warm-up, then down to zero over the other three: no step is wasted on a rate of zero
    assert list(recorder.rates.values()) == pytest.approx([0.5e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    summary = read(tmp_path / "summary.json")
    assert summary["updates"] == 4 and summary["first_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert summary["val_nll"] is not None and summary["last_loss"] < summary["first_loss"]
    assert weight_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "policy")) == weight_bits(module.policy)


def test_supervised_fine_tuning_refuses_a_game_and_unknown_averages(model: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.average must be token or response, got 'row'"):
        SftLightningModule(model, average="row")  # type: ignore[arg-type]
    data = SyntheticDataModule(rows)
    data.game = SelfPlay(str(tmp_path))
    with pytest.raises(UserError, match="SftLightningModule has no opponent, so it takes no SelfPlay callback"):
        Trainer(accelerator="cpu", logger=False, max_epochs=1).fit(SftLightningModule(model), data)


# --- in a notebook ----------------------------------------------------------------------------------------------------


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


def test_a_game_cut_short_is_not_over(model: str, rows: str, tmp_path: Path) -> None:
    """As by ``max_time``: an epoch that did not reach its last batch is continued, not exported."""
    whole = Game(model, rows, tmp_path / "whole").play()

    def stop(trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == 7

    Game(model, rows, tmp_path / "run", callbacks=[Do(on_train_batch_end=stop)]).play()
    assert not (tmp_path / "run" / "game.json").exists()
    assert not (tmp_path / "run" / "iteration_1" / "summary.json").exists()
    assert Game(model, rows, tmp_path / "run").play().weights == whole.weights


def test_another_batch_size_in_the_middle_of_an_epoch_is_refused(model: str, rows: str, tmp_path: Path) -> None:
    def stop(trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 7

    Game(model, rows, tmp_path / "run", callbacks=[Do(on_train_batch_end=stop)]).play()
    with pytest.raises(UserError, match=r"in the middle of an epoch with data.batch_size 4, got 2"):
        Game(model, rows, tmp_path / "run", data={"batch_size": 2}, allow_changes=["data.batch_size"]).play()


def test_a_prompt_longer_than_the_model_s_context_is_refused(model: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"but the model takes 512. Lower data.max_prompt_tokens"):
        Game(model, rows, tmp_path / "run", data={"generator": TransformersGenerator(max_new_tokens=600)}).play()
