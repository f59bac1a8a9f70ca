"""What a reward says of responses, kept and continued: on tiny models, or on a generator that answers by a rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fake_judge
import pytest
from games import FakeGenerator, read
from helpers import byte_tokenizer, tiny_model

from spin_lightning import (
    FunctionReward,
    ModelReward,
    NumberMatch,
    Reward,
    RewardUnavailable,
    SumOfRewards,
    SyntheticDataModule,
    TextMatch,
    UserError,
)
from spin_lightning.cli import commands as cli
from spin_lightning.cli.score import render
from spin_lightning.data.preferences import PreferenceDataModule
from spin_lightning.rewards import Answer
from spin_lightning.rewards.base import refuse_unanswered
from spin_lightning.runs.files import write_json
from spin_lightning.stages.scoring import ComparedPairs, Players, RewardStore, Scoring

Rule = Callable[[list[int], int], list[int]]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sums(tmp_path: Path) -> str:
    return write(tmp_path / "sums.jsonl", [{"prompt": f"{a}+1?", "completion": f"#### {a + 1}"} for a in range(6)])


def read_data(rows: str, rule: Rule | None = None, **settings: Any) -> SyntheticDataModule:
    data = SyntheticDataModule(
        rows, generator=FakeGenerator(rule or (lambda prompt, seed: []), 16), val_fraction=0, **settings
    )
    data.tokenizer, data.end_ids, data.needs_real = byte_tokenizer(), [], False
    data.setup("score")
    return data


def by_text(rule: Callable[[str, int], str]) -> Rule:
    """A rule of texts: from the last user's turn and the response's number in order of its seed."""
    tokenizer = byte_tokenizer()
    seen: dict[str, list[int]] = {}

    def respond(prompt: list[int], seed: int) -> list[int]:
        asked = tokenizer.decode(prompt).split("user\n")[-1].split("<|im_end|>")[0]
        seeds = seen.setdefault(asked, [])
        if seed not in seeds:
            seeds.append(seed)
        return list(tokenizer(rule(asked, seeds.index(seed)), add_special_tokens=False).input_ids)

    return respond


PLAYERS = Players(lambda name: (tiny_model(seed=0 if name is None else 1), None), nullcontext, "tiny")


class Counting(Reward):
    """The right number's share of the response by a rule; counts what it is asked, and breaks down when told."""

    def __init__(self, rule: Callable[[Answer], float | None] = lambda answer: float(len(answer.text))) -> None:
        self._rule, self.asked, self.breaks_at = rule, [], None

    asked: list[str]
    breaks_at: int | None

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        if self.breaks_at is not None and len(self.asked) >= self.breaks_at:
            refuse_unanswered(1, 1, "the judge", "status 503")
        self.asked += [answer.text for answer in answers]
        return [self._rule(answer) for answer in answers]


class Comparing(Counting):
    """Prefers by a rule of two texts."""

    def prefer(self, first: Sequence[Answer], second: Sequence[Answer]) -> list[float | None]:
        self.asked += [f"{a.text}|{b.text}" for a, b in zip(first, second, strict=True)]
        return [0.75 if len(a.text) > len(b.text) else 0.5 for a, b in zip(first, second, strict=True)]


def test_a_model_s_responses_are_scored_counted_and_written_down(sums: str, tmp_path: Path):
    texts = ["#### {}", "#### {}", "#### 99", "none"]  # two right, one wrong, one without a number
    data = read_data(sums, by_text(lambda asked, number: texts[number].format(int(asked[0]) + 1)))
    summary = Scoring(NumberMatch(), str(tmp_path / "run"), shard_size=4).run(PLAYERS, data, 4)
    assert summary == read(tmp_path / "run" / "summary.json")
    assert (summary["prompts"], summary["responses"], summary["unjudged"], summary["cut_share"]) == (6, 24, 0, 0.0)
    assert summary["mean"] == pytest.approx(2.1 / 4)
    assert summary["standard_error"] == pytest.approx(0)
    assert summary["pass_at"] == {"1": pytest.approx(0.5), "2": pytest.approx(5 / 6), "4": 1.0}
    assert summary["best_of"]["2"] == pytest.approx((0 * 0 + 1 * 0.1 + 2 * 1 + 3 * 1) / 6)
    best = [json.loads(line) for line in (tmp_path / "run" / "best.jsonl").read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in best] == [f"#### {a + 1}" for a in range(6)]
    assert best[0] == {
        "messages": [{"role": "user", "content": "0+1?"}, {"role": "assistant", "content": "#### 1"}],
        "reward": 1.0,
    }
    pairs = [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()]
    assert pairs[2] == {
        "prompt": [{"role": "user", "content": "2+1?"}],
        "chosen": [{"role": "assistant", "content": "#### 3"}],
        "rejected": [{"role": "assistant", "content": "none"}],
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "stop",
        "preference": 1.0,
        "margin": 1.0,
    }


