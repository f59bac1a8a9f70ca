"""``spin-lightning chat``: on a terminal, from a script, with the models that runs leave behind."""

from __future__ import annotations

import builtins
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer, load, save_tiny_model

from spin_lightning import RowDataModule, TransformersGenerator
from spin_lightning.cli.chat import Stream, find_model
from spin_lightning.cli.commands import main
from spin_lightning.data.encoding import Encoder
from spin_lightning.generation.base import Player, opened, seed_of
from spin_lightning.types import UserError

Refusal = Callable[[Sequence[str]], str]
FEW = ["--max_new_tokens", "6", "--temperature", "1", "--device", "cpu"]


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is on the screen after a person has typed some lines, and Ctrl-D; an error is raised in their place."""

    def run(args: Sequence[str], *lines: str | BaseException) -> str:
        remaining: Iterator[str | BaseException] = iter(lines)

        def typed(prompt: str = "") -> str:
            line = next(remaining, EOFError())
            if isinstance(line, BaseException):
                raise line
            sys.stdout.write(f"{prompt}{line}\n")
            return line

        terminal = io.StringIO()
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", terminal)
        monkeypatch.setattr(builtins, "input", typed)
        main(["chat", *args, *FEW])
        return capsys.readouterr().out

    return run


@pytest.fixture
def piping(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """What is written to stdout and stderr where the input is a file."""

    def run(args: Sequence[str], text: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        main(["chat", *args, *FEW])
        return capsys.readouterr()

    return run


def response_of(folder: str, turns: list[Any], number: int = 0) -> str:
    """What a game's sampler answers with the seed of the n-th question."""
    encoder = Encoder(byte_tokenizer())
    generator = TransformersGenerator(6)
    with opened(generator, Player(load(folder).eval())):
        prompt = encoder.prompt_ids(turns)
        ((_, response),) = generator.generate([prompt], [seed_of(0, 0, number, 0)], encoder.end_ids, encoder.pad_id)
    return encoder.decode(response.ids)


def asked(*texts: str) -> list[Any]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_each_line_of_a_script_is_a_question_of_its_own(model, piping):
    out, err = piping([model, "--json"], "1+1?\n\n2+2?\n")
    first, second = map(json.loads, out.splitlines())
    assert first["messages"] == asked("1+1?", response_of(model, asked("1+1?")))
    assert second["messages"] == asked("2+2?", response_of(model, asked("2+2?"), number=2))
    assert first["model"] == model and first["finish_reason"] == "length" and model in err


def test_a_script_gets_what_a_terminal_would_not_obey(model, piping):
    out, _ = piping([model], "1+1?\n2+2?\n")
    from spin_lightning.terminal import printable

    expected = [response_of(model, asked("1+1?")), response_of(model, asked("2+2?"), number=1)]
    assert out == "".join(f"{printable(text)}\n" for text in expected)


def test_a_conversation_goes_on_and_begins_again(model, typing, tmp_path):
    saved = tmp_path / "mine.jsonl"
    screen = typing(
        [model, "--system", "be brief"], "a?", "b?", f"/save {saved}", "/reset", "/save x", "c?", "/quit", "d?"
    )
    (row,) = [json.loads(line) for line in saved.read_text().splitlines()]
    turns: list[Any] = [{"role": "system", "content": "be brief"}, *asked("a?")]
    turns += [{"role": "assistant", "content": response_of(model, turns)}, *asked("b?")]
    turns += [{"role": "assistant", "content": response_of(model, turns, number=1)}]
    assert row["messages"] == turns
    assert f"1 row added to {saved}" in screen and "another conversation begins" in screen
    assert "nothing was said yet" in screen and "(cut:" in screen and "d?" not in screen


def test_what_was_saved_is_a_row_for_sft(model, typing, tmp_path):
    saved = tmp_path / "mine.jsonl"
    typing([model], "a?", f"/save {saved}", "b?", f"/save {saved}")
    data = RowDataModule(str(saved), val_fraction=0.0, batch_size=1, max_response_tokens=99)
    data.tokenizer = byte_tokenizer()
    data.setup("fit")
    assert [len(prompt.row.prompt) for prompt in data.prompts] == [1, 3]


def test_ctrl_c_stops_the_response_and_not_the_program(model, typing, monkeypatch):
    hear = Stream.hear

    def interrupted(self, tokens):
        hear(self, tokens)
        if len(self.ids) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "hear", interrupted)
    screen = typing([model], KeyboardInterrupt(), "a?", "/help", "/save", "/what")
    assert "/quit or Ctrl-D ends" in screen and "(stopped)" in screen
    assert "/reset      begins" in screen and "/save wants the name" in screen
    assert screen.count("/reset      begins") == 1 and "there is no /what; /help lists the commands" in screen


