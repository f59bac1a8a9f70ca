"""Every kind of source, every column layout, and every message about them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from time import process_time

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from spin_lightning.data.formats import FORMATS, MAX_ROW_CHARACTERS, prompt_key
from spin_lightning.data.rows import load_rows
from spin_lightning.types import Row, UserError


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def asked(question: str, real: str) -> Row:
    return Row(prompt=(turn("user", question),), real=real)  # type: ignore[arg-type]


RECORDS = [{"prompt": "1 + 1?", "completion": "2"}, {"prompt": "Grüße?", "completion": "Hallo,\n„Welt“ "}]
ROWS = [asked("1 + 1?", "2"), asked("Grüße?", "Hallo,\n„Welt“ ")]


def write_jsonl(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, records: list[dict]) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


def read_one(tmp_path: Path, record: dict, **settings) -> Row:
    [row] = load_rows(write_jsonl(tmp_path / "one.jsonl", record), **settings).rows
    return row


def error_of(source: object, **settings) -> str:
    with pytest.raises(UserError) as caught:
        load_rows(str(source), **settings)
    return str(caught.value)


# --- Sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".JSONL"])
def test_every_file_kind_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"train{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(RECORDS, indent=2))
    elif suffix == ".csv":
        path.write_text('prompt,completion\n1 + 1?,2\nGrüße?,"Hallo,\n„Welt“ "\n', encoding="utf-8", newline="")
    elif suffix == ".parquet":
        write_parquet(path, RECORDS)
    else:
        write_jsonl(path, *RECORDS)
    loaded = load_rows(str(path))
    assert loaded.rows == ROWS
    assert loaded.format == "prompt_completion"
    assert loaded.description == f"read 2 rows of {path} as 'prompt_completion': columns prompt, completion"


def test_json_may_hold_lines_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "train.json"
    path.write_text("\n" + "\n\n".join(map(json.dumps, RECORDS)) + "\n\n")
    assert load_rows(str(path)).rows == ROWS


def test_jsonl_is_split_at_newlines_only(tmp_path):
    record = {"prompt": "line\u2028separator?", "completion": "next\x85line"}
    assert read_one(tmp_path, record) == asked("line\u2028separator?", "next\x85line")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"prompt": "p", "completion": "c"}]'),
        ("a.jsonl", '{"prompt": "p", "completion": "c"}'),
        ("a.csv", "prompt,completion\r\np,c\r\n"),
    ],
)
def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_rows(str(tmp_path / name)).rows == [asked("p", "c")]


def test_csv_cells_stay_text_and_may_be_long(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text(f"prompt,completion\n7,{'x' * 200_000}\n")
    assert load_rows(str(path)).rows == [asked("7", "x" * 200_000)]


def test_parquet_holds_message_lists(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", [{"messages": [turn("user", "hi"), turn("assistant", "hello")]}])
    assert load_rows(source).rows == [asked("hi", "hello")]


def test_saved_data_set_and_data_set_dict(tmp_path):
    train, test = datasets.Dataset.from_list(RECORDS), datasets.Dataset.from_list(RECORDS[:1])
    train.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    assert load_rows(str(tmp_path / "plain")).rows == ROWS
    assert load_rows(str(tmp_path / "both")).rows == ROWS
    assert load_rows(str(tmp_path / "both"), split="test").rows == ROWS[:1]
    assert "there are no splits here" in load_rows(str(tmp_path / "plain"), split="test").description
    message = error_of(tmp_path / "both", split="validation")
    assert "has no split 'validation', it has ['test', 'train']. Set data.split" in message


def test_saved_data_set_holds_message_lists_and_counts_rows_from_one(tmp_path):
    good, bad = [turn("user", "hi"), turn("assistant", "hello")], [turn("user", "hi")]
    datasets.Dataset.from_list([{"messages": good}] * 2).save_to_disk(str(tmp_path / "good"))
    datasets.Dataset.from_list([{"messages": good}, {"messages": bad}]).save_to_disk(str(tmp_path / "bad"))
    assert load_rows(str(tmp_path / "good")).rows == [asked("hi", "hello")] * 2
    assert f"{tmp_path / 'bad'}, row 2: there is no assistant turn, got roles ['user']" in error_of(tmp_path / "bad")


def test_a_folder_gives_only_the_files_of_the_split(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", {"prompt": "secret", "completion": "secret"})
    write_parquet(tmp_path / "train-00001-of-00002.parquet", RECORDS[1:])
    write_parquet(tmp_path / "train-00000-of-00002.parquet", RECORDS[:1])
    write_parquet(tmp_path / "train_gen-00000.parquet", [{"prompt": "other", "completion": "other"}])
    (tmp_path / "README.md").write_text("not data")
    assert load_rows(str(tmp_path)).rows == ROWS
    assert load_rows(str(tmp_path), split="test").rows == [asked("secret", "secret")]
    message = error_of(tmp_path, split="dev")
    assert "must hold files of split 'dev', as dev.jsonl" in message
    assert "got ['test.jsonl', 'train-00000-of-00002.parquet'" in message and "README" not in message


def test_a_glob_reads_its_files_in_order_of_name(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", RECORDS[1])
    write_jsonl(tmp_path / "a.jsonl", RECORDS[0])
    assert load_rows(str(tmp_path / "*.jsonl")).rows == ROWS
    write_jsonl(tmp_path / "c.jsonl", {"prompt": "p", "completion": ""})
    assert f"{tmp_path / 'c.jsonl'}, line 1: the real answer is blank" in error_of(tmp_path / "?.jsonl")
    assert "does not exist" in error_of(tmp_path / "*.csv")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "train.jsonl", *RECORDS)
    assert load_rows("~/train.jsonl").rows == ROWS


def test_hub_name_configuration_split_and_revision_are_passed_on(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "1 + 1?", "answer": "2"}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = {"prompt": "question", "completion": "answer"}
    loaded = load_rows("openai/gsm8k:main", split="test", revision="v1", columns=columns, max_rows=2)
    assert loaded.rows == [asked("1 + 1?", "2")] * 2
    assert "stopped at max_rows=2" in loaded.description
    load_rows("some/name", columns=columns)
    assert calls == [
        (("openai/gsm8k", "main"), {"split": "test", "revision": "v1"}),
        (("some/name", None), {"split": "train", "revision": None}),
    ]


def test_hub_failure_says_what_was_tried_and_how_to_give_a_file(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error_of("no-such-org/no-such-set", split="train_sft")
    assert "no local file or folder is called 'no-such-org/no-such-set'" in message
    assert "tried load_dataset('no-such-org/no-such-set', None, split='train_sft', revision=None)" in message
    assert "got ConnectionError: no route to the hub" in message
    assert "Check the network, the name (name:config" in message and ".jsonl" in message and "save_to_disk" in message


def test_missing_file_names_its_neighbours_and_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    write_jsonl(tmp_path / "train.jsonl", *RECORDS)
    message = error_of(tmp_path / "tran.jsonl")
    assert f"{tmp_path / 'tran.jsonl'} does not exist" in message
    assert "did you mean 'train.jsonl'?" in message
    assert f"there is no folder {tmp_path / 'nowhere'}. Correct" in error_of(tmp_path / "nowhere" / "a.jsonl")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} has no files" in error_of(tmp_path / "empty" / "a.jsonl")
    assert "does not exist" in error_of("train_file.csv")
    assert "does not exist" in error_of("./folder")


def test_settings_without_meaning_for_a_file_are_named(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", *RECORDS)
    description = load_rows(source, split="test", revision="main").description
    assert "revision 'main' is ignored, it is for the hub" in description
    assert "split 'test' is ignored, there are no splits here" in description


def test_unreadable_files_are_named_with_the_place(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    assert (
        "must end in one of .json, .jsonl, .ndjson, .csv, .tsv, .parquet (all but Parquet also with .gz or .zst behind)"
        in error_of(tmp_path / "a.txt")
    )
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"prompt": "\xff"}')  # 9 bytes, then 12 before the bad one
    message = error_of(tmp_path / "a.jsonl", columns={"prompt": "a", "completion": "a"})
    assert f"{tmp_path / 'a.jsonl'}, line 2: must be UTF-8 text, got byte 0xff at byte offset 21\n" in message
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbfprompt\n\xe9")
    message = error_of(tmp_path / "b.csv", on_bad_row="drop")  # where the file goes on behind that byte is unknown
    assert f"{tmp_path / 'b.csv'} must be UTF-8 text, got byte 0xe9 at byte offset 10. Save it as UTF-8." in message
    (tmp_path / "a.json").write_text('[\n{"prompt": "p"},\n{"prompt": oops}]')
    assert f"{tmp_path / 'a.json'}, line 3 column 12: not JSON" in error_of(tmp_path / "a.json")
    (tmp_path / "a.csv").write_text('prompt,completion\np,c\np,"never closed\n')
    assert "the record after line 2: not CSV (unexpected end of data)" in error_of(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text("[" * 100_000)
    assert "a.json: not JSON that can be read (maximum recursion depth" in error_of(tmp_path / "a.json")
    (tmp_path / "a.parquet").write_text("PAR1 it is not")
    assert "must be a parquet file" in error_of(tmp_path / "a.parquet")
    not_utf8 = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"p", b"\xe9"]).buffers())
    parquet.write_table(pyarrow.table({"prompt": not_utf8, "completion": not_utf8}), tmp_path / "b.parquet")
    assert "must be a parquet file of UTF-8 text" in error_of(tmp_path / "b.parquet")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "prompt,completion\n")])
def test_an_empty_file_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert "must hold at least one row, got none" in error_of(tmp_path / name)


def test_max_rows_stops_early_and_must_be_positive(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", *RECORDS, "not an object")
    assert load_rows(source, max_rows=2).rows == ROWS
    assert "data.max_rows must be at least 1" in error_of(source, max_rows=0)


def packed(data: bytes, suffix: str) -> bytes:
    return (
        gzip.compress(data, mtime=0) if suffix.endswith(".gz") else pyarrow.Codec("zstd").compress(data, asbytes=True)
    )


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".json", ".jsonl", ".ndjson", ".csv", ".tsv"])
def test_packed_files_are_read_as_they_are(tmp_path, kind, packing):
    text = "\n".join(map(json.dumps, RECORDS))
    if kind == ".json":
        text = json.dumps(RECORDS)
    elif kind in (".csv", ".tsv"):
        cells = [["prompt", "completion"], *([r["prompt"], '"' + r["completion"] + '"'] for r in RECORDS)]
        text = "\n".join(("," if kind == ".csv" else "\t").join(row) for row in cells)
    (tmp_path / f"a{kind}{packing}").write_bytes(packed(text.encode(), packing))
    assert load_rows(str(tmp_path / f"a{kind}{packing}")).rows == ROWS


def test_packed_files_may_have_parts_and_must_be_whole(tmp_path):
    line = json.dumps(RECORDS[0]).encode() + b"\n"
    for packing in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{packing}"
        path.write_bytes(packed(line, packing) + packed(line, packing))
        assert load_rows(str(path)).rows == ROWS[:1] * 2
        path.write_bytes(packed(line * 9, packing)[:-4])
        assert f"{path} cannot be read" in error_of(path) and "Is the download whole?" in error_of(path)
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    assert "must end in one of" in error_of(tmp_path / "a.parquet.gz")


@pytest.mark.parametrize(
    ("suffix", "cell", "said"),
    [
        (".csv", ";", "separated by a semicolon"),
        (".csv", "\t", "separated by a tab"),
        (".csv", "|", "separated by a bar"),
        (".tsv", ",", "separated by a comma"),
        (".tsv", "\t", ""),
        (".csv", ",", ""),
    ],
)
def test_what_separates_cells_is_seen_in_the_header_and_said(tmp_path, suffix, cell, said):
    path = tmp_path / f"a{suffix}"
    for header in (f"prompt{cell}completion", f'\n"prompt"{cell}"completion"'):
        path.write_text(f'{header}\n"p {cell} p"{cell}c\n')
        loaded = load_rows(str(path))
        assert loaded.rows == [asked(f"p {cell} p", "c")]
        assert said in loaded.description and (said != "") == ("separated" in loaded.description)


def test_columns_of_one_name_are_refused_by_that_name(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,completion\np,c,d\n")
    message = error_of(tmp_path / "a.csv", on_bad_row="drop")
    assert "'completion' stands more than once" in message and "Rename or remove one" in message
    (tmp_path / "b.csv").write_text(",prompt,completion,,\n0,p,c,,\n1,q,d,,,\n")  # an index, and a spreadsheet's rest
    assert load_rows(str(tmp_path / "b.csv")).rows == [asked("p", "c"), asked("q", "d")]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_document_may_be_a_list_or_hold_one_whatever_its_name(tmp_path, suffix, indent):
    path = tmp_path / f"a{suffix}"
    path.write_text(json.dumps(RECORDS, indent=indent))
    assert load_rows(str(path)).rows == ROWS
    path.write_text(json.dumps({"data": RECORDS}, indent=indent))
    loaded = load_rows(str(path))
    assert loaded.rows == ROWS and loaded.places == [f"{path}, row 1", f"{path}, row 2"]
    assert "its rows are the list under 'data'" in loaded.description
    path.write_text("\n".join(json.dumps(record, indent=indent) for record in RECORDS))
    loaded = load_rows(str(path))
    assert loaded.rows == ROWS and loaded.places == [f"{path}, line 1", f"{path}, line {5 if indent else 2}"]
    path.write_text(json.dumps({"id": 1, "messages": CHAT, "tools": [TOOL]}, indent=indent))
    assert [row.real for row in load_rows(str(path)).rows] == ["d"]


def test_a_json_document_with_more_in_it_is_refused_once_and_read_by_its_key(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1", "train": RECORDS, "test": RECORDS[:1]}, indent=2))
    message = error_of(path)
    assert "is one JSON object with the keys 'version', 'train', 'test'; expected a list of objects" in message
    assert message.endswith(f"--data.train_data '{path}:train' or '{path}:test'.") and "line" not in message[:60]
    assert load_rows(f"{path}:train").rows == ROWS
    assert "with a list under 'trian', got an object with" in error_of(f"{path}:trian")
    write_jsonl(path, *RECORDS)
    assert "with a list under 'train', got 2 values" in error_of(f"{path}:train")
    for by_column in ({"prompt": ["a"], "completion": ["b"]}, {"prompt": {"0": "a"}, "completion": {"0": "b"}}):
        path.write_text(json.dumps(by_column))
        assert "orient='records', lines=True" in error_of(path)


def test_a_mistake_in_an_indented_document_is_one_message_with_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORDS[0], indent=2) + '\n{\n  "prompt": oops\n}')
    assert f"{path}, line 6 column 13: not JSON" in error_of(path, on_bad_row="drop")
    path.write_bytes(json.dumps(RECORDS[0]).encode("utf-16"))
    assert f"{path} must hold what its name says, got UTF-16 text. Save it as UTF-8." in error_of(path)


@pytest.mark.parametrize(
    ("data", "cure"),
    [
        (packed(b"{}", ".gz"), "Let its name end in .gz"),
        (packed(b"{}", ".zst"), "Let its name end in .zst"),
        (b"PAR1...", "Let its name end in .parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Run: git lfs pull"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_once(tmp_path, data, cure):
    (tmp_path / "a.jsonl").write_bytes(data)
    assert cure in error_of(tmp_path / "a.jsonl") and "rows of" not in error_of(tmp_path / "a.jsonl")


def test_a_folder_of_nameless_parts_is_read_whole_and_said(tmp_path):
    write_jsonl(tmp_path / "part-00001.jsonl", RECORDS[1])
    write_jsonl(tmp_path / "part-00000.jsonl", RECORDS[0])
    loaded = load_rows(str(tmp_path))
    assert loaded.rows == ROWS
    assert (
        "no file in it is named after a split: read all 2, part-00000.jsonl to part-00001.jsonl" in loaded.description
    )
    assert "must hold files of split 'dev'" in error_of(tmp_path, split="dev")
    write_jsonl(tmp_path / "my_test.jsonl", RECORDS[0])  # now a wrong guess would train on it
    assert "must hold files of split 'train'" in error_of(tmp_path)
    write_jsonl(tmp_path / "my_train.jsonl", RECORDS[0])
    assert f"--data.train_data '{tmp_path / 'my_train.jsonl'}'" in error_of(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert (
        f"no data. Give rows; those that a game made of its prompts are written by: spin-lightning pairs {tmp_path}"
        in (error_of(tmp_path))
    )


def test_many_rows_take_little_time(tmp_path):
    source = write_jsonl(
        tmp_path / "a.jsonl", *({"messages": [turn("user", f"{n}?"), turn("assistant", "a")]} for n in range(20_000))
    )
    start = process_time()
    assert len(load_rows(source).rows) == 20_000
    assert process_time() - start < 1.5  # a quarter of a second on a slow core


# --- Formats --------------------------------------------------------------------------------------------------------

CHAT = [
    turn("system", "be brief"),
    turn("user", "a"),
    turn("assistant", "b"),
    turn("user", "c"),
    turn("assistant", "d"),
]
CHAT_ROW = Row(prompt=tuple(CHAT[:4]), real="d")  # type: ignore[arg-type]
FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
TOOL = {"type": "function", "function": FUNCTION}
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("messages", {"messages": CHAT}, CHAT_ROW),
        ("messages", {"messages": CHAT, "prompt": "a", "prompt_id": "x"}, CHAT_ROW),  # UltraChat's columns
        ("messages", {"messages": [*CHAT, turn("user", "thanks")]}, CHAT_ROW),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, asked("a", "b")),
        ("prompt_completion", {"prompt": CHAT[:4], "completion": CHAT[4:]}, CHAT_ROW),
        ("prompt_completion", {"prompt": CHAT[:4], "completion": "d"}, CHAT_ROW),
        ("prompt_completion", {"prompt": CHAT[:2], "completion": CHAT[2:]}, CHAT_ROW),
        ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"}, asked("Add.\n1, 2", "3")),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Ho"}, asked("Hi", "Ho")),
        ("alpaca", {"instruction": "Hi", "output": "Ho"}, asked("Hi", "Ho")),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "system": "be brief"},
            Row((turn("system", "be brief"), turn("user", "a")), "b"),
        ),
        ("sharegpt", {"conversations": SHAREGPT}, asked("a", "b")),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "user", "value": "u"},
                    {"from": "assistant", "value": "x"},
                    {"from": "observation", "value": "o"},
                    {"from": "gpt", "value": "y"},
                ]
            },
            Row((turn("system", "s"), turn("user", "u"), turn("assistant", "x"), turn("tool", "o")), "y"),
        ),
        (
            "sharegpt",
            {"conversations": SHAREGPT, "system": "be brief"},
            Row((turn("system", "be brief"), turn("user", "a")), "b"),
        ),
        ("real_generated", {"real": CHAT, "generated": [turn("user", "a"), turn("assistant", "bad")]}, CHAT_ROW),
        ("real_generated", {"prompt": "a", "real": "b", "generated": "bad"}, asked("a", "b")),
        ("chosen_rejected", {"prompt": "a", "chosen": "b", "rejected": "bad"}, asked("a", "b")),
        ("chosen_rejected", {"prompt": CHAT[:4], "chosen": CHAT[4:], "rejected": [turn("assistant", "x")]}, CHAT_ROW),
        ("chosen_rejected", {"chosen": CHAT, "rejected": [*CHAT[:4], turn("assistant", "bad")]}, CHAT_ROW),
        ("chosen_rejected", {"prompt": CHAT[:4], "chosen": CHAT, "rejected": []}, CHAT_ROW),
        ("chosen_rejected", {"prompt": "a", "chosen": [turn("user", "a"), turn("assistant", "b")]}, asked("a", "b")),
    ],
)
def test_each_layout_is_detected_and_read(tmp_path, name, record, expected):
    loaded = load_rows(write_jsonl(tmp_path / "a.jsonl", record))
    assert (loaded.format, loaded.rows) == (name, [expected])
    assert read_one(tmp_path, record, format=name) == expected


def test_description_names_what_is_not_used(tmp_path):
    pair = {"real": CHAT, "generated": CHAT, "score": 1}
    source = write_jsonl(tmp_path / "a.jsonl", pair, {**pair, "real": [*CHAT, turn("user", "thanks")]})
    assert load_rows(source).description == (
        f"read 2 rows of {source} as 'real_generated': column real; column 'generated' is ignored: the opponent "
        "answers afresh; not used: 'score'; 1 had turns after the real answer, which were dropped"
    )


def test_two_fitting_formats_are_refused_until_one_is_named(tmp_path):
    record = {"messages": CHAT, "chosen": [turn("user", "q"), turn("assistant", "r")], "rejected": []}
    message = error_of(write_jsonl(tmp_path / "a.jsonl", record))
    assert "fit more than one format: messages, chosen_rejected" in message and "Set data.format" in message
    assert read_one(tmp_path, record, format="messages") == CHAT_ROW
    assert read_one(tmp_path, record, format="chosen_rejected") == asked("q", "r")
    assert read_one(tmp_path, record, columns={"messages": "messages"}) == CHAT_ROW


def test_unknown_columns_list_every_format_and_the_remedy(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", {"text_in": "q", "text_out": "a"})
    message = error_of(source)
    assert f"the columns of {source} do not fit: it has 'text_in', 'text_out', expected for" in message
    for name, layout in FORMATS.items():
        assert f"\n  {name}: {', '.join(layout.required)}" in message
    assert message.endswith("which: --data.columns '{prompt: text_in, completion: text_out}'.")
    message = error_of(source, format="alpaca")
    assert "\n  alpaca: instruction, output\n" in message and "sharegpt" not in message
    assert "--data.columns '{instruction: text_in, output: text_out}'" in message
    message = error_of(source, format="sharegtp")
    assert "data.format must be 'auto' or one of" in message
    assert "did you mean 'sharegpt'?), got 'sharegtp'" in message


def test_column_map_renames_the_users_columns(tmp_path):
    record = {"question": "q", "answer": "a", "prompt": "not this one", "bad": "x"}
    columns = {"prompt": "question", "chosen": "answer", "rejected": "bad"}
    loaded = load_rows(write_jsonl(tmp_path / "a.jsonl", record), columns=columns)
    assert loaded.rows == [asked("q", "a")]
    assert "columns chosen (yours: answer), prompt (yours: question)" in loaded.description
    assert "column 'bad' is ignored" in loaded.description and "not used: 'prompt'" in loaded.description
    chat = {"conversations": CHAT}  # ShareGPT's column name around role/content turns
    assert read_one(tmp_path, chat, columns={"messages": "conversations"}, format="messages") == CHAT_ROW


def test_wrong_column_maps_name_near_matches(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    message = error_of(source, columns={"prompt": "qestion", "completion": "answer"})
    assert f"data.columns maps 'prompt' to 'qestion', but {source} has the columns 'answer', 'question'" in message
    assert "did you mean 'question'?" in message
    assert "did you mean 'completion'?" in error_of(source, columns={"completon": "answer"})
    message = error_of(source, columns={"messages": "question"}, format="alpaca")
    assert (
        "data.columns maps 'messages', expected one of 'history', 'input', 'instruction', 'label', 'output'" in message
    )


def test_alpaca_columns_with_a_map_for_another_format_do_not_fall_back(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", {"instruction": "q", "output": "a"})
    assert "do not fit" in error_of(source, columns={"completion": "output"})


@pytest.mark.parametrize(
    ("record", "name", "question"),
    [
        ({"question": "q", "answer": "a"}, "prompt_completion", "q"),
        ({"prompt": "q", "response": "a"}, "prompt_completion", "q"),
        ({"instruction": "q", "response": "a"}, "prompt_completion", "q"),
        ({"input": "q", "output": "a"}, "prompt_completion", "q"),
        ({"query": "q", "response": "a"}, "prompt_completion", "q"),
        ({"user": "q", "assistant": "a"}, "prompt_completion", "q"),
        ({"problem": "q", "solution": "a"}, "prompt_completion", "q"),
        ({"prompt": "q", "completion": "a", "response": "x", "output": "y"}, "prompt_completion", "q"),
        ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, "alpaca", "q\nc"),
        ({"instruction": "q", "input": "c", "output": "a", "text": "x"}, "alpaca", "q\nc"),
        ({"instruction": "q", "input": "c", "response": "a"}, "alpaca", "q\nc"),
        ({"question": "q", "context": "c", "answer": "a"}, "alpaca", "q\nc"),
        ({"question": "q", "chosen": "a", "rejected": "x"}, "chosen_rejected", "q"),
        ({"chosen": [turn("user", "q"), turn("assistant", "a")], "question": 1, "input": 2}, "chosen_rejected", "q"),
        ({"conversation": [turn("user", "q"), turn("assistant", "a")]}, "messages", "q"),
        ({"dialog": [turn("user", "q"), turn("assistant", "a")]}, "messages", "q"),
        ({"dialogue": [turn("user", "q"), turn("assistant", "a")]}, "messages", "q"),
        ({"conversations": [turn("user", "q"), turn("assistant", "a")]}, "sharegpt", "q"),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "messages", "q"),
        ({"messages": [turn("user", "q"), turn("assistant", "a")], "question": "x", "answer": "y"}, "messages", "q"),
    ],
)
def test_other_spellings_are_read_and_the_layout_that_uses_more_columns_wins(tmp_path, record, name, question):
    loaded = load_rows(write_jsonl(tmp_path / "a.jsonl", record))
    assert (loaded.format, loaded.rows) == (name, [asked(question, "a")])


def test_no_alias_makes_ambiguous_what_has_our_own_names(tmp_path):
    aliases = {alias: "x" for layout in FORMATS.values() for names in layout.aliases.values() for alias in names}
    for name, layout in FORMATS.items():
        ours = {"messages": CHAT, "conversations": CHAT}
        record = {column: ours.get(column, "q") for column in (*layout.required, *layout.optional)}
        taken = {"instruction", "output"} & aliases.keys() - record.keys()  # together they are alpaca's own names
        others = {alias: text for alias, text in aliases.items() if alias not in taken}
        loaded = load_rows(write_jsonl(tmp_path / "a.jsonl", {**others, **record}))
        assert loaded.format == name and loaded.rows == [read_one(tmp_path, record)]


def test_two_spellings_that_fit_are_refused_with_the_flags_that_read_them(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", {"problem": "q", "solution": "a", "answer": "4"})
    message = error_of(source)
    assert "fit 'prompt_completion' in more than one way" in message
    assert "--data.columns '{prompt: problem, completion: answer}' or " in message
    assert load_rows(source, columns={"prompt": "problem", "completion": "answer"}).rows == [asked("q", "4")]


@pytest.mark.parametrize(
    ("record", "remedy"),
    [
        ({"in": "q", "out": "a", "id": 1}, "--data.columns '{prompt: in, completion: out}'."),
        ({"foo": "q", "bar": "a"}, "--data.columns '{prompt: foo, completion: bar}', if these are the right ones."),
        ({"Prompt": "q", "my answer": "a"}, "--data.columns '{prompt: Prompt, completion: \"my answer\"}'."),
        ({"my_chat": CHAT}, "Column 'my_chat' holds turns. Set --data.columns '{messages: my_chat}'."),
        ({"text": "### Human: q ### Assistant: a", "n": 1}, "In 'text' the prompt and the answer are not apart"),
        ({"prompt": "q"}, "A row needs what was asked and the real answer"),
    ],
)
def test_columns_that_do_not_fit_are_refused_with_what_would_read_them(tmp_path, record, remedy):
    source = write_jsonl(tmp_path / "a.jsonl", record)
    assert remedy in error_of(source)
    if flag := re.search(r"--data.columns '({.*?})'", remedy):
        pairs = (pair.split(": ") for pair in flag[1].strip("{}").split(", "))
        assert load_rows(source, columns={ours: theirs.strip('"') for ours, theirs in pairs}).rows


@pytest.mark.parametrize("speaker", ["gpt", "chatgpt", "bing", "bard", "model", "assistant", "GPT"])
def test_every_name_of_the_assistant_is_read(tmp_path, speaker):
    record = {"conversations": [{"from": "Human", "value": "q"}, {"from": speaker, "value": "a"}]}
    assert read_one(tmp_path, record) == asked("q", "a")


def test_text_parts_are_joined_and_other_parts_are_named(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b", "image_url": None}]
    record = {
        "messages": [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}, turn("assistant", "c")]
    }
    assert read_one(tmp_path, record) == Row((turn("developer", "d"), turn("user", "a b")), "c")
    record["messages"][1]["content"] = [*parts, {"type": "image_url", "image_url": {"url": "u"}}]
    assert "turn 2 of 'messages' has a part of type 'image_url'" in error_of(write_jsonl(tmp_path / "a.jsonl", record))


def test_turns_may_be_written_as_one_list_for_each_key_and_as_json_in_a_cell(tmp_path):
    by_key = {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}
    assert load_rows(write_parquet(tmp_path / "a.parquet", [by_key])).rows == [asked("q", "a")]
    cell = json.dumps([turn("user", "q"), turn("assistant", "a")]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'id,messages\n1,"{cell}"\n')
    assert load_rows(str(tmp_path / "a.csv")).rows == [asked("q", "a")]


SYSTEM = turn("system", "be brief")


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"messages": [turn("user", "q"), turn("assistant", "a")], "system": "be brief"}, [SYSTEM, turn("user", "q")]),
        (
            {"messages": [SYSTEM, turn("user", "q"), turn("assistant", "a")], "system": "be brief"},
            [SYSTEM, turn("user", "q")],
        ),
        ({"prompt": "q", "completion": "a", "system_prompt": "be brief"}, [SYSTEM, turn("user", "q")]),
        ({"prompt": "q", "completion": "a", "system": None, "history": None}, [turn("user", "q")]),
        (
            {"instruction": "q", "input": "", "output": "a", "history": [["x", "y"]], "system": "be brief"},
            [SYSTEM, turn("user", "x"), turn("assistant", "y"), turn("user", "q")],
        ),
        (
            {"messages": [SYSTEM, turn("user", "q"), turn("assistant", "a")], "history": [["x", "y"]]},
            [SYSTEM, turn("user", "x"), turn("assistant", "y"), turn("user", "q")],
        ),
        (
            {
                "messages": [turn("user", "x"), turn("assistant", "y"), turn("user", "q"), turn("assistant", "a")],
                "history": [["x", "y"]],
            },
            [turn("user", "x"), turn("assistant", "y"), turn("user", "q")],
        ),
    ],
)
def test_a_system_text_and_a_history_stand_before_the_conversation_once(tmp_path, record, prompt):
    assert read_one(tmp_path, record) == Row(tuple(prompt), "a")


def test_a_common_column_can_be_left_unread(tmp_path):
    record = {"messages": [SYSTEM, turn("user", "q"), turn("assistant", "a")], "system": "linux"}
    source = write_jsonl(tmp_path / "a.jsonl", record)
    assert "column 'system' has 'linux', but a system turn has 'be brief'" in error_of(source)
    assert "--data.columns '{system: \"\"}'" in error_of(source)
    loaded = load_rows(source, columns={"system": ""})
    assert loaded.rows == [Row((SYSTEM, turn("user", "q")), "a")] and "not used: 'system'" in loaded.description


def test_columns_that_often_matter_get_a_line_of_their_own_where_they_are_not_read(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", {"prompt": "q", "completion": "a", "context": "c", "id": 1})
    loaded = load_rows(source)
    assert "not used: 'context', 'id'" in loaded.description
    assert [note for note in loaded.notes if f"column 'context' of {source} is not read" in note] == loaded.notes != []


# --- Which turn is the real answer ----------------------------------------------------------------------------------


def weighted(weight: object, key: str = "weight") -> dict[str, object]:
    return {**turn("assistant", "b"), key: weight}


@pytest.mark.parametrize("mark", [weighted(0), weighted(0.0), weighted(False, "train"), weighted(0, "loss")])
def test_an_answer_that_is_not_to_be_trained_on_is_never_the_real_one(tmp_path, mark):
    only = {"messages": [turn("user", "q"), mark]}
    source = write_jsonl(tmp_path / "a.jsonl", only, {"messages": CHAT})
    assert "line 1: every assistant turn is marked as not to be trained on" in error_of(source)
    assert load_rows(source, on_bad_row="drop").dropped["untrained answer"].count == 1
    earlier = {"messages": [turn("user", "p"), {**turn("assistant", "a"), "weight": 1}, turn("user", "q"), mark]}
    loaded = load_rows(write_jsonl(tmp_path / "a.jsonl", earlier))
    assert loaded.rows == [asked("p", "a")] and loaded.noted["dropped_turns"].count == 1
    later = {"messages": [turn("user", "q"), mark, turn("user", "r"), weighted(1)]}
    loaded = load_rows(write_jsonl(tmp_path / "a.jsonl", later))
    assert loaded.rows == [Row((turn("user", "q"), turn("assistant", "b"), turn("user", "r")), "b")]
    assert not loaded.unused_keys


@pytest.mark.parametrize("label", [False, "False", "false", 0])
def test_an_undesirable_completion_is_no_real_answer(tmp_path, label):
    good = {"prompt": "q", "completion": "a", "label": True if label != 0 or label is False else 1}
    source = write_jsonl(tmp_path / "a.jsonl", good, {**good, "label": label})
    message = error_of(source)
    assert f"line 2: column 'label' is {label!r}" in message and "--data.columns '{label: \"\"}'" in message
    loaded = load_rows(source, on_bad_row="drop")
    assert loaded.rows == [asked("q", "a")] and loaded.dropped["undesirable answer"].count == 1


def test_a_label_about_something_else_is_not_read_and_said(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", *({"prompt": "q", "completion": "a", "label": n} for n in range(3)))
    loaded = load_rows(source)
    assert len(loaded.rows) == 3 and "not used: 'label'" in loaded.description and "'label'" in loaded.notes[0]


def test_keys_of_turns_without_effect_are_counted_by_name(tmp_path):
    turns = [
        {**turn("user", "q"), "name": "bob", "score": None},
        {**turn("assistant", "a"), "loss": True, "tool_calls": None},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", {"messages": turns}, {"messages": [turns[0], turn("assistant", "b")]})
    assert {key: tally.count for key, tally in load_rows(source).unused_keys.items()} == {"name": 2, "loss": 1}


@pytest.mark.parametrize("value", [False, 0, 5, ["x"]])
def test_an_input_that_is_not_text_is_a_bad_row(tmp_path, value):
    source = write_jsonl(tmp_path / "a.jsonl", {"instruction": "q", "input": value, "output": "a"})
    assert "column 'input' must be text, got" in error_of(source)


# --- Tools and reasoning --------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def calling(**extras: object) -> dict[str, object]:
    return {"role": "assistant", "content": None, **extras}


@pytest.mark.parametrize(
    ("calls", "answer"),
    [
        ({"tool_calls": [{"id": "c1", **CALL}]}, {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"}),
        (
            {"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}]},
            {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        ),
        (
            {"function_call": {"name": "add", "arguments": '{"x": 1}'}},
            {"role": "function", "content": "2", "name": "add"},
        ),
        ({"tool_calls": [{"name": "add", "arguments": {"x": 1, "y": None}}]}, {"role": "tool", "content": "2"}),
        ({"tool_calls": json.dumps([CALL])}, {"role": "tool", "content": "2"}),
    ],
)
@pytest.mark.parametrize(
    "tools",
    [{"tools": [TOOL]}, {"tools": json.dumps([FUNCTION])}, {"functions": [FUNCTION]}, {"tools": [json.dumps(TOOL)]}],
)
def test_tool_calls_and_definitions_are_read_as_chat_templates_take_them(tmp_path, calls, answer, tools):
    record = {**tools, "messages": [turn("user", "1 + 1?"), calling(**calls), answer, turn("assistant", "2")]}
    row = read_one(tmp_path, record)
    number = {"id": "c1"} if "c1" in str(calls) else {}
    assert row.prompt == (
        turn("user", "1 + 1?"),
        {"role": "assistant", "content": "", "tool_calls": [{**number, **CALL}]},
        {**answer, "role": "tool"},
    )
    assert (row.real, row.real_extras, row.tools) == ("2", {}, (TOOL,))


def test_a_call_can_be_the_real_answer(tmp_path):
    asks = turn("user", "1 + 1?")
    row = read_one(tmp_path, {"messages": [asks, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]})
    assert row == Row((asks,), "", {"tool_calls": [CALL]}, (TOOL,))
    spoken = [
        {"from": "human", "value": "1 + 1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
    ]
    assert read_one(tmp_path, {"conversations": spoken, "tools": json.dumps([FUNCTION])}) == row
    spoken += [{"from": "observation", "value": "2"}, {"from": "gpt", "value": "two"}]
    row = read_one(tmp_path, {"conversations": spoken})
    assert row.prompt[1:] == ({"role": "assistant", "content": "", "tool_calls": [CALL]}, turn("tool", "2"))


def test_what_a_data_set_fills_into_calls_and_definitions_is_left_out(tmp_path):
    other = {
        "type": "function",
        "function": {"name": "greet", "parameters": {"type": "object", "properties": {"who": {"type": "string"}}}},
    }
    records = [
        {"messages": [turn("user", "q"), calling(tool_calls=[CALL])], "tools": [TOOL]},
        {"messages": [turn("user", "q"), {**turn("assistant", "a"), "tool_calls": None}], "tools": [other]},
        {"messages": [turn("user", "r"), turn("assistant", "b")], "tools": None},
    ]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(records).to_parquet(str(path))
    loaded = load_rows(str(path))
    assert loaded.rows == [
        Row((turn("user", "q"),), "", {"tool_calls": [CALL]}, (TOOL,)),
        Row((turn("user", "q"),), "a", {}, (other,)),
        asked("r", "b"),
    ]
    assert not loaded.unused_keys and loaded.noted["repeated_prompts"].count == 0


def test_a_null_that_json_text_spells_is_kept(tmp_path):
    value = '{"id": null, "name": "add", "arguments": {"x": null}}'
    spoken = [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]
    row = read_one(tmp_path, {"conversations": spoken, "tools": '[{"name": "add", "default": null}]'})
    assert row.real_extras["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"x": None}}}
    ]
    assert row.tools == ({"type": "function", "function": {"name": "add", "default": None}},)


@pytest.mark.parametrize(
    ("kind", "extras", "reason"),
    [
        ("malformed call", {"tool_calls": [{"function": {"arguments": "{}"}}]}, "must have a name and arguments"),
        ("malformed call", {"tool_calls": "add(1)"}, "must have a name and arguments, got str 'add(1)'"),
        (
            "malformed call",
            {"tool_calls": [{"name": "add", "arguments": "{x: 1}"}]},
            "the arguments of 'add' in turn 2",
        ),
        ("malformed call", {"tool_calls": [{"name": "add", "arguments": [1]}]}, "must be a JSON object, got list"),
        (
            "malformed call",
            {"tool_calls": [CALL], "function_call": CALL["function"]},
            "both tool_calls and function_call",
        ),
        ("NUL character", {"tool_calls": [{"name": "add", "arguments": '{"x": "\\u0000"}'}]}, "a tool call of turn 2"),
        (
            "too deep",
            {"tool_calls": [{"name": "add", "arguments": '{"x": ' + "[" * 900 + "]" * 900 + "}"}]},
            "lists in lists",
        ),
        ("wrong type", {"reasoning_content": 5}, "reasoning_content of turn 2 of 'messages' must be text"),
        ("malformed turn", {"reasoning_content": "x", "thinking": "y"}, "two different texts"),
    ],
)
def test_a_call_or_a_reasoning_that_cannot_be_read_is_a_bad_row(tmp_path, kind, extras, reason):
    record = {"messages": [turn("user", "q"), {**turn("assistant", "a"), **extras}]}
    source = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT}, record)
    assert reason in error_of(source)
    assert load_rows(source, on_bad_row="drop").dropped[kind].count == 1


def test_tools_without_definitions_are_bad_rows_that_can_be_read_without(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT, "tools": ["search"]})
    assert "must be a list of tool definitions" in error_of(source) and '{tools: ""}' in error_of(source)
    assert load_rows(source, columns={"tools": ""}).rows == [CHAT_ROW]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_kept_with_its_turn(tmp_path, key):
    first = {**turn("assistant", "b"), key: "so"}
    row = read_one(
        tmp_path, {"messages": [turn("user", "a"), first, turn("user", "c"), {**turn("assistant", "d"), key: "hm"}]}
    )
    assert row.prompt[1] == {**turn("assistant", "b"), "reasoning_content": "so"}
    assert (row.real, row.real_extras) == ("d", {"reasoning_content": "hm"})
    assert row.real_turn == {"role": "assistant", "content": "d", "reasoning_content": "hm"}


def test_prompts_differ_by_all_that_decides_them(tmp_path):
    asks, says = turn("user", "a"), turn("assistant", "b")
    plain = Row((asks, says, turn("user", "c")), "d")
    assert prompt_key(plain) == (("user", "a"), ("assistant", "b"), ("user", "c"))
    called = Row((asks, {**says, "tool_calls": [CALL]}, turn("user", "c")), "d")
    thought = Row((asks, {**says, "reasoning_content": "so"}, turn("user", "c")), "d")
    armed = Row(plain.prompt, "d", tools=(TOOL,))
    assert len({prompt_key(row) for row in (plain, called, thought, armed)}) == 4
    records = [{"messages": [asks, {**says, "thinking": text}]} for text in ("x", "y", "x")]
    noted = load_rows(write_jsonl(tmp_path / "a.jsonl", *records)).noted
    assert (noted["exact_duplicates"].count, noted["repeated_prompts"].count) == (1, 1)


# --- Several sources ------------------------------------------------------------------------------------------------


def write_numbered(path: Path, size: int) -> str:
    return write_jsonl(path, *({"prompt": f"{path.stem}{n}", "completion": "c"} for n in range(size)))


def test_a_weight_is_the_share_of_a_sources_rows(tmp_path):
    a, b, c = (write_numbered(tmp_path / f"{name}.jsonl", 10) for name in "abc")
    mixed = load_rows({a: 1.0, b: 0.5, c: 2.5})
    taken = {
        name: sum(t for t, place in zip(mixed.times, mixed.places, strict=True) if place.startswith(name))
        for name in (a, b, c)
    }
    assert taken == {a: 10, b: 5, c: 25}
    assert sorted(set(mixed.times[15:])) == [2, 3] and set(mixed.times[:15]) == {1}
    assert mixed.places == sorted(mixed.places, key=lambda p: (p.split(",")[0], int(p.split()[-1])))  # in their order
    assert load_rows({a: 1.0, b: 0.5, c: 2.5}) == mixed
    assert load_rows({a: 1.0, b: 0.5, c: 2.5}, seed=1).places != mixed.places
    assert "weight 0.5: 5 taken" in mixed.description and len(mixed.parts) == 3
    assert len(load_rows({a: 0.01}).rows) == 1  # a source that is named is never left out whole


def test_the_rows_that_are_drawn_do_not_depend_on_where_the_files_lie(tmp_path):
    (tmp_path / "x").mkdir()
    rows = [load_rows({write_numbered(folder / "a.jsonl", 40): 0.5}).rows for folder in (tmp_path, tmp_path / "x")]
    assert rows[0] == rows[1] and len(rows[0]) == 20


def test_one_source_of_weight_one_is_the_source_itself(tmp_path):
    source = write_numbered(tmp_path / "a.jsonl", 9)
    plain, mapped = load_rows(source), load_rows({source: 1.0})
    assert (mapped.rows, mapped.places, mapped.times, mapped.noted) == (
        plain.rows,
        plain.places,
        plain.times,
        plain.noted,
    )


def test_what_is_counted_in_several_sources_is_counted_over_all(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", *RECORDS, {"prompt": "p"})
    b = write_jsonl(
        tmp_path / "b.jsonl", {"question": "1 + 1?", "answer": "2"}, {"question": "1 + 1?", "answer": "two"}, 7
    )
    mixed = load_rows({a: 1, b: 1}, on_bad_row="drop")
    assert {kind: tally.count for kind, tally in mixed.dropped.items()} == {"missing": 1, "not an object": 1}
    assert (mixed.noted["exact_duplicates"].count, mixed.noted["repeated_prompts"].count) == (1, 1)
    assert mixed.noted["exact_duplicates"].first == [f"{b}, line 1 repeats {a}, line 1"] and mixed.num_read == 6


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a.jsonl": 0}, "the weight of 'a.jsonl' must be a number above 0 and at most 1000, got 0."),
        ({"a.jsonl": float("nan")}, "must be a number above 0 and at most 1000, got nan"),
        ({"a.jsonl": True}, "must be a number above 0 and at most 1000, got True"),
        ({"a.jsonl": 1e9}, "must be a number above 0 and at most 1000, got 1000000000.0"),
        ({}, "a map from each of several to its weight, as {a.jsonl: 1.0, b.jsonl: 0.5}; got dict '{}'"),
        (["a.jsonl"], "must be one source, or a map"),
        ("{a.jsonl: x}", "must be one source, or a map"),
    ],
)
def test_a_mix_without_right_weights_is_refused(source, message):
    with pytest.raises(UserError) as caught:
        load_rows(source)
    assert message in str(caught.value)


# --- Bad rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [turn("user", "a")]}, "there is no assistant turn, got roles ['user']"),
        ({"messages": []}, "there is no assistant turn, got roles []"),
        ({"messages": [turn("assistant", "a")]}, "no user turn with text comes before the real answer"),
        ({"messages": [turn("user", " "), turn("assistant", "a")]}, "the prompt is blank"),
        ({"messages": [turn("user", "a"), turn("assistant", " \n")]}, "the real answer is blank, there is nothing"),
        ({"messages": "a"}, "column 'messages' must be a list of turns, got str 'a'"),
        ({"messages": None}, "column 'messages' must be a list of turns, got nothing"),
        ({"messages": ["a"]}, "turn 1 of 'messages' must have 'role' and 'content', got str 'a'"),
        (
            {"messages": [{"speaker": "a"}]},
            "turn 1 of 'messages' must have 'role' and 'content', got the keys ['speaker']",
        ),
        ({"messages": [{"role": "user"}]}, "turn 1 of 'messages' must have 'content', got the keys ['role']"),
        (
            {"messages": [turn("critic", "a")]},
            "turn 1 of 'messages' has role 'critic', expected one of system, developer",
        ),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "has role ['user'], expected one of"),
        ({"messages": [turn("user", "a"), {"role": "assistant", "content": None}]}, "must be text, got nothing"),
        (
            {"messages": [turn("user", "a"), {**turn("assistant", ""), "tool_calls": [{}]}]},
            "a tool call of turn 2 of 'messages' must have a name and arguments, got dict '{}'",
        ),
        ({"messages": [turn("user", "\ud83d")]}, "turn 1 of 'messages' holds half of a surrogate pair at character 0"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "has from 'cat', expected one of"),
        ({"prompt": 7, "completion": "a"}, "column 'prompt' must be text, got int '7'"),
        ({"prompt": " ", "completion": "a"}, "the prompt is blank"),
        ({"prompt": "a", "completion": 2.5}, "column 'completion' must be text, got float '2.5'"),
        ({"instruction": "a", "output": None}, "column 'output' must be text, got nothing"),
        ({"instruction": "", "input": "", "output": "b"}, "the prompt is blank"),
        ({"chosen": "a", "rejected": "b"}, "allowed only if 'chosen' is a whole conversation"),
        ({"chosen": [turn("assistant", "a")]}, "the prompt is blank"),
        (
            {"prompt": CHAT[:2], "chosen": [turn("user", "a"), turn("assistant", "b")]},
            "'chosen' is a whole conversation, but it does not begin with the turns of 'prompt'",
        ),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(tmp_path, record, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    message = error_of(path)
    assert f"1 of 1 rows of {path} cannot be read as" in message
    assert f"{path}, line 1: " in message and reason in message
    assert "Expected " in message and message.endswith("Mend or remove these rows.")
    assert error_of(path, on_bad_row="drop") == message  # with no good row there is nothing to go on with


def test_five_bad_rows_are_shown_with_their_lines_and_the_rest_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"prompt": "p", "completion": "c"}', "", *['{"prompt": "p"}'] * 5, "{oops", "[1]"]
    path.write_text("\n".join(lines))
    message = error_of(path)
    assert f"7 of 8 rows of {path} cannot be read as 'prompt_completion': columns prompt, completion\n" in message
    assert re.findall(r"line (\d+): column 'completion' must be text, got nothing", message) == list("34567")
    assert "\n  and 2 more\nExpected prompt and completion, each as text" in message
    assert message.endswith("Mend or remove these rows, or set data.on_bad_row: drop to leave them out.")
    path.write_text("\n".join([lines[0], *lines[-2:]]))
    message = error_of(path)
    assert "line 2: not JSON: Expecting property name" in message
    assert "line 3: must be an object with columns, got list '[1]'" in message


def test_a_file_without_any_object_shows_its_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text("hello\nworld")
    message = error_of(tmp_path / "a.jsonl")
    assert "2 of 2 rows" in message and "line 2: not JSON" in message and "one object with columns per row" in message


def test_csv_rows_must_match_the_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\np,c\np,c,d\np\n")
    message = error_of(path)
    assert f"{path}, row 2: has more cells than the 2 columns of the header" in message
    assert f"{path}, row 3: column 'completion' must be text, got nothing" in message


def test_a_csv_index_column_without_a_name_is_only_unused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",prompt,completion\n0,p,c\n")
    loaded = load_rows(str(path))
    assert loaded.rows == [asked("p", "c")] and "not used: ''" in loaded.description


# --- Dropping and counting ------------------------------------------------------------------------------------------

GOOD = b'{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "a%d"}]}'


def chat_line(user: object, real: object = "a", **changes: object) -> bytes:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": real, **changes}]
    return json.dumps({"messages": messages}).encode()


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        ("blank answer", chat_line("q", " \n"), "the real answer is blank"),
        ("blank prompt", chat_line("\u2028"), "the prompt is blank"),
        ("no answer", b'{"messages": [{"role": "user", "content": "q"}]}', "there is no assistant turn"),
        ("no answer", b'{"messages": []}', "got roles []"),
        ("missing", chat_line("q", None), "turn 2 of 'messages' must be text, got nothing"),
        ("missing", b'{"other": 1}', "column 'messages' must be a list of turns, got nothing"),
        ("wrong type", chat_line(7), "turn 1 of 'messages' must be text, got int '7'"),
        ("wrong type", chat_line("q", ["a"]), "turn 2 of 'messages' must be text, got list"),
        ("wrong type", b'{"messages": "q"}', "must be a list of turns, got str 'q'"),
        ("wrong role", chat_line("q", role="critic"), "turn 2 of 'messages' has role 'critic', expected one of system"),
        ("malformed turn", b'{"messages": ["q", "a"]}', "turn 1 of 'messages' must have 'role' and 'content'"),
        ("malformed call", chat_line("q", tool_calls=[{}]), "a tool call of turn 2 of 'messages' must have a name"),
        ("NUL character", chat_line("a\0b"), "turn 1 of 'messages' holds a NUL character at character 1"),
        ("not JSON", b'{"messages": "raw \0 NUL"}', "not JSON: Invalid control character at at column 19"),
        ("half a surrogate pair", chat_line("q", "\ud83d"), "turn 2 of 'messages' holds half of a surrogate pair"),
        (
            "too long",
            chat_line("q", "a" * MAX_ROW_CHARACTERS),
            "has 1,000,001 characters, but a row may have 1,000,000",
        ),
        ("not JSON", b"{oops", "not JSON: Expecting property name"),
        ("not JSON", b'{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),  # with the line's end
        ("not JSON", b"\xef\xbb\xbf" + GOOD % (1, 1), "not JSON: Unexpected UTF-8 BOM"),
        ("not JSON", b"[" * 100_000, "not JSON that can be read: maximum recursion depth"),
        ("not JSON", b'{"messages": ' + b"1" * 5000 + b"}", "not JSON that can be read: Exceeds the limit"),
        ("not an object", b"[1, 2]", "must be an object with columns, got list"),
        (
            "not UTF-8",
            chat_line("caf").replace(b"caf", b"caf\xe9"),
            "must be UTF-8 text, got byte 0xe9 at byte offset ",
        ),
        ("not UTF-8", "q".encode("utf-16"), "must be UTF-8 text, got byte 0xff at byte offset "),
    ],
)
def test_every_bad_row_is_refused_or_dropped_with_an_exact_count_and_its_line(tmp_path, kind, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD % (1, 1), line, GOOD % (2, 2), line, line]) + b"\n")
    message = error_of(path)
    assert f"3 of 5 rows of {path} cannot be read" in message
    assert re.findall(r"line (\d+): ", message) == ["2", "4", "5"]
    loaded = load_rows(str(path), on_bad_row="drop")
    assert loaded.rows == [asked("q1", "a1"), asked("q2", "a2")]
    assert loaded.places == [f"{path}, line 1", f"{path}, line 3"]
    assert loaded.num_read == 5 and "3 of 5 rows are bad and were dropped" in loaded.description
    assert {name: tally.count for name, tally in loaded.dropped.items()} == {kind: 3}
    for number, place in zip((2, 4, 5), loaded.dropped[kind].first, strict=True):
        assert place.startswith(f"{path}, line {number}: ") and reason in place
    assert not any(tally.count for tally in loaded.noted.values())


def test_of_each_kind_the_first_five_places_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD % (0, 0), *[b"{oops", b"[]"] * 7]))
    loaded = load_rows(str(path), on_bad_row="drop")
    assert {kind: tally.count for kind, tally in loaded.dropped.items()} == {"not JSON": 7, "not an object": 7}
    lines = {
        kind: [int(re.findall(r"line (\d+)", place)[0]) for place in t.first] for kind, t in loaded.dropped.items()
    }
    assert lines == {"not JSON": [2, 4, 6, 8, 10], "not an object": [3, 5, 7, 9, 11]}


def test_the_longest_row_allowed_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(chat_line("q", "a" * (MAX_ROW_CHARACTERS - 1)))
    assert len(load_rows(str(path)).rows) == 1
    path.write_bytes(chat_line("q", "a", tool_calls=[{"name": "f", "arguments": {"x": "a" * MAX_ROW_CHARACTERS}}]))
    assert "but a row may have 1,000,000" in error_of(path)


def test_duplicates_are_kept_and_counted_with_where_they_were_first(tmp_path):
    pairs = [("p", "a"), ("p", "b"), ("p", "a"), ("q", "a"), ("p", "b"), ("p ", "a")]
    source = write_jsonl(tmp_path / "a.jsonl", *({"prompt": p, "completion": c} for p, c in pairs))
    loaded = load_rows(source)
    assert loaded.rows == [asked(*pair) for pair in pairs]
    assert loaded.noted["exact_duplicates"].count == 2
    assert loaded.noted["exact_duplicates"].first == [
        f"{source}, line 3 repeats {source}, line 1",
        f"{source}, line 5 repeats {source}, line 2",
    ]
    assert loaded.noted["repeated_prompts"].first == [f"{source}, line 2 asks as {source}, line 1 did"]


def test_files_with_a_byte_order_mark_and_turns_behind_the_answer_are_counted(tmp_path):
    thanks = {"messages": [*CHAT, turn("user", "thanks")]}
    for name, start in (("a.jsonl", b"\xef\xbb\xbf"), ("b.jsonl", b""), ("c.jsonl", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(start + json.dumps(thanks).encode())
    noted = load_rows(str(tmp_path / "*.jsonl"), max_rows=3).noted
    assert (noted["byte_order_marks"].count, noted["dropped_turns"].count) == (2, 3)
    assert noted["byte_order_marks"].first == [str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl")]


def test_max_rows_counts_the_rows_that_are_dropped_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([b"{oops", GOOD % (1, 1), GOOD % (2, 2)]))
    loaded = load_rows(str(path), max_rows=2, on_bad_row="drop")
    assert (len(loaded.rows), loaded.num_read) == (1, 2)
    assert "1 of 2 rows are bad and were dropped; stopped at max_rows=2" in loaded.description


def test_other_file_kinds_drop_bad_rows_too(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\np,c\np,c,d\np\n,c\n")
    counts = {kind: t.count for kind, t in load_rows(str(tmp_path / "a.csv"), on_bad_row="drop").dropped.items()}
    assert counts == {"too many cells": 1, "missing": 1, "blank prompt": 1}
    source = write_parquet(tmp_path / "a.parquet", [*RECORDS, {"prompt": "p", "completion": None}])
    assert {kind: t.count for kind, t in load_rows(source, on_bad_row="drop").dropped.items()} == {"missing": 1}
    (tmp_path / "a.json").write_text(json.dumps([*RECORDS, 7]))
    loaded = load_rows(str(tmp_path / "a.json"), on_bad_row="drop")
    assert loaded.rows == ROWS and loaded.dropped["not an object"].first == [
        f"{tmp_path / 'a.json'}, row 3: must be an object with columns, got int '7'"
    ]


def test_what_to_do_with_bad_rows_is_one_of_two(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", *RECORDS)
    assert "data.on_bad_row must be 'error' or 'drop', got 'skip'" in error_of(source, on_bad_row="skip")


# --- Conversations without roles ------------------------------------------------------------------------------------

TWO_ROUNDS = Row((turn("user", "a"), turn("assistant", "b"), turn("user", "c")), "d")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": ["a", "b", "c", "d"]},
        {"conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
        {"messages": [{"user": "a", "assistant": "b"}, turn("user", "c"), turn("assistant", "d")]},
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: x",
        },
        {
            "input": {"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")], "tools": []},
            "preferred_output": [turn("assistant", "d")],
            "non_preferred_output": [turn("assistant", "x")],
        },
    ],
)
def test_turns_may_be_told_by_their_order_their_pairs_or_a_transcript(tmp_path, record):
    assert read_one(tmp_path, record) == TWO_ROUNDS


def test_tools_beside_the_messages_of_a_preference_are_read(tmp_path):
    asked_with = {"messages": [turn("user", "a")], "tools": [{"type": "function", "function": {"name": "look"}}]}
    row = read_one(tmp_path, {"input": asked_with, "preferred_output": [turn("assistant", "d")]})
    assert [tool["function"]["name"] for tool in row.tools] == ["look"]


def test_a_text_that_is_no_transcript_needs_its_prompt(tmp_path):
    for text in ("Human: a", "a\n\nHuman: b\n\nAssistant: c", "Assistant: a"):
        assert "column 'prompt' is empty" in error_of(write_jsonl(tmp_path / "one.jsonl", {"chosen": text}))


def test_an_odd_question_at_the_end_is_a_dropped_turn(tmp_path):
    loaded = load_rows(write_jsonl(tmp_path / "one.jsonl", {"conversations": ["a", "b", "c"]}))
    assert loaded.rows == [asked("a", "b")] and loaded.noted["dropped_turns"].count == 1


def test_a_spreadsheets_line_about_its_separator_is_obeyed(tmp_path):
    path = tmp_path / "one.csv"
    path.write_bytes("\ufeffsep=;\r\nprompt;completion\r\na,b;c;\r\n".encode())
    assert load_rows(str(path)).rows == [asked("a,b", "c")]


def test_nan_is_nothing(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"instruction": "a", "input": NaN, "output": "b"}')
    assert load_rows(str(path)).rows == [asked("a", "b")]
    path.write_text('{"instruction": "a", "input": "x", "output": NaN}')
    assert "column 'output' must be text, got nothing" in error_of(path)
