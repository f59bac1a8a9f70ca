"""Conversations to token ids: one renderer for generation and training.

A prompt's ids are rendered once and used everywhere. What an assistant wrote gets the ids that the chat template and the
tokenizer give it; a control token in anybody else's text is encoded as text. No text can open or close a turn. A response
carries exactly one terminator, and only if it ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template, encode_marked_chat, mark_control_tokens

from spin_lightning.files import sha256_of
from spin_lightning.terminal import say
from spin_lightning.types import FinishReason, Message, Prompt, Row, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TEMPLATES = {
    "alpaca": "### Instruction:\n{prompt}\n\n### Response:\n",
    "spin": "### Instruction: {prompt}\n\n### Response: ",  # what the authors' released generation script writes
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
#: Rows that are tokenized together.
BATCH = 1000
#: Tokens that mean the same in every tokenizer that has them. Servers stop on the ends by these names, so that no answer has them.
NEVER_SAID = {"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"}
NEVER_SAID |= {"<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>"}


@dataclass(frozen=True)
class Encoded:
    """One row as ids.

    Attributes:
        prompt_ids: The conversation up to where the answer begins.
        real_ids: The real answer, cut at the cap. A whole one ends with its terminator.
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
        prompt_template: None for the tokenizer's own chat template; where it has several, the one named ``default``, and
            ``tool_use`` for rows with tools. Else the name of one of them, ``alpaca``, ``spin``, ``chatml``, a text with
            ``{prompt}`` in it, a Jinja chat template, or the path of a file that holds one of the two.
        now: What the time is for a template that writes the date. None: what it is.

    Attributes:
        terminator_id: The token that ends an assistant turn under this template: it is scored, and generation stops on it.
        end_ids: All tokens on which generation stops, ``terminator_id`` first. :meth:`end_at` adds those of the model.
        time: ``now`` in ISO format; None where the template does not ask for the time.

    Raises:
        UserError: There is no template at all, or none of its tokens could end an answer.
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
                f"the chat template is not one of Jinja: {error}. Mend it in the model's folder, or give data.prompt_template."
            ) from None
        self._settings: dict[str, Any] = {"documents": None, **tokenizer.special_tokens_map}
        self.time: str | None = None
        if any("strftime_now" in text for text in self._templates):
            read_clock = self._templates[self.chat_template].environment.globals["strftime_now"]
            now = now or datetime.fromisoformat(read_clock("%Y-%m-%dT%H:%M:%S"))
            self.time, self._settings["strftime_now"] = now.isoformat(), now.strftime

        added = tokenizer.added_tokens_decoder
        self._added = {number: token.content for number, token in added.items()}
        self._control_tokens = self._turn_tokens = _any_of(())  # until it is known what the template writes
        self._shape = _TurnShape.of(self)
        self._control_tokens = _any_of(
            token.content
            for number, token in added.items()
            if token.special
            or number in self._shape.around
            or (not token.content.isspace() and any(token.content in text for text in self._templates))
        )
        self._template_text = _any_of(self._plain_markers())
        # with a template of the user's, the tokens of the tokenizer's own turns go on being turn tokens
        others = [] if own is None or prompt_template is None else own.values() if isinstance(own, dict) else [own]
        self._other_turns = [
            t.content for t in added.values() if t.special and any(t.content in text for text in others)
        ]
        self.terminator_id = self._shape.terminator_id
        self.end_ids: tuple[int, ...] = ()
        self.end_at([])
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = self.terminator_id  # never read: every mask comes from lengths
        self.pad_id: int = tokenizer.pad_token_id

    def end_at(self, ids: Iterable[int]) -> None:
        """Also end answers at these tokens: those of the model's generation settings.

        Ids outside of the vocabulary are ignored. So are ordinary tokens, and a printed note says so.
        """
        vocabulary = {number: text for text, number in self.tokenizer.get_vocab().items()}
        ends = dict.fromkeys([self.terminator_id, self._shape.call_terminator_id, *self.end_ids])
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
            [*named, *texts, *self._other_turns, *(self._added[token] for token in self._shape.around)]
        )
        self._ends = re.compile(f"(?<!{_START})(?:{_any_of(texts).pattern})")
        self._num_leading_ends = len(self._ends.findall(self._shape.lead))

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides how text becomes ids: vocabulary, merges, added tokens, template."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state = json.loads(backend.to_str()) if backend is not None else self.tokenizer.get_vocab()
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
        return sha256_of([state, *self._templates])

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins.

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
        """Ids of many rows, in their order. A row that the template refuses comes as the error that says why."""
        remaining = iter(rows)
        while some := list(islice(remaining, BATCH)):
            yield from self._encode_some(some, max_response_tokens)

    def _encode_some(self, rows: list[Row], max_response_tokens: int) -> Iterator[Encoded | UserError]:
        texts = [self._rendered(row) for row in rows]
        try:
            ids = iter(self._ids([text for pair in texts if isinstance(pair, tuple) for text in pair]))
        except UserError as error:
            if len(rows) == 1:
                yield error
            else:  # to know which
                for row in rows:
                    yield from self._encode_some([row], max_response_tokens)
            return
        for row, pair in zip(rows, texts, strict=True):
            if isinstance(pair, UserError):
                yield pair
                continue
            prompt_ids, whole_ids = next(ids), next(ids)
            try:
                response, noted = self._response(row, *pair, prompt_ids, whole_ids)
            except UserError as error:
                yield error
                continue
            reason: FinishReason = "stop" if len(response) <= max_response_tokens else "length"
            yield Encoded(prompt_ids, response[:max_response_tokens], reason, frozenset(noted))

    def has_control_tokens(self, row: Row) -> bool:
        """Whether a text of the row spells a control token that is encoded as text. Only for counting."""
        turns = (*row.prompt, row.real_turn)
        return any(self._taken_as_text(turn).search(turn["content"]) for turn in turns)

    def has_template_text(self, row: Row) -> bool:
        """Whether a text of the row spells what the template writes around turns in plain text, such as ``### Response:``.

        Such text has the template's own ids and can pass for a turn; no encoding can tell them apart.
        """
        return any(map(self._template_text.search, [row.real, *(message["content"] for message in row.prompt)]))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without its terminator."""
        ids = list(ids)
        return str(self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.end_ids else ids))

    # --- a row as text --------------------------------------------------------------------------------------------

    def _rendered(self, row: Row) -> tuple[str, str] | UserError:
        """The prompt, and the whole conversation with the real answer."""
        *asked, answer = (self._turn(message) for message in (*row.prompt, row.real_turn))
        tools = self._definitions(row.tools)
        try:
            return self._written(asked, tools, add_generation_prompt=True), self._written([*asked, answer], tools)
        except UserError as error:
            return error

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
        """The control tokens that are text in this turn: an assistant may write all but those that end or begin turns."""
        return self._turn_tokens if message["role"] == "assistant" else self._control_tokens

    # --- text as ids ----------------------------------------------------------------------------------------------

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered texts. Those without a marked token, which are nearly all, go to the tokenizer together."""
        is_marked = [_START in text or _END in text for text in texts]
        plain = [text for text, whether in zip(texts, is_marked, strict=True) if not whether]
        found = iter(self._plain_ids(plain) if plain else [])
        try:
            return [
                [int(token) for token in encode_marked_chat(self.tokenizer, text)] if whether else next(found)
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

    # --- the answer -----------------------------------------------------------------------------------------------

    def _response(
        self, row: Row, prompt: str, whole: str, prompt_ids: list[int], whole_ids: list[int]
    ) -> tuple[list[int], set[str]]:
        """The real answer as the model has to give it after the prompt, up to its terminator; and what is to be counted.

        Raises:
            UserError: The template does not write the answer's tool calls.
        """
        noted: set[str] = set()
        written = self._written_after(prompt, whole)
        block = self._shape.block if self._shape.block and prompt.endswith(self._shape.block.text) else None
        if calls := row.real_extras.get("tool_calls"):
            if written is None or not all(_name_of(call) in written for call in calls):
                raise UserError(
                    "the chat template does not write the tool calls of the real answer. Write them into its text, or set "
                    "data.prompt_template to a template that takes tool_calls."
                )
            said = written
        elif written is None or (not (block and block.is_closed) and self._leaves_out(row.real, written, block)):
            said = str(_marked(row.real, self._turn_tokens))
        else:
            said = written
        if block is not None:
            said = self._inside(block, row, said, noted)
        reasoning = row.real_extras.get("reasoning_content") or ""
        if _squashed(reasoning) not in _squashed(said):
            noted.add("reasoning_left_out")
        if row.tools and "tools" not in self.tool_template:
            noted.add("tools_left_out")

        if said == written and whole.startswith(prompt) and whole_ids[: len(prompt_ids)] == prompt_ids:
            response = whole_ids[len(prompt_ids) :]
        else:  # a token spans the border, or the template writes past answers otherwise: the prompt stays as it is
            noted.add("encoded_apart")
            response = self._ids_behind(said)
        ends = (place for place, token in enumerate(response) if token in self.end_ids)
        end = next(islice(ends, self._num_leading_ends, None), None)
        if end is not None:
            return response[: end + 1], noted
        if said == written and not calls and not self._shape.is_ended_by_next:
            noted.add("encoded_apart")
            response = self._ids_behind(_marked(row.real, self._turn_tokens))
        return [*response, self._shape.call_terminator_id if calls else self.terminator_id], noted

    def _written_after(self, prompt: str, whole: str) -> str | None:
        """What the template writes behind the prompt. None if it writes the conversation before the answer otherwise."""
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        same = len(_same_start(prompt, whole))
        return whole[same:] if len(prompt) - same <= len(self._shape.opening) else None

    def _leaves_out(self, answer: str, written: str, block: _Block | None) -> bool:
        """Whether the template leaves out an answer's beginning, as many do with reasoning."""
        if answer.strip() in written:
            return False
        parts = self._ends.split(written, maxsplit=self._num_leading_ends + 1)
        body, answer = _squashed("".join(parts[: self._num_leading_ends + 1])), _squashed(answer)
        begun = block.opens + body if block is not None else body
        return answer not in (body, begun) and answer.endswith(body)

    def _inside(self, block: _Block, row: Row, said: str, noted: set[str]) -> str:
        """The answer to a prompt that ends with a block such as ``<think>``.

        In an open one the answer goes on, and closes it; behind a closed one there is nothing but the answer.
        """
        reasoning = str(_marked(row.real_extras.get("reasoning_content") or "", self._turn_tokens))
        if block.is_closed:
            if block.closes in row.real:
                noted.add("reasoning_left_out")
            return said.rpartition(block.closes)[2].lstrip("\n") if block.closes in said else said
        if said.lstrip().startswith(block.opens):
            said = said.lstrip()[len(block.opens) :].lstrip("\n")
        if block.closes not in said:
            said = reasoning.strip("\n") + f"\n{block.closes}\n\n" + said.lstrip("\n")
        if not reasoning and block.closes not in row.real:
            noted.add("no_reasoning")
        return said

    # --- templates ------------------------------------------------------------------------------------------------

    def _plain_markers(self) -> set[str]:
        """What the template writes between turns, without control tokens; plain words are no markers."""
        turns: list[Message] = [{"role": role, "content": "\0"} for role in ("user", "assistant", "user", "assistant")]
        try:
            written = self._render(turns) + self._render(turns[:1], add_generation_prompt=True)
        except UserError:  # a template for single questions
            written = self._render(turns[:2])
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
                f"note: of the tokenizer's chat templates, {sorted(own)}, 'default' is used, and {with_tools!r} for rows "
                "with tools"
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
                    f"data.prompt_template to one of {sorted(PROMPT_TEMPLATES)}, to a text with {{prompt}} in it, or to a file."
                )
            return str(self.tokenizer.chat_template)
        template = PROMPT_TEMPLATES.get(prompt_template, prompt_template)
        if "{" not in template:
            path = Path(prompt_template).expanduser()
            if not path.is_file():
                raise UserError(
                    f"data.prompt_template {prompt_template!r} is neither one of {sorted(PROMPT_TEMPLATES)}, nor a text with "
                    "{prompt} in it, nor a file. Give one of these."
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


@dataclass(frozen=True)
class _Block:
    """A part of an assistant's turn between two tags, that begins in the prompt: open, or closed there already.

    ``text`` is how the prompt ends: with the tag that opens it, or with all of it.
    """

    opens: str
    closes: str
    is_closed: bool
    text: str


@dataclass(frozen=True)
class _TurnShape:
    """What a template writes around turns, found by rendering a few of them.

    Attributes:
        around: Added tokens that begin or end turns. Not those that an assistant's turn has inside, such as ``<think>``.
        terminator_id: The token that ends an assistant turn.
        is_ended_by_next: Whether the template itself writes it only where another turn follows, as GLM's do.
        opening: What is between a question and the place where its answer is generated.
        lead: What is between that place and the answer's text.
        block: A block that ``opening`` ends with, such as ``<think>``, or None.
        call_terminator_id: The token that ends an assistant turn with tool calls.
    """

    around: frozenset[int]
    terminator_id: int
    is_ended_by_next: bool
    opening: str
    lead: str
    block: _Block | None
    call_terminator_id: int

    @classmethod
    def of(cls, encoder: Encoder) -> _TurnShape:
        """Of an encoder that can render, and knows nothing else yet.

        Raises:
            UserError: The template refuses a question with its answer, or no token could end that.
        """
        tokenizer = encoder.tokenizer
        turns: dict[str, Any] = {
            "S": {"role": "system", "content": "spin rule"},
            "Q": {"role": "user", "content": "spin question"},
            "A": {"role": "assistant", "content": "spin answer"},
            "N": {"role": "user", "content": "spin next"},
            "C": {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
            "T": {"role": "tool", "content": "spin result", "name": "spin_probe", "tool_call_id": _PROBE_CALL["id"]},
        }

        @cache
        def written(names: str, is_open: bool = False) -> str:
            try:
                return encoder._render([turns[name] for name in names], add_generation_prompt=is_open)
            except UserError:  # not every template takes every role
                return ""

        def between(names: str, first: str, last: str = "", is_open: bool = False) -> str:
            """What stands between two turns' texts: from the beginning without the first, to the end without the last."""
            text = written(names, is_open)
            if first:
                text = text.partition(str(turns[first]["content"]))[2]
            return text.rpartition(str(turns[last]["content"]))[0] if last else text

        def tokens(text: str) -> list[int]:
            """Added tokens, apart from white space and from pairs of tags that the template only explains or fills itself."""
            ids = tokenizer.encode(text, add_special_tokens=False)
            found = list(dict.fromkeys(encoder._added[token] for token in ids if token in encoder._added))
            paired = set()
            for place, tag in enumerate(found):
                partner, is_closing = _partner(tag)
                if not is_closing and partner in found[place:]:
                    paired |= {tag, partner}
            kept = {tag for tag in found if not tag.isspace()} - paired
            return [token for token in dict.fromkeys(ids) if encoder._added.get(token) in kept]

        encoder._render([turns["Q"], turns["A"]])  # a template that refuses this says so
        opening, head = between("Q", "Q", is_open=True), between("QA", "Q", "A")
        after, to_next = between("QA", "A"), between("QAN", "A", "N")
        before_question = to_next or between("SQ", "S", "Q") or between("Q", "", "Q")

        known = {*encoder._added.values()}
        header, block = opening, None
        while tag := re.search(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*$", header):
            partner, is_closing = _partner(tag[1])
            if partner in before_question or not (partner in known or any(partner in t for t in encoder._templates)):
                break
            header = header[: tag.start()]
            if block is None:
                opens, closes = (partner, tag[1]) if is_closing else (tag[1], partner)
                block = _Block(opens, closes, is_closing, text=tag[0])
            else:
                block = replace(block, text=opening[len(header) :])
        common = _same_start(header, head)

        closes = {tokenizer.eos_token_id, *tokens(common)}  # what also ends a user's turn ends one
        ends = tokens(after)
        is_ended_by_next = not ends
        if is_ended_by_next:
            ends = [token for token in tokens(to_next) if token != tokenizer.bos_token_id or token in closes]
        terminator_id = next((token for token in ends if token in closes), ends[0] if ends else tokenizer.eos_token_id)
        if terminator_id is None:
            raise UserError(
                "no token can end an answer: the chat template writes none after an assistant turn, and the tokenizer "
                "has no eos_token. Set the tokenizer's eos_token, or give a data.prompt_template that ends answers."
            )
        if not ends:
            is_ended_by_next = False
        end_text = str(tokenizer.convert_ids_to_tokens(terminator_id))
        if block is not None and block.closes == end_text:
            block = None
        to_result = tokens(between("QAT", "A", "T")) if is_ended_by_next else []

        def from_end(text: str) -> str:
            return "".join(text.partition(end_text)[1:])

        around = [common, from_end(after), from_end(to_next), before_question if not to_next else ""]
        around += [between("SQ", "", "S"), between("SQ", "S", "Q")]
        around += [from_end(between("QCT", "Q", "T").removeprefix(common))]
        around += [between("QCT", "T", is_open=True).removesuffix(opening[len(header) :])]
        return cls(
            around=frozenset(token for text in around for token in tokens(text)),
            terminator_id=int(terminator_id),
            is_ended_by_next=is_ended_by_next,
            opening=opening,
            lead=head[len(_same_start(opening, head)) :],
            block=block,
            call_terminator_id=to_result[0] if to_result else int(terminator_id),
        )


_PROBE_CALL: dict[str, Any] = {
    "id": "spinprobe",  # nine letters, as Mistral's templates want it
    "type": "function",
    "function": {"name": "spin_probe", "arguments": {}},
}
_START, _, _END = mark_control_tokens(".", re.compile("[.]"))


def _marked(value: Any, tokens: re.Pattern[str]) -> Any:
    """A value with markers around the tokens in all of its texts, keys of tool definitions and arguments included."""
    if isinstance(value, dict):
        return {_marked(key, tokens): _marked(item, tokens) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, tokens) for item in value]
    return mark_control_tokens(value, tokens)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; of none, nothing."""
    longest_first = sorted({text for text in texts if text}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _squashed(text: str) -> str:
    """A text without its white space, which templates add and remove, and without markers."""
    return "".join(text.replace(_START, "").replace(_END, "").split())


def _partner(tag: str) -> tuple[str, bool]:
    """The tag that closes or opens what a tag opens or closes, and whether the given one closes.

    Example:
        >>> _partner("<think>"), _partner("[/INST]"), _partner("<|START_THINKING|>")
        (('</think>', False), ('[INST]', True), ('<|END_THINKING|>', False))
    """
    for opens, closes in (("<", "</"), ("[", "[/"), ("START", "END"), ("begin", "end")):
        if tag.startswith(closes) or (closes.isalpha() and closes in tag):
            return tag.replace(closes, opens, 1), True
        if opens.isalpha() and opens in tag:
            return tag.replace(opens, closes, 1), False
    return f"{tag[0]}/{tag[1:]}", False


def _same_start(a: str, b: str) -> str:
    return a[: next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _name_of(call: dict[str, Any]) -> str:
    return str(call.get("function", call).get("name", ""))