def test_what_is_missing_says_why(sums: str, tmp_path: Path):
    def run(name: str, reward: Reward, texts: list[str], **settings: Any) -> tuple[dict[str, str], str]:
        data = read_data(sums, by_text(lambda asked, number: texts[number]))
        summary = Scoring(reward, str(tmp_path / name), **settings).run(PLAYERS, data, len(texts))
        return summary.get("reasons", {}), " ".join("\n".join(render(summary)).split())

    reasons, shown = run("one", NumberMatch(), ["#### 99"], best_from=1.0)
    assert reasons["pair_rows"] == "each prompt has one response: set data.answers_per_prompt to 2 or more"
    assert reasons["best_rows"] == "no reward is at least 1 (score.best_from)"
    assert f"no rows {reasons['best_rows']} no pairs {reasons['pair_rows']}" in shown
    reasons, _ = run("equal", NumberMatch(), ["none", "neither"])
    assert reasons == {"pair_rows": "all judged responses to a prompt have the same reward"}
    reasons, _ = run("empty", Counting(lambda answer: -float(len(answer.text))), ["", "no"])
    assert reasons == {"pair_rows": "the better response of each prompt is empty or holds a NUL character"}
    reasons, shown = run("some", Counting(lambda answer: None if answer.text == "a" else 1.0), ["a", "b"])
    assert "not judged 6: None says that a response cannot be judged. See what the reward needs" in shown
    whole = Counting(lambda answer: None if answer.finish_reason == "length" else 1.0)
    type(whole).judges_cut = property(lambda self: False)  # type: ignore[method-assign, assignment]
    try:
        reasons, shown = run("cut", whole, ["so long that it is cut", "b"])
    finally:
        del type(whole).judges_cut
    assert "not judged 6: 6 were cut, and the reward judges whole responses: raise data.generator.max_new" in shown
    assert run("all", Counting(lambda answer: float(len(answer.text))), ["no", "yes"])[0] == {}


def test_its_rows_are_read_by_the_stages_that_follow(sums: str, tmp_path: Path):
    data = read_data(sums, by_text(lambda asked, number: ["#### 1", "no"][number]))
    Scoring(NumberMatch(), str(tmp_path / "run"), best_from=1.0).run(PLAYERS, data, 2)
    best = read_data(str(tmp_path / "run" / "best.jsonl"))
    assert [prompt.row.real for prompt in best.prompts] == ["#### 1"]  # right for one of the prompts
    pairs = PreferenceDataModule(str(tmp_path / "run" / "pairs.jsonl"), val_fraction=0)
    pairs.tokenizer, pairs.end_ids = byte_tokenizer(), []
    pairs.setup("fit" if len(data.prompts) >= 8 else None)
    rows = [prompt.row for prompt in pairs.prompts]
    assert [(row.real, row.rejected, row.margin) for row in rows] == [("#### 1", "no", 1.0)] + 5 * [
        ("#### 1", "no", 0.1)
    ]


def test_a_reward_model_of_its_pairs_scores_again(model: str, sums: str, tmp_path: Path):
    data = read_data(sums, by_text(lambda asked, number: ["#### 1", "no"][number]))
    Scoring(NumberMatch(), str(tmp_path / "run")).run(PLAYERS, data, 2)
    args = ["reward", f"--model.model_name_or_path={model}", f"--data.train_data={tmp_path / 'run' / 'pairs.jsonl'}"]
    args += [f"--export.output_dir={tmp_path / 'reward'}", "--data.batch_size=2", "--trainer.enable_progress_bar=false"]
    cli.main([*args, "--model.learning_rate=0.01", "--trainer.max_epochs=3"])
    reward = ModelReward(str(tmp_path / "reward" / "reward_model"))
    summary = Scoring(reward, str(tmp_path / "again")).run(PLAYERS, data, 2)
    assert summary["unjudged"] == 0 and summary["reward"]["sha256"]
    rewards = [row["reward"] for row in RewardStore(tmp_path / "again" / "rewards").read().to_pylist()]
    assert all(right > wrong for right, wrong in zip(rewards[::2], rewards[1::2], strict=True))


