"""A record to a row: every column layout that can be read, and all checks of what was asked and answered.

No files, no tokenizer and no model: lengths are judged later. Texts are kept to the letter, nothing is stripped. Of a
turn its role and its text are read, an assistant's reasoning and tool calls, and what says whose tool answers. A key
without a value (None) is absent, because data sets fill the keys that a turn does not have.

Nothing is guessed: columns that fit two layouts are an error. A name of ours goes before its aliases, and a layout that
uses more of the columns before one that uses some of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import islice, product, takewhile
from typing import Any, NamedTuple, TypeVar

from spin_lightning.types import FinishReason, Message, Row, UserError

T = TypeVar("T")

#: Who speaks, in any spelling and case, as the role that chat templates know.
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai", "claude"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
_PLAIN_ROLES = ("user", "assistant", "system", "developer", "tool")
#: The text of their turns is a tool call, or a list of them, as JSON.
CALLING_ROLES = {"function_call", "tool_call", "tool_calls"}
TURN_KEYS = (("role", "content"), ("from", "value"))
#: A question with its answer in one item of a conversation.
EXCHANGE_KEYS = (("input", "output"), ("user", "assistant"), ("human", "assistant"), ("question", "answer"))
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
#: False or 0 under one of them: the assistant turn is not to be trained on.
TRAINED_KEYS = ("weight", "train", "training", "loss")
TEXT_PARTS = ("text", "input_text", "output_text")
#: Columns that every layout may have beside its own, with their aliases.
COMMON_COLUMNS = {
    "system": ("system_prompt", "system_message"),
    "history": (),
    "tools": ("functions",),
    "label": ("kto_tag",),
}
#: Columns that often decide a prompt or an answer: where they are not read, that is worth a line of its own.
COLUMNS_THAT_MATTER = {"input", "context", "documents", "instruction", *REASONING_KEYS}
#: A longer row is a bad row: some tokenizers take minutes for it, and no context holds it.
MAX_ROW_CHARACTERS = 1_000_000
NUM_EXAMPLES = 5


class BadRow(Exception):
    """Why one row cannot be used: ``kind`` in two words, for counting, and the whole reason.

    ``load_rows`` collects them, so that one message shows them all.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass
class Tally:
    """How often something was met, and the first places where.

    Example:
        >>> tally = Tally()
        >>> tally.add("train.jsonl, line 4")
        >>> tally
        Tally(count=1, first=['train.jsonl, line 4'])
    """

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        """Count one more, and keep its place if it is among the first."""
        self.count += 1
        if len(self.first) < NUM_EXAMPLES:
            self.first.append(where)

    def listed(self) -> str:
        """The first places, each on a line of its own, and how many more there are."""
        more = f"\n  and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return "".join(f"\n  {place}" for place in self.first) + more


class Turn(NamedTuple):
    """A turn as it was read: whether its response may be trained on, and its keys that have no effect."""

    message: Message
    is_trained: bool = True
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """One column layout. ``read`` turns a record into the conversation up to and including the real response.

    ``ignored`` columns belong to the format but are not read: the opponent writes the losing response afresh.
    ``aliases`` are other names of its columns, which are looked for where our name is not among the data's.
    ``rejected`` reads the conversation that ends with the response that is not preferred, in layouts of preferences.
    """

    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], list[Turn]]
    expected: str
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rejected: Callable[[Mapping[str, Any]], list[Turn]] | None = None

    @property
    def known(self) -> set[str]:
        """All columns that the format reads or knows to have no effect."""
        return {*self.required, *self.optional, *self.ignored, *COMMON_COLUMNS}


class Reading(NamedTuple):
    """The format that fits a source, and which of the user's columns each of ours is."""

    format: str
    origin: dict[str, str]


# --- Values ---------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """The value as a message shows it: its type and its beginning."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _list_first(values: Iterable[Any]) -> str:
    """The first of many, each cut: a message is for a screen."""
    first = [str(value)[:40] for value in islice(values, 9)]
    return repr(first[:8]) if len(first) < 9 else f"{first[:8]} and more"


def _list_columns(columns: Sequence[str]) -> str:
    """The columns of a source as a message names them."""
    return ", ".join(repr(column[:60]) for column in columns[:20]) + (", ..." if len(columns) > 20 else "")


def near(name: str, choices: Iterable[str]) -> str:
    """The choices as a list to print, with those that look like the name."""
    choices = sorted(choices)
    close = get_close_matches(name, choices, n=3, cutoff=0.6)
    listed = ", ".join(map(repr, choices[:20])) + (", ..." if len(choices) > 20 else "")
    return f"{listed} (did you mean {' or '.join(map(repr, close))}?)" if close else listed


