"""``spin-lightning chat``: a conversation with a model of any iteration, or with two that are asked the same.

On a terminal responses appear as they are made. Where the input is no terminal, each line of it is a question of its
own, so that scripts can ask.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from spin_lightning.cli.arguments import Arguments, find_device
from spin_lightning.cli.quiet import silence_libraries
from spin_lightning.data.encoding import Encoder
from spin_lightning.generation.base import Player, opened, seed_of
from spin_lightning.generation.transformers import TransformersGenerator
from spin_lightning.models.adapters import LoraAdapter, base_name_of
from spin_lightning.models.loading import (
    context_length,
    dtype_name,
    end_ids,
    load_policy,
    load_tokenizer,
    stored_dtype,
)
from spin_lightning.stages.export import find_exported
from spin_lightning.terminal import ending_with_its_reader, printable, say
from spin_lightning.types import Message, UserError

_HELP = """/reset      begins another conversation
/save FILE  adds this one to FILE, as a row for sft
/quit       ends, as Ctrl-D does
Ctrl-C stops a response."""


@dataclass
class Speaker:
    """A model with what was said so far.

    Attributes:
        name: What it is called.
        model: In evaluation mode.
        encoder: Of its own tokenizer and template.
        limit: Tokens that it takes, prompt and response together. None: nobody knows.
        turns: The conversation.
    """

    name: str
    model: Any
    encoder: Encoder
    limit: int | None
    turns: list[Message] = field(default_factory=list)

    def answer(self, question: str, options: Namespace, seed: int, show: Callable[[str], object]) -> str:
        """Ask the model, and keep question and response. What is interrupted is kept as far as it came.

        Args:
            question: The user's turn.
            options: How to sample.
            seed: Of the response.
            show: Called with each further piece of the response.

        Returns:
            How it ended: ``stop``, ``length``, or ``interrupted``.

        Raises:
            UserError: The conversation does not fit into the model, or its template does not take it.
        """
        turns: list[Message] = [*self.turns, {"role": "user", "content": question}]
        prompt_ids = self.encoder.prompt_ids(turns)
        room = options.max_new_tokens if self.limit is None else self.limit - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt_ids)} tokens, and {self.name} takes {self.limit}, its response "
                "included. /reset begins another one."
            )
        generator = TransformersGenerator(min(options.max_new_tokens, room), options.temperature, options.top_p)
        stream = Stream(self.encoder, show)
        generator.heard = stream.hear
        ended = "interrupted"
        with suppress(KeyboardInterrupt), opened(generator, Player(self.model)):
            encoder = self.encoder
            ((_, response),) = generator.generate([prompt_ids], [seed], encoder.end_ids, encoder.pad_id)
            ended = response.finish_reason
        text = stream.close()
        if text:
            self.turns = [*turns, {"role": "assistant", "content": text}]
        return ended


class Stream:
    """The text of a response as it grows, in pieces that a terminal shows and does not obey.

    Args:
        encoder: Knows the text of ids.
        show: Called with each further piece.
    """

    def __init__(self, encoder: Encoder, show: Callable[[str], object]) -> None:
        self.encoder, self.show = encoder, show
        self.ids: list[int] = []
        self.shown = ""

    def hear(self, tokens: Sequence[int]) -> None:
        """Take the next token of the one response."""
        self.ids += tokens
        # not yet whole: a character of several tokens; a joiner, of which the next character decides
        self._grow(printable(self.encoder.decode(self.ids).rstrip("\ufffd\u200c\u200d")))

    def close(self) -> str:
        """The whole text, all of which is shown then."""
        text = self.encoder.decode(self.ids)
        self._grow(printable(text))
        return text

    def _grow(self, text: str) -> None:
        if text.startswith(self.shown) and len(text) > len(self.shown):
            self.show(text[len(self.shown) :])
            self.shown = text


def main(args: list[str]) -> None:
    """Talk, until the input ends.

    Args:
        args: Of the command line.

    Raises:
        UserError: There is no such model, or an option is outside its range.
    """
    silence_libraries()
    options = parse(args)
    is_live, output = sys.stdin.isatty(), sys.stdout
    with redirect_stdout(sys.stdout if is_live else sys.stderr):  # a script reads responses alone
        speakers = [_load(*find_model(options.run, options.iteration), options)]
        if options.against is not None:
            is_number = options.against.isdecimal()
            given = (options.run, int(options.against)) if is_number else (options.against, None)
            speakers.append(_load(*find_model(*given), options))
        with ending_with_its_reader():
            if is_live:
                _talk(speakers, options)
            else:
                _answer_lines(speakers, options, output)


def parse(args: Sequence[str]) -> Namespace:
    """Read the arguments.

    Raises:
        UserError: They are not as they should be.
    """
    options = Arguments("chat")
    options.add_argument("run")
    options.add_argument("--iteration", type=int)
    options.add_argument("--against")
    options.add_argument("--system")
    options.add_argument("--temperature", type=float, default=0.7)
    options.add_argument("--top_p", type=float, default=1.0)
    options.add_argument("--max_new_tokens", type=int, default=512)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--prompt_template")
    options.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--device")
    options.add_argument("--json", action="store_true")
    found = options.parse_args(args)
    TransformersGenerator(found.max_new_tokens, found.temperature, found.top_p)  # refuses what is out of range
    return found


# --- the models -------------------------------------------------------------------------------------------------------


def find_model(name: str, iteration: int | None = None) -> tuple[str, str]:
    """Which model a name stands for, and what to call it.

    Args:
        name: The folder of a run, of a model or of an adapter, a ``.gguf`` file, or a hub name.
        iteration: Of a run with iterations. None: the last one with a model.

    Raises:
        UserError: The folder holds no model, or the run none of that iteration.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if iteration is not None:
            raise UserError(f"--iteration {iteration} needs the folder of a run with iterations, and {name!r} is none.")
        return name, name
    found = find_exported(folder, iteration)
    place = found.parent
    is_numbered = place.parent == folder and place.name.startswith("iteration_")
    return str(found), f"{place.name.replace('_', ' ')} of {name}" if is_numbered else name


