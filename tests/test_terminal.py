"""Others' text is shown on a terminal, never obeyed: in prints, errors, logs, warnings, tracebacks and model cards."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_rows

from spin_lightning.cli.commands import main
from spin_lightning.models.model_card import render_model_card
from spin_lightning.stages.samples import side_by_side
from spin_lightning.terminal import printable, say

#: Renames the window, clears the screen, turns the reading direction, is invisible, ends a line, is half a character.
EVIL = "\x1b]0;pwned\x07\x1b[2J\r\b\x9b2J\x7f\u202e\u2066\u200b\u200f\u2028\u2029\ufeff\xad\ud800\U000e0041"


def is_harmless(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def test_every_character_that_a_terminal_obeys_is_written_as_its_escape() -> None:
    shown = printable(f"a{EVIL}\nb")
    assert (
        is_harmless(shown)
        and shown.startswith(r"a\x1b]0;pwned\x07\x1b[2J\r\x08\x9b2J\x7f\u202e")
        and shown.endswith("\nb")
    )
    for text in ("Größe 日本 é 👍🏽", "שלום مرحبا हिन्दी", "a\n  b", ""):
        assert printable(text) == text


def test_joiners_stay_where_words_and_emoji_need_them() -> None:
    for text in (
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0915\u094d\u200d\u0937",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f\u200d\U0001f525",
    ):
        assert printable(text) == text
    for text in (
        "pay\u200dpal",
        "\u200d\u0915",
        "\u0915\u200d",
        "\u0915\u200d\u200d\u0915",
        "\u0915\u200c\u202e\u0915",
    ):
        assert "\\u200" in printable(text) and is_harmless(printable(text))


def test_samples_show_it_too() -> None:
    shown = side_by_side({f"real{EVIL}": f"safe{EVIL}\tand\nsound"})
    assert is_harmless(say_to_string(shown)) and r"safe\x1b]0;pwned" in shown and "and sound" in shown


def say_to_string(text: str) -> str:
    stream = io.StringIO()
    say(text, file=stream)
    return stream.getvalue()


def test_nothing_in_the_package_prints_past_say() -> None:
    """``print`` is for the package's own words: help, the colours of ``check``, the end of a schema."""
    found = {}
    root = Path(__file__).parent.parent / "spin_lightning"
    for path in root.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        count = sum(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
        if count:
            found[path.name] = count
    assert found == {"terminal.py": 1, "commands.py": 4, "check.py": 1, "schema.py": 1}


@pytest.mark.parametrize("where", ["model type", "template", "role", "column", "flag", "config", "command"])
def test_no_file_and_no_argument_makes_the_command_line_print_it(
    where: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows, folder, extra = write_rows(tmp_path / "rows.jsonl"), tmp_path / "model", []
    folder.mkdir()
    for path in Path(model).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    turns = [{"role": "user", "content": f"hi {EVIL}"}, {"role": "assistant", "content": "yo"}]
    if where == "model type":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": f"x{EVIL}"}))
    elif where == "template":
        (folder / "chat_template.jinja").write_text("{{ raise_exception('no: ' + messages[0]['content']) }}")
        Path(rows).write_text(json.dumps({"messages": turns}) + "\n")
    elif where == "role":
        turns[0]["role"] = f"us{EVIL}"
        Path(rows).write_text(json.dumps({"messages": turns}) + "\n")
    elif where == "column":
        Path(rows).write_text(json.dumps({f"messages{EVIL}": [1]}) + "\n")
    elif where == "flag":
        extra = [f"--model.beta={EVIL}", f"--data.x{EVIL}=1"]
    elif where == "config":
        (tmp_path / "c.yaml").write_text(f"model: {{{EVIL[:-2]}: [", encoding="utf-8")
        extra = ["--config=c.yaml"]
    command = f"fit{EVIL}" if where == "command" else "check"
    with pytest.raises(SystemExit) as stop:
        main(
            [
                command,
                f"--model.model_name_or_path={folder}",
                f"--data.train_data={rows}",
                "--data.val_fraction=0",
                *extra,
            ]
        )
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.startswith("spin-lightning: error: ")
    assert is_harmless(printed.err) and is_harmless(printed.out)


def test_logs_warnings_and_tracebacks_of_a_program_are_printable_too() -> None:
    code = f"""
import logging, warnings
from spin_lightning.terminal import guard
guard()
guard()
evil = {EVIL[:-2]!r}
logging.getLogger("x").warning("log %s", evil)
warnings.warn("warning " + evil)
raise RuntimeError("error " + evil)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert is_harmless(printed)
    for kind in ("log", "UserWarning: warning", "RuntimeError: error"):
        assert rf"{kind} \x1b]0;pwned" in printed
    assert r"\\x1b" not in printed.replace(repr(EVIL[:-2]), "")  # once, not escaped again


def test_a_model_card_cannot_be_broken_by_a_name() -> None:
    name = f"evil`|\n---\ntags: [x]\n<script>alert(1)</script>{EVIL}"
    manifest = {
        "opponent": name,
        "versions": {"spin_lightning": "1"},
        "binding": {"opponent_sha256": "a" * 64, "seed": 0, "sampling": {"generator": f"[x](y) <b>|`{name}"}},
    }
    summary = {
        "iteration": 0, "beta": 1.0, "first_loss": None, "last_loss": None, "updates": 0, "val_nll": None,
        "epoch_metrics": {},
        "pairs": {"training_pairs": 1, "training_pairs_dropped": 0},
    }  # fmt: skip
    card = render_model_card(summary, manifest)
    assert is_harmless(card) and card.count("\n---\n") == 1 and "tags: [x]" not in card.splitlines()
    table = [line for line in card.splitlines() if line.startswith(("| opponent", "| sampling"))]
    assert [line.count("|") for line in table] == [3, 3]
    assert table[0].count("`") == 4 and not {"<", "[", "`"} & set(table[1])


@pytest.mark.parametrize(
    "args", [["schema", "fit"], ["check", "--data.train_data={rows}", "--model.model_name_or_path={model}"]]
)
def test_a_command_ends_quietly_when_nobody_reads_on(args, model, rows):
    args = [arg.format(model=model, rows=rows) for arg in args]
    command = [sys.executable, "-c", "import sys; from spin_lightning.cli import main; main(sys.argv[1:])", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 141, said
    assert "Traceback" not in said
