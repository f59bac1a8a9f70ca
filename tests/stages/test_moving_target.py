"""A target that moves: rows of an iteration's own, bound in its manifest, exact after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from games import DoLast, Game, Stopped, pairs_of, read, without_seconds
from helpers import args_of, load, log_prob_by_hand, write_rows
from test_resume import batches_in, play_undisturbed

from spin_lightning import BestAsReal, RowDataModule, SyntheticDataModule, TextMatch, TSpinLoss, UserError
from spin_lightning.cli.commands import main
from spin_lightning.cli.stage_cli import parse_settings
from spin_lightning.rewards.base import Answer, Reward
from spin_lightning.stages.best_as_real import CandidateStore

NOTHING_HELD_OUT = {"val_fraction": 0.0}


@pytest.fixture(scope="module")
def laws(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources: sums, and other sums that are answered in words."""
    folder = tmp_path_factory.mktemp("laws")
    second = folder / "second.jsonl"
    turns = [[{"role": "user", "content": f"{a}+2?"}, {"role": "assistant", "content": "two"}] for a in range(7)]
    second.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return [write_rows(folder / "first.jsonl", 8), str(second)]


def play(model: str, sources: Any, folder: Path, **settings: Any) -> Game:
    data = {**NOTHING_HELD_OUT, **settings.pop("data", {})}
    return Game(model, sources, folder, data=data, **settings)


def test_each_iteration_plays_on_its_own_rows(model: str, laws: list[str], tmp_path: Path) -> None:
    game = play(model, laws, tmp_path, data={"history": 0}).play()
    for k, count in enumerate((8, 7)):
        pairs = pairs_of(tmp_path, k)
        assert len(pairs) == count and {pair["iteration"] for pair in pairs} == {k}
        assert ({pair["chosen"][0]["content"] for pair in pairs} == {"two"}) == (k == 1)
    hashes = [read(tmp_path / f"iteration_{k}" / "pairs_manifest.json")["binding"]["prompts_sha256"] for k in range(2)]
    assert hashes[0] != hashes[1] == game.data.prompts_hash
    assert read(tmp_path / "run.json")["settings"]["data.prompts_sha256"] == hashes
    report = read(tmp_path / "data_report.json")
    assert [part["prompts_sha256"] for part in report["iterations"]] == hashes
    assert [part["train"]["prompts"] for part in report["iterations"]] == [8, 7]
    assert report["train_data"]["source"] == laws[0] and report["prompts_sha256"] == hashes[0]


def test_earlier_pairs_of_other_rows_are_scored_anew_on_both_sides(model: str, laws: list[str], tmp_path: Path) -> None:
    play(model, laws, tmp_path, play={"shard_size": 5}).play()
    pairs = pairs_of(tmp_path, 1)
    assert [pair["iteration"] for pair in pairs] == [1] * 7 + [0] * 8
    assert len({pair["prompt_id"] for pair in pairs}) == 15  # no prompt of one law passes for one of the other
    before = {pair["prompt_id"]: pair for pair in pairs_of(tmp_path, 0)}
    opponent = load(tmp_path / "iteration_0" / "policy")
    for pair in pairs:
        for side in ("real", "generated"):
            expected = log_prob_by_hand(opponent, pair["prompt_ids"], pair[f"{side}_ids"])
            assert pair[f"opponent_{side}_log_prob"] == pytest.approx(expected, abs=2e-4)
        if pair["iteration"] == 0:
            assert pair["generated_ids"] == before[pair["prompt_id"]]["generated_ids"]
            assert pair["opponent_real_log_prob"] != before[pair["prompt_id"]]["opponent_real_log_prob"]


def test_a_list_of_one_source_is_the_game_on_that_source(model: str, laws: list[str], tmp_path: Path) -> None:
    one = play(model, laws[0], tmp_path / "one").play()
    other = tmp_path / "copy.jsonl"
    shutil.copy(laws[0], other)
    same = play(model, [laws[0], str(other)], tmp_path / "list").play()
    assert same.losses == one.losses and same.weights == one.weights
    for k in range(2):
        assert pairs_of(tmp_path / "list", k) == pairs_of(tmp_path / "one", k)


def test_a_mixture_may_be_an_iterations_source(model: str, laws: list[str], tmp_path: Path) -> None:
    mixed = {laws[0]: 0.5, laws[1]: 2.0}
    play(model, [laws[0], mixed], tmp_path, data={"history": 0, "val_data": laws[1]}).play()
    assert len(pairs_of(tmp_path, 1)) == 4 + 14
    assert read(tmp_path / "start.json")["val/nll"] > 0