class Served(FakeGenerator):
    """Reads the model from a folder, as a server does."""

    needs_folder = True
    folders: list[Path]

    def generate(self, *args: Any) -> Any:
        assert self.opponent.folder is not None and (self.opponent.folder / "model.safetensors").exists()
        self.folders.append(self.opponent.folder)
        return super().generate(*args)


def test_a_model_that_lies_in_no_folder_is_written_for_a_server_and_removed_again(sums: str, tmp_path: Path):
    data = read_data(sums)
    data.generator = Served(lambda prompt, seed: [65], 16)
    data.generator.folders = []
    Scoring(Counting(), str(tmp_path / "run")).run(PLAYERS, data, 1)
    assert data.generator.folders == [tmp_path / "run" / "served"] and not (tmp_path / "run" / "served").exists()


def test_a_cut_response_is_no_row_for_sft(sums: str, tmp_path: Path):
    data = read_data(sums, by_text(lambda asked, number: "#" * 40 if number else "ok"))
    summary = Scoring(Counting(), str(tmp_path / "run")).run(PLAYERS, data, 2)
    assert summary["cut_share"] == 0.5
    best = [json.loads(line) for line in (tmp_path / "run" / "best.jsonl").read_text().splitlines()]
    assert {row["messages"][-1]["content"] for row in best} == {"ok"}


