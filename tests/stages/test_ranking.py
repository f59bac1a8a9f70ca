"""Pairs that a reward has a say in: which they are, what is stored of it, and that it is asked once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from games import DoLast, Game, Stopped, pairs_of, read, weight_bits, without_seconds
from helpers import args_of, load, log_prob_by_hand

from spin_lightning import NumberMatch, TransformersGenerator, TSpinLoss, UserError
from spin_lightning.cli import main
from spin_lightning.generation.pair_store import SCHEMA, PairStore, RankedPairStore
from spin_lightning.rewards.base import Answer, Reward

#: Three answers a prompt, two iterations with a history.
SETTINGS: dict[str, Any] = {
    "data": {"answers_per_prompt": 3, "generator": TransformersGenerator(max_new_tokens=5)},
    "play": {"shard_size": 3, "epochs": 1},
}


class Sums(Reward):
    """The sum of an answer's bytes modulo ``modulus``. Keeps what it was asked about, and under which default dtype."""

    def __init__(self, modulus: int = 5) -> None:
        self.modulus = modulus
        self.asked: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        self.asked += [answer.key for answer in answers]
        self.dtypes.add(torch.tensor(0.5).dtype)
        return [float(sum(answer.text.encode()) % self.modulus) for answer in answers]


def play(model: str, rows: str, folder: Path, pairs: str, reward: Reward | None, **settings: Any) -> Game:
    given = {**SETTINGS, **settings}
    play = {**SETTINGS["play"], "pairs": pairs, "reward": reward, **settings.get("play", {})}
    return Game(model, rows, folder, **{**given, "play": play}).play()


def value_of(text: str, modulus: int = 5) -> float:
    return float(sum(text.encode()) % modulus)


def test_best_against_worst_is_taken_of_each_prompt_s_answers_and_ties_are_not_trained_on(
    model: str, rows: str, tmp_path: Path
) -> None:
    Game(model, rows, tmp_path / "plain", **SETTINGS).play()
    ranked = play(model, rows, tmp_path / "ranked", "best_worst", Sums(2))
    answers: dict[int, list[dict[str, Any]]] = {}
    for row in pairs_of(tmp_path / "plain", 0):
        answers.setdefault(row["prompt_id"], []).append(row)
    found = pairs_of(tmp_path / "ranked", 0)
    assert [row["prompt_id"] for row in found] == sorted(answers) and len(found) == 8
    start, ends = load(model), ranked.data.encoder.end_ids
    for row in found:
        of_prompt = answers[row["prompt_id"]]
        values = [value_of(other["rejected"][0]["content"], 2) for other in of_prompt]
        assert row["rewards"] == values
        best, worst = values.index(max(values)), 2 - values[::-1].index(min(values))
        assert (row["real_reward"], row["generated_reward"]) == (values[best], values[worst])
        assert row["real_ids"] == of_prompt[best]["generated_ids"]
        assert row["generated_ids"] == of_prompt[worst]["generated_ids"]
        assert row["chosen"] == of_prompt[best]["rejected"] and row["seed"] == of_prompt[worst]["seed"]
        assert (row["real_finish_reason"] == "stop") == (row["real_ids"][-1] in ends)
        for side in ("real", "generated"):
            expected = log_prob_by_hand(start, row["prompt_ids"], row[f"{side}_ids"])
            assert row[f"opponent_{side}_log_prob"] == pytest.approx(expected, abs=1e-3)
    report = read(tmp_path / "ranked" / "iteration_0" / "summary.json")["pairs"]
    told = [row for row in found if row["real_reward"] > row["generated_reward"]]
    assert 0 < len(told) == report["training_pairs"] == report["rewards"]["pairs_told_apart"] < 8
    assert report["rewards"]["pairs_tied"] == 8 - len(told) and report["rewards"]["unjudged"] == 0
    every = [value for row in found for value in row["rewards"]]
    assert report["rewards"]["mean"] == pytest.approx(sum(every) / len(every))
    # those of the iteration before are scored by this opponent, on both sides
    assert {row["iteration"] for row in pairs_of(tmp_path / "ranked", 1)} == {0, 1}
    opponent = load(tmp_path / "ranked" / "iteration_0" / "policy")
    old = next(row for row in pairs_of(tmp_path / "ranked", 1) if row["iteration"] == 0)
    for side in ("real", "generated"):
        expected = log_prob_by_hand(opponent, old["prompt_ids"], old[f"{side}_ids"])
        assert old[f"opponent_{side}_log_prob"] == pytest.approx(expected, abs=1e-3)
    assert ranked.losses[0] == pytest.approx(0.693147, abs=1e-4)


