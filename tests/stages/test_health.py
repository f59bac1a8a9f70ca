"""What Health says of a game, and what it ends one for."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from spin_lightning import (
    AlphaSpinLoss,
    DpopLoss,
    Health,
    IpoLoss,
    LengthNormalizedLoss,
    SpaceLoss,
    SpinLoss,
    TSpinLoss,
)
from spin_lightning.stages.health import remarks_on_preferences, remarks_on_rewards


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
        ({"rewards/margins": -0.019}, 9.0, "margin is -0.019: the policy has hardly moved from the opponent"),
        ({}, 10.5, "held-out NLL is 10.500, worse than the 10.000 measured first"),
        ({}, 9.5, "held-out NLL rose from 9.000 to 9.500 in this iteration"),
        ({}, 8.5, "held-out NLL went from 9.000 to 8.500"),
        ({}, None, None),
    ],
)
def test_health_says_what_training_did(metrics: dict[str, float], nll: float | None, sentence: str | None) -> None:
    health = Health()
    health.nll = [10.0, 9.0]
    calm = {"rewards/real": 0.1, "rewards/accuracies": 0.8, "rewards/margins": 0.02}
    summary = {"epoch_metrics": {**calm, **metrics}, "val_nll": nll}
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
    summary = {
        "epoch_metrics": {"rewards/real": -0.2, "rewards/accuracies": 0.8, "rewards/margins": 0.3},
        "val_nll": None,
    }
    health.on_iteration_end(FakeTrainer, FakeModule(loss), 1, summary)  # type: ignore[arg-type]
    sentence = f"the policy finds the real answers less likely than {reference} (reward -0.200): {remedy}"
    assert health.remarks == ([(1, sentence)] if reference else [])


@pytest.mark.parametrize("loss", [TSpinLoss(), SpinLoss()])
def test_health_explains_a_high_accuracy_by_what_the_loss_compares(loss: Any) -> None:
    health = Health()
    summary = {
        "epoch_metrics": {"rewards/real": -9.0, "rewards/accuracies": 0.97, "rewards/margins": 0.3},
        "val_nll": None,
    }
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
    summary = {
        "epoch_metrics": {"rewards/real": 0.1, "rewards/accuracies": 0.8, "rewards/margins": 0.3},
        "val_nll": nll,
    }
    health.on_iteration_end(FakeTrainer, None, 0, summary)  # type: ignore[arg-type]
    assert f"held-out NLL is {nll}, which is NaN or infinite, after" in health.remarks[0][1]
    first = "10.000" if start else "nan"
    assert reasons == ([f"harm: held-out NLL {nll} against {first} at the start"] if stop == "harm" else [])


@pytest.mark.parametrize(("nll", "is_harm"), [(10.19, False), (10.21, True)])
def test_harm_begins_at_two_per_cent_over_the_first_nll_not_the_last(nll: float, is_harm: bool) -> None:
    FakeTrainer.datamodule.game.reasons = reasons = []
    health = Health("harm")
    health.nll = [10.0, 5.0]
    summary = {
        "epoch_metrics": {"rewards/real": 0.1, "rewards/accuracies": 0.8, "rewards/margins": 0.3},
        "val_nll": nll,
    }
    health.on_iteration_end(FakeTrainer, None, 1, summary)  # type: ignore[arg-type]
    assert bool(reasons) == is_harm and health.nll == [10.0, 5.0, nll]


@pytest.mark.parametrize("stop", ["equilibrium", "harm", "never"])
def test_health_stops_the_game_only_for_the_reasons_it_was_given(stop: Any) -> None:
    FakeTrainer.datamodule.game.reasons = reasons = []
    health = Health(stop)
    health.nll = [10.0]
    health.on_generation_end(FakeTrainer, None, 0, None, situation(identical_share=1.0))  # type: ignore[arg-type]
    summary = {
        "epoch_metrics": {"rewards/real": 0.1, "rewards/accuracies": 0.8, "rewards/margins": 0.3},
        "val_nll": 10.3,
    }
    health.on_iteration_end(FakeTrainer, None, 0, summary)  # type: ignore[arg-type]
    equilibrium, harm = (
        "equilibrium: 100% of the answers are identical",
        "harm: held-out NLL 10.300 against 10.000 at the start",
    )
    assert reasons == {"equilibrium": [equilibrium], "harm": [equilibrium, harm], "never": []}[stop]


@pytest.mark.parametrize(("share", "ends"), [(0.949, False), (0.95, True)])
def test_a_game_is_at_its_equilibrium_from_95_per_cent_of_its_own_answers(share: float, ends: bool) -> None:
    FakeTrainer.datamodule.game.reasons = reasons = []
    Health().on_generation_end(FakeTrainer, None, 2, None, situation(identical_share=share))  # type: ignore[arg-type]
    assert reasons == (["equilibrium: 95% of the answers are identical"] if ends else [])


# --- of rollouts -----------------------------------------------------------------------------------------------------

USUAL = {
    "completions/distinct": 0.9, "completions/cut": 0.0, "kl/reference": 1.0, "groups/flat": 0.3, "reward/none": 0.0,
    "reward/length_correlation": 0.1, "reward/mean": 0.4, "value/explained_variance": 0.2, "val/reward": 0.5,
}  # fmt: skip


class Stops:
    """A trainer whose game may be told to stop."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.datamodule = self.game = self

    def stop(self, reason: str) -> None:
        self.reasons.append(reason)


