"""One calm display: a live line that never wraps and never doubles, and plain lines where no cursor can move."""

from __future__ import annotations

import io
import logging
import os
import re
import select
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from games import Do, Game
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.live import Live
from transformers import modeling_gguf_pytorch_utils as gguf

from spin_lightning import ShowProgress
from spin_lightning import progress as module
from spin_lightning.cli.commands import run
from spin_lightning.cli.stage_cli import StageCLI
from spin_lightning.data.encoding import Encoder
from spin_lightning.models.loading import load_policy, load_tokenizer, without_bars
from spin_lightning.models.saving import save_model
from spin_lightning.progress import Display, Phase
from spin_lightning.terminal import say


class Clock:
    """A clock that stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """What a terminal shows: as much of one as the display uses. Live text is what is written in cyan."""

    def __init__(self, width: int = 80) -> None:
        self.width = width
        self.rows: list[list[str]] = [[]]
        self.live: list[set[int]] = [set()]  # columns of each row
        self.row = self.column = 0
        self.is_cyan = False
        self.most_live = 0  # rows with live text at one time

    def feed(self, raw: str) -> Screen:
        for control, number, letter, char in re.findall(r"(\x1b\[([\d;?]*)([A-Za-z]))|([\s\S])", raw):
            if control:
                assert letter in "mKAhl", f"{control!r} is nothing that the display has a use for"
                if letter == "m":
                    self.is_cyan = number == "36"
                elif letter in "hl":
                    assert number == "?25"  # rich hides the cursor of others
                elif letter == "K":
                    self.rows[self.row], self.live[self.row] = [], set()
                else:
                    self.row -= int(number or 1)
            elif char == "\r":
                self.column = 0
            elif char == "\n":
                self._go_down()
            else:
                self._put(char)
            self.most_live = max(self.most_live, sum(map(bool, self.live)))
        return self

    def _go_down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])
            self.live.append(set())

    def _put(self, char: str) -> None:
        if self.column == self.width:
            assert not self.is_cyan, "the live line is longer than the terminal is wide"
            self.column = 0
            self._go_down()
        row = self.rows[self.row]
        row += " " * (self.column + 1 - len(row))
        row[self.column] = char
        (self.live[self.row].add if self.is_cyan else self.live[self.row].discard)(self.column)
        self.column += 1

    @property
    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.rows).rstrip("\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """One terminal behind stdout and stderr. No fixture: pytest takes both anew when a test begins."""
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def screen_of(terminal: Terminal) -> Screen:
    return Screen().feed(terminal.getvalue().replace("\n", "\r\n"))


# --- on a terminal --------------------------------------------------------------------------------------------------


def test_the_innermost_phase_has_the_line_and_gives_it_back(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    display = Display(clock)
    display.heading = "iteration 0 (1 of 3)"
    with Phase(display, "training", 10, "steps", waits=True) as training:
        assert terminal.getvalue() == ""  # it may be over at once
        clock.now += 4
        training.advance(2)
        assert screen_of(terminal).text == "iteration 0 (1 of 3), training: 2 of 10 steps (20%), 16 s left"
        with Phase(display, "measuring held-out NLL", 4, "batches"):
            assert screen_of(terminal).text == "iteration 0 (1 of 3), measuring held-out NLL: 0 of 4 batches (0%)"
            clock.now += 3
        assert screen_of(terminal).text == "iteration 0 (1 of 3), training: 2 of 10 steps (20%), 28 s left"
    screen = screen_of(terminal)
    assert screen.most_live == 1
    assert screen.text == "iteration 0 (1 of 3), training: 2 steps in 7 s"
    assert sys.stdout is sys.stderr is terminal


def test_remarks_prints_and_logs_stand_above_the_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    logger, handler = logging.getLogger("of_a_library"), logging.StreamHandler(terminal)  # as old as the library
    logger.addHandler(handler)
    remark = (
        "note: [bold]a remark[/bold] with 100% of its :smile: characters, "
        + "longer than a terminal is wide " * 2
        + "at all"
    )
    display = Display(clock)
    with Phase(display, "answering", 10, "responses") as phase:
        clock.now += 5
        phase.advance(1, tokens=50)
        for write in (say, print, logger.warning, lambda text: print(text, file=sys.stderr)):
            write(remark)
            assert screen_of(terminal).text.endswith("answering: 1 of 10 responses (10%), 45 s left, 10 tokens/s")
    logger.warning("and after it")
    logger.removeHandler(handler)
    screen = screen_of(terminal)
    assert handler.stream is terminal and screen.most_live == 1
    assert terminal.getvalue().count(f"\x1b[2K{remark}\n") == 3  # whole
    assert screen.text.splitlines()[:2] == [  # of our own, with line ends between words
        "note: [bold]a remark[/bold] with 100% of its :smile: characters, longer than a",
        "  terminal is wide longer than a terminal is wide at all",
    ]
    assert screen.text.splitlines()[-2:] == ["answering: 1 responses in 5 s, 10 tokens/s", "and after it"]


def test_a_narrow_terminal_has_shorter_words_and_then_fewer(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    facts = {"loss": "0.412", "margin": "0.831", "mine": "7"}
    seen = {}
    for width in ("120", "80", "60", "12"):
        os.environ["COLUMNS"] = width
        display = Display(clock)
        display.heading = "iteration 0 (1 of 3)"
        phase = Phase(display, "training", 1000, "steps", lambda: facts).begin()
        phase.skip(520)
        clock.now += 40
        phase.advance(100, tokens=61_600)
        (seen[width],) = re.findall(r"\x1b\[36m([^\x1b]+)\x1b\[0m$", terminal.getvalue())
        phase.end(is_done=False)
        terminal.truncate(0)
    assert seen == {
        "120": (
            "iteration 0 (1 of 3), training: 620 of 1,000 steps (62%), 3 min left, loss 0.412, margin 0.831, mine 7, "
            "1,540 tokens/s"
        ),
        "80": "iteration 0 (1/3) training 62%, 3 min left, loss 0.412, margin 0.831, mine 7",
        "60": "iteration 0 (1/3) training 62%, 3 min left, loss 0.412",
        "12": "iteration 0 ",
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_takes_the_line_away_and_leaves_everything_as_it_was(
    error: type[BaseException], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = terminal_of(monkeypatch)
    display = Display(clock)

    def fail() -> None:
        with Phase(display, "training", 10, "steps"), Phase(display, "saving the model"):
            assert screen_of(terminal).text == "saving the model"  # nothing to count, so it is shown at once
            raise error

    with pytest.raises(error):
        fail()
    assert screen_of(terminal).text == "" and "?25" not in terminal.getvalue()  # no cursor was ever hidden
    assert sys.stdout is sys.stderr is terminal and display.phases == []


def test_a_loop_that_was_broken_off_does_not_stay_open(model: str, rows: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Its traceback keeps the loop's generator alive, and a notebook keeps the traceback."""
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "has_control_tokens", lambda *args: 1 / 0)
        game = Game(model, rows, tmp_path, callbacks=[ShowProgress()], trainer={"enable_progress_bar": True})
        with pytest.raises(ZeroDivisionError) as kept:
            game.play()
    assert kept.tb is not None and module.display.phases == []
    display = Display()
    with Phase(display, "answering"):
        Phase(display, "scoring").begin()
    assert display.phases == []


