"""Every source kind, every column layout, and every message of ``spin_lightning.formats``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from spin_lightning.formats import FORMATS, MAX_ROW_CHARACTERS
from spin_lightning.rows import load_rows
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


# --- Formats --------------------------------------------------------------------------------------------------------

CHAT = [
    turn("system", "be brief"),
    turn("user", "a"),
    turn("assistant", "b"),
    turn("user", "c"),
    turn("assistant", "d"),
]
CHAT_ROW = Row(prompt=tuple(CHAT[:4]), real="d")  # type: ignore[arg-type]
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
