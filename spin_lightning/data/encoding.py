"""Conversations to token ids: one renderer for generation and training.

A prompt's ids are rendered once and used everywhere. What an assistant wrote gets the ids that the chat template and
the tokenizer give it; a control token in anybody else's text is encoded as text. No text can open or close a turn. A
response carries exactly one terminator, and only if it ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils import chat_template_utils as chat_templates
from transformers.utils.chat_template_utils import _compile_jinja_template, encode_marked_chat, mark_control_tokens

from spin_lightning.data.turn_shape import PROBE_TOOL, Block, TurnShape, parting
from spin_lightning.models.loading import tokenizer_state
from spin_lightning.runs.files import sha256_of
from spin_lightning.terminal import say
from spin_lightning.types import FinishReason, Message, Prompt, Row, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TEMPLATES = {
    "alpaca": "### Instruction:\n{prompt}\n\n### Response:\n",
    "spin": "### Instruction: {prompt}\n\n### Response: ",  # what the authors' released generation script writes
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
#: Rows that are tokenized together.
BATCH = 250
#: Tokens that mean the same in every tokenizer that has them. Servers stop on the ends by these names, so that no
#: response has them.
NEVER_SAID = {"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"}
NEVER_SAID |= {"<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>"}


@dataclass(frozen=True)
class Encoded:
    """One row as ids.

    Attributes:
        prompt_ids: The conversation up to where the response begins.
        real_ids: The real response, cut at the cap. A whole one ends with its terminator. Of a prompt alone: none.
        finish_reason: ``length`` where it was cut.
        noted: What is to be counted: ``encoded_apart``, ``reasoning_left_out``, ``no_reasoning``, ``tools_left_out``.
    """

    prompt_ids: list[int]
    real_ids: list[int]
    finish_reason: FinishReason
    noted: frozenset[str] = frozenset()


class Encoder:
    """Turns conversations into ids with a tokenizer's chat template, or with an explicit prompt template.

    Args:
        tokenizer: A Hugging Face tokenizer. Its pad token may be missing or equal to its end of sequence.
        prompt_template: None for the tokenizer's own chat template; where it has several, the one named ``default``,
            and ``tool_use`` for rows with tools. Else the name of one of them, ``alpaca``, ``spin``, ``chatml``, a text
            with ``{prompt}`` in it, a Jinja chat template, or the path of a file that holds one of the two.
        now: What the time is for a template that writes the date. None: what it is.

    Attributes:
        terminator_id: The token that ends an assistant turn under this template: it is scored, and generation stops on
            it.
        end_ids: All tokens on which generation stops, ``terminator_id`` first. :meth:`end_at` adds those of the model.
        time: ``now`` in ISO format; None where the template does not ask for the time.

    Raises:
        UserError: There is no template at all, or none of its tokens could end a response.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None = None, now: datetime | None = None
    ) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        self.chat_template, self.tool_template = self._resolve_templates(prompt_template)
        try:
            self._templates = {text: _compile_jinja_template(text) for text in (self.chat_template, self.tool_template)}
        except TemplateError as error:
            raise UserError(
                f"the chat template is not one of Jinja: {error}. Mend it in the model's folder, or give "
                "data.prompt_template."
            ) from None
        self._settings: dict[str, Any] = {"documents": None, **tokenizer.special_tokens_map}
        self.time: str | None = None
        if any("strftime_now" in text for text in self._templates):
            read_clock = self._templates[self.chat_template].environment.globals["strftime_now"]
            now = now or datetime.fromisoformat(read_clock("%Y-%m-%dT%H:%M:%S"))
            self.time, self._settings["strftime_now"] = now.isoformat(), now.strftime

        added = tokenizer.added_tokens_decoder
        self._added = {number: token.content for number, token in added.items()}
        self._tokens = _any_of(text for text in self._added.values() if not text.isspace())
        self._control_tokens = self._turn_tokens = _any_of(())  # until it is known what the template writes
        self._takes_parts, self._role_of_developer = False, "developer"
        self._shapes = self._find_shapes()
        self._shape = self._shapes[self.chat_template]
        around = self._shape.around | self._shapes[self.tool_template].around
        self._control_tokens = _any_of(
            token.content
            for number, token in added.items()
            if token.special
            or number in around
            or (not token.content.isspace() and any(token.content in text for text in self._templates))
        )
        self._template_text = _any_of(self._plain_markers())
        # with a template of the user's, the tokens of the tokenizer's own turns go on being turn tokens
        others = [] if own is None or prompt_template is None else own.values() if isinstance(own, dict) else [own]
        self._other_turns = [
            t.content for t in added.values() if t.special and any(t.content in text for text in others)
        ]
        opening = [added[n] for n in tokenizer.encode(self._shape.opening, add_special_tokens=False) if n in added]
        is_plain = bool(opening) and not (opening[-1].normalized or opening[-1].single_word or opening[-1].lstrip)
        self._opener = opening[-1].content if is_plain and hasattr(tokenizer, "backend_tokenizer") else ""
        self.terminator_id = self._shape.terminator_id
        self.end_ids: tuple[int, ...] = ()
        self.end_at([])
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = self.terminator_id  # never read: every mask comes from lengths
        self.pad_id: int = tokenizer.pad_token_id

    def end_at(self, ids: Iterable[int]) -> None:
        """Also end responses at these tokens: those of the model's generation settings.

        Ids outside of the vocabulary are ignored. So are ordinary tokens, and a printed note says so.
        """
        vocabulary = {number: text for text, number in self.tokenizer.get_vocab().items()}
        shapes = [*self._shapes.values()]
        ends = dict.fromkeys([self.terminator_id, *(shape.call_terminator_id for shape in shapes), *self.end_ids])
        given = sorted({*ids} & vocabulary.keys() - ends.keys())
        ordinary = {n: vocabulary[n] for n in given if n not in self._added and n != self.tokenizer.eos_token_id}
        if ordinary:
            say(f"note: the model's settings end answers at ordinary tokens, which are ignored: {ordinary}")
        ends |= dict.fromkeys(number for number in given if number not in ordinary)
        self.end_ids = tuple(ends)
        texts = [vocabulary[token] for token in self.end_ids]
        named = [text for text in self.tokenizer.special_tokens_map.values() if isinstance(text, str)]
        named += [text for text in self._added.values() if text in NEVER_SAID]
        self._turn_tokens = _any_of(
            [*named, *texts, *self._other_turns, *(self._added[token] for shape in shapes for token in shape.around)]
        )
        self._ends = re.compile(f"(?<!{_START})(?:{_any_of(texts).pattern})")

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides how text becomes ids: vocabulary, merges, added tokens, template."""
        return sha256_of([tokenizer_state(self.tokenizer), *self._templates])

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of a conversation up to where the assistant's response begins.

        Raises:
            UserError: The template refuses the conversation.
        """
        return self._ids([self._render(messages, tools, add_generation_prompt=True)])[0]

    def encode(self, prompt_id: int, row: Row, max_response_tokens: int) -> Prompt:
        """Ids of one row. The real response is cut at ``max_response_tokens``, and a cut one has no terminator.

        Raises:
            UserError: The template refuses the row.
        """
        (encoded,) = self.encode_rows([row], max_response_tokens)
        if isinstance(encoded, UserError):
            raise encoded
        return Prompt(prompt_id, row, encoded.prompt_ids, encoded.real_ids, encoded.finish_reason)

    def encode_rows(self, rows: Iterable[Row], max_response_tokens: int) -> Iterator[Encoded | UserError]:
        """Ids of many rows, in their order. A row that the template refuses comes as the error that says why.

        Of rows with two responses those of the real one: ``row.swapped`` has the other one in its place.
        """
        remaining = iter(rows)
        while some := list(islice(remaining, BATCH)):
            yield from self._encode_some(some, max_response_tokens)

    def _encode_some(self, rows: list[Row], max_response_tokens: int) -> Iterator[Encoded | UserError]:
        texts = [self._rendered(row) for row in rows]
        try:
            ids = iter(self._ids_of_pairs([found[:2] for found in texts if isinstance(found, tuple)]))
        except UserError as error:
            if len(rows) == 1:
                yield error
            else:  # to know which
                for row in rows:
                    yield from self._encode_some([row], max_response_tokens)
            return
        for row, found in zip(rows, texts, strict=True):
            if isinstance(found, UserError):
                yield found
                continue
            prompt, whole, noted = found
            prompt_ids, whole_ids = next(ids)
            if not row.has_real:
                yield Encoded(prompt_ids, [], "stop", frozenset(noted))
                continue
            try:
                response = self._response(row, prompt, whole, prompt_ids, whole_ids, noted)
            except UserError as error:
                yield error
                continue
            reason: FinishReason = "stop" if len(response) <= max_response_tokens else "length"
            if row.real_finish_reason == "length" and reason == "stop" and len(response) > 1:  # it was cut before
                response, reason = response[:-1], "length"
            yield Encoded(prompt_ids, response[:max_response_tokens], reason, frozenset(noted))

    def has_control_tokens(self, row: Row) -> bool:
        """Whether a text of the row spells a control token that is encoded as text. Only for counting."""
        turns = (*row.prompt, row.real_turn)
        return any(self._taken_as_text(turn).search(turn["content"]) for turn in turns)

    def has_template_text(self, row: Row) -> bool:
        """Whether a text of the row spells a turn's frame that the template writes as text, such as ``### Response:``.

        Such text has the template's own ids and can pass for a turn; no encoding can tell them apart.
        """
        return any(map(self._template_text.search, [row.real, *(message["content"] for message in row.prompt)]))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without its terminator."""
        ids = list(ids)
        return str(self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.end_ids else ids))

    # --- a row as text --------------------------------------------------------------------------------------------

    def _rendered(self, row: Row) -> tuple[str, str, set[str]] | UserError:
        """The prompt, the whole conversation with the real response, and what is to be counted."""
        *asked, answer = (self._turn(message) for message in (*row.prompt, row.real_turn))
        tools = self._definitions(row.tools)
        try:
            prompt = self._written(asked, tools, add_generation_prompt=True)
            whole = self._written([*asked, answer], tools) if row.has_real else prompt
        except UserError as error:
            return error
        noted = set()
        if any(map(partial(self._is_left_out, prompt), row.prompt)):
            noted.add("turns_left_out")
        if any(_name_of(tool) not in prompt for tool in tools or []):
            noted.add("tools_left_out")
        return prompt, whole, noted

    def _is_left_out(self, prompt: str, message: Message) -> bool:
        """Whether the template leaves out a turn's text or its tool calls. It may leave out earlier reasoning."""
        if message.get("tool_calls") and not self._shape.writes_calls:
            return True
        said = message["content"].strip()
        if said in prompt:
            return False
        return _squashed(said.rpartition("</think>")[2]) not in _squashed(prompt)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), add_generation_prompt: bool = False
    ) -> str:
        """What the template writes, with markers around control tokens that are to be taken as text."""
        turns = [self._turn(message) for message in messages]
        return self._written(turns, self._definitions(tools), add_generation_prompt)

    def _turn(self, message: Message) -> dict[str, Any]:
        """A turn as templates read it, marked."""
        tokens = self._taken_as_text(message)
        turn = {key: _marked(value, tokens) for key, value in message.items() if value is not None}
        if "reasoning_content" in turn:
            turn["thinking"] = turn["reasoning_content"]  # its name in other templates
        if self._takes_parts:
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        if turn["role"] == "developer":
            turn["role"] = self._role_of_developer
        return turn

    def _definitions(self, tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
        return _marked(list(tools), self._control_tokens) if tools else None

    def _written(
        self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool = False
    ) -> str:
        template = self._templates[self.tool_template if tools else self.chat_template]
        try:
            return template.render(
                messages=turns, tools=tools, add_generation_prompt=add_generation_prompt, **self._settings
            )
        except Exception as error:  # Jinja raises what the template's author wrote
            roles = [turn["role"] for turn in turns]
            raise UserError(
                f"the chat template refuses a conversation with the roles {roles}: {repr(str(error))[1:-1]}. "
                "Change the rows, or set data.prompt_template to a template that takes them."
            ) from error

    def _taken_as_text(self, message: Message) -> re.Pattern[str]:
        """The control tokens that are text in this turn: an assistant may write all but those that begin or end one."""
        return self._turn_tokens if message["role"] == "assistant" else self._control_tokens

    # --- text as ids ----------------------------------------------------------------------------------------------

    def _ids_of_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Ids of prompts and of the conversations that go on behind them. What both begin with is tokenized once.

        Tokenizers take a text apart at its control tokens, so that what stands before one has the same ids whatever
        follows.
        """
        texts, cuts = [], []
        for prompt, whole in pairs:
            cut = prompt.rfind(self._opener) if self._opener and _START not in whole else -1
            is_shared = cut > 0 and whole.startswith(self._opener, cut) and whole[:cut] == prompt[:cut]
            cuts.append(cut if is_shared else 0)
            texts += [prompt, whole[cut:] if is_shared else whole]
        ids = iter(self._ids(texts))
        found = []
        for cut in cuts:
            prompt_ids, whole_ids = next(ids), next(ids)
            if cut:
                whole_ids = prompt_ids[: len(prompt_ids) - 1 - prompt_ids[::-1].index(whole_ids[0])] + whole_ids
            found.append((prompt_ids, whole_ids))
        return found

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered texts. Those without a marked token, which are nearly all, go to the tokenizer together."""
        is_marked = [_START in text or _END in text for text in texts]
        plain = [text for text, whether in zip(texts, is_marked, strict=True) if not whether]
        found = iter(self._plain_ids(plain) if plain else [])
        try:
            return [
                _marked_ids(self.tokenizer, text) if whether else next(found)
                for text, whether in zip(texts, is_marked, strict=True)
            ]
        except ValueError as error:  # the tokenizer makes a control token of plain text too
            raise UserError(f"{error}. Remove it from the rows.") from error

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _ids_behind(self, text: str) -> list[int]:
        """Ids of a text that follows another: behind a newline, as some tokenizers put a space before a first word."""
        newline, behind_newline, alone = self._ids(["\n", f"\n{text}", text])
        return behind_newline[len(newline) :] if behind_newline[: len(newline)] == newline else alone

    # --- the response -----------------------------------------------------------------------------------------------

    def _response(
        self, row: Row, prompt: str, whole: str, prompt_ids: list[int], whole_ids: list[int], noted: set[str]
    ) -> list[int]:
        """The real response as the model has to give it after the prompt, up to its terminator; adds to the counts.

        Raises:
            UserError: The template does not write the response's tool calls, or not before it ends the turn.
        """
        shape = self._shapes[self.tool_template if row.tools else self.chat_template]
        num_leading_ends = len(self._ends.findall(shape.lead)) if shape.lead else 0
        written = self._written_after(prompt, whole, shape)
        block = shape.block if shape.block and prompt.endswith(shape.block.text) else None
        calls = row.real_extras.get("tool_calls")
        if calls:
            names = [_name_of(call) for call in calls]
            if written is None or any(written.count(name) < names.count(name) for name in names):
                raise UserError(
                    "the chat template does not write the tool calls of the real answer. Write them into its text, or "
                    "set data.prompt_template to a template that takes tool_calls."
                )
            body, _ = self._split_at_end(written, num_leading_ends)
            if any(body.count(name) < names.count(name) for name in names):
                raise UserError(
                    "the chat template ends the real answer's turn before its tool calls, so generation could never "
                    f"come to them: it writes {written[:80]!r}. Remove the text before the calls, or set "
                    "data.prompt_template to another template."
                )
            if _squashed(row.real) not in _squashed(body):
                noted.add("text_left_out")
            said = written
        elif written is None or (
            not (block and block.is_closed) and self._leaves_out(row.real, written, block, num_leading_ends)
        ):
            said = str(_marked(row.real, self._turn_tokens))
            tag = re.match(r"\s*([<\[][^<>\[\]\s]+[>\]])", said)
            if block is None and not (tag and tag[1] in shape.lead):
                said = shape.lead + said
        else:
            said = written
        if block is not None:
            said = self._inside(block, row, said, num_leading_ends, noted)
        reasoning = row.real_extras.get("reasoning_content") or ""
        if _squashed(reasoning) not in _squashed(said):
            noted.add("reasoning_left_out")

        if whole == prompt + said and whole_ids[: len(prompt_ids)] == prompt_ids:
            response = whole_ids[len(prompt_ids) :]
        else:  # a token spans the border, or the template writes past responses otherwise: the prompt stays as it is
            noted.add("encoded_apart")
            response = self._ids_after(prompt, prompt_ids, said)
        ends = (place for place, token in enumerate(response) if token in self.end_ids)
        end = next(islice(ends, num_leading_ends, None), None)
        if end is not None:
            return response[: end + 1]
        if (
            said == written and not calls and not shape.is_ended_by_next
        ):  # what stands behind the response is for the next turn
            answer = str(_marked(row.real, self._turn_tokens))
            place = said.rfind(answer)
            said = said[: place + len(answer)] if place >= 0 else answer
            noted.add("encoded_apart")
            response = self._ids_after(prompt, prompt_ids, said)
        return [*response, shape.call_terminator_id if calls else self.terminator_id]

    def _ids_after(self, prompt: str, prompt_ids: list[int], said: str) -> list[int]:
        """Ids of a response right behind its prompt; where the prompt would get other ids by it, behind a new line."""
        (ids,) = self._ids([prompt + said])
        return ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else self._ids_behind(said)

    def _written_after(self, prompt: str, whole: str, shape: TurnShape) -> str | None:
        """What the template writes behind the prompt. None if it changes the conversation before the response."""
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        same = parting(prompt, whole, self._tokens)
        if len(prompt) - same <= len(shape.opening):
            answer, opening = whole[same:], prompt[same:]
            if opening.strip() and answer.lstrip().startswith(opening.strip()):  # with other white space before it
                answer = answer.lstrip()[len(opening.strip()) :].removeprefix(opening[len(opening.rstrip()) :])
            return answer
        before, opening, answer = whole.rpartition(shape.opening)
        return answer if before and opening else None

    def _split_at_end(self, text: str, num_leading_ends: int) -> tuple[str, str]:
        """An answer's text, and what follows from its terminator on."""
        end = next(islice(self._ends.finditer(text), num_leading_ends, None), None)
        return (text, "") if end is None else (text[: end.start()], text[end.start() :])

    def _leaves_out(self, answer: str, written: str, block: Block | None, num_leading_ends: int) -> bool:
        """Whether the template leaves out a response's beginning, as many do with reasoning."""
        if answer.strip() in written:
            return False
        body, answer = _squashed(self._split_at_end(written, num_leading_ends)[0]), _squashed(answer)
        begun = block.opens + body if block is not None else body
        return answer not in (body, begun) and answer.endswith(body)

    def _inside(self, block: Block, row: Row, said: str, num_leading_ends: int, noted: set[str]) -> str:
        """The response to a prompt that ends with a block such as ``<think>``.

        In an open one the response goes on, and closes it; behind a closed one there is nothing but the response.
        """
        reasoning = str(_marked(row.real_extras.get("reasoning_content") or "", self._turn_tokens))
        body, behind = self._split_at_end(said, num_leading_ends)
        if block.is_closed:
            if block.closes in row.real:
                noted.add("reasoning_left_out")
            return body.rpartition(block.closes)[2].lstrip("\n") + behind if block.closes in body else said
        if body.lstrip().startswith(block.opens):
            body = body.lstrip()[len(block.opens) :].lstrip("\n")
        if block.closes not in body:
            body = reasoning.strip("\n") + block.closing + body.lstrip("\n")
        if not reasoning and block.closes not in row.real:
            noted.add("no_reasoning")
        return body + behind

    # --- templates ------------------------------------------------------------------------------------------------

    def _find_shapes(self) -> dict[str, TurnShape]:
        """The shape of turns under each template; and whether it takes texts as parts, and developers as the system.

        Raises:
            UserError: A template refuses a question with its answer, or no token could end that.
        """
        question, answer = {"role": "user", "content": "spin question"}, {"role": "assistant", "content": "spin answer"}

        def is_written(*turns: Message) -> bool:
            for tools in ([], [PROBE_TOOL]):
                try:
                    return turns[0]["content"] in self._render(turns, tools)
                except UserError:
                    continue
            return False

        asked: list[Message] = [question, answer]  # type: ignore[list-item]
        if not is_written(*asked):
            self._takes_parts = True
            self._takes_parts = is_written(*asked)
        rule = {role: is_written({"role": role, "content": "spin rule"}, *asked) for role in ("developer", "system")}
        if rule["system"] and not rule["developer"]:
            self._role_of_developer = "system"
        shapes = {self.tool_template: self._shape_with([PROBE_TOOL])} if len(self._templates) > 1 else {}
        try:
            return {**shapes, self.chat_template: self._shape_with([])}
        except UserError as error:
            try:  # a template for nothing but rows with tools
                return {**shapes, self.chat_template: self._shape_with([PROBE_TOOL])}
            except UserError:
                raise error from None

    def _shape_with(self, tools: list[dict[str, Any]]) -> TurnShape:
        return TurnShape.of(partial(self._render, tools=tools), self.tokenizer, self._templates, self._tokens)

    def _plain_markers(self) -> set[str]:
        """What the template writes between turns, without control tokens; plain words are no markers."""
        turns: list[Message] = [{"role": role, "content": "\0"} for role in ("user", "assistant", "user", "assistant")]
        try:
            written = self._render(turns) + self._render(turns[:1], add_generation_prompt=True)
        except UserError:  # a template for single questions, or for rows with tools
            try:
                written = self._render(turns[:2])
            except UserError:
                return set()
        pieces = [piece.strip() for part in written.split("\0") for piece in self._control_tokens.split(part)]
        lines = {line.strip() for piece in pieces for line in piece.splitlines()}
        return {line for line in lines if len(line) > 2 and not re.fullmatch(r"[\w\s.,'!?-]*", line)}

    def _resolve_templates(self, prompt_template: str | None) -> tuple[str, str]:
        """The templates of rows without and with tools. The tokenizer carries them too: trained with, served with."""
        own = self.tokenizer.chat_template
        if isinstance(own, dict) and prompt_template is None:
            if "default" not in own:
                raise UserError(
                    f"the tokenizer has several chat templates, {sorted(own)}, and none is named 'default'. Set "
                    "data.prompt_template to the name of one."
                )
            with_tools = "tool_use" if "tool_use" in own else "default"
            say(
                f"note: of the tokenizer's chat templates, {sorted(own)}, 'default' is used, and {with_tools!r} for "
                "rows with tools"
            )
            return str(own["default"]), str(own[with_tools])
        if isinstance(own, dict) and prompt_template in own:
            template = str(own[prompt_template])
        else:
            template = self._resolve_template(prompt_template)
        self.tokenizer.chat_template = template
        return template, template

    def _resolve_template(self, prompt_template: str | None) -> str:
        if prompt_template is None:
            if not self.tokenizer.chat_template:
                raise UserError(
                    "the tokenizer has no chat template, so it is unknown how its model expects a prompt. Set "
                    f"data.prompt_template to one of {sorted(PROMPT_TEMPLATES)}, to a text with {{prompt}} in it, or "
                    "to a file."
                )
            return str(self.tokenizer.chat_template)
        template = PROMPT_TEMPLATES.get(prompt_template, prompt_template)
        if "{" not in template:
            path = Path(prompt_template).expanduser()
            if not path.is_file():
                raise UserError(
                    f"data.prompt_template {prompt_template!r} is neither one of {sorted(PROMPT_TEMPLATES)}, nor a "
                    "text with {prompt} in it, nor a file. Give one of these."
                )
            template = path.read_text(encoding="utf-8")
        if "{%" in template or "{{" in template:
            return template
        if template.count("{prompt}") != 1:
            raise UserError(f"data.prompt_template must contain {{prompt}} exactly once, got {template!r}.")
        before, after = (json.dumps(part, ensure_ascii=False) for part in template.split("{prompt}"))
        bos = "{{ bos_token }}" if self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id] else ""
        return (
            f"{bos}{{% for message in messages %}}"
            f"{{% if message['role'] == 'user' %}}{{{{ {before} + message['content'] + {after} }}}}"
            "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + '\\n\\n' }}"
            "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        )


_START, _, _END = mark_control_tokens(".", re.compile("[.]"))


def _marked(value: Any, tokens: re.Pattern[str]) -> Any:
    """A value with markers around the tokens in all of its texts, keys of tool definitions and arguments included."""
    if isinstance(value, dict):
        return {_marked(key, tokens): _marked(item, tokens) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, tokens) for item in value]
    return mark_control_tokens(value, tokens)


def _marked_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text with markers. Up to transformers 5.22, the pattern that finds these is handed over."""
    pattern = []
    if "markers_re" in signature(encode_marked_chat).parameters:
        pattern = [chat_templates._get_control_token_patterns(tuple(tokenizer.added_tokens_encoder))[1]]
    return [int(token) for token in encode_marked_chat(tokenizer, text, *pattern)]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; of none, nothing."""
    longest_first = sorted({text for text in texts if text}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _squashed(text: str) -> str:
    """A text without its white space, which templates add and remove, and without markers."""
    return "".join(text.replace(_START, "").replace(_END, "").split())


def _name_of(call: dict[str, Any]) -> str:
    return str(call.get("function", call).get("name", ""))