def test_no_colours_where_they_are_not_wanted(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    with Phase(Display(clock), "saving the model"):
        pass
    assert "saving the model" in terminal.getvalue() and "\x1b[3" not in terminal.getvalue()


def test_words_of_others_are_not_obeyed_on_the_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    with Phase(Display(clock), "training", facts=lambda: {"mine\x1b[2J": "\r7"}):
        pass
    assert r"training, mine\x1b[2J \r7" in terminal.getvalue()


# --- elsewhere ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["a file", "TERM=dumb", "only stderr is a terminal"])
def test_without_a_cursor_a_plain_line_comes_now_and_then(
    why: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = terminal_of(monkeypatch)
    if why == "TERM=dumb":
        monkeypatch.setenv("TERM", "dumb")
    else:
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        monkeypatch.setattr(sys, "stderr", terminal if "only" in why else (terminal := io.StringIO()))  # type: ignore[assignment]
    monkeypatch.setenv("FORCE_COLOR", "1")
    display, came = Display(clock), []
    with Phase(display, "answering", 1000, "responses") as phase:
        for done in range(1000):
            before = terminal.getvalue()
            clock.now += 0.25 if done < 500 else 1.0
            phase.advance(1, tokens=10)
            if terminal.getvalue() != before:
                came.append(done + 1)
    # every tenth of the work in its fast half, then every thirty seconds; an end
    assert came[:8] == [100, 200, 300, 400, 500, 530, 560, 590] and len(came) == 5 + 500 // 30
    lines = terminal.getvalue().splitlines()
    assert lines[0] == "answering: 100 of 1,000 responses (10%), 4 min left, 40 tokens/s"
    assert lines[-1] == "answering: 1,000 responses in 10 min, 16 tokens/s"
    assert not {"\r", "\x1b"} & set(terminal.getvalue())


def test_lines_stand_above_a_bar_that_lightning_shows(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    with (
        Live("its bar", console=Console(file=terminal, force_terminal=True, width=80), auto_refresh=False),
        Phase(Display(clock), "answering", 10, "responses") as phase,
    ):
        clock.now += 40
        phase.advance()
        assert screen_of(terminal).text == "answering: 1 of 10 responses (10%), 6 min left\nits bar"
    assert "\x1b[36m" not in terminal.getvalue()


def test_short_work_says_nothing_and_long_work_inside_other_work_every_thirty_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    display = Display(clock)
    with Phase(display, "encoding", 10, "rows") as phase:
        for _ in range(10):
            clock.now += 0.15
            phase.advance()
    assert capsys.readouterr().err == ""
    with Phase(display, "answering", 300, "responses") as answering:
        for _ in range(2):
            with Phase(display, "scoring", 20, "pairs") as scoring:
                for _ in range(20):
                    clock.now += 1
                    scoring.advance()
        answering.advance(20, tokens=400)
        clock.now += 10
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "scoring: 10 of 20 pairs (50%), 10 s left",
        "answering: 20 responses in 50 s, 40 tokens/s",  # 400 tokens in the 10 s that were not of scoring
    ]
    assert said.out == ""


def test_what_was_done_before_says_nothing_about_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Phase(Display(clock), "answering", 1000, "responses") as phase:
        phase.skip(900)
        clock.now += 30
        phase.advance(10)
    assert capsys.readouterr().err.splitlines()[0] == "answering: 910 of 1,000 responses (91%), 4 min left"


def test_a_display_that_is_off_shows_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    display = Display(clock)
    display.is_on = False
    with Phase(display, "saving the model"):
        clock.now += 100
    assert terminal.getvalue() == ""


# --- whole programs -------------------------------------------------------------------------------------------------


def on_a_terminal(code: str, *args: str, cwd: Path | None = None) -> tuple[int, str]:
    """Run Python code on a pseudo-terminal of 80 columns: its exit code and all that it wrote."""
    pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**env, "TERM": "xterm"}, cwd=cwd,
    )  # fmt: skip
    os.close(theirs)
    raw = b""
    while True:
        try:
            if select.select([ours], [], [], 120)[0] and (part := os.read(ours, 65536)):
                raw += part
                continue
        except OSError:  # the other end is closed
            pass
        break
    os.close(ours)
    return process.wait(), raw.decode()