def test_a_moving_game_killed_at_any_moment_continues_to_the_same_weights(
    model: str, laws: list[str], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"data": NOTHING_HELD_OUT}
    whole = play_undisturbed(settings, model, laws, tmp_path)  # type: ignore[arg-type]
    assert len(whole.moments) > 40
    for moment in whole.moments[3::16]:
        game = Game(model, laws, moment.folder, **settings)  # type: ignore[arg-type]
        done = batches_in(game.clock.last_checkpoint)
        game.play()
        reference = whole.game.recorder.losses
        assert game.recorder.losses == {number: loss for number, loss in reference.items() if number >= done}
        assert game.weights == whole.game.weights
        ends = [without_seconds(read(folder / "game.json")) for folder in (moment.folder, whole.folder)]
        assert ends[0] == ends[1]


def test_rows_of_an_iteration_to_come_may_not_change(model: str, laws: list[str], tmp_path: Path) -> None:
    play(model, laws, tmp_path / "run").play()
    changed = write_rows(tmp_path / "changed.jsonl", 9)
    (tmp_path / "run" / "game.json").unlink()
    with pytest.raises(UserError, match=r"data.prompts_sha256: \['\w+', '\w+'\] -> "):
        play(model, [laws[0], changed], tmp_path / "run", play={"iterations": 2}).play()
    longer = play(model, [*laws, changed], tmp_path / "run", play={"iterations": 3}).play()
    assert len(pairs_of(tmp_path / "run", 2)) == 9 + 7 and longer.losses  # made longer, with rows of its own


def test_a_loss_that_needs_the_first_responses_refuses_other_rows(model: str, laws: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"TSpinLoss compares with the responses of iteration 0 to the same prompts"):
        play(model, laws, tmp_path, module={"loss": TSpinLoss()}).play()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda laws: RowDataModule(laws), "is a list, .* one source an iteration, and there are none here"),
        (lambda laws: SyntheticDataModule([], val_fraction=0.0), "is an empty list"),
        (lambda laws: SyntheticDataModule(laws), "Give data.val_data, or set data.val_fraction: 0"),
    ],
)
def test_lists_that_cannot_be_are_refused(make: Callable[[list[str]], Any], words: str, laws: list[str]) -> None:
    with pytest.raises(UserError, match=words):
        make(laws)


