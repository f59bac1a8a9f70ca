"""What every generation backend promises: prompt ids in; token ids, finish reason and log-prob out."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from spin_lightning.types import Response, UserError


@dataclass(frozen=True)
class Player:
    """Who responds in an iteration. At its start that is the policy itself, in evaluation mode while it responds.

    Attributes:
        model: In this process.
        folder: Where the same weights lie as a Hugging Face folder, for a backend in another process. None: nowhere, as
            in iteration 0, whose model may be changed or unnamed; a generator that ``needs_folder`` is given one there
            too.
    """

    model: Any
    folder: Path | None = None


def seed_of(seed: int, iteration: int, prompt_id: int, answer: int) -> int:
    """The seed of one response: it depends on these four numbers alone, so any response can be made again, anywhere.

    It has 56 bits, of which the generators here use the lower 32 (see ``sampling.uniforms_of``). Among ``n`` answers
    about ``n^2 / 2^33`` pairs therefore share their random numbers: 5 of 200,000 responses. That biases nothing, as
    each of them is still a fair sample; two responses to one prompt share them with a probability of ``2^-32``.

    Example:
        >>> seed_of(0, 1, 2, 0) == seed_of(0, 1, 2, 0) != seed_of(0, 1, 2, 1)
        True
    """
    digest = hashlib.sha256(f"{seed}/{iteration}/{prompt_id}/{answer}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def as_set(terminator_ids: int | Collection[int]) -> frozenset[int]:
    """The ids that end a response, of which there may be one.

    Example:
        >>> as_set(2) == as_set([2, 2])
        True
    """
    return frozenset([terminator_ids] if isinstance(terminator_ids, int) else terminator_ids)


class ResponseGenerator(ABC):
    """Answers prompts with the opponent. Subclass it to bring a backend; turn it on by class path.

    A backend is opened with an opponent, asked for responses any number of times, and closed; so in each iteration. At
    the game's end, also after an error, it is shut down. It never changes its settings.

    Args:
        max_new_tokens: Cap on the response, terminator included. Real responses are cut at the same number.
        temperature: 1 samples the opponent as it is, which the game assumes. Any other value moves its fixed point
            to p_data ** temperature; 0 is greedy and drives the most likely response to zero.
        top_p: 1 samples the opponent as it is. Less cuts the tail, and the game then sees another opponent.
        batch_size: Prompts answered together. Changes speed and memory, not the distribution of the responses.

    Raises:
        UserError: A setting is outside its range.
    """

    #: Whether the opponent is to lie in a folder in iteration 0 too, for a backend in another process.
    needs_folder: ClassVar[bool] = False
    #: Whether it gives the log-prob of each token, and not their sum alone.
    gives_token_log_probs: ClassVar[bool] = True

    def __init__(
        self, max_new_tokens: int = 256, temperature: float = 1.0, top_p: float = 1.0, batch_size: int = 64
    ) -> None:
        if max_new_tokens < 1 or batch_size < 1:
            raise UserError(
                f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens!r} and {batch_size!r}."
            )
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature must be 0 (greedy) or positive, got {temperature!r}. Self-play assumes 1.")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {top_p!r}. Self-play assumes 1.")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.batch_size = batch_size
        self._opponent: Player | None = None

    def open(self, opponent: Player) -> None:
        """Get ready to respond as this opponent. Extend it in a backend that loads weights or starts a server."""
        self._opponent = opponent

    def close(self) -> None:
        """Let go of the opponent. Called also after an error."""
        self._opponent = None

    def check_ready(self) -> None:  # noqa: B027  # most need nothing
        """Refuse what can be known to fail, before a model is loaded.

        Raises:
            UserError: Something that the backend needs is missing.
        """

    def shut_down(self) -> None:  # noqa: B027  # most keep nothing
        """Give back what outlives ``close``, such as a server. It may be opened again."""

    @property
    def opponent(self) -> Player:
        """Who responds, from ``open`` to ``close``."""
        if self._opponent is None:
            raise RuntimeError(f"{type(self).__name__} has no opponent: call open(Player(model)) before generate.")
        return self._opponent

    @property
    def sampling(self) -> dict[str, Any]:
        """All that decides the distribution of the responses; the pair manifest keeps it. Extend it in a subclass."""
        return {
            "generator": f"{type(self).__module__}.{type(self).__qualname__}",
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }

    @property
    def engine(self) -> dict[str, Any]:
        """What computes the responses where this package does not, such as a server and its version; else empty.

        The pair manifest keeps it. Pairs that one engine began are not continued with another. Asked where an iteration
        begins.
        """
        return {}

    def check_contract(self) -> None:
        """Refuse a ``sampling`` that a manifest cannot keep, and a ``generate`` of another form.

        Raises:
            UserError: JSON cannot hold it, or a key is missing. Or ``generate`` wants other arguments, such as the
                model, which ``open`` gets.
        """
        taken = inspect.signature(self.generate)
        try:
            taken.bind("prompts", "seeds", "terminator_ids", "pad_id")
            is_taken = "model" not in taken.parameters
        except TypeError:
            is_taken = False
        if not is_taken:
            raise UserError(
                f"{type(self).__name__}.generate must take (prompts, seeds, terminator_ids, pad_id), got {taken}. "
                "The model is self.opponent.model, of the opponent that open() was given."
            )
        sampling, wanted = self.sampling, ("max_new_tokens", "temperature", "top_p")
        try:
            is_kept = json.loads(json.dumps(sampling)) == sampling and all(key in sampling for key in wanted)
        except (TypeError, ValueError):
            is_kept = False
        if not is_kept:
            raise UserError(
                f"{type(self).__name__}.sampling must be a dict that JSON can hold, with {', '.join(wanted)}, got "
                f"{sampling!r}. Begin it with **super().sampling."
            )

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        terminator_ids: int | Collection[int],
        pad_id: int,
    ) -> Iterator[tuple[int, Response]]:
        """Answer every prompt once, in any order, yielding ``(index, response)`` as responses are finished.

        Gradients are off. ``self.opponent.model`` is the model.

        Args:
            prompts: Token ids, one list a prompt.
            seeds: One seed for each prompt. The same model, prompt and seed give the same response, whatever else is in
                the batch (up to rounding of the dtype).
            terminator_ids: The token that ends a response, or several: whichever comes first. It is kept in the
                response.
            pad_id: The id to pad with. It may equal a terminator.
        """


@contextmanager
def opened(generator: ResponseGenerator, opponent: Player) -> Iterator[ResponseGenerator]:
    """A generator that is open while this lasts."""
    generator.open(opponent)
    try:
        yield generator
    finally:
        generator.close()