def test_what_the_data_cannot_hold_is_no_row(sums: str, tmp_path: Path):
    texts = ["", "a\0bcdef", "fine"]
    data = read_data(sums, by_text(lambda asked, number: texts[number]))
    summary = Scoring(Counting(), str(tmp_path / "run")).run(PLAYERS, data, 3)
    assert (summary["empty_or_nul"], summary["best_rows"], summary["pair_rows"]) == (12, 6, 6)
    read_data(str(tmp_path / "run" / "best.jsonl"))
    (pair, *_) = [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("fine", "")
    worse = Scoring(Counting(lambda answer: -len(answer.text)), str(tmp_path / "worse")).run(PLAYERS, data, 3)
    assert (worse["best_rows"], worse["pair_rows"]) == (6, 0)  # an empty response is not learnt from as the better one


def test_a_judge_that_falls_silent_is_not_asked_again_about_what_it_said(sums: str, tmp_path: Path):
    calls: list[int] = []

    def rule(asked: str, number: int) -> str:
        calls.append(number)
        return asked

    data, reward = read_data(sums, by_text(rule)), Counting()
    reward.breaks_at = 4
    scoring = Scoring(reward, str(tmp_path / "run"), shard_size=2)
    with pytest.raises(RewardUnavailable, match="run the same command again"):
        scoring.run(PLAYERS, data, 1)
    assert len(reward.asked) == 4 and len(calls) == 6
    assert len([*(tmp_path / "run").glob("responses/*")]) == 1 and len([*(tmp_path / "run").glob("rewards/*")]) == 2
    reward.breaks_at = None
    summary = Scoring(reward, str(tmp_path / "run"), shard_size=2).run(PLAYERS, data, 1)
    assert sorted(reward.asked) == [f"{a}+1?" for a in range(6)] and len(calls) == 6
    again = Scoring(reward, str(tmp_path / "run"), shard_size=2).run(PLAYERS, data, 1)
    assert again == summary and len(reward.asked) == 6
    (tmp_path / "run" / "rewards" / "prompts-000000002.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="is not the file that was written"):
        Scoring(reward, str(tmp_path / "run"), shard_size=2).run(PLAYERS, data, 1)


def test_a_changed_function_is_noticed_and_a_run_of_before_goes_on(
    sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(function: str) -> dict[str, Any]:
        return Scoring(FunctionReward(function), str(tmp_path / "run")).run(PLAYERS, read_data(sums), 1)

    summary = run("fake_judge:count_vowels")
    manifest = tmp_path / "run" / "rewards_manifest.json"
    kept = read(manifest)
    assert kept["binding"]["reward"]["source_sha256"]
    monkeypatch.setattr(fake_judge, "count_vowels", lambda completions: [0.0] * len(completions))
    with pytest.raises(UserError, match=r"rewards in .* what differs: reward\."):
        run("fake_judge:count_vowels")
    del kept["binding"]["reward"]["source_sha256"]  # as an earlier version has left it
    write_json(manifest, kept)
    assert run("fake_judge:count_vowels")["mean"] == summary["mean"]  # what was said stays


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"reward": NumberMatch(partial=0.2)},
            r"rewards in .* what differs: reward\. Use .* or remove rewards/",
        ),
        ({"model": 1}, "responses in .* what differs: model_sha256"),
        ({"answers": 2}, "responses in .* what differs: answers_per_prompt"),
        ({"seed": 3}, "responses in .* what differs: seed"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(sums: str, tmp_path: Path, change: Any, words: str):
    Scoring(NumberMatch(), str(tmp_path / "run")).run(PLAYERS, read_data(sums), 1)
    players = Players(lambda name: (tiny_model(seed=change.get("model", 0)), None), nullcontext, "tiny")
    data = read_data(sums, seed=change.get("seed", 0))
    with pytest.raises(UserError, match=words):
        Scoring(change.get("reward", NumberMatch()), str(tmp_path / "run")).run(players, data, change.get("answers", 1))


def test_a_mistake_in_the_reward_can_be_mended_in_the_same_folder(sums: str, tmp_path: Path):
    data = read_data(sums, by_text(lambda asked, number: "#### 1"))
    with pytest.raises(UserError, match="gave 'x'"):
        Scoring(Counting(lambda answer: "x"), str(tmp_path / "run")).run(PLAYERS, data, 1)  # type: ignore
    summary = Scoring(NumberMatch(), str(tmp_path / "run")).run(PLAYERS, data, 1)
    assert summary["pass_at"]["1"] == pytest.approx(1 / 6)


def test_the_data_s_own_responses_are_scored(tmp_path: Path):
    rows = [{"prompt": "q", "completion": text, "label": "yes"} for text in ("yes", " YES ", "no")]
    data = SyntheticDataModule(
        write(tmp_path / "rows.jsonl", rows), generator=FakeGenerator(lambda p, s: []), val_fraction=0
    )
    data.tokenizer, data.end_ids, data.keep_columns = byte_tokenizer(), [], ("label",)
    data.setup("score")
    none = Players(lambda name: pytest.fail("no model is needed"), nullcontext, "none")
    summary = Scoring(TextMatch(column="label"), str(tmp_path / "run")).run(none, data, 0)
    assert (summary["model"], summary["mean"], summary["responses"]) == (None, pytest.approx(2 / 3), 3)
    with pytest.raises(UserError, match=r"score\.against compares responses of models"):
        Scoring(TextMatch(column="label"), str(tmp_path / "other"), against="x").run(none, data, 0)


def test_a_reward_that_compares_with_real_responses_is_refused_for_prompts_alone_before_a_model_is_loaded(
    tmp_path: Path,
):
    data = read_data(write(tmp_path / "prompts.jsonl", [{"prompt": f"{a}+1?", "gold": a + 1} for a in range(3)]))
    none = Players(lambda name: pytest.fail("a model was loaded"), nullcontext, "none")
    with pytest.raises(UserError, match=r"NumberMatch can judge nothing\. The data have no real responses"):
        Scoring(NumberMatch(), str(tmp_path / "run")).run(none, data, 2)
    assert not (tmp_path / "run" / "responses").exists()


def test_the_win_rate_of_one_model_against_another(sums: str, tmp_path: Path):
    ours = read_data(sums, by_text(lambda asked, number: "long answer" if asked[0] in "0123" else "a"))
    theirs = read_data(sums, by_text(lambda asked, number: "short" if asked[0] in "01234" else "a"))
    summary = Scoring(Counting(), str(tmp_path / "run"), against="other").run(PLAYERS, ours, 1, theirs)
    against = summary["against"]
    assert (against["wins"], against["losses"], against["ties"], against["pairs"]) == (4, 1, 1, 6)
    assert against["win_rate"] == pytest.approx(4.5 / 6)
    assert against["interval"] == pytest.approx([0.3648, 0.9400], abs=1e-4)
    assert against["order_sensitivity"] is None
    judge = Comparing()
    summary = Scoring(judge, str(tmp_path / "judged"), against="other").run(PLAYERS, ours, 1, theirs)
    against = summary["against"]
    # 0.75 where the longer one is shown first, 0.5 else: for the four won ones the mean of 0.75 and 0.5
    assert against["win_rate"] == pytest.approx((4 * 0.625 + 0.375 + 0.5) / 6)
    assert against["order_sensitivity"] == pytest.approx(5 * 0.25 / 6)
    assert len([text for text in judge.asked if text.startswith("long answer|")]) == 4  # with the real one: by score
    asked = len(judge.asked)
    Scoring(judge, str(tmp_path / "judged"), against="other").run(PLAYERS, ours, 1, theirs)
    assert len(judge.asked) == asked


def test_the_same_model_wins_half(sums: str, tmp_path: Path):
    data = read_data(sums, lambda prompt, seed: [65 + seed % 20])
    same = Players(lambda name: (tiny_model(), None), nullcontext, "tiny")
    summary = Scoring(Counting(), str(tmp_path / "run"), against="copy").run(same, data, 2, data)
    assert (summary["against"]["win_rate"], summary["against"]["ties"]) == (0.5, 12)


def test_a_judge_that_compares_labels_pairs_of_responses_where_none_is_real(tmp_path: Path):
    data = read_data(
        write(tmp_path / "rows.jsonl", [{"prompt": f"{a}?"} for a in range(3)]),
        by_text(lambda asked, number: ["a", "bbb", "cc", "cc"][number]),
    )
    judge = Comparing()
    summary = Scoring(judge, str(tmp_path / "run")).run(PLAYERS, data, 4)
    assert (summary["mean"], summary["unjudged"], summary["pair_rows"], summary["best_rows"]) == (None, 0, 3, 0)
    pairs = [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()]
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"], row["preference"]) for row in pairs] == [
        ("bbb", "a", 0.625)
    ] * 3
    assert "a" not in judge.asked  # nothing was scored alone


def test_a_judge_that_compares_labels_the_two_responses_of_preference_rows(tmp_path: Path):
    rows = [{"prompt": "q?", "chosen": "short", "rejected": "the longer one"}]
    data = ComparedPairs(write(tmp_path / "rows.jsonl", rows), val_fraction=0)
    data.tokenizer, data.end_ids = byte_tokenizer(), []
    data.setup("score")
    Scoring(Comparing(), str(tmp_path / "run")).run(PLAYERS, data, 0)
    (pair,) = [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()]
    assert (pair["chosen"][0]["content"], pair["preference"]) == ("the longer one", 0.625)


def test_with_a_judge_that_compares_each_score_labels_a_pair_with_the_real_response(sums: str, tmp_path: Path):
    data = read_data(sums, by_text(lambda asked, number: asked[0]))
    judge = Comparing(lambda answer: {"0": 0.9, "1": 0.5}.get(answer.text, 0.2))
    Scoring(judge, str(tmp_path / "run")).run(PLAYERS, data, 1)
    pairs = [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()]
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"], row["preference"]) for row in pairs] == [
        ("0", "#### 1", 0.9),
        *((f"#### {a + 1}", str(a), 0.8) for a in (2, 3, 4, 5)),
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shard_size": 0}, "score.shard_size must be at least 1"),
        ({"part": "test"}, "score.part must be 'train' or 'held_out'"),
        ({"right_from": float("nan")}, "score.right_from must be a finite number"),
        ({"reward": 3}, "a reward must be a Reward, got 3"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        Scoring(**{"reward": TextMatch(), "output_dir": str(tmp_path / "run"), **settings})


def test_what_each_reward_of_a_sum_said_is_kept(sums: str, tmp_path: Path):
    data = read_data(sums, by_text(lambda asked, number: "#### 1" if number else "#### 9"))
    reward = SumOfRewards({"number": NumberMatch(), "length": Counting()}, {"length": 0.5})
    summary = Scoring(reward, str(tmp_path / "run")).run(PLAYERS, data, 2)
    assert summary["mean_by_reward"] == {"number": pytest.approx((1 + 11 * 0.1) / 12), "length": 6.0}
    assert summary["mean"] == pytest.approx((1 + 11 * 0.1) / 12 + 3)
    table = RewardStore(tmp_path / "run" / "rewards").read().to_pylist()
    said = {"reward": 4.0, "rewards": [("number", 1.0), ("length", 6.0)], "over_next": None}
    assert table[1] == {"prompt_id": 0, "answer": 1, **said}
    assert (summary["right_from"], summary["pass_at"]) == (None, {})  # of rewards that are no shares of 1
    told = Scoring(reward, str(tmp_path / "run"), right_from=3.5).run(PLAYERS, data, 2)
    assert told["pass_at"] == {"1": pytest.approx(1 / 12), "2": pytest.approx(1 / 6)}
