"""``spin-lightning check``: the data as the game sees it, without the model's weights."""

from __future__ import annotations

import json
import re

import pytest
from helpers import CHATML, metaspace_tokenizer, save_tiny_model, write_rows
from safetensors.torch import save_file

from spin_lightning.cli import check
from spin_lightning.cli import commands as cli
from spin_lightning.cli.commands import config_folder
from spin_lightning.data.report import COUNTED
from spin_lightning.types import UserError

PROMPT = r"<|im_start|> u s e r \n 0 + 1 ? <|im_end|> \n <|im_start|> a s s i s t a n t \n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder without its weights."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    save_file({}, folder / "model.safetensors")  # whole, and nothing to load
    return str(folder)


@pytest.fixture
def flags(tmp_path, model, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    rows = write_rows(tmp_path / "rows.jsonl")
    return [f"--data.train_data={rows}", f"--model.model_name_or_path={model}", "--data.val_fraction=0"]


def printed_by(args, capsys):
    check.main(args)
    return capsys.readouterr().out


def rows_of(printed):
    """The shown rows: for each its title, and what stands under each kind of token."""
    blocks = [block.splitlines() for block in printed.split("\n\n")]
    kind = re.compile(r"  (prompt|response|terminator|padding) +(\d+)  (.*)")
    return [
        {"title": lines[0], **{m[1]: (int(m[2]), m[3]) for line in lines[1:] if (m := kind.match(line))}}
        for lines in blocks
        if len(lines) > 1 and kind.match(lines[1])
    ]


def test_two_flags_show_the_format_the_counts_and_a_pair_without_any_weights(flags, capsys):
    printed = printed_by(flags, capsys)
    assert "as 'messages': column messages" in printed and "format: messages\n" in printed
    assert "to train on: 12 rows\n  tokens of prompts: median 23, 90 % up to 25, most 25" in printed
    assert "held out: 0 rows" in printed
    first, second = rows_of(printed)
    assert first["prompt"] == second["prompt"] == (23, PROMPT)
    assert first["response"] == (1, "1") and second["response"] == (2, "1 1")
    assert first["terminator"] == second["terminator"] == (1, "<|im_end|>")
    assert first["padding"] == (1, "<|im_end|>") and "padding" not in second
    for kind, (_, meaning) in check.KINDS.items():
        assert re.search(rf"\n  {kind} +{re.escape(meaning)}", printed)


def test_the_command_line_runs_it(flags, capsys):
    cli.main(["check", *flags])
    assert "format: messages" in capsys.readouterr().out


def test_a_cut_answer_is_shown_without_a_terminator(flags, capsys):
    for cap, shown in ((2, (1, "<|im_end|>")), (1, None)):
        row = rows_of(printed_by([*flags, f"--data.generator.max_new_tokens={cap}"], capsys))[0]
        assert row["response"] == (1, "1") and row.get("terminator") == shown


@pytest.mark.parametrize("config", ["one_gpu_1.5b", "paper", "demo", "demo_sft"])
def test_the_config_of_a_run_is_checked_as_it_is(flags, capsys, config):
    path = config_folder() / f"{config}.yaml"
    cleared = ["--model.revision=null", "--data.val_data=null", "--data.format=auto", "--data.max_rows=null"]
    printed = printed_by([f"--config={path}", *flags, *cleared, "--data.batch_size=4", *short(path)], capsys)
    assert "format: messages" in printed


def short(path):
    """The tiny model takes 512 tokens."""
    cap = "--data.max_response_tokens=16" if path.stem == "demo_sft" else "--data.generator.max_new_tokens=16"
    return ["--data.max_prompt_tokens=64", cap]


def test_the_cap_of_sft_is_understood(flags, capsys):
    row = rows_of(printed_by([*flags, "--data.max_response_tokens=1"], capsys))[0]
    assert row["response"] == (1, "1") and "terminator" not in row
    with pytest.raises(UserError, match=r"data\.max_response_tokens is 2, and data\.generator\.max_new_tokens 1: "):
        check.main([*flags, "--data.max_response_tokens=2", "--data.generator.max_new_tokens=1"])


def test_a_config_of_sft_that_names_a_sampler_is_understood(flags, capsys, tmp_path):
    of_sft = [f"--export.output_dir={tmp_path / 'run'}", "--data.generator.max_new_tokens=1"]
    row = rows_of(printed_by([*flags, *of_sft], capsys))[0]
    assert row["response"] == (1, "1") and "terminator" not in row


def test_a_plugin_s_settings_and_other_sections_are_understood_but_not_made(flags, capsys, tmp_path):
    others = ["--trainer.accelerator=gpu", "--trainer.devices=8", f"--self_play.output_dir={tmp_path / 'run'}"]
    others += ["--model.loss=SpaceLoss", "--data.generator=TransformersGenerator", "--trainer.callbacks+=Health"]
    assert "format: messages" in printed_by([*flags, *others], capsys)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_its_own_is_taken(flags, capsys, tmp_path, model):
    assert "format: messages" in printed_by([*flags, f"--data.tokenizer_name_or_path={model}"], capsys)


def test_what_was_counted_is_listed_with_its_places(flags, capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("a") as file:
        file.write("{oops\n" * 2 + path.read_text().splitlines()[0] + "\n")
    printed = printed_by([*flags, "--data.on_bad_row=drop"], capsys)
    assert "2 of 15 rows are bad and were dropped" in printed
    assert f"note: {COUNTED['exact_duplicates']}: 1, the first {path}, line 15 repeats {path}, line 1\n" in printed
    assert re.search(rf"train_data, not JSON: 2\n  {path}, line 13: not JSON.*\n  {path}, line 14: not JSON", printed)


def test_no_control_character_of_the_data_reaches_the_terminal(flags, capsys, tmp_path):
    evil = "\x1b[31m\x07\r\x9b2J\u202e\u200b\u2028\t"
    messages = [{"role": "user", "content": f"{evil}x"}, {"role": "assistant", "content": f"y{evil}"}]
    bad = {"messages": [{"role": evil, "content": evil}], evil: evil}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'messages': messages})}\n{json.dumps(bad)}\n{evil}\n")
    printed = printed_by([*flags, "--data.batch_size=1", "--data.on_bad_row=drop"], capsys)
    assert all(char.isprintable() or char == "\n" for char in printed)
    assert r"\x1b [ 3 1 m \x07 \r" in printed