def test_check_counts_the_rows_of_each_iteration(
    model: str, laws: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = args_of("fit", model, f"[{','.join(laws)}]", "unused", "--data.val_fraction=0", "--data.batch_size=4")
    main(["check", *flags[1:], "--self_play.iterations=2"])
    printed = capsys.readouterr().out
    assert "to train on in iteration 0: 8 rows" in printed and "to train on in iteration 1: 7 rows" in printed


def test_there_is_one_source_an_iteration(
    model: str, laws: list[str], tmp_path: Path, refusal: Callable[[Sequence[str]], str]
) -> None:
    flags = args_of("fit", model, f"[{','.join(laws)}]", tmp_path / "run", "--data.val_fraction=0")
    assert parse_settings("fit", flags[1:]).data.train_data == laws
    assert "7 rows to train on in iteration 1 are fewer than data.batch_size 8: of 7 rows 0 are held out" in refusal(
        [*flags, "--self_play.iterations=2", "--trainer.accelerator=cpu"]
    )
    printed = refusal([*flags, "--self_play.iterations=3", "--trainer.accelerator=cpu"])
    assert "data.train_data is a list of 2 values" in printed and "but the game has 3 iterations" in printed


# --- the policy's best responses as real ones -------------------------------------------------------------------------


class Favourite(Reward):
    """The code of a response's first byte: no two responses are worth the same by chance alone."""

    asked = 0

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        type(self).asked += len(answers)
        return [float(answer.text.encode("utf-8", "replace")[0]) if answer.text else None for answer in answers]


@pytest.fixture
def rising() -> Callable[[], dict[str, Any]]:
    Favourite.asked = 0
    return lambda: {"callbacks": [BestAsReal(Favourite(), responses=3)], "play": {"shard_size": 3}}


def candidates_of(folder: Path, iteration: int) -> list[dict[str, Any]]:
    return CandidateStore(folder / f"iteration_{iteration}" / "candidates").read().to_pylist()


def test_the_best_response_becomes_the_real_one(
    model: str, rows: str, tmp_path: Path, rising: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    game = Game(model, rows, tmp_path, **rising()).play()
    given = {prompt.prompt_id: prompt for prompt in game.data._as_read or ()}
    for k in range(2):
        kept = {row["prompt_id"]: row for row in candidates_of(tmp_path, k)}
        assert len(kept) == 8 and any(row["best"] >= 0 for row in kept.values())
        for pair in pairs_of(tmp_path, k):
            if pair["iteration"] != k:
                continue
            row = kept[pair["prompt_id"]]
            usable = [
                reward if reward is not None and reason == "stop" else -1.0
                for reward, reason in zip(row["rewards"], row["finish_reasons"], strict=True)
            ]
            if max(usable) > row["real_reward"]:
                assert pair["real_ids"] == row["candidates"][usable.index(max(usable))]
                assert pair["chosen"][0]["content"] == row["texts"][row["best"]]
            else:
                assert row["best"] == -1 and pair["real_ids"] == given[pair["prompt_id"]].real_ids
            assert pair["generated_ids"] not in row["candidates"] or len(pair["generated_ids"]) == 1
        replaced = sum(row["best"] >= 0 for row in kept.values())
        assert (
            f"iteration {k}: {replaced} of 8 real responses are replaced by better ones" in capsys.readouterr().out or k
        )
    hashes = [read(tmp_path / f"iteration_{k}" / "pairs_manifest.json")["binding"]["prompts_sha256"] for k in range(2)]
    settings = read(tmp_path / "run.json")["settings"]
    assert settings["data.prompts_sha256"] not in hashes and hashes[0] != hashes[1]
    assert settings["best_as_real.reward"] == {"class": "Favourite"} and settings["best_as_real.responses"] == 3
    binding = read(tmp_path / "iteration_1" / "candidates_manifest.json")["binding"]
    assert binding["prompts_sha256"] == settings["data.prompts_sha256"]  # each iteration begins from the data's again
    assert binding["reward"]["reward"].endswith("Favourite")


def test_killed_at_any_moment_it_continues_and_asks_at_most_a_shard_again(
    model: str, rows: str, tmp_path: Path, rising: Any
) -> None:
    whole = play_undisturbed(rising(), model, rows, tmp_path)
    asked, Favourite.asked = Favourite.asked, 0
    assert asked <= 2 * 8 * (3 + 1)
    for moment in whole.moments[5::24]:
        before = sum(
            len(row["rewards"]) + 1
            for k in range(2)
            for path in moment.folder.glob(f"iteration_{k}/candidates/*.parquet")
            for row in pq.read_table(path).to_pylist()
        )
        Favourite.asked = 0
        game = Game(model, rows, moment.folder, **rising())
        done = batches_in(game.clock.last_checkpoint)
        game.play()
        reference = whole.game.recorder.losses
        assert game.recorder.losses == {number: loss for number, loss in reference.items() if number >= done}
        assert game.weights == whole.game.weights
        assert Favourite.asked <= 2 * 8 * (3 + 1) - before + 3 * (3 + 1)
        for k in range(2):
            assert candidates_of(moment.folder, k) == candidates_of(whole.folder, k)


def test_another_reward_is_refused(model: str, rows: str, tmp_path: Path, rising: Any) -> None:
    def stop(*_: Any) -> None:
        raise Stopped

    settings = rising()
    with pytest.raises(Stopped):
        Game(model, rows, tmp_path, last=[DoLast(on_train_batch_end=stop)], **settings).play()
    other = {**settings, "callbacks": [BestAsReal(TextMatch(), responses=3)]}
    with pytest.raises(UserError, match=r"best_as_real.reward: .*'Favourite'.* -> .*'TextMatch'"):
        Game(model, rows, tmp_path, **other).play()
    with pytest.raises(UserError, match=r"what differs: reward"):
        Game(model, rows, tmp_path, allow_changes=["best_as_real.reward"], **other).play()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward": 1.0}, "BestAsReal.reward must be a Reward, got 1.0"),
        ({"responses": 0}, "responses must be at least 1 and first_iteration at least 0, got 0 and 0"),
    ],
)
def test_what_it_cannot_do_with_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        BestAsReal(**{"reward": TextMatch(), **settings})
