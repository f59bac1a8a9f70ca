"""The records that travel between the parts: a row of data, a pair, a batch, log-probs, a loss.

Records only. Whatever computes, reads or writes lives in the module that owns it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

from torch import Tensor

FinishReason = Literal["stop", "length"]


class UserError(ValueError):
    """Something the user can mend. The message says what was expected, what came, and what to do.

    The command line prints it without a traceback; in Python it is an ordinary ``ValueError``.
    """


class Message(TypedDict):
    """One turn of a conversation. ``role`` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One row of the user's SFT data: what was asked, and the real answer to it."""

    prompt: tuple[Message, ...]
    real: str


@dataclass(frozen=True)
class Prompt:
    """A row as token ids: the prompt as the generator and the trainer both see it, and the real response.

    ``prompt_id`` numbers the prompts that were kept, from 0. ``real_ids`` are capped at the common
    response cap and end with the terminator only if ``real_finish_reason`` is ``"stop"``.
    """

    prompt_id: int
    row: Row
    prompt_ids: list[int]
    real_ids: list[int]
    real_finish_reason: FinishReason


@dataclass(frozen=True)
class Response:
    """What a generator answered: the sampled ids, why it stopped, and the sampler's log-probs.

    ``ids`` end with the terminator if and only if ``finish_reason`` is ``"stop"``. ``log_prob`` is the sum, in
    nats, of the log-probabilities of ``ids`` under the untouched distribution of the model.
    """

    ids: list[int]
    finish_reason: FinishReason
    log_prob: float


@dataclass
class PairLogProbs:
    """Log-probabilities of both responses of each pair under one model, in nats, summed over response tokens.

    Attributes:
        real: Shape ``(B,)``.
        generated: Shape ``(B,)``.
        real_lengths: Scored response tokens, terminator included, shape ``(B,)``.
        generated_lengths: The same for the generated responses, shape ``(B,)``.
        initial_response: Log-probs of the answer that the opponent of iteration 0 gave to the same prompt,
            shape ``(B,)``. Only for losses with ``needs_initial_response``.
    """

    real: Tensor
    generated: Tensor
    real_lengths: Tensor
    generated_lengths: Tensor
    initial_response: Tensor | None = None


@dataclass
class PairLossOutput:
    """What a pair loss returns: unreduced losses, and the implicit rewards without gradient, all ``(B,)``."""

    losses: Tensor
    real_rewards: Tensor
    generated_rewards: Tensor


@dataclass
class PairBatch:
    """One batch of pairs, right padded. Rows of the token tensors: all real, all generated, then (if the loss
    asks for them) all initial responses.

    Attributes:
        input_ids: Prompt and response ids, shape ``(R, T)`` with ``R`` = 2B or 3B.
        attention_mask: 1 on every real token, shape ``(R, T)``.
        response_mask: True on the tokens that are scored, shape ``(R, T)``, unshifted.
        opponent: Stored opponent log-probs, each ``(B,)``.
        initial: Stored log-probs of the opponent of iteration 0, or None.
        pair_ids: Position of each pair in the iteration's training set, shape ``(B,)``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    opponent: PairLogProbs
    initial: PairLogProbs | None
    pair_ids: Tensor

    def __len__(self) -> int:
        return len(self.pair_ids)


@dataclass
class SftBatch:
    """One batch of prompts with their real responses, right padded; fields as in :class:`PairBatch`."""

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)
