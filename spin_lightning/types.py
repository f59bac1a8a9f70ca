"""The records that travel between the parts: a row of data, a pair, a batch, log-probs, a loss.

Records only. Whatever computes, reads or writes lives in the module that owns it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from signal import Signals
from typing import Any, Literal, Required, TypedDict

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


class UserError(ValueError):
    """Something the user can mend. The message says what was expected, what came, and what to do.

    The command line prints it without a traceback; in Python it is an ordinary ``ValueError``.
    """

    exit_code = 2


class StorageError(OSError):
    """A file could not be written: no room, no permission. What was there before is untouched: mend it, try again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite. The message names the step and the rows."""

    exit_code = 1


class RewardUnavailable(Exception):
    """A judge did not reply about too many answers. What is finished is saved, and the same command continues."""

    exit_code = 75


class Interrupted(Exception):
    """A signal asked the run to end. What is finished is saved, and the same command continues."""

    def __init__(self, signal_number: int) -> None:
        name = Signals(signal_number).name
        super().__init__(f"stopped by {name}; what is finished is saved, and the same command continues")
        self.exit_code = 130 if name == "SIGINT" else 143


class LostProcess(Exception):
    """Another process of the run is gone without a word: killed, or its machine is. The same command continues."""

    exit_code = 75

    def __init__(self) -> None:
        super().__init__(
            "another process of this run is gone (killed, out of memory, or its machine is), so all end. What is "
            "finished is saved, and the same command continues"
        )


class EndedElsewhere(Exception):
    """Another process of the run has ended and said why; this one ends too, quietly, with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run ended, and said why")
        self.exit_code = exit_code


class StageFailed(Exception):
    """A command that this one started has failed, and said why. The same command continues.

    Args:
        what: What to call it.
        code: Its exit code, below 0 that of the signal that killed it. 2: there is something to mend first.
        advice: What else may be done about an exit code of 2, as a sentence.
    """

    def __init__(self, what: str, code: int, advice: str = "") -> None:
        ended = f"was killed by {Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        mend = "mend that, and the same command continues" if code == 2 else "and the same command continues"
        also = f". {advice}" if advice and code == 2 else ""
        super().__init__(f"{what} {ended}. What is finished is saved{';' if code == 2 else ','} {mend}{also}")
        self.exit_code = code if code > 0 else 128 - code


class Message(TypedDict, total=False):
    """One turn of a conversation, as chat templates read it. ``role`` is system, developer, user, assistant or tool.

    Beside role and text it has only what the data gives: ``reasoning_content`` and ``tool_calls`` of an assistant;
    ``name`` and ``tool_call_id`` of a tool's answer.
    """

    role: Required[str]
    content: Required[str]
    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


@dataclass(frozen=True)
class Row:
    """One row of the user's data: what was asked, the real response to it, and in preference data one that is worse.

    Attributes:
        prompt: The turns before the real response.
        real: The text of the real response, in preference data of the better one. May be empty where ``real_extras``
            has tool calls.
        real_extras: What else the turn of the real response has: ``reasoning_content``, ``tool_calls``.
        tools: Definitions of the tools that may be called (JSON schema, as chat templates take them).
        has_real: Whether there is a real response at all. If not, ``real`` is empty.
        real_finish_reason: ``length`` where it is known to have been cut, so that it ends without a terminator.
        rejected: The text of the response that is not preferred. None where there is none.
        rejected_extras: As ``real_extras``.
        rejected_finish_reason: As ``real_finish_reason``.
        preference: Probability that ``real`` is the better of the two, in [1/2, 1].
        margin: How much better ``real`` is, on the scale of a reward model's scores.
        columns: Further columns of the data, those that a reward names.
    """

    prompt: tuple[Message, ...]
    real: str
    real_extras: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()
    has_real: bool = True
    real_finish_reason: FinishReason = "stop"
    rejected: str | None = None
    rejected_extras: dict[str, Any] = field(default_factory=dict)
    rejected_finish_reason: FinishReason = "stop"
    preference: float = 1.0
    margin: float = 0.0
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def real_turn(self) -> Message:
        """The real response as a turn of the conversation."""
        return {"role": "assistant", "content": self.real, **self.real_extras}  # type: ignore[typeddict-item]

    @property
    def swapped(self) -> Row:
        """The same with both responses in each other's place. It says the same of them."""
        assert self.rejected is not None
        return replace(
            self,
            real=self.rejected,
            real_extras=self.rejected_extras,
            real_finish_reason=self.rejected_finish_reason,
            rejected=self.real,
            rejected_extras=self.real_extras,
            rejected_finish_reason=self.real_finish_reason,
            preference=1 - self.preference,
            margin=-self.margin,
        )


