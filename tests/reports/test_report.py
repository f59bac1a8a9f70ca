"""A report says what a run's files say, whatever is in them and whatever is missing, and nothing in it can run."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from spin_lightning.cli.commands import main
from spin_lightning.reports.page import MOST_BYTES, render, write_report
from spin_lightning.reports.record import read_metrics, read_run
from spin_lightning.reports.responses import compare
from spin_lightning.types import UserError

HOSTILE = [
    "</div></main><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\u202egnp.exe\u2066 right to left",
    "a\x00b\x1b[2J\x07\x9b\ud800",
    "w" * 20_000,
    "**bold** [link](javascript:alert(1)) &lt;b&gt; {{ 7 * 7 }} {% raw %}",
    "line\r\n\nline\u2028line " + "\n" * 3000,
    "مرحبا 👩\u200d💻 ééé",
]
VOID = {"meta", "br", "hr", "rect", "circle", "path"}


class Page(HTMLParser):
    """A page as a browser would take it: its tags, which have to be closed in their order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], []):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page(folder: Path, **options: Any) -> Page:
    """The report of a folder, which must be whole and harmless."""
    text = render(folder, **options)
    text.encode()
    found = Page(text)
    assert len(text.encode()) < MOST_BYTES
    assert not {"script", "iframe", "img", "link", "object", "embed", "form", "base", "a"} & set(found.tags) - {"a"}
    names = {name for name, _ in found.attributes}
    assert not [name for name in names if name.startswith("on")] and not names & {"src", "style", "xlink:href"}
    assert all(str(value).startswith("#") for name, value in found.attributes if name == "href")
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", text)
    return found


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def write_table(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name / "shard-0.parquet")
    write(folder / f"{name}_manifest.json", {"complete": True, "binding": {}, "shards": [{"file": "shard-0.parquet"}]})


def write_metrics(folder: Path, rows: list[dict[str, Any]], version: int = 0) -> None:
    path = folder / "logs" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)


def make_game(
    folder: Path, iterations: int = 2, steps: int = 10, response: Callable[[int, int], str] | None = None
) -> Path:
    """The files that a game leaves, without playing it."""
    answer = response or (lambda iteration, prompt: f"The sum is {prompt + 1 - iteration}.")
    config = {"model": {"model_name_or_path": "org/base", "api_key": "abc"}, "self_play": {"iterations": iterations}}
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    settings = {"self_play.pairs": "real_generated", "data.prompts_sha256": "ab12" * 16}
    write(folder / "run.json", {"settings": settings, "changes": [], "versions": {"torch": "9.9.9"}})
    write(folder / "start.json", {"val/nll": 8.0})
    report = {
        "train": {"rows": 64, "prompts": 60, "long_prompts": {"count": 3, "first": ["rows.jsonl, line 7"]}},
        "train_data": {"description": "read 64 rows of rows.jsonl", "notes": []},
    }
    write(folder / "data_report.json", report)
    summaries = []
    for number in range(iterations):
        summary = {
            "iteration": number,
            "first_loss": math.log(2),
            "last_loss": 0.5,
            "updates": steps,
            "val_nll": 7.0 - number,
            "seconds": {"pairs": 60.0, "training": 90.0},
            "epoch_metrics": {"rewards/margins": 0.25, "rewards/accuracies": 0.75},
            "pairs": {"generated_clipped_share": 0.125, "real_mean_length": 5.0, "generated_mean_length": 6.0 + number},
        }
        summaries.append(summary)
        write(folder / f"iteration_{number}" / "summary.json", summary)
        rows = [
            {
                "iteration": number,
                "prompt_id": prompt,
                "answer": 0,
                "prompt": turns(answer(-1, prompt) if response else f"{prompt}+1?"),
                "chosen": turns("", f"The sum is {prompt + 1}.")[1:],
                "rejected": turns("", answer(number, prompt))[1:],
                "generated_finish_reason": "length" if prompt else "stop",
            }
            for prompt in range(10)
        ]
        write_table(folder / f"iteration_{number}", "pairs", rows)
    metrics = [
        {"step": step, "loss": 0.7 - 0.01 * (step % steps), "rewards/real": 0.1, "rewards/generated": -0.2, "lr": 1e-5}
        for step in range(iterations * steps)
    ]
    metrics += [{"step": steps * (number + 1) - 1, "val/nll": 7.0 - number} for number in range(iterations)]
    write_metrics(folder, metrics)
    write(folder / "health.json", {"remarks": [{"iteration": 1, "sentence": "held-out NLL went from 7 to 6"}]})
    write(folder / "game.json", {"ended_because": f"all {iterations} iterations were played", "iterations": summaries})
    return folder


