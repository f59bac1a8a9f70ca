"""Conversations to token ids: one renderer for generation and training.

A prompt's ids are rendered once and used everywhere. Control tokens that stand in somebody's text are encoded as
text, so no content can open or close a turn. A response carries exactly one terminator, and only if it ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin_lightning.files import sha256_of
from spin_lightning.types import FinishReason, Message, Prompt, Row, UserError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

PROMPT_TEMPLATES = {
    "alpaca": "### Instruction:\n{prompt}\n\n### Response:\n",
    "spin": "### Instruction: {prompt}\n\n### Response: ",  # what the authors' released generation script writes
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


class Encoder:
    """Turns conversations into ids with a tokenizer's chat template, or with an explicit prompt template.

    Args:
        tokenizer: A Hugging Face tokenizer. Its pad token may be missing or equal to its end of sequence.
        prompt_template: None for the tokenizer's own chat template. Else ``alpaca``, ``spin``, ``chatml``, a text
            with ``{prompt}`` in it, a Jinja chat template, or the path of a file that holds one of the two.

    Attributes:
        terminator_id: The token that ends an assistant turn under this template: scored in training, and the
            one on which generation stops.

    Raises:
        UserError: There is no template at all, or none of its tokens could end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = self._resolve_template(prompt_template)
        tokenizer.chat_template = self.chat_template  # exported beside the weights: what was trained is what is served
        self.terminator_id = self._find_terminator()
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = self.terminator_id  # never read: every mask comes from lengths
        self.pad_id: int = tokenizer.pad_token_id
        self.num_separate = 0
        control = [token.content for token in tokenizer.added_tokens_decoder.values() if self._is_control(token)]
        self._control_tokens = re.compile("|".join(map(re.escape, control)) or "(?!)")  # (?!) matches nothing
        self._template_text = re.compile("|".join(map(re.escape, self._plain_markers())) or "(?!)")

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides how text becomes ids: vocabulary, merges, added tokens, template."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state = json.loads(backend.to_str()) if backend is not None else self.tokenizer.get_vocab()
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
        return sha256_of([state, self.chat_template])

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins."""
        return self._render_ids(messages, add_generation_prompt=True)

    def encode(self, prompt_id: int, row: Row, max_response_tokens: int) -> Prompt:
        """Ids of one row. The real response is cut at ``max_response_tokens``, and a cut one has no terminator."""
        prompt_ids = self.prompt_ids(row.prompt)
        whole = self._render_ids([*row.prompt, {"role": "assistant", "content": row.real}])
        if whole[: len(prompt_ids)] == prompt_ids and self.terminator_id in whole[len(prompt_ids) :]:
            response = whole[len(prompt_ids) :]
            response = response[: response.index(self.terminator_id)]
        else:  # the template writes past answers otherwise, or a token spans the border: keep the prompt as generated from
            self.num_separate += 1
            response = self._answer_ids(row.real)
        response = [*response, self.terminator_id]
        finish_reason: FinishReason = "stop" if len(response) <= max_response_tokens else "length"
        return Prompt(prompt_id, row, prompt_ids, response[:max_response_tokens], finish_reason)

    def has_control_tokens(self, row: Row) -> bool:
        """Whether a text of the row spells a control token. ``encode`` takes it as text, so this is only for counting."""
        return any(map(self._control_tokens.search, [row.real, *(message["content"] for message in row.prompt)]))

    def has_template_text(self, row: Row) -> bool:
        """Whether a text of the row spells what the template writes around turns in plain text, such as ``### Response:``.

        Such text has the template's own ids and can pass for a turn; no encoding can tell them apart.
        """
        return any(map(self._template_text.search, [row.real, *(message["content"] for message in row.prompt)]))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without its terminator."""
        ids = list(ids)
        return str(self.tokenizer.decode(ids[:-1] if ids and ids[-1] == self.terminator_id else ids))

    def _plain_markers(self) -> set[str]:
        """What the template writes between turns, without control tokens; plain words are no markers."""
        turns: list[Message] = [{"role": role, "content": "\0"} for role in ("user", "assistant", "user", "assistant")]
        try:
            written = self._render(turns, tokenize=False) + self._render(
                turns[:1], tokenize=False, add_generation_prompt=True
            )
        except UserError:  # a template for single questions
            written = self._render(turns[:2], tokenize=False)
        pieces = [piece.strip() for part in written.split("\0") for piece in self._control_tokens.split(part)]
        lines = {line.strip() for piece in pieces for line in piece.splitlines()}
        return {line for line in lines if len(line) > 2 and not re.fullmatch(r"[\w\s.,'!?-]*", line)}

    def _is_control(self, token: AddedToken) -> bool:
        return not token.content.isspace() and (token.special or token.content in self.chat_template)

    def _answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer that follows a prompt but is encoded apart from it."""
        # the branch never runs, yet tells which added tokens are control tokens
        template = f"{{% if false %}}{self.chat_template}{{% endif %}}{{{{ messages[0]['content'] }}}}"
        newline, behind_newline, alone = (
            self._render_ids([{"role": "assistant", "content": text}], chat_template=template)
            for text in ("\n", f"\n{answer}", answer)
        )
        # behind a newline, because some tokenizers put a space before a text's first word
        return behind_newline[len(newline) :] if behind_newline[: len(newline)] == newline else alone

    def _render_ids(self, messages: Sequence[Message], **settings: Any) -> list[int]:
        ids = self._render(messages, tokenize=True, return_dict=False, sanitize_control_tokens=True, **settings)
        return [int(token) for token in ids]

    def _render(self, messages: Sequence[Message], **settings: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": message["role"], "content": message["content"]} for message in messages], **settings
            )
        except Exception as error:  # Jinja raises what the template's author wrote
            roles = [message["role"] for message in messages]
            raise UserError(
                f"the chat template refuses a conversation with the roles {roles}: {error}. "
                "Change the rows, or set data.prompt_template to a template that takes them."
            ) from error

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

    def _find_terminator(self) -> int:
        """The first control token the template writes after an assistant's text, else the end of sequence."""
        probe = "spin probe"
        turns: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
        _, found, after = self._render(turns, tokenize=False).rpartition(probe)
        tail = self.tokenizer.encode(after, add_special_tokens=False) if found else []
        added = self.tokenizer.added_tokens_decoder
        for token in tail:
            if token in added and not added[token].content.isspace():
                return int(token)
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "no token can end an answer: the chat template writes none after an assistant turn, and the tokenizer "
                "has no eos_token. Set the tokenizer's eos_token, or give a data.prompt_template that ends answers."
            )
        return int(self.tokenizer.eos_token_id)
