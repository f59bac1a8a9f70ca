"""What a chat template writes around turns: found by rendering a few of them, as no two templates say it alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from spin_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Block:
    """A part of an assistant's turn between two tags, that begins in the prompt: open, or closed there already.

    ``text`` is how the prompt ends: with the tag that opens it, or with all of it. ``closing`` is the tag that closes
    it, with the white space that the template puts around it behind reasoning.
    """

    opens: str
    closes: str
    is_closed: bool
    text: str
    closing: str = ""


@dataclass(frozen=True)
class TurnShape:
    """What a template writes around turns, found by rendering a few of them.

    Attributes:
        around: Added tokens that begin or end turns. Not those that an assistant's turn has inside, such as
            ``<think>``.
        terminator_id: The token that ends an assistant turn.
        is_ended_by_next: Whether the template itself writes it only where another turn follows, as GLM's do.
        opening: What is between a question and the place where its response is generated.
        lead: What is between that place and the response's text.
        block: A block that ``opening`` ends with, such as ``<think>``, or None.
        call_terminator_id: The token that ends an assistant turn with tool calls.
        writes_calls: Whether earlier tool calls are written at all.
    """

    around: frozenset[int]
    terminator_id: int
    is_ended_by_next: bool
    opening: str
    lead: str
    block: Block | None
    call_terminator_id: int
    writes_calls: bool

    @classmethod
    def of(
        cls,
        render: Callable[..., str],
        tokenizer: PreTrainedTokenizerBase,
        templates: Collection[str],
        added_tokens: re.Pattern[str],
    ) -> TurnShape:
        """The shape of turns under a template.

        Args:
            render: Writes a conversation: ``render(turns, add_generation_prompt=True)``.
            tokenizer: Whose added tokens may begin and end turns.
            templates: The texts of the templates that are in use.
            added_tokens: Matches the added tokens, but for those of white space.

        Raises:
            UserError: The template refuses a question with its answer, or no token could end that.
        """
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        turns: dict[str, Any] = {
            "S": {"role": "system", "content": "spin rule"},
            "Q": {"role": "user", "content": "spin question"},
            "A": {"role": "assistant", "content": "spin answer"},
            "N": {"role": "user", "content": "spin next"},
            "R": {"role": "assistant", "content": "spin answer", "reasoning_content": "spin reason"},
            "C": {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
            "T": {"role": "tool", "content": "spin result", "name": "spin_probe", "tool_call_id": _PROBE_CALL["id"]},
        }

        @cache
        def written(names: str, is_open: bool = False) -> str:
            try:
                return render([turns[name] for name in names], add_generation_prompt=is_open)
            except UserError:  # not every template takes every role
                return ""

        def between(names: str, first: str, last: str = "", is_open: bool = False) -> str:
            """What stands between two turns' texts: from the beginning without a first, to the end without a last."""
            text = written(names, is_open)
            if first:
                text = text.partition(str(turns[first]["content"]))[2]
            return text.rpartition(str(turns[last]["content"]))[0] if last else text

        def tokens(text: str) -> list[int]:
            """Added tokens, but for white space and pairs of tags that the template only explains or fills itself."""
            ids = tokenizer.encode(text, add_special_tokens=False)
            found = list(dict.fromkeys(added[token] for token in ids if token in added))
            paired = set()
            for place, tag in enumerate(found):
                partner, is_closing = _partner(tag)
                if not is_closing and partner in found[place:]:
                    paired |= {tag, partner}
            kept = {tag for tag in found if not tag.isspace()} - paired
            return [token for token in dict.fromkeys(ids) if added.get(token) in kept]

        render([turns["Q"], turns["A"]])  # a template that refuses this says so
        opening, head = between("Q", "Q", is_open=True), between("QA", "Q", "A")
        after, to_next = between("QA", "A"), between("QAN", "A", "N")
        before_question = to_next or between("SQ", "S", "Q") or between("Q", "", "Q")

        known = {*added.values()}
        header, block = opening, None
        while tag := re.search(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*$", header):
            partner, is_closing = _partner(tag[1])
            is_known = partner in known or partner in header or any(partner in text for text in templates)
            if partner in before_question or not is_known:
                break
            header = header[: max(header.rfind(partner), 0) or tag.start()] if is_closing else header[: tag.start()]
            if block is None:
                opens, closes = (partner, tag[1]) if is_closing else (tag[1], partner)
                block = Block(opens, closes, is_closing, text=opening[len(header) :])
            else:
                block = replace(block, text=opening[len(header) :])
        common = _same_start(header, head)

        closes = {tokenizer.eos_token_id, *tokens(common)}  # what also ends a user's turn ends one
        ends = tokens(after)
        always = tokens(after[: parting(after, to_next, added_tokens)])  # of several that close, the last ends the turn
        if written("QA") == written("QA", True):  # a template that always begins the next response
            always = [token for token in always if token == tokenizer.eos_token_id]
        is_ended_by_next = not ends
        if is_ended_by_next:
            ends = [token for token in tokens(to_next) if token != tokenizer.bos_token_id or token in closes]
        terminator_id = next((token for token in ends if token in closes), ends[0] if ends else tokenizer.eos_token_id)
        if always:
            terminator_id = tokenizer.eos_token_id if tokenizer.eos_token_id in always else always[-1]
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
        if block is not None and not block.is_closed:
            before, tag_text, behind = between("QR", "Q").partition("spin reason")[2].partition(block.closes)
            blank = "".join(takewhile(str.isspace, behind))
            block = replace(block, closing=before + tag_text + blank if tag_text else f"\n{block.closes}\n\n")
        call_text = written("QC")
        to_result = [token for token in tokens(call_text) if call_text.rstrip().endswith(added[token])]
        to_result = [token for token in to_result if token not in tokens(opening)]
        if is_ended_by_next and not to_result:
            to_result = tokens(between("QAT", "A", "T"))

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
            lead=head[parting(opening, head, added_tokens) :],
            block=block,
            call_terminator_id=to_result[0] if to_result else int(terminator_id),
            writes_calls="spin_probe" in written("QCT").partition(str(turns["Q"]["content"]))[2],
        )