def test_a_signal_is_answered_above_the_line() -> None:
    code = """
        import os, signal
        from spin_lightning.progress import progress
        from spin_lightning.runs import signals
        signals.listen()
        with progress("training") as phase:
            os.kill(os.getpid(), signal.SIGINT)
            phase.display.show(is_new=True)
            signals.end_if_asked()
    """
    _, raw = on_a_terminal(code)
    screen = Screen().feed(raw)
    assert screen.text.startswith("SIGINT received: ending at the next point that can be continued from.")
    assert screen.most_live == 1 and "training" not in screen.text.splitlines()


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "RuntimeError('broken')"])
def test_a_traceback_stands_below_what_was_said_and_the_line_is_gone(error: str) -> None:
    code = f"""
        from spin_lightning import progress
        from spin_lightning.terminal import guard, say
        guard()
        progress.progress("training").begin()  # as a callback does, which may never be told of the end
        say("a remark")
        raise {error}
    """
    exit_code, raw = on_a_terminal(code)
    screen = Screen().feed(raw)
    lines = screen.text.splitlines()
    assert exit_code in (1, -2, 130)
    assert lines[0] == "a remark" and lines[1].startswith("Traceback")
    assert lines[-1].startswith(error.partition("(")[0]) and "training" not in lines and screen.most_live == 1