@pytest.mark.parametrize("given", [["--sample", "5"], ["--sample=5"]])
def test_a_sample_is_read_whole_but_encoded_alone(flags, capsys, given):
    printed = printed_by([*flags, *given, "--data.batch_size=12"], capsys)
    assert (
        "data: read 12 rows of" in printed and "note: of 12 rows 5 are encoded and counted (train), a sample" in printed
    )
    assert "to train on: 5 rows, a sample of 12\n" in printed
    assert len(rows_of(printed)) == 2


@pytest.mark.parametrize("given", [["--sample"], ["--sample=0"], ["--sample", "many"]])
def test_a_sample_is_a_number_of_rows(flags, given):
    with pytest.raises(UserError, match="--sample must be a number of rows, at least 1, got"):
        check.main([*flags, *given])


def test_the_ends_of_the_model_are_known_without_its_weights(flags, capsys, tmp_path):
    folder = tmp_path / "with_ends"
    save_tiny_model(folder)
    save_file({}, folder / "model.safetensors")  # whole, and nothing to load
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 256]}')
    flags[1] = f"--model.model_name_or_path={folder}"
    (tmp_path / "rows.jsonl").write_text(
        (tmp_path / "rows.jsonl").read_text().replace('"content": "1"', '"content": "<|endoftext|>"')
    )
    first = rows_of(printed_by(flags, capsys))[0]
    assert first["response"] == (13, " ".join("<|endoftext|>")) and first["terminator"] == (1, "<|im_end|>")