def test_a_game_is_told_in_words_curves_and_tables(tmp_path):
    found = page(make_game(tmp_path / "mine"))
    assert "Self-play fine-tuning (SPIN) of org/base on 64 rows. It is over: all 2 iterations were played" in found.text
    assert "The held-out NLL fell from 8.000 to 6.000 nats a response, 25% better." in found.text
    assert "iteration 1: held-out NLL went from 7 to 6." in found.text
    for title in (
        "Loss",
        "Rewards",
        "Held-out NLL",
        "Response lengths",
        "Shares of generated responses",
        "Learning rate",
    ):
        assert title in found.texts, title
    assert "held-out NLL: 3 points, from 8 to 6" in found.text  # the start is there, though it was not logged
    assert "ln 2" in found.text and "64 rows, 60 prompts" in found.text
    assert "prompts longer than data.max_prompt_tokens; left out: 3, the first rows.jsonl, line 7" in found.text
    assert "9.9.9" in found.text and "ab12" * 16 in found.text
    assert "abc" not in found.texts and "***" in found.texts
    assert "Not in this report" not in found.text


def test_responses_stand_side_by_side_with_differences_marked(tmp_path):
    text = render(make_game(tmp_path / "mine"), samples=3)
    assert text.count('class="prompt"') == 3 and "3+1?" not in text
    assert "The sum is 1." in text  # iteration 0 is right: nothing is marked
    assert "The sum is <del>2</del><ins>1</ins>." in text and "The sum is <del>3</del><ins>2</ins>." in text
    assert text.count("cut at the length cap</div>") == 4


def test_words_are_compared_one_by_one_unless_all_is_new():
    assert compare("a b c", "a b c") == [("same", "a b c")]
    assert compare("a b c d", "a x y d") == [("same", "a "), ("missing", "b c"), ("added", "x y"), ("same", " d")]
    assert compare("one two three", "four five six") == [("new", "four five six")]
    assert compare("", "new") == [("added", "new")] and compare("old words", "") == [("missing", "old words")]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_text_of_others_is_shown_and_never_obeyed(tmp_path, number):
    text = HOSTILE[number]
    storable = text.encode("utf-8", "replace").decode()
    folder = make_game(tmp_path / "mine", response=lambda iteration, prompt: storable)
    for name in ("health.json", "data_report.json", "summary.json", "evaluation.json"):
        content = {
            "remarks": [{"iteration": 0, "sentence": text}],
            "train_data": {"description": text, "notes": [text]},
        }
        write(folder / name, {**content, "tasks": {text: {"metric": text, "value": 0.5, "stderr": 0.1, "shots": text}}})
    (folder / "config.yaml").write_text(yaml.safe_dump({"self_play": {storable[:50]: storable}}))
    write_metrics(folder, [{"step": step, "my/" + storable[:40]: step, "loss": 1.0} for step in range(3)])
    found = page(folder)
    if number == 0:
        assert "</div></main><script>alert(1)</script>" in found.text  # as text
    if number == 2:
        assert "\\u202egnp.exe\\u2066" in found.text
    if number == 4:
        assert "(20,000 characters)" in found.text
    if number == 7:
        assert "👩\u200d💻" in found.text


def test_no_file_of_a_run_is_needed_and_none_is_trusted(tmp_path):
    whole = make_game(tmp_path / "whole")
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(files) > 10
    for content in (
        None,
        b"",
        b"{",
        b"[1]",
        b'{"remarks": 3, "iterations": 7, "shards": "x", "pairs": []}',
        b"\xff\x00PAR1",
    ):
        for number, file in enumerate(files):
            folder = tmp_path / f"run_{number}"
            path = folder / file
            if not folder.exists():
                make_game(folder)
            kept = path.read_bytes()
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            assert "mine" not in page(folder).text
            path.write_bytes(kept)


def test_what_is_missing_is_said(tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / "config.yaml").write_text("self_play: {iterations: 3}\n")
    text = page(folder).text
    assert "It is not over: no update was made yet." in text
    assert "there are no logs/*/metrics.csv" in text and "there is no run.json" in text
    (folder / "run.json").write_text('{"settings": ')
    assert "run.json cannot be read" in page(folder).text
    make_game(tmp_path / "going")
    (tmp_path / "going" / "game.json").unlink()
    (tmp_path / "going" / "iteration_1" / "summary.json").unlink()
    text = page(tmp_path / "going").text
    assert "It is not over: in iteration 1 (1 of 2 iterations are over), after 20 updates." in text


