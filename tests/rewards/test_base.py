from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch

from spin_lightning import JudgeReward, NumberMatch, RewardUnavailable, SumOfRewards, TextMatch, UserError
from spin_lightning.rewards import Answer, Reward, check_reward, make_answer, preferred, scored
from spin_lightning.rewards.base import preferred_by_order, refuse_unanswered, refuse_without_real, scored_with_parts
from spin_lightning.types import Prompt, Row


class By(Reward):
    """Scores by a rule for all answers, and remembers how many it was asked about."""

    def __init__(self, rule: Callable[[Sequence[Answer]], Any]) -> None:
        self._rule = rule
        self.asked: list[int] = []

    def score(self, answers: Sequence[Answer]) -> Any:
        self.asked.append(len(answers))
        return self._rule(answers)


def answers(*texts: str) -> list[Answer]:
    return [Answer([{"role": "user", "content": "q"}], text) for text in texts]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            [math.nan, 1.0],
            r"By gave nan, of 1 values that are none. Mend its score: .* None for one that cannot be judged",
        ),
        ([math.inf, 1.0], "gave inf"),
        ([1.0], "gave 1 values for 2 responses. Mend its score"),
        ([1.0, 2.0, 3.0], "gave 3 values for 2 responses"),
        (["1", 1.0], "gave '1'"),
        (None, "gave NoneType instead of a list"),
        ("11", "gave str instead of a list"),
        (1.0, "gave float instead of a list"),
        ({1: 1.0, 2: 2.0}, "gave dict instead of a list"),
    ],
)
def test_what_is_no_number_for_each_answer_is_refused(given: Any, words: str):
    with pytest.raises(UserError, match=words):
        scored(By(lambda _: given), answers("a", "b"))


@pytest.mark.parametrize(
    "given", [[1, 0.5, None], (True, 0.5, None), numpy.array([1, 0.5]), torch.tensor([1, 0.5]), [torch.tensor(1), 0.5]]
)
def test_numbers_of_any_kind_are_taken(given: Any):
    asked = answers("a", "b", "c")[: len(given)]
    assert scored(By(lambda _: given), asked) == [1.0, 0.5, None][: len(given)]