@dataclass(frozen=True)
class Prompt:
    """A row as token ids: the prompt as the generator and the trainer both see it, and the real response.

    ``prompt_id`` numbers the prompts that were kept, from 0. ``real_ids`` are capped at the common
    response cap and end with the terminator only if ``real_finish_reason`` is ``"stop"``. They are empty where the row
    has no real response. ``rejected_ids`` are the same of the response that is not preferred, None where there is none.
    """

    prompt_id: int
    row: Row
    prompt_ids: list[int]
    real_ids: list[int]
    real_finish_reason: FinishReason
    rejected_ids: list[int] | None = None
    rejected_finish_reason: FinishReason = "stop"


@dataclass(frozen=True)
class Response:
    """What a generator answered: the sampled ids, why it stopped, and the sampler's log-probs.

    ``ids`` end with one of the end ids if and only if ``finish_reason`` is ``"stop"``, and have none before.
    ``log_prob`` is the sum, in nats, of the log-probabilities of ``ids`` under the untouched distribution of the model;
    ``log_probs`` are its terms, where the generator gives them.
    """

    ids: list[int]
    finish_reason: FinishReason
    log_prob: float
    log_probs: list[float] | None = None


@dataclass
class PairLogProbs:
    """Log-probabilities of both responses of each pair under one model, in nats, summed over response tokens.

    Attributes:
        real: Shape ``(B,)``.
        generated: Shape ``(B,)``.
        real_lengths: Scored response tokens, terminator included, shape ``(B,)``.
        generated_lengths: The same for the generated responses, shape ``(B,)``.
        initial_response: Log-probs of the response that the opponent of iteration 0 gave to the same prompt,
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
class TokenLossOutput:
    """What a token loss returns, one entry for each of N response tokens. Only the losses have a gradient.

    The response token is compared with what the opponent may say in its place, of which there is a mean.

    Attributes:
        losses: Unreduced.
        real_rewards: Of the response tokens.
        generated_rewards: Of what the opponent may say, on average.
        wins: How much of it has a lower reward than the response token; what has the same counts one half.
        generated_log_probs: The policy's log-prob of it, on average.
    """

    losses: Tensor
    real_rewards: Tensor
    generated_rewards: Tensor
    wins: Tensor
    generated_log_probs: Tensor


@dataclass
class TokenLaws:
    """A model's law of the next token at N places, cut to k tokens and "the rest", all other tokens as one outcome.

    Attributes:
        ids: Which tokens, shape ``(N, k)``, no token twice in a row.
        log_probs: Their log-probs in nats, shape ``(N, k)``.
        rest: Log-prob of all other tokens together, shape ``(N,)``; -inf where the k tokens are the whole vocabulary.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor

    def __len__(self) -> int:
        return len(self.rest)

    @property
    def outcomes(self) -> Tensor:
        """The log-probs of the tokens and, last, of the rest, shape ``(N, k + 1)``."""
        return torch.cat([self.log_probs, self.rest[:, None]], 1)


@dataclass
class TokenLogProbs:
    """What one model says where N response tokens stand.

    Attributes:
        real: Its log-prob of the response token, shape ``(N,)``.
        laws: Its law of the tokens that may stand there.
    """

    real: Tensor
    laws: TokenLaws