def _load(path: str, name: str, options: Namespace) -> Speaker:
    """A model that is ready to answer.

    Raises:
        UserError: It cannot be loaded, or there is no such device.
    """
    device = find_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    is_adapter = (Path(path).expanduser() / "adapter_config.json").is_file()
    base = base_name_of(path) if is_adapter else path
    stored = (stored_dtype(base) or "float32") if options.dtype is None and device.type != "cpu" else "float32"
    model = load_policy(base, dtype=getattr(torch, options.dtype or stored))
    if is_adapter:
        model = LoraAdapter(path=path).apply(model)
    tokenizer = load_tokenizer(path)
    try:
        encoder = Encoder(tokenizer, options.prompt_template)
    except UserError as error:
        raise UserError(str(error).replace("data.prompt_template", "--prompt_template")) from None
    encoder.end_at(end_ids(base, tokenizer))
    say(f"{name}: {dtype_name(model.dtype)} on {device.type}")
    policy: Any = model.to(device)  # type: ignore[arg-type]
    return Speaker(name, policy.eval(), encoder, context_length(policy.config), _beginning(options))


def _beginning(options: Namespace) -> list[Message]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


# --- the conversation -------------------------------------------------------------------------------------------------


def _talk(speakers: Sequence[Speaker], options: Namespace) -> None:
    """Ask and answer on a terminal."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() has a history and arrow keys with it
    say(f"temperature {options.temperature:g}; /help lists the commands")
    number = 0
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D ends")
            continue
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/reset":
            for speaker in speakers:
                speaker.turns = _beginning(options)
            number = 0
            say("another conversation begins")
        elif word == "/save":
            _save(speakers, rest.strip())
        elif re.fullmatch(r"/\w+", word):
            say(_HELP if word == "/help" else f"there is no {word}; /help lists the commands")
        elif line:
            for speaker in speakers:
                _show_answer(speaker, line, options, number, is_named=len(speakers) > 1)
            number += 1


def _show_answer(speaker: Speaker, question: str, options: Namespace, number: int, is_named: bool) -> None:
    """Have one of the models answer on the terminal."""
    if is_named:
        say(f"--- {speaker.name}")
    try:
        ended = speaker.answer(question, options, seed_of(options.seed, 0, number, 0), _write)
    except UserError as error:
        say(f"error: {error}")
        return
    say("")
    if ended == "length":
        say("(cut: it has as many tokens as --max_new_tokens allows, or as the model has room for)")
    elif ended == "interrupted":
        say("(stopped)")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _save(speakers: Sequence[Speaker], name: str) -> None:
    """Add the conversation to a file, a row for each model that has said something."""
    rows = [_row_of(speaker) for speaker in speakers if speaker.turns and speaker.turns[-1]["role"] == "assistant"]
    if not name or not rows:
        say("nothing was said yet" if name else "/save wants the name of a file: /save mine.jsonl")
        return
    try:
        with Path(name).expanduser().open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        say(f"error: {name!r} cannot be written: {error.strerror}")
        return
    say(f"{len(rows)} row{'s' * (len(rows) > 1)} added to {name}")


def _row_of(speaker: Speaker) -> dict[str, Any]:
    return {"messages": speaker.turns, "model": speaker.name}


def _answer_lines(speakers: Sequence[Speaker], options: Namespace, output: TextIO) -> None:
    """Answer each line of the input, in a conversation of its own.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    for number, line in enumerate(sys.stdin):
        question = line.rstrip("\r\n")
        if not question.strip():
            continue
        for speaker in speakers:
            speaker.turns = _beginning(options)
            if len(speakers) > 1 and not options.json:
                output.write(f"--- {printable(speaker.name)}\n")
            pieces: list[str] = []
            show: Callable[[str], object] = pieces.append if options.json else output.write
            try:
                ended = speaker.answer(question, options, seed_of(options.seed, 0, number, 0), show)
            except UserError as error:
                ended = "refused"
                speaker.turns = [*_beginning(options), {"role": "user", "content": question}]
                say(f"line {number + 1}: {error}")
            if ended == "interrupted":
                raise KeyboardInterrupt
            output.write(json.dumps({**_row_of(speaker), "finish_reason": ended}) if options.json else "")
            output.write("\n")
            output.flush()