def test_a_long_run_is_small_and_quick(tmp_path):
    folder = make_game(tmp_path / "long", iterations=2, steps=2, response=lambda iteration, prompt: "<&>'\x01" * 5000)
    write_metrics(folder, [{"step": step, "loss": math.sin(step), "rewards/real": step} for step in range(20_000)])
    assert len(render(folder, samples=8).encode()) < 500_000


def test_another_run_is_drawn_over_it_and_compared_in_words(tmp_path):
    mine, sft = make_game(tmp_path / "mine"), tmp_path / "sft"
    sft.mkdir()
    (sft / "config.yaml").write_text("model: {max_updates: 5, model_name_or_path: org/base}\nexport: {}\n")
    write(sft / "summary.json", {"updates": 20, "val_nll": 5.5})
    write_metrics(sft, [{"step": 0, "val/nll": 8.0, "loss": 3.0}, {"step": 19, "val/nll": 5.5, "loss": 1.0}])
    found = page(mine, against=[sft])
    assert "held-out NLL 6.000 here and 5.500 there, so sft is better" in found.text
    assert "mine: 3 points, from 8 to 6, 6 to 8; sft: 2 points, from 8 to 5.5" in found.text
    assert "sft: 2 points, from 3 to 1" not in found.text  # the loss is another one
    for folder, rows in ((mine, "aa"), (sft, "bb")):
        write(folder / "run.json", {"settings": {"data.held_out_sha256": rows}})
    assert "on other held-out rows than here: the two cannot be compared" in page(mine, against=[sft]).text


def test_runs_of_one_name_are_told_apart(tmp_path):
    mine, other = make_game(tmp_path / "a" / "spin"), make_game(tmp_path / "b" / "spin")
    text = page(mine, against=[other, other]).text
    assert f"{other}: 3 points, from 8 to 6" in text and "spin: 3 points, from 8 to 6" in text


def test_a_game_that_was_given_more_iterations_is_not_over(tmp_path):
    folder = make_game(tmp_path / "mine")
    assert "It is over" in page(folder).text and "It is over" not in page(folder, running=True).text
    (folder / "iteration_2").mkdir()
    assert "It is not over: in iteration 2 (2 of 2 iterations are over)" in page(folder).text
    write(
        folder / "game.json", {"ended_because": "equilibrium: 97% of the answers are identical", "iterations": [{}, {}]}
    )
    assert "It is over: equilibrium: 97% of the answers are identical" in page(folder).text


def test_resumes_log_over_what_they_repeat(tmp_path):
    write_metrics(tmp_path, [{"step": step, "loss": 1.0 + step, "lr": 1.0} for step in range(10)])
    write_metrics(tmp_path, [{"step": step, "loss": 2.0} for step in range(6, 8)], version=1)
    write_metrics(tmp_path, [{"step": 8, "loss": "nan"}, {"step": "x", "loss": 9}], version=10)
    found = read_metrics(tmp_path / "logs")
    assert found["loss"][:8] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 2), (7, 2)]
    assert len(found["loss"]) == 9 and math.isnan(found["loss"][8][1]) and found["lr"][-1] == (5, 1.0)


def test_retention_and_evaluations_are_told(tmp_path):
    folder = make_game(tmp_path / "mine")
    summary = json.loads((folder / "iteration_1" / "summary.json").read_text())
    summary["retention"] = {"other_nll": 3.5, "start": {"other_nll": 3.0}, "kl_to_start": 0.25}
    write(folder / "iteration_1" / "summary.json", summary)
    task = {"metric": "acc", "value": 0.625, "stderr": 0.05, "shots": 25}
    write(folder / "iteration_1" / "evaluation.json", {"tasks": {"arc": task}, "model_sha256": "cd34"})
    text = page(folder).text
    assert "The NLL of rows of other tasks rose from 3.000 to 3.500 nats a response: it forgets some." in text
    assert "The policy is 0.25 nats a token from the model it started from" in text
    assert "arc (acc, 25 shots)" in text and "0.625 ± 0.05" in text and "cd34" in text