@dataclass
class ResponseBatch:
    """Prompts and their responses, end to end in one row: no padding, and each prompt once for all its responses.

    Attributes:
        input_ids: Every prompt followed by its responses, shape ``(T,)``.
        position_ids: From 0 at each prompt's start; every response continues those of its prompt, shape ``(T,)``.
        scored: Places of the response tokens, in order, shape ``(N,)``.
        predictors: For each of them the place whose logits predict it (``models.batches.shifted``), shape ``(N,)``.
        response_index: Which response each of them belongs to, shape ``(N,)``.
        response_lengths: Tokens of each response, shape ``(R,)``.
        lengths: For each prompt its length and then those of its responses: the same layout as plain numbers.
        block_masks: What FlexAttention made of the layout, by sliding window. A cache.
    """

    input_ids: Tensor
    position_ids: Tensor
    scored: Tensor
    predictors: Tensor
    response_index: Tensor
    response_lengths: Tensor
    lengths: tuple[tuple[int, ...], ...]
    block_masks: dict[int | None, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.response_lengths)


@dataclass
class RolloutBatch:
    """Sampled responses that are computed in one pass, with what was found out about them before training.

    Equal responses to a prompt are computed once; each keeps its own numbers here. B responses have M tokens.

    Attributes:
        responses: All distinct responses, each prompt once.
        tokens: Which of the N scored tokens of ``responses`` each token is, the B responses end to end, shape ``(M,)``.
        lengths: Tokens of each response, shape ``(B,)``.
        log_probs: By the policy that sampled them, shape ``(M,)``.
        advantages: Shape ``(M,)``.
        values: What a critic said of them, shape ``(M,)``; None without one.
        returns: What it should have said, shape ``(M,)``; None without one.
        sampler_log_probs: By the generator that sampled them, shape ``(M,)``; None where it does not say.
        num_responses: Responses that an update counts for this pass, also those that are not computed, as nothing is to
            be learned from them.
        num_tokens: Their tokens.
    """

    responses: ResponseBatch
    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor
    advantages: Tensor
    values: Tensor | None
    returns: Tensor | None
    sampler_log_probs: Tensor | None
    num_responses: int
    num_tokens: int

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass
class TokenBatch:
    """Real responses that are computed in one pass, with what the opponent says where their tokens stand.

    Attributes:
        responses: The responses, each behind a prompt of its own.
        opponent: Of each of the N scored tokens of ``responses``.
        preference: As in a batch of pairs. Always None.
        initial: As in a batch of pairs. Always None.
    """

    responses: ResponseBatch
    opponent: TokenLogProbs
    preference: None = None
    initial: None = None

    def __len__(self) -> int:
        return len(self.opponent.real)


@dataclass
class PairBatch:
    """Pairs that are computed in one pass: a training batch is a list of these.

    Attributes:
        responses: All distinct responses of the pairs, each prompt once.
        real: Which of the responses is each pair's real one, shape ``(B,)``.
        generated: The same for the generated one, shape ``(B,)``.
        initial_response: The same for the response of iteration 0, or None.
        opponent: Stored opponent log-probs, each ``(B,)``. NaN where nobody scored the pairs.
        initial: Stored log-probs of the opponent of iteration 0, or None.
        pair_ids: Position of each pair in the iteration's training set, shape ``(B,)``.
        preference: Probability that the real response is the better one, shape ``(B,)``. None: 1 in every pair.
        margin: How much better it is, on the scale of a reward model's scores, shape ``(B,)``. None: 0 in every pair.
    """

    responses: ResponseBatch
    real: Tensor
    generated: Tensor
    initial_response: Tensor | None
    opponent: PairLogProbs
    initial: PairLogProbs | None
    pair_ids: Tensor
    preference: Tensor | None = None
    margin: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pair_ids)
