"""Every row that is dropped, cut, double or strange is counted to the row: in the report, in its file and on screen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers import byte_tokenizer, write_rows
from jsonargparse import ArgumentParser

from spin_lightning import SyntheticDataModule, TransformersGenerator
from spin_lightning.data import formats, rows, sources
from spin_lightning.data.report import COUNTED
from spin_lightning.types import UserError


def write(path: Path, *rows: tuple[str, str] | bytes) -> str:
    """Lines of prompt and completion; bytes are written as they are."""
    lines = [
        row if isinstance(row, bytes) else json.dumps({"prompt": row[0], "completion": row[1]}).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines))
    return str(path)


def module(source: str | dict[str, float], **settings: Any) -> SyntheticDataModule:
    defaults = {"val_fraction": 0.0, "batch_size": 1, "generator": TransformersGenerator(max_new_tokens=8)}
    data = SyntheticDataModule(source, **{**defaults, **settings})
    data.tokenizer = byte_tokenizer()
    return data


def report_of(source: str | dict[str, float], **settings: Any) -> dict[str, Any]:
    data = module(source, **settings)
    data.setup("fit")
    return data.report


def counts(section: dict[str, Any]) -> dict[str, int]:
    return {name: value["count"] for name, value in section.items() if isinstance(value, dict) and value.get("count")}


#: Around each prompt the template writes <|im_start|>user\n and <|im_end|>\n<|im_start|>assistant\n: one token a
#: letter.
AROUND = 1 + 5 + 1 + 1 + 1 + 10
ROWS = [
    ("p1", "a"),  # line 1
    ("p2", "b"),
    ("p1", "a"),  # an exact duplicate
    ("p1", "c"),  # another answer to a known prompt
    b'\xff{"prompt": 1}',  # line 5: not UTF-8
    b"{oops",
    b"{oops",
    ("x" * 60, "a"),  # line 8: a prompt of 79 tokens
    ("p3", "exactly"),  # 7 and the terminator: just within the cap of 8
    ("p4", "too long"),  # line 10: 8 and the terminator
    ("<|im_end|>", "a"),
    ("p5", "<|endoftext|>"),  # line 12: control tokens, and 13 tokens as text
    ("p6", " "),  # a blank answer
]


def test_every_count_of_a_bad_file_is_exact(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", *ROWS)
    report = report_of(source, on_bad_row="drop", max_prompt_tokens=40)
    data, train = report["train_data"], report["train"]
    assert (data["source"], data["format"]) == (source, "prompt_completion")
    assert (data["rows_read"], data["rows_kept"], data["rows_dropped"]) == (13, 9, 4)
    assert counts(data["dropped"]) == {"not UTF-8": 1, "not JSON": 2, "blank answer": 1}
    assert counts(data) == {"exact_duplicates": 1, "repeated_prompts": 1}
    assert (train["rows"], train["prompts"]) == (9, 8)
    assert counts(train) == {"long_prompts": 1, "cut_answers": 2, "control_tokens": 2}
    assert train["long_prompts"]["first"] == [f"{source}, line 8: {60 + AROUND} tokens"]
    assert train["cut_answers"]["first"] == [f"{source}, line 10", f"{source}, line 12"]
    assert train["control_tokens"]["first"] == [f"{source}, line 11", f"{source}, line 12"]
    assert train["prompt_tokens"] == {"median": 2 + AROUND, "p90": 10 + AROUND, "most": 10 + AROUND}
    assert train["real_tokens"] == {"median": 2, "p90": 8, "most": 8}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("data: read 9 rows of ") and "4 of 13 rows are bad and were dropped" in printed[0]
    for words, count, line in (
        ("bad rows that were dropped, not UTF-8", 1, 5),
        ("bad rows that were dropped, not JSON", 2, 6),
        ("bad rows that were dropped, blank answer", 1, 13),
        (COUNTED["exact_duplicates"], 1, 3),
        (COUNTED["repeated_prompts"], 1, 4),
        (COUNTED["long_prompts"], 1, 8),
        (COUNTED["cut_answers"], 2, 10),
        (COUNTED["control_tokens"], 2, 11),
    ):
        assert [text for text in printed if text.startswith(f"note: {words}: {count}, the first {source}, line {line}")]
    assert len(printed) == 1 + 8  # and nothing is said of what is zero


def test_a_clean_file_has_nothing_but_zeros_and_no_notes(tmp_path, capsys):
    report = report_of(write_rows(tmp_path / "rows.jsonl", 6))
    assert not any(counts(report[part]) for part in ("train_data", "train", "held_out"))
    assert report["train_data"]["dropped"] == {} and report["val_data"] is None
    assert report["held_out"]["rows"] == 0 and report["held_out"]["prompt_tokens"] is None
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_rows_held_out_are_counted_apart_and_those_also_trained_on_are_named(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", *((f"p{n}", "a") for n in range(4)))
    val = write(tmp_path / "val.jsonl", ("p1", "b"), ("new", "b"), ("y" * 60, "b"), b"{oops")
    report = report_of(train, val_data=val, on_bad_row="drop", max_prompt_tokens=40)
    assert counts(report["val_data"]["dropped"]) == {"not JSON": 1}
    assert counts(report["held_out"]) == {"also_trained_on": 1, "long_prompts": 1}
    assert report["held_out"]["also_trained_on"]["first"] == [f"{val}, line 1"]
    assert (report["held_out"]["rows"], report["held_out"]["prompts"], report["train"]["prompts"]) == (3, 2, 4)
    assert f"{COUNTED['long_prompts']} (held-out rows): 1" in capsys.readouterr().out
    shares = report_of(train, val_fraction=0.5)
    assert (shares["train"]["rows"], shares["held_out"]["rows"], shares["train_data"]["rows_kept"]) == (2, 2, 4)


def test_the_rows_that_are_held_out_do_not_depend_on_what_is_counted(tmp_path):
    data = module(write_rows(tmp_path / "rows.jsonl", 12), val_fraction=0.25)
    data.setup("fit")
    chosen = sorted(Random("held-out/0").sample(range(12), 3))
    assert [prompt.row.prompt[0]["content"] for prompt in data.val_prompts] == [f"{a}+{a + 1}?" for a in chosen]


def test_the_report_is_written_whole_and_says_which_prompts_it_is_about(tmp_path):
    data = module(write(tmp_path / "rows.jsonl", *ROWS), on_bad_row="drop", max_prompt_tokens=40)
    data.setup("fit")
    data.write_report(tmp_path / "run")
    written = (tmp_path / "run" / "data_report.json").read_text(encoding="utf-8")
    assert json.loads(written) == data.report
    assert data.report["prompts_sha256"] == data.prompts_hash
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data_report.json"]


def test_without_drop_the_first_five_bad_rows_end_it_before_a_tokenizer_is_loaded(tmp_path):
    data = module(write(tmp_path / "rows.jsonl", ("p", "a"), *[b"{oops"] * 6))
    data.tokenizer = None  # asking for one would be another error
    with pytest.raises(
        UserError, match=r"6 of 7 rows of (.|\n)*line 6: not JSON(.|\n)*and 1 more(.|\n)*on_bad_row: drop"
    ):
        data.setup("fit")


def test_a_row_the_chat_template_refuses_is_named_by_its_line(tmp_path):
    data = module(write(tmp_path / "rows.jsonl", ("p", "a"), ("q", "a")))
    data.tokenizer = byte_tokenizer(
        chat_template="{% for m in messages %}{% if m['content'] == 'q' %}{{ raise_exception('no q') }}{% endif %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: the chat template refuses .*: no q"):
        data.setup("fit")


def test_the_docs_name_every_count_and_every_kind_of_bad_row():
    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    written = Path(formats.__file__).read_text() + Path(sources.__file__).read_text() + Path(rows.__file__).read_text()
    kinds = set(re.findall(r'BadRow\(\s*"([^"]+)"', written)) | {"missing", "wrong type"}
    assert len(kinds) > 18
    for name in {*COUNTED, "dropped_turns", "prompts_sha256", *kinds}:
        assert f"`{name}`" in docs, name


# --- fewer rows than a batch ------------------------------------------------------------------------------------------


def test_fewer_rows_than_a_batch_are_refused_with_what_became_of_the_others(tmp_path):
    source = write(tmp_path / "rows.jsonl", *((f"p{n}", "a") for n in range(8)), ("x" * 60, "a"), ("y" * 60, "a"))
    with pytest.raises(UserError) as caught:
        report_of(source, batch_size=8, max_prompt_tokens=40, val_fraction=0.1, seed=1)
    assert str(caught.value) == (
        "7 rows to train on are fewer than data.batch_size 8: of 10 rows 1 are held out and 2 have prompts that are "
        "too long. Set --data.batch_size 7 or less, or give more rows."
    )


def test_a_batch_of_pairs_counts_every_answer_of_a_prompt(tmp_path):
    source = write(tmp_path / "rows.jsonl", *((f"p{n}", "a") for n in range(4)))
    report_of(source, batch_size=4)
    report_of(source, batch_size=12, answers_per_prompt=3)
    with pytest.raises(UserError, match=r"4 rows to train on with 3 responses each are fewer than data.batch_size 13"):
        report_of(source, batch_size=13, answers_per_prompt=3)


def test_only_training_needs_a_whole_batch(tmp_path):
    two = write(tmp_path / "two.jsonl", ("p", "a"), ("q", "b"))
    module(two, batch_size=8, val_fraction=0.5).setup("validate")


# --- several sources --------------------------------------------------------------------------------------------------


def test_sources_are_mixed_by_their_weights_and_each_is_in_the_report(tmp_path, capsys):
    a, b = (write(tmp_path / f"{name}.jsonl", *((f"{name}{n}", "x") for n in range(8))) for name in "ab")
    data = module({a: 2.0, b: 0.5}, val_fraction=0.25)
    data.setup("fit")
    report = data.report
    asked, held_out = ([p.row.prompt[0]["content"] for p in prompts] for prompts in (data.prompts, data.val_prompts))
    assert len(held_out) == 3 and not set(asked) & set(held_out)  # of 12 different rows, and never a copy of them
    assert [asked.count(question) for question in dict.fromkeys(asked)] == [
        2 if question.startswith("a") else 1 for question in dict.fromkeys(asked)
    ]
    assert len(set(asked)) == 9 and report["held_out"]["also_trained_on"]["count"] == 0
    assert (report["train_data"]["rows_read"], report["train_data"]["rows_kept"]) == (16, 20)
    assert [(part["source"], part["weight"], part["rows_taken"]) for part in report["train_data"]["sources"]] == [
        (a, 2.0, 16),
        (b, 0.5, 4),
    ]
    assert json.loads(json.dumps(report)) == report
    printed = capsys.readouterr().out
    assert f"data: read 8 rows of {a} as" in printed and f"data: read 8 rows of {b} as" in printed


def test_one_source_of_weight_one_trains_on_the_same_prompts(tmp_path):
    source = write(tmp_path / "rows.jsonl", *((f"p{n}", "a") for n in range(12)))
    plain, mapped = module(source, val_fraction=0.25), module({source: 1.0}, val_fraction=0.25, val_data=None)
    plain.setup("fit")
    mapped.setup("fit")
    assert (plain.prompts_hash, plain.held_out_hash) == (mapped.prompts_hash, mapped.held_out_hash)


def test_held_out_data_may_be_several_sources_too(tmp_path):
    source = write(tmp_path / "rows.jsonl", *((f"p{n}", "a") for n in range(4)))
    val = write(tmp_path / "val.jsonl", *((f"v{n}", "a") for n in range(4)))
    assert report_of(source, val_data={val: 0.5})["held_out"]["prompts"] == 2


@pytest.mark.parametrize("text", ["{a.jsonl: 1.0, b.jsonl: 0.5}", '{"a.jsonl": 1, "b.jsonl": 0.5}'])
def test_sources_with_weights_are_read_from_the_command_line(text):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SyntheticDataModule, "data", skip={"generator"})
    given = parser.parse_args([f"--data.train_data={text}", "--data.val_data=v.jsonl"])
    assert given.data.train_data == {"a.jsonl": 1.0, "b.jsonl": 0.5} and given.data.val_data == "v.jsonl"


def test_keys_and_columns_without_effect_are_notes_of_their_own(tmp_path, capsys):
    turns = [{"role": "user", "content": "q", "name": "bob"}, {"role": "assistant", "content": "a", "loss": 1.5}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "context": "c"}))
    report = report_of(str(tmp_path / "rows.jsonl"))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    for words in ("column 'context' of ", "'name' inside turns has no effect: in 1 rows", "'loss' inside turns"):
        assert [note for note in notes if words in note]
    assert [entry["key"] for entry in report["train_data"]["unused_turn_keys"]] == ["name", "loss"]
    assert len(report["train_data"]["notes"]) == 1