def test_a_folder_of_runs_has_a_section_for_each(tmp_path):
    make_game(tmp_path / "line" / "spin")
    sft = tmp_path / "line" / "a_first"
    sft.mkdir()
    (sft / "config.yaml").write_text("model: {max_updates: 5}\nexport: {}\n")
    stages = {"spin": {"stage": "fit", "updates": 20, "nll": [8.0, 6.0], "seconds": 3.0}, "a_first": {"stage": "sft"}}
    write(tmp_path / "line" / "chain.json", {"stages": stages})
    found = page(tmp_path / "line")
    assert found.text.index("spin : self-play") < found.text.index("a_first : supervised")  # in the chain's order
    assert "8 → 6" in found.text and found.text.count("not over") >= 2
    control = tmp_path / "line" / "control_0"
    control.mkdir()
    (control / "config.yaml").write_text("model: {max_updates: 5}\nexport: {}\n")
    write(control / "summary.json", {"updates": 20, "val_nll": 5.0})
    results = {"SPIN iteration 1": {"nll": 6.0, "exact": 0.5}, "control 1": {"nll": 5.0, "exact": 0.25}}
    write(tmp_path / "line" / "results.json", results)
    text = page(tmp_path / "line").text
    assert "continued SFT has the lower held-out NLL: 5.000 against 6.000 of self-play" in text
    assert "held-out NLL 6.000 here and 5.000 there, so continued SFT is better" in text
    write(tmp_path / "line" / "comparison.json", {"verdict": {"sentence": "Too close to call.", "judgements": []}})
    assert "Too close to call." in page(tmp_path / "line").text


def test_the_command_writes_a_file_and_says_where(tmp_path, capsys, refusal):
    folder = make_game(tmp_path / "mine")
    main(["report", str(folder)])
    assert f"the report is in {folder}/report.html" in capsys.readouterr().out
    main(["report", str(folder), "--output", str(tmp_path / "deep" / "x.html"), "--samples", "0"])
    assert 'class="prompt"' not in (tmp_path / "deep" / "x.html").read_text()
    assert "there is no folder" in refusal(["report", str(tmp_path / "nothing")])
    (tmp_path / "empty").mkdir()
    assert "holds nothing that tells what was trained" in refusal(["report", str(tmp_path / "empty")])
    for other in (tmp_path, "/dev/stdout", folder / "config.yaml"):
        expected = f"--output must be a file whose name ends with .html, got {str(other)!r}."
        assert expected in refusal(["report", str(folder), "--output", str(other)]).replace("\n", " ")
    assert "--samples must be 0 or more, got -1" in refusal(["report", str(folder), "--samples", "-1"])
    assert "has no '--outptu'. Did you mean --output?" in refusal(["report", str(folder), "--outptu", "x"])
    assert "argument --samples: invalid int value: 'many'" in refusal(["report", str(folder), "--samples", "many"])
    with pytest.raises(UserError, match="there is no folder"):
        write_report(folder, against=[tmp_path / "nothing"])


def test_the_kind_of_a_run_is_found_without_its_settings(tmp_path):
    for kind, summary in {
        "score": {"pass_at": {}, "mean": 0.5, "responses": 4, "prompts": 2, "model": "m"},
        "reward": {"val_longer_wins": 0.25, "val_accuracy": 0.9},
        "sft": {"updates": 3},
    }.items():
        write(tmp_path / kind / "summary.json", summary)
        assert read_run(tmp_path / kind).kind == kind
        page(tmp_path / kind)
    assert "4 responses of m to 2 prompts: the mean reward is 0.5." in page(tmp_path / "score").text
    assert "has the higher score in 90%; taking the longer one would be right in 75%" in page(tmp_path / "reward").text


def test_responses_of_other_stages_stand_side_by_side_too(tmp_path):
    dpo = tmp_path / "dpo"
    dpo.mkdir()
    (dpo / "config.yaml").write_text("export: {shard_size: 5}\n")
    pair = {"iteration": None, "prompt": turns("2+3?"), "chosen": turns("", "It is 5.")[1:]}
    write_table(dpo, "pairs", [{**pair, "rejected": turns("", "It is 6.")[1:]}])
    write_metrics(dpo, [{"step": step, "rewards/real": 0.1, "rewards/generated": 0.0} for step in range(2)])
    text = render(dpo)
    assert "It is <del>5</del><ins>6</ins>." in text and "gained in log-probability over the reference" in text
    assert 'class="label">chosen<' in text and "opponent" not in text
    ppo = tmp_path / "ppo"
    for number, words in ((0, "It is 4."), (2, "It is 5.")):
        row = {"iteration": number, "answer": 0, "prompt": turns("2+3?"), "response": turns("", words)[1:]}
        write_table(ppo / f"iteration_{number}", "held_out", [{**row, "finish_reason": "stop", "reward": number / 2}])
        write(ppo / f"iteration_{number}" / "summary.json", {"updates": 1, "pairs": {"val/reward": number / 2}})
    write(ppo / "rollouts.json", {"ended_because": "all 3 iterations were played", "held_out": {"val/reward": 1.0}})
    text = render(ppo)
    assert "It is <del>4</del><ins>5</ins>." in text and "iteration 2 · reward 1" in text
    assert "The reward of responses to held-out prompts rose from 0.000 to 1.000." in text
    score = tmp_path / "score"
    write(score / "summary.json", {"pass_at": {"1": 0.5}, "mean": 0.5, "responses": 2, "prompts": 1, "model": "m"})
    key = {"prompt_id": 0, "prompt": turns("2+3?"), "real": "It is 5."}
    responses = [{**key, "answer": place, "response": f"It is {4 + place}."} for place in range(2)]
    write_table(score, "responses", responses)
    write_table(score, "rewards", [{"prompt_id": 0, "answer": place, "reward": float(place)} for place in range(2)])
    text = render(score)
    assert text.index("response · reward 1") < text.index("It is <del>5</del><ins>4</ins>.")
    assert '<td dir="auto">pass@1</td><td dir="auto">0.5</td>' in text


