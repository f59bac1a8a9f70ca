"""The contract tests for plugin authors: what is ours passes them, and each promise that is broken is said in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import LOSSES

from spin_lightning import (
    Advantage,
    BestOfGroup,
    ContinuousGenerator,
    FunctionReward,
    Gae,
    GroupNormalized,
    Health,
    LeaveOneOut,
    NumberMatch,
    Opponent,
    ResidentOpponent,
    Reward,
    SpinLoss,
    StoredOpponent,
    SumOfRewards,
    TextMatch,
    TokenSpinLoss,
    TransformersGenerator,
    testing,
)
from spin_lightning.advantages import Advantages
from spin_lightning.cli.commands import STAGES
from spin_lightning.stages.stage import Stage
from spin_lightning.types import PairLossOutput, Response


def length_of(completions: Sequence[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("name", LOSSES)
def test_our_losses_pass(name):
    make, beta = LOSSES[name]
    testing.check_loss(make(), beta)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, math.inf])
def test_our_token_loss_passes(temperature):
    testing.check_loss(TokenSpinLoss(temperature), beta=5.0)


@pytest.mark.parametrize(
    "advantage", [Gae(), Gae(lam=0.5, whiten=False), LeaveOneOut(), GroupNormalized(), BestOfGroup()]
)
def test_our_advantages_pass(advantage):
    testing.check_advantage(advantage)


@pytest.mark.parametrize(
    "generator",
    [
        TransformersGenerator(6),
        TransformersGenerator(6, temperature=0.0),
        ContinuousGenerator(6, top_p=0.5, batch_size=2),
    ],
)
def test_our_generators_pass(generator):
    testing.check_generator(generator)


@pytest.mark.parametrize(
    "reward",
    [NumberMatch(), TextMatch(), SumOfRewards({"number": NumberMatch()}), FunctionReward(f"{__name__}:length_of")],
    ids=lambda reward: reward.name,
)
def test_our_rewards_pass(reward):
    testing.check_reward(reward)


@pytest.mark.parametrize("opponent", [StoredOpponent, ResidentOpponent])
def test_our_opponents_pass(opponent):
    testing.check_opponent(opponent())


@pytest.mark.parametrize("word", ["fit", "ppo"])
def test_our_stages_pass(word):
    testing.check_stage(STAGES[word])


@pytest.mark.slow
def test_our_callbacks_pass():
    testing.check_callback(Health)


# --- losses -----------------------------------------------------------------------------------------------------------


class Double(SpinLoss):
    def forward(self, *args: Any) -> Any:
        return PairLossOutput(*(part.float() for part in vars(super().forward(*args)).values()))


class Overflowing(SpinLoss):
    def forward(self, policy: Any, opponent: Any, beta: float, initial: Any = None) -> Any:
        output = super().forward(policy, opponent, beta, initial)
        return replace(output, losses=torch.exp(opponent.real - policy.real).exp())


class InPlace(SpinLoss):
    def forward(self, policy: Any, opponent: Any, *args: Any) -> Any:
        opponent.real.add_(1.0)
        return super().forward(policy, opponent, *args)


class Ranked(SpinLoss):
    def forward(self, *args: Any) -> Any:
        output = super().forward(*args)
        return replace(output, losses=output.losses * torch.arange(1, len(output.losses) + 1))


class Moody(SpinLoss):
    calls = 0

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        return super().forward(*args)


class Random(SpinLoss):
    def forward(self, *args: Any) -> Any:
        output = super().forward(*args)
        return replace(output, losses=output.losses + torch.rand(()))


class Shifted(SpinLoss):
    def forward(self, *args: Any) -> Any:
        output = super().forward(*args)
        return replace(output, real_rewards=output.real_rewards + 1)


class Graded(SpinLoss):
    def forward(self, policy: Any, *args: Any) -> Any:
        return replace(super().forward(policy, *args), real_rewards=policy.real)


class Dishonest(SpinLoss):
    learns_from_identical = True


class Summed(SpinLoss):
    def forward(self, *args: Any) -> Any:
        output = super().forward(*args)
        return replace(output, losses=output.losses.mean())


class RankedTokens(TokenSpinLoss):
    def forward(self, *args: Any) -> Any:
        output = super().forward(*args)
        return replace(output, losses=output.losses * torch.arange(1, len(output.losses) + 1))


class BlindToNothing(TokenSpinLoss):
    """Takes the ratio of what neither model may say."""

    def forward(self, policy: Any, opponent: Any, *args: Any) -> Any:
        output = super().forward(policy, opponent, *args)
        return replace(output, losses=output.losses + (policy.laws.rest - opponent.laws.rest))


class ShiftedTokens(TokenSpinLoss):
    def forward(self, *args: Any) -> Any:
        output = super().forward(*args)
        return replace(output, generated_rewards=output.generated_rewards + 1)


class Forgetful(SpinLoss):
    def __init__(self, tau: float = 0.1) -> None:
        super().__init__()
        self.scale = tau


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Double, "computes in the dtype of the log-probs; got losses of torch.float32 from torch.float64"),
        (Overflowing, "is finite for log-ratios of up to 20 nats"),
        (InPlace, "leaves the log-probs that it is given as they are"),
        (Ranked, "each loss of Ranked is of its own pair"),
        (Moody, r"calling it changes nothing; got other attributes after a call \(calls\)"),
        (Random, "a pure function: the same log-probs give the same losses"),
        (Shifted, "a model against itself has rewards of exactly 0"),
        (Graded, "the rewards of Graded carry no gradient"),
        (Dishonest, "got True, and there is never a gradient. Override the property: return False"),
        (Summed, "Summed must return a PairLossOutput with one entry a pair"),
        (Forgetful, "got no attribute 'tau'. Set self.tau = tau in __init__"),
        (RankedTokens, "each loss of RankedTokens is of its own token"),
        (BlindToNothing, "BlindToNothing is finite for log-ratios of up to 0 nats; got losses"),
        (ShiftedTokens, "a model against itself has rewards of exactly 0"),
        (dict, "a loss is a PairLoss or a TokenLoss; got dict"),
    ],
)
def test_a_loss_that_breaks_a_promise_is_told_which(kind, words):
    with pytest.raises(AssertionError, match=words):
        testing.check_loss(kind())


# --- advantages -------------------------------------------------------------------------------------------------------


class ByResponse(Advantage):
    def estimate(self, trajectories: Any) -> Any:
        return Advantages(trajectories.rewards)


class ByPlace(Advantage):
    def estimate(self, trajectories: Any) -> Any:
        spread = trajectories.rewards.repeat_interleave(trajectories.lengths)
        return Advantages(spread * torch.arange(len(spread)))


class Counting(Advantage):
    calls = 0

    def estimate(self, trajectories: Any) -> Any:
        self.calls += 1
        return Advantages(trajectories.rewards.repeat_interleave(trajectories.lengths))


class Rounded(Advantage):
    def estimate(self, trajectories: Any) -> Any:
        return Advantages(trajectories.rewards.repeat_interleave(trajectories.lengths).half())


class Critical(Advantage):
    needs_values = True

    def estimate(self, trajectories: Any) -> Any:
        return Advantages(trajectories.values)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (ByResponse, r"one number a token in advantages, shape \(13,\); got shape \(6,\)"),
        (ByPlace, "whatever the order of the responses"),
        (Counting, "Counting keeps no state"),
        (Rounded, "have the dtype of the rewards and no gradient; got torch.float16 from torch.float64"),
        (Critical, r"in returns, shape \(13,\); got shape None"),
        (dict, "an advantage is an Advantage; got dict"),
    ],
)
def test_an_advantage_that_breaks_a_promise_is_told_which(kind, words):
    with pytest.raises(AssertionError, match=words):
        testing.check_advantage(kind())


# --- generators -------------------------------------------------------------------------------------------------------


class Changed(TransformersGenerator):
    def change(self, number: int, response: Response) -> Response:
        return response

    def generate(self, prompts: Any, seeds: Any, *args: Any) -> Iterator[tuple[int, Response]]:
        self.together = len(prompts)
        for number, response in super().generate(prompts, seeds, *args):
            yield number, self.change(number, response)


class ByBatch(Changed):
    def change(self, number: int, response: Response) -> Response:
        return response if len(response.ids) < 2 else replace(response, ids=[self.together, *response.ids[1:]])


class Sharpened(Changed):
    def change(self, number: int, response: Response) -> Response:
        return replace(response, log_prob=response.log_prob / 2)


class Unfinished(Changed):
    def change(self, number: int, response: Response) -> Response:
        return replace(response, finish_reason="stop")


class Long(Changed):
    def change(self, number: int, response: Response) -> Response:
        return replace(response, ids=[5] * 50)


class Drifting(Changed):
    def change(self, number: int, response: Response) -> Response:
        self.temperature = 0.5
        return response


class Touching(Changed):
    def open(self, opponent: Any) -> None:
        super().open(opponent)
        with torch.no_grad():
            next(opponent.model.parameters()).zero_()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (ByBatch, "a response of ByBatch depends on the model, its prompt and its seed alone"),
        (Sharpened, "log_prob of Sharpened is the model's log-probability of the ids"),
        (Unfinished, "gave the finish_reason 'stop' to a response that ends with token"),
        (Long, "gave a response of 50 tokens, and max_new_tokens is 4"),
        (Drifting, "Drifting never changes its settings"),
        (Touching, "Touching leaves the model as it is"),
    ],
)
def test_a_generator_that_breaks_a_promise_is_told_which(kind, words):
    with pytest.raises(AssertionError, match=words):
        testing.check_generator(kind(4))


# --- rewards ----------------------------------------------------------------------------------------------------------


class Plain(Reward):
    def score(self, answers: Any) -> Any:
        return [float(len(answer.text)) for answer in answers]


class Relative(Plain):
    def score(self, answers: Any) -> Any:
        return [value - len(answers) for value in super().score(answers)]


class Short(Plain):
    def score(self, answers: Any) -> Any:
        return super().score(answers)[:-1]


class NotANumber(Plain):
    def score(self, answers: Any) -> Any:
        return [float("nan") for _ in answers]


class Connected(Plain):
    def __init__(self) -> None:
        self.ask = lambda: 1.0


class Blind(Plain):
    needs_real = True


class Partial(Plain):
    def prefer(self, first: Any, second: Any) -> Any:
        return [2.0 for _ in first]


class Unkept(Plain):
    settings = {"by": object}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Relative, "gives the same answer the same reward; .* one by one"),
        (Short, "Short gave 4 values for 5 answers|Short"),
        (NotANumber, "NotANumber"),
        (Connected, "can be copied by pickle"),
        (Blind, "has needs_real, so it judges nothing without a real response"),
        (Partial, "prefers with 2.0"),
        (Unkept, "settings must be a dict that JSON can hold"),
        (dict, "a reward must be a Reward"),
    ],
)
def test_a_reward_that_breaks_a_promise_is_told_which(kind, words):
    with pytest.raises(AssertionError, match=words):
        testing.check_reward(kind())


# --- opponents, callbacks, stages -------------------------------------------------------------------------------------


class Mirror(Opponent):
    def become(self, policy: Any) -> None:
        self.__dict__["policy"] = policy

    def log_probs(self, batch: Any) -> Any:
        from spin_lightning.models.log_probs import pair_log_probs

        with torch.no_grad():
            return pair_log_probs(self.__dict__["policy"], batch)


class Weak(StoredOpponent):
    def log_probs(self, batch: Any) -> Any:
        return replace(batch.opponent, real=batch.opponent.real - 1)


class Stateful(ResidentOpponent):
    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.model = None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Mirror, "Mirror stays what it is while the policy trains"),
        (Weak, "a difference of 1 nats. Take over its weights in become"),
        (Stateful, "the weights of Stateful stay out of checkpoints"),
    ],
)
def test_an_opponent_that_breaks_a_promise_is_told_which(kind, words):
    with pytest.raises(AssertionError, match=words):
        testing.check_opponent(kind())


class Meddling(L.Callback):
    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.5


class Drawing(L.Callback):
    """Chooses which batches to look at."""

    def on_train_batch_start(self, *args):
        torch.rand(1)


class Amnesiac(L.Callback):
    def __init__(self) -> None:
        self.seen = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen += 1

    def state_dict(self) -> Any:
        return {"seen": self.seen}


class Coded(L.Callback):
    def state_dict(self) -> Any:
        return {"kind": Coded}


def count(folder: Any, *callbacks: Any) -> dict[str, Any]:
    for callback in callbacks:
        callback.seen = 4
    return {}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Meddling, "Meddling only watches"),
        (Drawing, "Drawing leaves the random numbers of training as they are"),
        (Amnesiac, "a new Amnesiac that was given a saved state has that state"),
        (Coded, "the state_dict of Coded holds plain values"),
        (dict, "a callback is a Callback of Lightning; got dict"),
    ],
)
def test_a_callback_that_breaks_a_promise_is_told_which(kind, words, monkeypatch):
    if kind in (Amnesiac, Coded):  # what they do in a game is not the question
        monkeypatch.setattr(testing, "play_tiny_game", count)
    with pytest.raises(AssertionError, match=words):
        testing.check_callback(kind)


def test_a_callback_may_say_that_it_changes_training(monkeypatch):
    weights = iter([{"w": torch.zeros(1)}, {"w": torch.ones(1)}] * 2)
    monkeypatch.setattr(testing, "play_tiny_game", lambda *args: next(weights))
    testing.check_callback(Meddling, changes_training=True)
    with pytest.raises(AssertionError, match="1 of 1 other weights"):
        testing.check_callback(Meddling)


SFT = dict(
    module="spin_lightning.stages.sft.SftLightningModule",
    data="spin_lightning.data.module.RowDataModule",
    callbacks={"export": "spin_lightning.stages.export.ExportPolicy"},
    folder="export",
    over_file="summary.json",
    mark="model.max_updates",
)
NO_CLASS = Stage(**{**SFT, "module": "spin_lightning.stages.sft.Nothing"})
NO_MODULE = Stage(**{**SFT, "module": "spin_lightning.data.module.RowDataModule"})
NO_FOLDER = Stage(**{**SFT, "folder": "model"})
HIDDEN = Stage(**SFT)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SFT", "is a Stage; got dict"),
        ("NO_CLASS", "is an import path; got 'spin_lightning.stages.sft.Nothing'"),
        ("NO_MODULE", "is a PolicyModule; got spin_lightning.data.module.RowDataModule"),
        ("NO_FOLDER", r"is the section whose output_dir is the run's folder; got model. Name one of \['export'\]"),
        ("HIDDEN", "the help of .*HIDDEN is read from its source.*Write its texts, dicts and numbers as literals"),
    ],
)
def test_a_stage_that_breaks_a_promise_is_told_which(name, words):
    with pytest.raises(AssertionError, match=words):
        testing.check_stage(f"{__name__}.{name}")


def test_it_needs_no_pytest():
    assert "pytest" not in vars(testing) and "import pytest" not in Path(testing.__file__).read_text()