def test_a_game_on_a_terminal_has_one_live_line_and_whole_remarks(model: str, rows: str, tmp_path: Path) -> None:
    code = """
        import sys
        from spin_lightning import progress
        from spin_lightning.cli import main
        progress.LEAST_SECONDS = progress.FRAME_SECONDS = 0.0  # so that a tiny game shows all it does
        main(sys.argv[1:])
    """
    exit_code, raw = on_a_terminal(
        code, "fit", f"--model.model_name_or_path={model}", f"--data.train_data={rows}", "--data.val_fraction=0.2",
        "--self_play.iterations=2", "--self_play.epochs=1", "--self_play.output_dir=run",
        "--data.generator.max_new_tokens=4", "--data.batch_size=4", "--trainer.accelerator=cpu",
        "--trainer.logger=false", cwd=tmp_path,
    )  # fmt: skip
    screen = Screen().feed(raw)
    assert exit_code == 0 and screen.most_live == 1 and "?25" not in raw
    frames = [re.sub(r"\d+ s left", "0 s left", frame) for frame in re.findall(r"\x1b\[36m([^\x1b]*)\x1b", raw)]
    for beginning in (
        "reading rows: 1 rows", "encoding rows: 1 of 8", "loading the model", "measuring held-out NLL: 0 of 1 batches",
        "iteration 0 (1 of 2), answering: 1 of 8 responses (12%)", "iteration 0 (1 of 2), scoring: 0 of 4 pairs",
        "iteration 0 (1 of 2), training: 0 of 2 steps "
        "(0%)", "iteration 0 (1/2) training 50%, 0 s left, loss 0.693, margin 0.000",
        "iteration 0 (1 of 2), saving the "
        "model", "iteration 1 (2 of 2), scoring the pairs of iteration 0: 0 of 1 shards",
        "iteration 1 (2/2) training 100%, loss 0.69",
    ):  # fmt: skip
        assert any(frame.startswith(beginning) for frame in frames), beginning
    for remark in (
        "model: LlamaForCausalLM with 8,832 parameters, float32, on cpu",
        "iteration 0: the opponent answers 8 prompts, 1 each, temperature 1, top_p 1, at most 4 tokens",
        "health, iteration 0: held-out NLL went from ",
        "the game is over: all 2 iterations were played. Models: run/iteration_*/policy",
    ):
        assert remark in " ".join(screen.text.split()), remark
    for noise in ("GPU available", "Seed set", "max_epochs", "Loading weights", "shards: ", "Params", "Epoch", "it/s"):
        assert noise not in raw, noise


