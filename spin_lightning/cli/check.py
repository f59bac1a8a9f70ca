"""``spin-lightning check``: what the data looks like to the game, before a weight is loaded.

Reads, checks, counts and encodes as ``fit`` and ``sft`` do, by the same code, and shows one pair token by token. Of the
model it loads the tokenizer and the config.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from spin_lightning.cli.commands import STAGES
from spin_lightning.cli.settings_errors import explaining_settings
from spin_lightning.cli.stage_cli import parse_settings
from spin_lightning.data.module import RowDataModule
from spin_lightning.models.loading import (
    context_length,
    end_ids,
    load_config,
    load_tokenizer,
    refuse_ids_beyond,
    refuse_without_causal_head,
)
from spin_lightning.stages.stage import Stage
from spin_lightning.terminal import say
from spin_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: What a token can be: how it is coloured, and what becomes of it.
KINDS = {
    "prompt": ("36", "read, never scored"),
    "response": ("32", "scored: its log-probabilities are what the loss compares"),
    "terminator": ("33", "scored too: ends an answer, and generation stops on it. An answer that was cut has none"),
    "padding": (
        "90",
        "fills shorter rows where a batch is padded, never scored. Training lays rows end to end, without any, if the "
        "model can",
    ),
}


def main(args: list[str]) -> None:
    """Check the data of a run and show one pair of it.

    Args:
        args: The arguments of ``fit`` or ``sft``.

    Raises:
        UserError: A run with these settings and data could not begin.
    """
    sample, args = _take_sample(args)
    stage, settings, data = find_stage(args)
    model = settings.model
    callbacks = {section: make_object(kind, settings[section]) for section, kind in stage.callbacks.items()}
    stage.check(make_object(stage.module, model), callbacks)
    data.sample = sample
    config = read_data(settings, data)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    refuse_ids_beyond(rows, data.encoder.tokenizer, data.encoder.pad_id, data.encoder.terminator_id)
    say("\n".join(["", *_summarize(data), ""]))
    print("\n".join(show_pair(data)))  # whose tokens are printable, and colours are wanted


def read_data(settings: Any, data: RowDataModule) -> PreTrainedConfig:
    """Read, check and encode the rows of a run, without loading its model.

    Args:
        settings: Of the run.
        data: Made of them. The rows are in it afterwards.

    Returns:
        The config of the model.

    Raises:
        UserError: The data or the model cannot be used.
    """
    model = settings.model
    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    if data.tokenizer_name_or_path is not None:
        data.tokenizer = load_tokenizer(data.tokenizer_name_or_path)
    else:
        data.tokenizer = load_tokenizer(model.model_name_or_path, **where)
    data.end_ids = end_ids(model.model_name_or_path, data.tokenizer, **where)
    data.setup("fit")
    config = load_config(model.model_name_or_path, **where)
    refuse_without_causal_head(config, model.trust_remote_code)
    if (limit := context_length(config)) is not None:
        data.refuse_longer_than(limit)
    return config


def _take_sample(args: list[str]) -> tuple[int | None, list[str]]:
    """``--sample N``, which only this command has, and the arguments without it."""
    rest, value = [], None
    remaining = iter(args)
    for arg in remaining:
        if arg == "--sample" or arg.startswith("--sample="):
            value = next(remaining, "") if arg == "--sample" else arg.partition("=")[2]
            if not (value.isascii() and value.isdigit() and int(value)):
                raise UserError(f"--sample must be a number of rows, at least 1, got {value!r}.")
        else:
            rest.append(arg)
    return None if value is None else int(value), rest


def find_stage(args: list[str]) -> tuple[Stage, Any, RowDataModule]:
    """The first stage that the settings fit, the settings, and the data made of them.

    Raises:
        UserError: They fit none; the message is about the first one.
    """
    first: UserError | None = None
    is_understood = False  # by a stage that refuses what it says: another must not read over that
    for word, path in STAGES.items():
        try:
            stage, settings = resolve_name(path), parse_settings(word, args, may_read_over=not is_understood)
            is_understood = True
            return stage, settings, make_object(stage.data, settings.data)
        except UserError as error:
            first = first or error
    assert first is not None
    raise first from None


def make_object(class_path: str, settings: Any) -> Any:
    """An object of a class, made of its section of the settings."""
    from jsonargparse import ArgumentParser, Namespace

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(resolve_name(class_path), "made")
    with explaining_settings():
        return parser.instantiate_classes(Namespace(made=settings)).made


def _summarize(data: RowDataModule) -> list[str]:
    """What a run trains on, and the places of all that was dropped or is strange."""
    report = data.report
    lines = [f"format: {report['train_data']['format']}"]
    parts = [(f"to train on in iteration {k}", part["train"]) for k, part in enumerate(report.get("iterations", ()))]
    for name, part in [*(parts or [("to train on", report["train"])]), ("held out", report["held_out"])]:
        of = f", a sample of {part['sample_of']}" if "sample_of" in part else ""
        lines.append(f"{name}: {part['prompts']} rows{of}")
        of_kinds = {"prompt_tokens": "prompts", "real_tokens": "real answers", "rejected_tokens": "rejected answers"}
        for kind, what in of_kinds.items():
            if spread := part.get(kind):
                lines.append(
                    f"  tokens of {what}: median {spread['median']:g}, 90 % up to {spread['p90']}, most "
                    f"{spread['most']}"
                )
    for source in ("train_data", "val_data", "train", "held_out"):
        section = report[source] or {}
        for kind, tally in {**section.get("dropped", {}), **section}.items():
            if isinstance(tally, Mapping) and tally.get("count", 0) > 1:  # the first one is on the screen already
                lines += [f"{source}, {kind}: {tally['count']}", *(f"  {place}" for place in tally["first"])]
    return lines


def show_pair(data: RowDataModule) -> list[str]:
    """A pair's two rows as lines to print: every token, under what it is. No response is generated for it."""
    pad = [data.encoder.pad_id]
    first = data.prompts[0]
    # one of another length, if there is any, so that there is padding to see
    other = max(data.prompts[1:], key=lambda prompt: len(prompt.real_ids) != len(first.real_ids), default=None)
    rows = {"the first row, prompt and real answer": first.real_ids} if first.real_ids else {}
    if first.rejected_ids is not None:
        rows["the same prompt, and the answer that is not preferred"] = first.rejected_ids
    elif other is not None and other.real_ids:
        rows["the same prompt; another row's real answer stands where the opponent's will be"] = other.real_ids
    rows = rows or {"the first row, a prompt alone": []}
    longest = max(map(len, rows.values()))
    lines = ["One pair, token by token, with a blank between tokens. ␣ is a space, \\n a new line."]
    for title, response in rows.items():
        is_whole = response[-1:] != [] and response[-1] in data.encoder.end_ids
        parts = {
            "prompt": first.prompt_ids,
            "response": response[:-1] if is_whole else response,
            "terminator": response[-1:] if is_whole else [],
            "padding": pad * (longest - len(response)),
        }
        lines += ["", title]
        for kind, ids in parts.items():
            if ids:
                lines += _lay_out_tokens(kind, [_show_token(data.encoder.tokenizer, token) for token in ids])
    return [*lines, "", *(_colour(kind, f"  {kind:<10}  ") + meaning for kind, (_, meaning) in KINDS.items())]


def _lay_out_tokens(kind: str, tokens: Sequence[str]) -> list[str]:
    label = f"  {kind:<10} {len(tokens):>5}  "
    width = max(shutil.get_terminal_size((100, 24)).columns, 60) - len(label)
    wrapped = textwrap.wrap(" ".join(tokens), width, break_on_hyphens=False)
    return [(label if number == 0 else " " * len(label)) + _colour(kind, line) for number, line in enumerate(wrapped)]


def _show_token(tokenizer: Any, token: int) -> str:
    """A token's text with nothing in it that moves a terminal's cursor, or cannot be seen."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if piece.startswith("▁") and not text.startswith(" "):  # decoding drops a text's first space
        text = f" {text}"
    return "".join(
        "␣" if char == " " else char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text or piece
    )


def _colour(kind: str, text: str) -> str:
    is_wanted = bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()
    if not is_wanted or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{KINDS[kind][0]}m{text}\x1b[0m"