def remarks_on(*reports: dict[str, float], stop: Any = "never") -> tuple[list[tuple[int, str]], list[str]]:
    health, trainer = Health(stop), Stops()
    for iteration, report in enumerate(reports):
        merged = {name: value for name, value in {**USUAL, **report}.items() if value is not None}
        health.on_generation_end(trainer, None, iteration, None, merged)  # type: ignore[arg-type]
        again = Health(stop)
        again.load_state_dict(health.state_dict())  # a resume between any two
        again.remarks, health = health.remarks, again
    return health.remarks, trainer.reasons


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("kl/reference", 21.5, "21.5 nats from the reference"),
        ("groups/flat", 0.85, "85% of the prompts all responses have the same reward"),
        ("completions/cut", 0.06, "6% of the responses were cut"),
        ("completions/distinct", 0.29, "29% of the responses are distinct, 90% were at first"),
        ("reward/none", 0.02, "2% of the responses have no reward"),
        ("reward/length_correlation", -0.95, "follows the length of a response (correlation -0.95)"),
        ("val/reward", 0.45, "fell from 0.500 to 0.450: it may be hacked"),
    ],
)
def test_what_is_notable_of_rollouts_is_said_once(name: str, value: float, words: str) -> None:
    rises = {"reward/mean": 0.6}
    remarks, _ = remarks_on({}, {name: value, **rises}, {name: value, **rises}, rises, {name: value, **rises})
    assert [iteration for iteration, _ in remarks] == [1, 4]  # it went away in between
    assert all(words in sentence for _, sentence in remarks)


def test_usual_rollouts_are_no_cause_for_remarks() -> None:
    lower = {"val/reward": 0.45, "reward/mean": 0.3}  # both fell
    assert remarks_on({}, {}, lower, {"value/explained_variance": -1.0}, {"val/reward": None}) == ([], [])


def test_a_critic_has_ten_iterations_to_learn() -> None:
    remarks, _ = remarks_on(*[{"value/explained_variance": -0.5}] * 12)
    assert [iteration for iteration, _ in remarks] == [10] and "explained variance -0.50" in remarks[0][1]


def test_a_hacked_reward_may_end_the_run() -> None:
    hacked = {"val/reward": 0.4, "reward/mean": 0.6}
    assert remarks_on({}, hacked, {"val/reward": None}, stop="harm")[1] == [
        "harm: the held-out reward falls while the reward rises"
    ]
    assert remarks_on({}, hacked)[1] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"longer_wins": 0.7}, ["the longer answer is the better one in 70% of the pairs: length alone tells them"]),
        ({"longer_wins": 0.1}, ["the shorter answer is the better one in 90% of the pairs"]),
        ({"chosen_cut": 3}, ["30% of the chosen answers are cut and never end"]),
    ],
)
def test_what_recorded_pairs_tell_before_training(changes: dict[str, Any], said: list[str]) -> None:
    report = {"pairs": 10, "longer_wins": 0.5, "chosen_mean_length": 9.0, "rejected_mean_length": 6.0, "chosen_cut": 0}
    found = remarks_on_preferences({**report, **changes})
    assert [remark[: len(words)] for remark, words in zip(found, said, strict=True)] == said


@pytest.mark.parametrize(
    ("chosen", "rejected", "accuracy", "longer", "words"),
    [
        (0.2, -0.3, 0.9, 0.5, None),
        (-0.001, -0.3, 0.9, 0.5, None),
        (-0.4, -0.9, 0.9, 0.5, "less likely than at the start (reward -0.400), and so are the rejected ones (-0.900)"),
        (-0.4, 0.1, 0.9, 0.5, "less likely than at the start (reward -0.400). A pair's loss asks for their difference"),
        (0.1, -0.2, 0.62, 0.7, "the policy tells 62% of the pairs apart, and their lengths alone tell 70%"),
    ],
)
def test_what_rewards_of_recorded_pairs_tell(
    chosen: float, rejected: float, accuracy: float, longer: float, words: str | None
) -> None:
    metrics = {"rewards/real": chosen, "rewards/generated": rejected, "rewards/accuracies": accuracy}
    found = remarks_on_rewards(metrics, {"longer_wins": longer}, SpinLoss())
    assert len(found) == (words is not None) and (words or "") in "".join(found)