def test_weights_are_read_and_written_without_bars(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    save_model(load_policy(model), load_tokenizer(model), tmp_path / "policy", "# card", 1)
    with without_bars():
        assert list(gguf.tqdm("ab")) == ["a", "b"]
    assert capfd.readouterr() == ("", "")
    assert list(gguf.tqdm("ab", desc="a bar")) == ["a", "b"] and "a bar: 100%" in capfd.readouterr().err


# --- with a Trainer -------------------------------------------------------------------------------------------------


def test_training_without_a_terminal_is_not_silent(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module.display, "clock", clock)

    def wait(*args: Any) -> None:
        clock.now += 31

    Game(
        model, rows, tmp_path, callbacks=[ShowProgress(), Do(on_train_batch_start=wait)],
        play={"iterations": 2, "epochs": [2, 1]}, data={"history": 0}, trainer={"enable_progress_bar": True},
    ).play()  # fmt: skip
    said = capsys.readouterr()
    lines = [
        re.sub(r"-?\d\.\d{3}", "#", line).rpartition(",")[0] for line in said.err.splitlines() if "training" in line
    ]
    assert lines == [
        "iteration 0 (1 of 2), training: 1 of 4 steps (25%), 93 s left, loss #, margin #",
        "iteration 0 (1 of 2), training: 2 of 4 steps (50%), 62 s left, loss #, margin #",
        "iteration 0 (1 of 2), training: 3 of 4 steps (75%), 31 s left, loss #, margin #",
        "iteration 0 (1 of 2), training: 4 of 4 steps (100%), loss #, margin #",
        "iteration 0 (1 of 2), training: 4 steps in 2 min, loss #, margin #",
        "iteration 1 (2 of 2), training: 1 of 2 steps (50%), 31 s left, loss #, margin #",
        "iteration 1 (2 of 2), training: 2 of 2 steps (100%), loss #, margin #",
        "iteration 1 (2 of 2), training: 2 steps in 62 s, loss #, margin #",
    ]
    assert "model: LlamaForCausalLM with 8,832 parameters, float32, on cpu" in said.out
    assert module.display.phases == [] and module.display.heading == ""


@pytest.mark.parametrize("choice", ["nothing", "no bar", "a bar of one's own"])
def test_the_command_line_has_this_display_and_says_little(
    choice: str,
    model: str,
    rows: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[bool] = []
    begin = StageCLI.before_fit

    def look(cli: StageCLI) -> None:
        shown.append(module.display.is_on)
        begin(cli)

    monkeypatch.setattr(StageCLI, "before_fit", look)
    more = {
        "no bar": ["--trainer.enable_progress_bar=false"],
        "a bar of one's own": ["--trainer.callbacks+=TQDMProgressBar"],
    }
    cli = run([
        "sft", f"--model.model_name_or_path={model}", f"--data.train_data={rows}", "--data.val_fraction=0.2",
        f"--export.output_dir={tmp_path}/run", "--trainer.accelerator=cpu", "--trainer.logger=false",
        *more.get(choice, []),
    ])  # fmt: skip
    bars = [type(callback).__name__ for callback in cli.trainer.callbacks if isinstance(callback, ProgressBar)]
    assert bars == {"nothing": ["ShowProgress"], "no bar": [], "a bar of one's own": ["TQDMProgressBar"]}[choice]
    assert shown == [choice != "no bar"] and module.display.is_on  # in this run, and not for ever
    said = capfd.readouterr()
    if choice == "nothing":
        assert re.sub(r"\d+\.\d{3}", "#", said.out).splitlines() == [
            f"data: read 10 rows of {rows} as 'messages': column messages",
            "model: LlamaForCausalLM with 8,832 parameters, float32, on cpu",
            "held-out NLL before training: # nats a response",
            "held-out NLL: # nats a response",
            f"the model is in {tmp_path}/run/policy",
        ]
    if choice != "a bar of one's own":
        assert said.err == ""