def test_real_against_wrong_leaves_out_answers_that_are_worth_as_much_and_asks_about_a_real_one_once(
    model: str, rows: str, tmp_path: Path
) -> None:
    reward = Sums()
    game = play(model, rows, tmp_path, "real_wrong", reward)
    found = pairs_of(tmp_path, 0)
    assert len(found) == 24 and len(reward.asked) == len(set(reward.asked))
    for row in found:
        assert row["real_reward"] == value_of(row["chosen"][0]["content"])
        assert row["generated_reward"] == value_of(row["rejected"][0]["content"])
    kept = sum(row["generated_reward"] < row["real_reward"] for row in found)
    report = read(tmp_path / "iteration_0" / "summary.json")["pairs"]
    assert 0 < report["training_pairs"] == kept < 24
    assert sorted(row["real_reward"] for row in pairs_of(tmp_path, 1) if row["iteration"] == 1) == sorted(
        row["real_reward"] for row in found
    )
    assert game.clock.remembered.first_loss == pytest.approx(0.693147, abs=1e-4)


class Unsure(Sums):
    """Cannot judge most answers, and compares instead of scoring where it can."""

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [None if sum(answer.text.encode()) % 2 else 0.25 for answer in answers]

    def prefer(self, first: Sequence[Answer], second: Sequence[Answer]) -> list[float | None]:
        return [0.25] * len(first)


def test_what_cannot_be_judged_is_left_out_and_a_reward_that_compares_is_not_asked_about_the_real_one(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(model, rows, tmp_path / "wrong", "real_wrong", Unsure(), play={"iterations": 1})
    found = pairs_of(tmp_path / "wrong", 0)
    assert {row["real_reward"] for row in found} == {0.5}
    values = {value_of(row["rejected"][0]["content"], 2): row["generated_reward"] for row in found}
    assert values == {0: 0.25, 1: None}
    report = read(tmp_path / "wrong" / "iteration_0" / "summary.json")["pairs"]
    assert report["training_pairs"] == sum(row["generated_reward"] is not None for row in found)
    assert report["rewards"]["unjudged"] == sum(row["generated_reward"] is None for row in found)
    play(model, rows, tmp_path / "best", "best_worst", Unsure(), play={"iterations": 1})  # all that are judged tie
    ended = read(tmp_path / "best" / "game.json")["ended_because"]
    assert ended == "no pair is left that Unsure tells apart"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"the game is over: {ended}. Nothing was trained, so there is no model. See the settings of")
    assert "Unsure, data.answers_per_prompt and data.generator.max_new_tokens" in last and "Models:" not in last


def test_prompts_alone_are_enough_for_best_against_worst(model: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}+1?", "level": n}) + "\n" for n in range(10)))
    game = play(model, str(path), tmp_path / "run", "best_worst", Sums())
    assert game.data.prompts[0].real_ids == [] and len(game.losses) > 1
    assert read(tmp_path / "run" / "iteration_1" / "summary.json")["val_nll"] is None


def test_a_reward_computes_in_float32_whatever_the_policy_does(model: str, rows: str, tmp_path: Path) -> None:
    reward = Sums()
    play(model, rows, tmp_path, "best_worst", reward, trainer={"precision": "bf16-true"}, play={"iterations": 1})
    assert reward.dtypes == {torch.float32}