def _make_type_error(value: Any, expected: str) -> BadRow:
    return BadRow("missing" if value is None else "wrong type", f"{expected}, got {shown(value)}")


def _check_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _make_type_error(value, f"{what} must be text")
    if "\0" in value:  # ends the text in some tokenizers, and is never meant
        raise BadRow("NUL character", f"{what} holds a NUL character at character {value.index(chr(0))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, and tokenizers crash on it
        reason = f"{what} holds half of a surrogate pair at character {error.start}"
        raise BadRow("half a surrogate pair", reason) from None
    return value


def _read_content(value: Any, what: str) -> str:
    """The text of a turn, which may be a list of text parts."""
    if not isinstance(value, list):
        return _check_text(value, what)
    texts = []
    for part in value:
        if not isinstance(part, dict):
            raise _make_type_error(value, f"{what} must be text")
        kind = part.get("type") or "text"
        if kind not in TEXT_PARTS or "text" not in part:
            raise BadRow(
                "not text", f"{what} has a part of type {str(kind)[:40]!r}, only parts of type 'text' are read"
            )
        texts.append(_check_text(part["text"], f"a part of {what}"))
    return "".join(texts)


def _parse_json(value: Any) -> Any:
    """A list or an object that is written as JSON text, as in a CSV cell; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _read_list(value: Any, expected: str) -> list[Any]:
    value = _parse_json(value)
    if not isinstance(value, list):
        raise _make_type_error(value, f"{expected}")
    return value


def _clean_json(value: Any, what: str) -> Any:
    """A JSON value with checked texts, and without the keys that have no value."""
    if isinstance(value, str):
        return _check_text(value, what)
    if isinstance(value, list):
        return [_clean_json(item, what) for item in value]
    if isinstance(value, dict):
        return {_check_text(key, what): _clean_json(item, what) for key, item in value.items() if item is not None}
    return value


def _read_objects(value: Any, what: str) -> Iterator[Any]:
    """The objects of a list, or the only one, each of them or all as JSON text, with checked texts.

    What JSON text spells as null was meant; elsewhere a data set fills it in, and the key is absent.
    """
    items = _parse_json(value)
    for item in items if isinstance(items, list) else [items]:
        found = _parse_json(item)
        cleaned = _clean_json(found, what)
        yield found if isinstance(value, str) or isinstance(item, str) else cleaned


# --- Turns ----------------------------------------------------------------------------------------------------------


def is_turn(value: Any) -> bool:
    """Whether it looks like a turn of a conversation."""
    return isinstance(value, dict) and any({*keys} <= value.keys() for keys in TURN_KEYS)


def _read_turns(value: Any, column: str) -> list[Turn]:
    lists = [*value.values()] if isinstance(value, dict) else []  # one list for each key
    if lists and all(isinstance(items, list) and len(items) == len(lists[0]) for items in lists):
        value = [dict(zip(value, items, strict=True)) for items in zip(*lists, strict=True)]
    turns = _read_list(value, f"column {column!r} must be a list of turns")
    if column == "conversations" and turns and all(isinstance(turn, str) for turn in turns):  # who speaks first asks
        sides = (_make_user_turn, _make_assistant_turn)
        return [sides[n % 2](text, f"turn {n + 1} of {column!r}") for n, text in enumerate(turns)]
    read = []
    for number, turn in enumerate(turns, 1):
        where = f"turn {number} of {column!r}"
        keys = next((keys for keys in EXCHANGE_KEYS if isinstance(turn, dict) and turn.keys() == {*keys}), None)
        if keys is None:
            read.append(_read_turn(turn, where))
        else:
            read += [
                _make_user_turn(turn[keys[0]], f"{keys[0]!r} of {where}"),
                _make_assistant_turn(turn[keys[1]], f"{keys[1]!r} of {where}"),
            ]
    return read


def _read_transcript(text: Any) -> list[Turn]:
    r"""The turns of a text that tells them as Anthropic's: each behind a blank line and ``Human:`` or ``Assistant:``.

    Example:
        >>> [turn.message["content"] for turn in _read_transcript("\n\nHuman: 1 + 1?\n\nAssistant: 2")]
        ['1 + 1?', '2']
    """
    if not isinstance(text, str) or not re.match(r"\s*Human: .*?\n\nAssistant:", text, re.DOTALL):
        return []
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text.lstrip())[1:]
    sides = {"Human": _make_user_turn, "Assistant": _make_assistant_turn}
    return [sides[who](said, "a turn of the text") for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _read_turn(turn: Any, where: str) -> Turn:
    if isinstance(turn, dict) and len(turn) == 2 and turn.get("role") in _PLAIN_ROLES and "content" in turn:  # most are
        return Turn({"role": turn["role"], "content": _read_content(turn["content"], where)})
    given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    role_key, text_key = next((keys for keys in TURN_KEYS if keys[0] in given), (None, None))
    if role_key is None or text_key is None:
        got = f"the keys {_list_first(turn)}" if isinstance(turn, dict) else shown(turn)
        raise BadRow("malformed turn", f"{where} must have 'role' and 'content', got {got}")
    speaker = given[role_key]
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        expected = ", ".join(ROLES)
        raise BadRow("wrong role", f"{where} has {role_key} {repr(speaker)[:40]}, expected one of {expected}")
    content, extras = given.get(text_key), _read_extras(role, given, where)
    if speaker.lower() in CALLING_ROLES and "tool_calls" not in extras:
        content, extras["tool_calls"] = "", _read_calls(content, where)
    if content is None and "tool_calls" in extras:
        content = ""
    elif content is None and text_key not in turn:
        raise BadRow("malformed turn", f"{where} must have {text_key!r}, got the keys {_list_first(turn)}")
    message: Message = {"role": role, "content": _read_content(content, where), **extras}  # type: ignore[typeddict-item]
    if given.keys() == {role_key, text_key}:
        return Turn(message)
    is_trained = role != "assistant" or _is_trained(given, where)
    used = {role_key, text_key, *(("function_call", *REASONING_KEYS) if role == "assistant" else ()), *extras}
    used |= {key for key in TRAINED_KEYS if given.get(key) in (False, 0)}
    used |= {"weight"} if role == "assistant" and given.get("weight") == 1 else set()
    return Turn(message, is_trained, tuple(k for k in given if k not in used and given[k] not in ("", [], {})))


def _read_extras(role: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a turn has beside role and text, as chat templates take it."""
    if role == "tool":
        return {key: _check_text(given[key], f"{key} of {where}") for key in ("tool_call_id", "name") if given.get(key)}
    if role != "assistant":
        return {}
    extras: dict[str, Any] = {}
    reasoning = {_check_text(given[key], f"{key} of {where}") for key in REASONING_KEYS if key in given} - {""}
    if len(reasoning) > 1:
        raise BadRow("malformed turn", f"{where} has two different texts under {', '.join(REASONING_KEYS)}")
    if reasoning:
        extras["reasoning_content"] = reasoning.pop()
    calls = [given[key] for key in ("tool_calls", "function_call") if given.get(key)]
    if len(calls) > 1:
        raise BadRow("malformed call", f"{where} has both tool_calls and function_call")
    if calls:
        extras["tool_calls"] = _read_calls(calls[0], where)
    return extras


def _read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's layout, with the arguments as an object, which is what chat templates expect."""
    calls = []
    for call in _read_objects(value, f"a tool call of {where}"):
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("malformed call", f"a tool call of {where} must have a name and arguments, got {shown(call)}")
        name, number = function["name"], {} if call.get("id") is None else {"id": call["id"]}
        arguments: Any = next(
            (function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {}
        )
        if isinstance(arguments, str):
            arguments = _parse_json(arguments) if arguments.strip() else {}
            _clean_json(arguments, f"a tool call of {where}")
        if not isinstance(arguments, dict):
            reason = f"the arguments of {name[:40]!r} in {where} must be a JSON object, got {shown(arguments)}"
            raise BadRow("malformed call", reason)
        calls.append({**number, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _is_trained(given: Mapping[str, Any], where: str) -> bool:
    weight = given.get("weight", 1)
    if not isinstance(weight, int | float):
        raise _make_type_error(weight, f"weight of {where} must be 0 or 1")
    return not any(isinstance(given.get(key), int | float) and not given[key] for key in TRAINED_KEYS)


# --- Layouts --------------------------------------------------------------------------------------------------------


def _make_user_turn(text: Any, what: str) -> Turn:
    return Turn({"role": "user", "content": _check_text(text, what)})


def _make_assistant_turn(text: Any, what: str) -> Turn:
    return Turn({"role": "assistant", "content": _check_text(text, what)})


def _read_alpaca(record: Mapping[str, Any]) -> list[Turn]:
    asked = [_check_text(record["instruction"], "column 'instruction'")]
    if record["input"] is not None:
        asked.append(_check_text(record["input"], "column 'input'"))
    question = "\n".join(part for part in asked if part.strip())
    return [_make_user_turn(question, "the question"), _make_assistant_turn(record["output"], "column 'output'")]


def _read_answer(column: str) -> Callable[[Mapping[str, Any]], list[Turn]]:
    """A reader for a response column (text or turns) with a ``prompt`` column (text, turns or absent)."""

    def read(record: Mapping[str, Any]) -> list[Turn]:
        prompt, answer = record["prompt"], record[column]
        if isinstance(prompt, dict) and "messages" in prompt:  # OpenAI's preferences
            prompt = prompt["messages"]
        asked = _read_prompt(prompt)
        if not isinstance(answer, list):
            if prompt is None and (turns := _read_transcript(answer)):
                return turns
            if prompt is None:
                reason = f"column 'prompt' is empty, which is allowed only if {column!r} is a whole conversation"
                raise BadRow("missing", reason)
            return [*asked, _make_assistant_turn(answer, f"column {column!r}")]
        turns = _read_turns(answer, column)
        if turns and turns[0].message["role"] == "assistant":
            return asked + turns
        if isinstance(prompt, list) and not _begins_with(turns, asked):
            reason = f"{column!r} is a whole conversation, but it does not begin with the turns of 'prompt'"
            raise BadRow("another prompt", reason)
        return turns  # the whole conversation is in the response column, a text prompt only repeats its question

    return read


def _read_prompt(prompt: Any) -> list[Turn]:
    """The turns of a ``prompt`` column: text, turns or absent."""
    if prompt is None or isinstance(prompt, list):
        return _read_turns(prompt or [], "prompt")
    return [_make_user_turn(prompt, "column 'prompt'")]


def _begins_with(turns: Sequence[Turn], start: Sequence[Turn]) -> bool:
    return [turn.message for turn in turns[: len(start)]] == [turn.message for turn in start]


_TEXT_OR_TURNS = "as text or as a list of {role, content} turns"
_PROMPTS = ("question", "instruction", "query", "input", "problem", "user")
#: Every readable layout. The order is that of the messages, not of preference: two that fit are an error.
FORMATS: dict[str, Format] = {
    "messages": Format(
        ("messages",),
        lambda record: _read_turns(record["messages"], "messages"),
        "a list of {role, content} turns with an assistant turn after a user turn",
        aliases={"messages": ("conversation", "dialog", "dialogue", "chat")},
    ),
    "prompt_completion": Format(
        ("prompt", "completion"),
        _read_answer("completion"),
        f"prompt and completion, each {_TEXT_OR_TURNS}",
        aliases={"prompt": _PROMPTS, "completion": ("answer", "response", "output", "solution", "assistant")},
    ),
    "alpaca": Format(
        ("instruction", "output"),
        _read_alpaca,
        "instruction, input and output as text; input follows the instruction on a new line",
        optional=("input",),
        aliases={"instruction": ("question",), "input": ("context",), "output": ("response", "answer")},
    ),
    "sharegpt": Format(
        ("conversations",),
        lambda record: _read_turns(record["conversations"], "conversations"),
        "a list of {from, value} or {role, content} turns with an assistant turn after a user turn",
    ),
    "real_generated": Format(
        ("real",),
        _read_answer("real"),
        f"the real answer {_TEXT_OR_TURNS}",
        ("prompt",),
        ("generated",),
        {"prompt": _PROMPTS},
    ),
    "chosen_rejected": Format(
        ("chosen",),
        _read_answer("chosen"),
        f"the chosen answer {_TEXT_OR_TURNS}",
        ("prompt",),
        ("rejected",),
        {"prompt": _PROMPTS, "chosen": ("preferred_output",)},
    ),
}


#: What both layouts with two responses may say of these: how each ended, and how much better the first one is.
_OF_PAIRS = {
    "real_finish_reason": ("chosen_finish_reason",),
    "generated_finish_reason": ("rejected_finish_reason",),
    "preference": (),
    "margin": (),
}


def _with_both(name: str, better: str, worse: str, **aliases: tuple[str, ...]) -> Format:
    """A layout with a column for each of two responses, as it is read where the worse one is wanted too."""
    layout = FORMATS[name]
    return replace(
        layout,
        required=(better, worse),
        expected=f"two answers to one prompt, the {better} and the {worse} one, each {_TEXT_OR_TURNS}",
        optional=(*layout.optional, *_OF_PAIRS),
        ignored=(),
        aliases={**layout.aliases, **_OF_PAIRS, **aliases},
        rejected=_read_answer(worse),
    )


#: The layouts with two responses to a prompt.
PREFERENCE_FORMATS: dict[str, Format] = {
    "real_generated": _with_both("real_generated", "real", "generated"),
    "chosen_rejected": _with_both("chosen_rejected", "chosen", "rejected", rejected=("non_preferred_output",)),
}
#: A game's own pairs say the same in two layouts.
_OF_GAMES = {"prompt", "chosen", "rejected", "real", "generated", "prompt_ids"}
#: The layouts of a stage that can do without real responses.
PROMPT_FORMATS: dict[str, Format] = {
    **FORMATS,
    "prompt_only": Format(
        ("prompt",),
        lambda record: _read_prompt(record["prompt"]),
        f"a prompt {_TEXT_OR_TURNS}",
        aliases={"prompt": _PROMPTS},
    ),
}
#: Stands in when no record has columns at all, so that the records themselves are reported.
NO_COLUMNS = Format((), lambda record: [], "one object with columns per row")


def read_row(layout: Format, record: Mapping[str, Any], needs_real: bool = True) -> tuple[Row, int, tuple[str, ...]]:
    """The row of a record, whose columns have our names.

    Args:
        layout: Its layout. One that reads two responses gives a row with both, the better one first.
        record: The columns that the layout has.
        needs_real: Whether a conversation has to have a real response. If not, one that does not end with an assistant
            turn is a prompt as a whole.

    Returns:
        The row, how many turns after its real response were dropped, and the keys of its turns that have no effect.

    Raises:
        BadRow: The record has no question, no real response, or something of the wrong type.
    """
    common = {column: record.get(column) for column in COMMON_COLUMNS}
    asked = record.get("prompt")
    if isinstance(asked, dict) and common["tools"] is None:
        common["tools"] = asked.get("tools")
    has_common = any(value is not None for value in common.values())
    tools: tuple[dict[str, Any], ...] = ()

    def read_turns(read: Callable[[Mapping[str, Any]], list[Turn]]) -> list[Turn]:
        turns = read(record)
        if not has_common:
            return turns
        _read_common("label", common, _refuse_undesirable)
        return _add_context(
            turns, _read_common("system", common, _read_system), _read_common("history", common, _read_history)
        )

    turns = read_turns(layout.read)
    tools = () if common["tools"] is None else _read_common("tools", common, _read_tools)
    row, num_dropped = _split_last_answer(turns, tools, needs_real)
    if layout.rejected is not None:
        rejected = read_turns(layout.rejected)
        worse, more_dropped = _split_last_answer(rejected, tools, what="rejected")
        row, num_dropped = _join_answers(row, worse, record), num_dropped + more_dropped
        turns += rejected
    unused = tuple(dict.fromkeys(key for turn in turns for key in turn.unused))
    return row, num_dropped, unused


def _join_answers(row: Row, worse: Row, record: Mapping[str, Any]) -> Row:
    """A row with both responses, the one that is more likely the better first."""
    if prompt_key(row) != prompt_key(worse):
        raise BadRow(
            "another prompt",
            "the two answers follow different conversations, so they do not compare: "
            f"{len(row.prompt)} turns and {len(worse.prompt)} turns come before them",
        )
    preference = preference_of(record)
    row = replace(
        row,
        real_finish_reason=_read_end(record, "real_finish_reason"),
        rejected=worse.real,
        rejected_extras=worse.real_extras,
        rejected_finish_reason=_read_end(record, "generated_finish_reason"),
        preference=preference,
        margin=_read_number(record, "margin", 0.0),
    )
    return row if preference >= 0.5 else row.swapped


def preference_of(record: Mapping[str, Any]) -> float:
    """The probability that the first of a record's two answers is the better one. 1 where it says nothing of it.

    Raises:
        BadRow: It is none.
    """
    preference = _read_number(record, "preference", 1.0)
    if not 0 <= preference <= 1:
        raise BadRow(
            "wrong preference",
            "column 'preference' is the probability that the first answer is the better one, from 0 to 1, got "
            f"{preference!r}",
        )
    return preference


def _read_number(record: Mapping[str, Any], column: str, default: float) -> float:
    value = record.get(column)
    if value is None or value == "":
        return default
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _make_type_error(value, f"column {column!r} must be a number")
    return number


def _read_end(record: Mapping[str, Any], column: str) -> FinishReason:
    value = record.get(column)
    if value not in (None, "", "stop", "length"):
        raise _make_type_error(value, f"column {column!r} must be 'stop' or 'length'")
    return "length" if value == "length" else "stop"


def is_verdict(labels: Iterable[Any]) -> bool:
    """Whether a ``label`` column says which answers are desirable (KTO), and is not about something else.

    Example:
        >>> is_verdict([True, False]), is_verdict(["0", "1"]), is_verdict([0, 1, 2]), is_verdict(["sports"])
        (True, True, False, False)
    """
    values = {str(label).lower() for label in labels if label is not None}
    return not values.isdisjoint(("true", "false")) or values <= {"0", "1"}


def _read_common(column: str, values: Mapping[str, Any], read: Callable[[Any], T]) -> T:
    """What is read from a common column; a mistake in it says how the column is left unread."""
    try:
        return read(values[column])
    except BadRow as reason:
        cure = f"If the column means something else, {_write_option({column: ''})} leaves it unread"
        raise BadRow(reason.kind, f"{reason}. {cure}") from None


def _refuse_undesirable(label: Any) -> None:
    if label is not None and str(label).lower() in ("false", "0"):
        raise BadRow("undesirable answer", f"column 'label' is {label!r}: the answer is one to be avoided")


def _read_system(value: Any) -> str:
    return "" if value is None else _check_text(value, "column 'system'")


def _read_history(value: Any) -> list[Turn]:
    if value is None or value == "":
        return []
    turns: list[Turn] = []
    for number, item in enumerate(_read_list(value, "column 'history' must be a list of [question, answer] pairs"), 1):
        where = f"item {number} of 'history'"
        if isinstance(item, dict):
            turns.append(_read_turn(item, where))
        elif isinstance(item, list | tuple) and len(item) == 2:
            turns += (
                _make_user_turn(item[0], f"the question of {where}"),
                _make_assistant_turn(item[1], f"the answer of {where}"),
            )
        else:
            raise BadRow("malformed turn", f"{where} must be a pair of question and answer, got {shown(item)}")
    return turns


def _add_context(turns: list[Turn], system: str, history: list[Turn]) -> list[Turn]:
    """The conversation behind its ``system`` text and its ``history``, wherever these are not in it already."""
    head = list(takewhile(lambda turn: turn.message["role"] in ("system", "developer"), turns))
    rest = turns[len(head) :]
    if system.strip():
        written = [turn.message["content"] for turn in turns if turn.message["role"] == "system"]
        if written and written[0] != system:
            raise BadRow(
                "two system texts",
                f"column 'system' has {system[:40]!r}, but a system turn has {written[0][:40]!r}. To read the turn, "
                f"leave the column unread: {_write_option({'system': ''})}",
            )
        head = head if written else [Turn({"role": "system", "content": system}), *head]
    return [*head, *([] if _begins_with(rest, history) else history), *rest]


def _read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Definitions of tools in OpenAI's layout: a list of objects or of their JSON texts, or JSON text of it all."""
    if value is None or value in ("", [], {}):
        return ()
    tools = []
    for tool in _read_objects(value, "a definition in 'tools'"):
        if not isinstance(tool, dict):
            raise BadRow(
                "malformed tools",
                f"column 'tools' must be a list of tool definitions, or JSON text of one, got {shown(tool)}",
            )
        is_bare = "name" in tool and "function" not in tool and tool.get("type", "function") == "function"
        tool = {key: value for key, value in tool.items() if not is_bare or key != "type"}
        tools.append({"type": "function", "function": tool} if is_bare else tool)
    return tuple(tools)


def _split_last_answer(
    read: Sequence[Turn], tools: tuple[dict[str, Any], ...], needs_real: bool = True, what: str = "real"
) -> tuple[Row, int]:
    """The row whose real response is the last assistant turn to train on, and how many turns after it were dropped."""
    turns = [turn.message for turn in read]
    size = sum(len(turn["content"]) for turn in turns)
    if tools or any(len(turn) > 2 for turn in turns):
        size += len(json.dumps([tools, [{**turn, "content": ""} for turn in turns]], ensure_ascii=False, default=str))
    if size > MAX_ROW_CHARACTERS:
        raise BadRow("too long", f"has {size:,} characters, but a row may have {MAX_ROW_CHARACTERS:,}")
    answers = [position for position, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not needs_real and turns and turns[-1]["role"] != "assistant":
        _refuse_blank_prompt(turns)
        return Row(tuple(turns), "", {}, tools, has_real=False), 0
    if not answers:
        raise BadRow(
            "no answer", f"there is no assistant turn, got roles {_list_first(turn['role'] for turn in turns)}"
        )
    last = next((position for position in reversed(answers) if read[position].is_trained), None)
    if last is None:
        marks = ", ".join(TRAINED_KEYS)
        raise BadRow("untrained answer", f"every assistant turn is marked as not to be trained on ({marks} 0 or false)")
    prompt, real = turns[:last], turns[last]["content"]
    extras = {key: value for key, value in turns[last].items() if key not in ("role", "content")}
    if not real.strip() and "tool_calls" not in extras and what == "real":  # a worse response may be one that is empty
        raise BadRow("blank answer", "the real answer is blank, there is nothing to learn")
    _refuse_blank_prompt(prompt)
    return Row(tuple(prompt), real, extras, tools), len(turns) - last - 1


def _refuse_blank_prompt(prompt: Sequence[Message]) -> None:
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in prompt):
        raise BadRow("blank prompt", "the prompt is blank: no user turn with text comes before the real answer")


def prompt_key(row: Row) -> tuple[Any, ...]:
    """The row's prompt, with all that decides it, as something to compare and to look up."""
    key: tuple[Any, ...] = tuple((message["role"], message["content"]) for message in row.prompt)
    extras = [{**message, "content": ""} for message in row.prompt if len(message) > 2]
    if extras or row.tools:
        places = [number for number, message in enumerate(row.prompt) if len(message) > 2]
        key += (json.dumps([places, extras, row.tools], sort_keys=True, default=str),)
    return key


def answer_key(row: Row) -> tuple[str, ...]:
    """The row's real response, with all that decides it, as something to compare and to look up; or both of a pair."""
    key: tuple[str, ...] = (
        (row.real, json.dumps(row.real_extras, sort_keys=True, default=str)) if row.real_extras else (row.real,)
    )
    if row.rejected is not None:
        key += (row.rejected, json.dumps(row.rejected_extras, sort_keys=True, default=str))
    return key


# --- Which layout fits ----------------------------------------------------------------------------------------------


def _find_readings(name: str, layout: Format, columns: Mapping[str, str], found: Sequence[str]) -> Iterator[Reading]:
    """Every way to find the layout's columns among those of the data."""
    is_mapped = not columns.keys().isdisjoint(layout.required)  # then the user has said which column is which

    def names(ours: str, is_required: bool) -> list[str | None]:
        if ours in columns:
            return [columns[ours] or None]
        if ours in found:
            return [ours]
        aliases = (*layout.aliases.get(ours, ()), *COMMON_COLUMNS.get(ours, ()))
        theirs: list[str | None] = [alias for alias in aliases if alias in found and alias not in columns.values()]
        if is_required:
            return [] if is_mapped else theirs
        return theirs if len(theirs) == 1 else [None]

    ours = [*layout.required, *layout.optional, *COMMON_COLUMNS]
    for theirs in product(*(names(name, name in layout.required) for name in ours)):
        origin = {a: b for a, b in zip(ours, theirs, strict=True) if b is not None}
        if len({*origin.values()}) == len(origin) or columns:
            yield Reading(name, origin)


def fits(columns: Sequence[str]) -> bool:
    """Whether an object with these keys is a row of some layout.

    Example:
        >>> fits(["id", "question", "answer"]), fits(["version", "data"])
        (True, False)
    """
    return any(True for item in FORMATS.items() for _ in _find_readings(*item, {}, columns))


def choose_format(
    name: str,
    columns: Mapping[str, str],
    found: list[str],
    source: str,
    example: Mapping[str, Any],
    formats: Mapping[str, Format] = FORMATS,
) -> Reading:
    """The one format that fits the columns of the source and the column map.

    Args:
        name: A key of ``formats``, or ``"auto"``.
        columns: From our column names to the user's; ``""`` leaves a column unread.
        found: The columns of the source.
        source: Its name, for messages.
        example: One of its records, from which a remedy is made.
        formats: Those to choose from.

    Raises:
        UserError: No format fits, or more than one; with the setting that would read the source.
    """
    known = {key: layout.known for key, layout in formats.items()}
    allowed = set().union(*known.values()) if name == "auto" else known[name]
    for ours, theirs in columns.items():
        if ours not in allowed:
            raise UserError(f"data.columns maps {ours!r}, expected one of {near(ours, allowed)}. Rename that key.")
        if theirs not in found and (theirs or ours in (set() if name == "auto" else set(formats[name].required))):
            raise UserError(
                f"data.columns maps {ours!r} to {theirs!r}, but {source} has the columns {near(theirs, found)}."
                " Correct the name."
            )
    names = [key for key in formats if known[key] >= columns.keys()] if name == "auto" else [name]
    fitting = [
        reading
        for key in names
        for reading in _find_readings(key, formats[key], columns, found)
        if {*formats[key].required} <= reading.origin.keys()
    ]
    plain = [r for r in fitting if all(r.origin[c] == columns.get(c, c) for c in formats[r.format].required)]
    best = _keep_most_specific(plain or fitting)
    if len(best) == 1:
        return best[0]
    has = f"It has {_list_columns(found)}."
    several = list(dict.fromkeys(reading.format for reading in best))
    if len(several) > 1 and {*found} >= _OF_GAMES:
        return next(reading for reading in best if reading.format == "chosen_rejected")
    if len(several) > 1:
        raise UserError(
            f"the columns of {source} fit more than one format: {', '.join(several)}. {has} Set data.format to the one "
            f"to read: {' or '.join(f'--data.format {key}' for key in several)}."
        )
    if best:
        flags = [
            _write_option({ours: reading.origin[ours] for ours in formats[reading.format].required}) for reading in best
        ]
        raise UserError(
            f"the columns of {source} fit {several[0]!r} in more than one way. {has} Say which is which: "
            f"{' or '.join(flags[:4])}."
        )
    listed = {name: formats[name]} if name != "auto" else formats
    layouts = "".join(f"\n  {key}: {', '.join(layout.required)}" for key, layout in listed.items())
    raise UserError(
        f"the columns of {source} do not fit: it has {_list_columns(found)}, expected for{layouts}"
        f"\n{_suggest_remedy(name, formats, found, example)}"
    )


def _keep_most_specific(readings: Sequence[Reading]) -> list[Reading]:
    """Those that do not use a part of what another one uses; of equals the first."""
    used = [{*reading.origin.values()} for reading in readings]
    return [
        reading
        for number, reading in enumerate(readings)
        if not any(used[number] < other for other in used) and used[number] not in used[:number]
    ]


def _write_option(columns: Mapping[str, str]) -> str:
    r"""The option that maps the columns, as it is typed in a shell.

    Example:
        >>> _write_option({"prompt": "text_in", "completion": "text out"})
        '--data.columns \'{prompt: text_in, completion: "text out"}\''
    """
    pairs = (
        f"{ours}: {theirs if re.fullmatch(r'[A-Za-z][A-Za-z0-9_]*', theirs) else json.dumps(theirs)}"
        for ours, theirs in columns.items()
    )
    quoted = f"{{{', '.join(pairs)}}}".replace("'", "'\\''")
    return f"--data.columns '{quoted}'"


_ASKED = r"prompt|question|instruct|quer(y|ies)|problem|request|user|human|source|(^|_)(q|x|in|inputs?|ask|asked)(_|$)"
_ANSWERED = r"complet|answer|respon|solution|reply|replies|assist|target|gpt|(^|_)(a|y|out|outputs?)(_|$)"


def _suggest_remedy(name: str, formats: Mapping[str, Format], found: Sequence[str], example: Mapping[str, Any]) -> str:
    """What to set so that these columns are read, made from their names and from one record."""
    if all(layout.rejected for layout in formats.values()):
        flag = _write_option({"prompt": "question", "chosen": "better", "rejected": "worse"})
        return (
            "A row of preferences needs two answers to one prompt, the better and the worse one. If they are there "
            f"under other names, say which is which: {flag}."
        )
    for column, value in example.items():
        parsed = _parse_json(value)
        if isinstance(parsed, list) and parsed and is_turn(parsed[0]) and name in ("auto", "messages", "sharegpt"):
            return (
                f"Column {column!r} holds turns. Set "
                f"{_write_option({(formats[name] if name != 'auto' else FORMATS['messages']).required[0]: column})}."
            )
    texts = [column for column in found if isinstance(example.get(column), str)]
    if "text" in texts and not any(re.search(_ANSWERED, column, re.IGNORECASE) for column in texts):
        return (
            "In 'text' the prompt and the answer are not apart, so it is unknown where the real answer begins. Write "
            "them "
            'apart, as {"prompt": ..., "completion": ...} or as {"messages": [{"role": ..., "content": ...}, ...]}.'
        )
    if len(texts) < 2:
        return "A row needs what was asked and the real answer: two columns with text, or one with a list of turns."
    answer = next((c for c in texts if re.search(_ANSWERED, c, re.IGNORECASE)), None)
    prompt = next((c for c in texts if c != answer and re.search(_ASKED, c, re.IGNORECASE)), None)
    is_sure = prompt is not None and answer is not None
    longest = sorted(texts, key=lambda column: -len(example[column]))
    if not is_sure and answer is None and prompt is None:
        prompt, answer = (column for column in texts if column in longest[:2])
    prompt = prompt or next(column for column in longest if column != answer)
    answer = answer or next(column for column in longest if column != prompt)
    ours = formats[name].required if name != "auto" and len(formats[name].required) == 2 else ("prompt", "completion")
    flag = _write_option(dict(zip(ours, (prompt, answer), strict=True)))
    return f"Say which of your columns is which: {flag}" + ("." if is_sure else ", if these are the right ones.")
