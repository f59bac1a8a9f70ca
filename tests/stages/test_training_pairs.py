"""Which pairs an iteration trains on: those of earlier ones, no identical ones, empty and cut ones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from games import Do, FakeGenerator, Game, pairs_of, read
from helpers import load, log_prob_by_hand
from transformers import AutoTokenizer

from spin_lightning import (
    AlphaSpinLoss,
    Health,
    SpinLoss,
    TSpinLoss,
)


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
        opponent = load(opponents[k]).eval()
        for row in trained:
            before = made[row["iteration"]][row["prompt_id"]]
            assert (
                row["generated_ids"] == before["generated_ids"] and row["opponent_sha256"] == before["opponent_sha256"]
            )
            for side in ("real", "generated"):
                score = log_prob_by_hand(opponent, row["prompt_ids"], row[f"{side}_ids"])
                assert row[f"opponent_{side}_log_prob"] == pytest.approx(score, abs=1e-4)
    assert sorted(game.recorder.order_of(2)) == list(range(8 * min(3, history + 1)))


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
    """Repeats no real response in iteration 0, the six smallest of the ten sums in iteration 1; else says ``no``."""

    def generate(self, *args: Any) -> Any:
        self.rule = repeating(self.model, 0.6 if self.module.iteration else 0.0).rule
        return super().generate(*args)


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
    # sums 1, 3, ..., 19: five of one digit, five of two; an answer is its digits and a terminator, "no" has three
    # tokens
    real = (5 * 2 + 5 * 3) / 10
    assert [p["real_mean_length"] for p in pairs] == pytest.approx([real, real])
    own = (5 * 2 + 1 * 3 + 4 * 3) / 10  # 1, 3, 5, 7, 9 and 11 repeated, four times "no"
    assert [p["generated_mean_length"] for p in pairs] == pytest.approx([3.0, own])
    assert [p["generated_tokens"] for p in pairs] == [30, round(10 * own)]
    remarks = [said for iteration, said in game.health.remarks if iteration == 1 and "identical" in said]
    assert remarks == [
        "60% of the pairs are identical and teach nothing, so this iteration is shorter; it may be the last useful one"
    ]


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

    def generate(self, *args: Any) -> Any:
        self.rule = repeating(self.model, 9.0 if self.module.iteration else 0.0).rule
        return super().generate(*args)


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


@pytest.mark.parametrize("loss", [AlphaSpinLoss(0.4), TSpinLoss()])
def test_losses_that_look_back_to_the_start_get_what_they_ask_for(
    loss: Any, model: str, rows: str, tmp_path: Path
) -> None:
    Game(model, rows, tmp_path, module={"loss": loss}, play={"epochs": 1}, data={"answers_per_prompt": 2}).play()
    first = {(row["prompt_id"], row["answer"]): row["generated_ids"] for row in pairs_of(tmp_path, 0)}
    start = load(model).eval()
    for row in pairs_of(tmp_path, 1)[::5]:
        if loss.needs_initial_response:
            assert row["initial_ids"] == first[row["prompt_id"], row["answer"]]
        for side in ("real", "generated"):
            score = log_prob_by_hand(start, row["prompt_ids"], row[f"{side}_ids"])
            stored = row[f"initial_{side}_log_prob"]
            assert stored == pytest.approx(score, abs=1e-4) if loss.needs_initial_log_probs else stored is None