def test_two_models_answer_the_same_question(typing, tmp_path):
    for number in (0, 1):
        save_tiny_model(tmp_path / "run" / f"iteration_{number}" / "policy", seed=number)
        (tmp_path / "run" / f"iteration_{number}" / "summary.json").write_text("{}")
    run = str(tmp_path / "run")
    screen = typing([run, "--against", "0"], "a?", f"/save {tmp_path / 'two.jsonl'}")
    assert screen.index(f"--- iteration 1 of {run}") < screen.index(f"--- iteration 0 of {run}")
    rows = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == [f"iteration 1 of {run}", f"iteration 0 of {run}"]
    said = [row["messages"][1]["content"] for row in rows]
    assert said == [response_of(f"{run}/iteration_{number}/policy", asked("a?")) for number in (1, 0)]


def test_a_conversation_that_is_too_long_is_said(model, typing, piping):
    long = "x" * 600  # of a model that takes 512 tokens
    screen = typing([model], long, "a?")
    assert "tokens, and" in screen and "takes 512, its response included. /reset" in screen
    out, err = piping([model, "--json"], f"{long}\na?\n")
    first, second = map(json.loads, out.splitlines())
    assert first["finish_reason"] == "refused" and first["messages"] == asked(long) and "line 1: the conv" in err
    assert second["messages"][0] == asked("a?")[0]


def test_pieces_add_up_to_what_a_terminal_can_show():
    pieces: list[str] = []
    encoder = Encoder(byte_tokenizer())
    stream = Stream(encoder, pieces.append)
    text = "a\x1b[2J\u00e4\u4e2d \U0001f469\u200d\U0001f4bb b\u200d"
    for token in byte_tokenizer()(text, add_special_tokens=False).input_ids:
        stream.hear([token])
    assert stream.close() == text
    assert "".join(pieces) == "a\\x1b[2J\u00e4\u4e2d \U0001f469\u200d\U0001f4bb b\\u200d"
    assert "\u00e4" in pieces and "\\x1b" in pieces  # as they come, and no character in halves


def test_an_adapter_is_talked_to_on_its_base(piping, tmp_path):
    pytest.importorskip("peft")
    from spin_lightning import LoraAdapter
    from spin_lightning.models.adapters import save_adapter

    base = save_tiny_model(tmp_path / "base")
    policy = LoraAdapter(r=2).apply(load(base))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(policy, byte_tokenizer(), tmp_path / "run" / "adapter", "# card\n")
    (tmp_path / "run" / "summary.json").write_text("{}")
    with_adapter, _ = piping([str(tmp_path / "run"), "--json"], "1+1?\n")
    alone, _ = piping([base, "--json"], "1+1?\n")
    assert json.loads(with_adapter)["messages"][0] == json.loads(alone)["messages"][0]
    assert json.loads(with_adapter)["messages"] != json.loads(alone)["messages"]


def test_of_a_run_the_last_iteration_with_a_model_is_taken(tmp_path):
    for number in (0, 9, 10):
        (tmp_path / f"iteration_{number}" / "policy").mkdir(parents=True)
        (tmp_path / f"iteration_{number}" / "summary.json").write_text("{}")
    (tmp_path / "iteration_11" / "policy").mkdir(parents=True)  # its summary is not there yet
    assert find_model(str(tmp_path)) == (str(tmp_path / "iteration_10" / "policy"), f"iteration 10 of {tmp_path}")
    assert find_model(str(tmp_path / "iteration_9"))[0] == str(tmp_path / "iteration_9" / "policy")
    with pytest.raises(UserError, match=r"no model of iteration 11; it has those of 0, 9, 10\."):
        find_model(str(tmp_path), 11)
    assert find_model("org/name") == ("org/name", "org/name")


def test_what_cannot_be_talked_to_says_so(refusal: Refusal, model, tmp_path):
    for args, words in (
        ([str(tmp_path)], "there is no model in"),
        ([model, "--iteration", "0"], "is of a run with iterations"),
        ([model, "--temperature", "-1"], "temperature must be 0 (greedy) or positive, got -1.0"),
        ([model, "--max_new_tokens", "x"], "argument --max_new_tokens: invalid int value: 'x'"),
        ([model, "--device", "nowhere"], "--device 'nowhere' cannot be used"),
        (["./nothing.gguf"], "does not exist"),
    ):
        assert words in refusal(["chat", *args]), args


def test_a_model_without_a_template_is_given_one(piping, refusal: Refusal, tmp_path):
    folder = tmp_path / "base"
    save_tiny_model(folder)
    byte_tokenizer(chat_template=None).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert "Set --prompt_template to one of ['alpaca'" in refusal(["chat", str(folder)])
    out, _ = piping([str(folder), "--prompt_template", "alpaca", "--json"], "1+1?\n")
    assert json.loads(out)["finish_reason"] in ("stop", "length")