@pytest.mark.parametrize("pairs", ["best_worst", "real_wrong"])
def test_a_game_stopped_anywhere_continues_bit_by_bit_and_asks_about_nothing_that_is_stored(
    pairs: str, model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_reward = Sums()
    whole = play(model, rows, tmp_path / "whole", pairs, whole_reward)
    expected = without_seconds(read(tmp_path / "whole" / "game.json"))
    write = RankedPairStore.write_shard

    def stop_behind(shard: int) -> None:
        written = iter(range(1, 99))

        def write_and_stop(self: RankedPairStore, name: str, rows: Any) -> None:
            write(self, name, rows)
            if next(written) == shard:
                raise Stopped

        monkeypatch.setattr(RankedPairStore, "write_shard", write_and_stop)

    def stop_at(update: int) -> DoLast:
        def stop(trainer: Any, *args: Any) -> None:
            if trainer.global_step == update:
                raise Stopped

        return DoLast(on_train_batch_end=stop)

    last = whole.trainer.global_step
    for name, shard, update in (
        ("first shard", 1, 0),
        ("later shard", 5, 0),
        ("update", 0, 1),
        ("last update", 0, last),
    ):
        folder, before, after = tmp_path / name.replace(" ", "_"), Sums(), Sums()
        if shard:
            stop_behind(shard)
        with pytest.raises(Stopped):
            play(model, rows, folder, pairs, before, last=[stop_at(update)])
        monkeypatch.undo()
        continued = play(model, rows, folder, pairs, after)
        assert weight_bits(continued.module.policy) == weight_bits(whole.module.policy), name
        assert without_seconds(read(folder / "game.json")) == expected, name
        assert sorted([*before.asked, *after.asked]) == sorted(whole_reward.asked), name


def test_other_rewards_do_not_continue_a_game_and_plain_games_have_no_column_of_them(
    model: str, rows: str, tmp_path: Path
) -> None:
    stop = DoLast(on_train_batch_end=lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        play(model, rows, tmp_path / "run", "best_worst", Sums(), last=[stop])
    binding = PairStore(tmp_path / "run" / "iteration_0" / "pairs").binding
    assert binding["pairs"] == "best_worst" and binding["reward"]["modulus"] == 5
    with pytest.raises(UserError, match=r"self_play\.reward: .*'\.modulus': 5.* -> .*'\.modulus': 7"):
        play(model, rows, tmp_path / "run", "best_worst", Sums(7))
    with pytest.raises(UserError, match=r"self_play\.pairs: 'best_worst' -> 'real_wrong'"):
        play(model, rows, tmp_path / "run", "real_wrong", Sums())
    Game(model, rows, tmp_path / "plain", play={"iterations": 1}).play()
    store = PairStore(tmp_path / "plain" / "iteration_0" / "pairs")
    assert store.read().column_names == SCHEMA.names and not {"pairs", "reward"} & store.binding.keys()


@pytest.mark.parametrize(
    ("pairs", "reward", "settings", "message"),
    [
        ("best_of", None, {}, r"self_play\.pairs must be one of real_generated, best_worst, real_wrong, got 'best_of'"),
        ("best_worst", None, {}, r"self_play\.pairs best_worst needs a reward .* --self_play\.reward NumberMatch"),
        ("real_generated", Sums(), {}, r"self_play\.reward has no say in pairs of real and generated responses"),
        ("real_wrong", "NumberMatch", {}, r"self_play\.reward must be a Reward, got 'NumberMatch'"),
        ("best_worst", Sums(), {"data": {}}, r"needs several responses to each prompt, got data\.answers_per_prompt 1"),
        ("best_worst", Sums(), {"module": {"loss": TSpinLoss()}}, "TSpinLoss compares with the first opponent's"),
        ("real_wrong", NumberMatch(column="gold"), {}, r"the reward needs the columns 'gold', but .* has 'messages'"),
    ],
)
def test_settings_that_do_not_suit_each_other_are_refused_before_a_model_is_loaded(
    pairs: str, reward: Any, settings: dict[str, Any], message: str, model: str, rows: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        play(model, rows, tmp_path / "run", pairs, reward, **settings)
    assert not (tmp_path / "run").exists()


def test_a_reward_is_named_on_the_command_line(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        args_of(
            "fit",
            model,
            rows,
            tmp_path / "run",
            "--self_play.pairs=real_wrong",
            "--self_play.reward=TextMatch",
            "--self_play.iterations=1",
            "--data.generator.max_new_tokens=5",
            "--data.batch_size=4",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        )
    )
    printed = capsys.readouterr().out
    assert (
        "pairs to train on (the real response against each generated one that is worth less, by TextMatch; " in printed
    )
    assert "all answers are worth 0.000 on average" in printed
    assert read(tmp_path / "run" / "run.json")["settings"]["self_play.reward"] == {
        "class": "TextMatch",
        ".column": None,
    }