def test_equal_answers_to_a_prompt_are_asked_about_once():
    reward = By(lambda asked: [float(len(answer.text)) for answer in asked])
    other = Answer([{"role": "user", "content": "r"}], "a")
    cut = Answer([{"role": "user", "content": "q"}], "a", finish_reason="length")
    other_gold = Answer([{"role": "user", "content": "q"}], "a", columns={"x": 1})
    asked = [*answers("a", "bb", "a", "a"), other, cut, other_gold]
    assert scored(reward, asked) == [1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert reward.asked == [5]
    assert scored(reward, []) == [] and reward.asked == [5]


def test_a_reward_for_none_of_many_is_a_mistake():
    with pytest.raises(UserError, match=r"the reward By judged none of 8 responses\. None says"):
        scored(By(lambda asked: [None] * len(asked)), answers(*"abcdefgh"))
    assert scored(By(lambda asked: [None] * len(asked)), answers(*"abcdefg")) == [None] * 7


def test_by_score_the_better_answer_wins_and_ties_are_half():
    reward = By(lambda asked: [None if a.text == "?" else float(len(a.text)) for a in asked])
    assert preferred(reward, answers("aa", "a", "b", "?"), answers("b", "aa", "c", "b")) == [1.0, 0.0, 0.5, None]


def test_preferences_are_probabilities():
    class Odd(By):
        def prefer(self, first: Any, second: Any) -> Any:
            return [1.5]

    with pytest.raises(UserError, match=r"prefers with 1\.5\. Mend its prefer"):
        preferred(Odd(lambda _: []), answers("a"), answers("b"))


def test_a_sum_adds_weighted_parts_and_keeps_them():
    def first(asked: Sequence[Answer]) -> list[float | None]:
        return [1.0, None, 3.0]

    reward = SumOfRewards({"a": By(first), "b": By(lambda asked: [10.0, 20.0, 30.0])}, {"b": 0.1})
    total, parts = scored_with_parts(reward, answers("x", "y", "z"))
    assert total == [2.0, None, 6.0] == scored(reward, answers("x", "y", "z"))
    assert parts == {"a": [1.0, None, 3.0], "b": [10.0, 20.0, 30.0]}
    assert SumOfRewards({"n": NumberMatch(column="x"), "t": TextMatch(column="x")}).columns == ("x",)


@pytest.mark.parametrize(
    ("rewards", "weights", "words"),
    [
        ({}, None, "must map names to rewards"),
        ({"a": 3}, None, "must map names to rewards"),
        ({"a": TextMatch()}, {"b": 1.0}, "weights names b, and the rewards are a"),
        ({"a": TextMatch()}, {"a": math.nan}, "weights must be finite"),
    ],
)
def test_sums_that_cannot_be_made_are_refused(rewards: Any, weights: Any, words: str):
    with pytest.raises(UserError, match=words):
        SumOfRewards(rewards, weights)


def test_settings_are_the_class_and_its_arguments():
    assert SumOfRewards({"n": NumberMatch(partial=0.2)}, {"n": 2.0}).settings == {
        "reward": "spin_lightning.rewards.base.SumOfRewards",
        "rewards": {
            "n": {
                "reward": "spin_lightning.rewards.program.NumberMatch",
                "pattern": None,
                "partial": 0.2,
                "tolerance": 0.0,
                "column": None,
            }
        },
        "weights": {"n": 2.0},
    }


def test_a_reward_that_a_manifest_cannot_keep_is_refused():
    class Odd(By):
        def __init__(self, rule: Any) -> None:
            super().__init__(rule)
            self.rule = rule

    with pytest.raises(UserError, match=r"Odd\.settings must be a dict that JSON can hold"):
        check_reward(Odd(lambda _: []))
    with pytest.raises(UserError, match="a reward must be a Reward, got 3"):
        check_reward(3)
    check_reward(SumOfRewards({"n": NumberMatch()}))


def test_a_judge_that_is_silent_about_more_than_a_tenth_stops_the_run():
    refuse_unanswered(2, 20, "the judge", "status 503")
    with pytest.raises(RewardUnavailable, match=r"did not reply about 3 of 20 responses \(status 503\)"):
        refuse_unanswered(3, 20, "the judge", "status 503")
    assert RewardUnavailable.exit_code == 75


def test_an_answer_is_made_of_a_prompt_and_a_response():
    row = Row(({"role": "user", "content": "q"},), "", has_real=False)
    answer = make_answer(Prompt(0, row, [1, 2], [], "stop"), [3], "a", "length")
    assert (answer.text, answer.real, answer.ids, answer.prompt_ids, answer.finish_reason) == (
        *("a", None, [3], [1, 2]),
        "length",
    )


class Judge(By):
    """Prefers the text with more characters, and by a bias the one that is shown first."""

    def prefer(self, first: Sequence[Answer], second: Sequence[Answer]) -> list[float | None]:
        self.asked.append(len(first))
        return [
            None if "?" in (a.text, b.text) else 1 / (1 + math.exp(len(b.text) - len(a.text) - 2))
            for a, b in zip(first, second, strict=True)
        ]


def test_a_reward_that_compares_is_asked_in_both_orders():
    judge = Judge(lambda _: [])
    assert judge.compares and not By(lambda _: []).compares
    ours, theirs = answers("aa", "a", "a", "?", "aa"), answers("b", "b", "a", "b", "b")
    found = preferred(judge, ours, theirs)
    assert found == [pytest.approx(0.610758, abs=1e-6), 0.5, 0.5, None, found[0]]
    assert judge.asked == [3, 3]  # equal answers are a tie, and a pair that comes again is not asked about again
    ((one, two), *_) = preferred_by_order(judge, ours, theirs)  # type: ignore[misc]
    assert one - two == pytest.approx(0.683633, abs=1e-6)
    assert preferred_by_order(By(lambda asked: [1.0, 0.0]), answers("x"), answers("y")) == [(1.0, 1.0)]


class OfTensors(Reward):
    """What a function of somebody's does: a number from a tensor, with what torch takes for the dtype."""

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [float(torch.tensor([len(answer.text) / 3]) @ torch.ones(1)) for answer in answers]


def test_a_reward_computes_alike_whatever_the_precision_of_the_policy() -> None:
    third = float(torch.tensor(1 / 3))
    torch.set_default_dtype(torch.bfloat16)  # as trainer.precision bf16-true does around a pass
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert scored(OfTensors(), [Answer([], "a")]) == [third]
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (NumberMatch(), "NumberMatch can judge nothing. The data have no real responses to compare with: name"),
        (SumOfRewards({"text": TextMatch()}), "SumOfRewards can judge nothing. There is no text to compare with"),
        (JudgeReward(url="http://localhost:9", mode="pair"), "the data have none. Set mode: score"),
    ],
)
def test_a_reward_that_needs_real_responses_is_refused_where_there_are_none(reward: Reward, message: str) -> None:
    alone = Prompt(0, Row(({"role": "user", "content": "q"},), "", has_real=False), [1], [], "stop")
    with pytest.raises(UserError, match=message):
        refuse_without_real(reward, [alone])
    refuse_without_real(reward, [alone, Prompt(1, Row(alone.row.prompt, "4"), [1], [2], "stop")])
    refuse_without_real(NumberMatch(column="gold"), [alone])