def test_a_token_game_is_told_by_token_and_a_distance_too(tmp_path):
    folder = make_game(tmp_path / "mine")
    for number in range(2):
        (folder / f"iteration_{number}" / "pairs_manifest.json").unlink()
        binding = {"opponent_sha256": f"{number}f" * 32}
        write(folder / f"iteration_{number}" / "laws_manifest.json", {"complete": True, "binding": binding})
    last = folder / "iteration_1" / "summary.json"
    retention = {"kl_to_start": 0.0268, "other_nll": 9.0, "start": {"other_nll": 8.0}}
    write(last, {**json.loads(last.read_text()), "retention": retention})
    found = page(folder)
    assert "as a mean over real tokens" in found.text and "to tell real from generated" not in found.text
    assert "Rewards reward a token over updates" in found.text and "1f" * 32 in found.text
    assert "The policy is 0.0268 nats a token from the model it started from" in found.text
    assert "rose from 8.000 to 9.000 nats a response: it forgets some" in found.text


def test_a_name_that_is_no_text_is_shown_in_escapes(tmp_path):
    folder = make_game(tmp_path / "mine").rename(tmp_path / os.fsdecode(b"run_\xff"))
    changes = [{"setting": "a\ud800<b>", "from": 1, "to": 2}]
    write(folder / "run.json", {**json.loads((folder / "run.json").read_text()), "changes": changes})
    text = write_report(folder).read_text(encoding="utf-8")
    assert "run_\\udcff" in text and "changed: a\\ud800&lt;b&gt;" in text


def test_many_runs_with_many_metrics_of_their_own_are_cut_to_what_a_page_may_weigh(tmp_path, monkeypatch):
    for number in range(3):
        folder = make_game(tmp_path / f"game_{number}", iterations=1)
        names = [f"own_{name}" for name in range(12)] + ["loss", "lr"]
        write_metrics(folder, [{"step": x, **dict.fromkeys(names, math.sin(x * 1.7))} for x in range(100)])
    assert len(render(tmp_path).encode()) > 150_000
    monkeypatch.setattr("spin_lightning.reports.page.MOST_BYTES", 150_000)
    text = write_report(tmp_path).read_text()
    assert len(text.encode()) <= 150_000 and text.count("<title>Learning rate</title>") == 3


def test_no_responses_of_several_runs_are_shown_where_none_are_asked_for(tmp_path):
    for number in range(3):
        make_game(tmp_path / f"game_{number}")
    assert 'class="prompt"' in render(tmp_path) and 'class="prompt"' not in render(tmp_path, samples=0)


def test_what_has_not_moved_is_not_told_as_a_gain_or_a_loss(tmp_path):
    folder = make_game(tmp_path / "mine", iterations=1)
    summary = folder / "iteration_0" / "summary.json"
    retention = {"other_nll": 9.00001, "start": {"other_nll": 9.0}}
    write(summary, {**json.loads(summary.read_text()), "val_nll": 8.00001, "retention": retention})
    text = page(folder).text
    assert "The held-out NLL stayed at 8.000 nats a response." in text
    assert "stayed at 9.000 nats a response: nothing is forgotten there." in text
    summary.unlink()
    (folder / "game.json").unlink()
    write_metrics(folder, [{"step": 0, "loss": 0.7}, {"step": 1, "loss": 0.6}])  # killed before anything was measured
    assert "held-out NLL at the start 8 updates 2" in page(folder).text