# --- colours ----------------------------------------------------------------------------------------------------------


def test_every_token_is_coloured_by_what_it_is_where_colours_are_wanted(flags, capsys, monkeypatch):
    plain = printed_by(flags, capsys)
    assert "\x1b" not in plain  # not a terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = printed_by(flags, capsys)
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain
    for kind, tokens in (
        ("prompt", PROMPT),
        ("response", "1 1"),
        ("terminator", "<|im_end|>"),
        ("padding", "<|im_end|>"),
    ):
        assert f"\x1b[{check.KINDS[kind][0]}m{tokens}\x1b[0m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed_by(flags, capsys) == plain


def test_a_long_prompt_is_wrapped_to_the_terminal_and_every_line_coloured(flags, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "70")
    write_rows(tmp_path / "rows.jsonl")
    text = (tmp_path / "rows.jsonl").read_text().replace("0+1?", "word " * 30)
    (tmp_path / "rows.jsonl").write_text(text)
    shown = printed_by(flags, capsys).partition("One pair")[2].partition("read, never")[0]
    lines = [line for line in shown.splitlines() if "\x1b[36m" in line]
    assert len(lines) > 10 and all(line.endswith("\x1b[0m") for line in lines[:-1])
    assert all(len(re.sub(r"\x1b\[\d*m", "", line)) <= 70 for line in lines)
    assert shown.count("w o r d ␣") > 2


def test_words_of_a_sentencepiece_vocabulary_keep_their_space():
    tokenizer = metaspace_tokenizer("first", CHATML)
    ids = [tokenizer.get_vocab()[token] for token in ("▁4", "4", "▁", "\n")]
    assert [check._show_token(tokenizer, token) for token in ids] == ["␣4", "4", "␣", r"\n"]


# --- what cannot be run is refused in a sentence ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--data.train_data=nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("--data.train_dta=x", "train_dta"),
        ("--model.model_name_or_path=./no/model", "'./no/model' does not exist"),
        ("--data.batch_size=13", "12 rows to train on are fewer than data.batch_size 13"),
        ("--data.batch_size=0", "data.batch_size must be at least 1, got 0"),
        ("--data.on_bad_row=skip", "on_bad_row"),
        ("--data.generator.max_new_tokens=600", "but the model takes 512"),
        ("--data.prompt_template=nonsense", "data.prompt_template 'nonsense'"),
        ("--data.max_prompt_tokens=2", "all 12 prompts of"),
        ("--model.learning_rate=[1e-5]", "model.learning_rate"),
        ("--model.beta=[1, 2]", "model.beta"),
        ("--model.beta=-1", "beta"),
    ],
)
def test_a_run_that_could_not_begin_is_refused_with_exit_code_2(flags, refusal, flag, words):
    args = [given for given in flags if given.split("=")[0] != flag.split("=")[0]] + [flag]
    with pytest.raises(UserError, match=re.escape(words)):
        check.main(args)
    refusal(["check", *args])


def test_help_teaches(capsys):
    cli.main(["check", "--help"])
    printed = capsys.readouterr().out
    for words in (
        "usage: spin-lightning check",
        "without loading the model",
        "--data.on_bad_row drop",
        "NO_COLOR",
    ):
        assert words in printed


def test_of_pairs_both_answers_are_shown(tmp_path, model, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f'{{"prompt": "q{n}", "chosen": "yes", "rejected": "never"}}\n' for n in range(9)))
    check.main([f"--model.model_name_or_path={model}", f"--data.train_data={path}", "--data.too_long=drop"])
    printed = capsys.readouterr().out
    assert "tokens of rejected answers: median 6" in printed
    assert "the same prompt, and the answer that is not preferred" in printed and "n e v e r" in printed