_PROBE_CALL: dict[str, Any] = {
    "id": "spinprobe",  # nine letters, as Mistral's templates want it
    "type": "function",
    "function": {"name": "spin_probe", "arguments": {}},
}
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "spin_tool", "description": "", "parameters": {"type": "object", "properties": {}}},
}


def parting(one: str, other: str, tokens: re.Pattern[str]) -> int:
    """Where two rendered texts begin to differ. A token that both begin alike belongs to what differs.

    Example:
        >>> parting("<a>x", "<a>y", re.compile("<a>")), parting("x<a>", "x<b>", re.compile("<[ab]>"))
        (3, 1)
    """
    same = len(_same_start(one, other))
    for text in (one, other):
        for token in tokens.finditer(text, max(same - 100, 0)):
            if token.start() >= same:
                break
            same = token.start() if token.end() > same else same
    return same


def _partner(tag: str) -> tuple[str, bool]:
    """The tag that closes or opens what a tag opens or closes, and whether the given one closes.

    Example:
        >>> _partner("<think>"), _partner("[/INST]"), _partner("<|START_THINKING|>"), _partner("<tool|>")
        (('</think>', False), ('[INST]', True), ('<|END_THINKING|>', False), ('<|tool>', True))
    """
    if tag[:2] == "<|" and tag[-2:] != "|>":
        return f"<{tag[2:-1]}|>", False
    if tag[:2] != "<|" and tag[-2:] == "|>":
        return f"<|{tag[1:-2]}>", True
    for opens, closes in (("<", "</"), ("[", "[/"), ("START", "END"), ("begin", "end")):
        if tag.startswith(closes) or (closes.isalpha() and closes in tag):
            return tag.replace(closes, opens, 1), True
        if opens.isalpha() and opens in tag:
            return tag.replace(opens, closes, 1), False
    return f"{tag[0]}/{tag[1:]}", False


def _same_start(a: str, b: str) -> str:
    return a[: next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]
