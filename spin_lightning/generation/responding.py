"""Asks a generator for responses and believes none of them unchecked: the model's, to any prompts, in any stage."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from spin_lightning.data.encoding import Encoder
from spin_lightning.generation.base import ResponseGenerator
from spin_lightning.terminal import say
from spin_lightning.types import Response, UserError


class Responder:
    """A generator that is open, with the model that it speaks for.

    Args:
        generator: What responds. It is opened and closed by whoever makes this.
        encoder: Knows the tokens that end a response.
        model: Whose responses they are; its rows of embeddings are the ids there can be.
        poll: Called after each response; raises to interrupt.
    """

    def __init__(self, generator: ResponseGenerator, encoder: Encoder, model: Any, poll: Callable[[], None]) -> None:
        self.generator, self.encoder, self.model, self.poll = generator, encoder, model, poll
        self._most_at_once = sys.maxsize  # fewer after memory ran out

    def respond(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[tuple[int, Response]]:
        """A response to every prompt, in any order, each with the prompt's number.

        Where memory runs out, those that are missing are asked for again, half as many at a time: a response depends on
        its prompt and its seed alone.

        Raises:
            UserError: The generator does not keep its promises.
        """
        missing = dict.fromkeys(range(len(prompts)))
        while missing:
            asked = list(itertools.islice(missing, self._most_at_once))
            try:
                for number, response in self._generate([prompts[i] for i in asked], [seeds[i] for i in asked]):
                    if asked[number] not in missing:
                        raise self._make_error(f"answered prompt {number} twice")
                    del missing[asked[number]]
                    self.poll()
                    yield asked[number], response
                if unanswered := sum(index in missing for index in asked):
                    raise self._make_error(f"gave {len(asked) - unanswered} responses to {len(asked)} prompts")
                continue
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                together = min(self._most_at_once, self.generator.batch_size)
                if not _is_out_of_memory(error) or together == 1:
                    raise
                self._most_at_once = together // 2
                why = str(error).partition("\n")[0][:120] or type(error).__name__
            # outside of the handler, whose traceback holds on to the memory
            torch.cuda.empty_cache()
            say(f"note: out of memory in generation ({why}); going on with {self._most_at_once} prompts at a time")

    def _generate(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[tuple[int, Response]]:
        """What the generator yields, each response checked."""
        ends = self.encoder.end_ids
        answers = self.generator.generate(prompts, seeds, ends[0] if len(ends) == 1 else ends, self.encoder.pad_id)
        if not isinstance(answers, Iterable):
            raise self._make_error(f"gave {type(answers).__name__} instead of responses one by one")
        for answer in answers:
            yield self._check_response(answer, len(prompts))

    def _check_response(self, answer: Any, num_asked: int) -> tuple[int, Response]:
        """What a generator yielded, if it is what it has to be.

        Raises:
            UserError: It is not. The message names the generator and what is wrong.
        """
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Response)):
            raise self._make_error(
                f"yielded {_describe(answer)} instead of a pair of a prompt's number and its Response"
            )
        number, response = answer
        if type(number) is not int or not 0 <= number < num_asked:
            raise self._make_error(f"yielded a response to prompt {number!r}, and there are {num_asked} prompts")
        ids, ends, cap = response.ids, self.encoder.end_ids, self.generator.max_new_tokens
        if not isinstance(ids, list) or not ids or any(type(token) is not int for token in ids):
            raise self._make_error(f"gave {_describe(ids)} as ids, which must be a list of at least one int")
        rows = len(self.model.get_input_embeddings().weight)  # type: ignore[operator]
        if not 0 <= min(ids) <= max(ids) < rows:
            raise self._make_error(f"gave the ids {min(ids)} to {max(ids)}, and the model has rows for 0 to {rows - 1}")
        if len(ids) > cap:
            raise self._make_error(f"gave a response of {len(ids)} tokens, and max_new_tokens is {cap}")
        if any(token in ends for token in ids[:-1]):
            raise self._make_error("gave a response with the token that ends one before its last place")
        if response.finish_reason != ("stop" if ids[-1] in ends else "length"):
            raise self._make_error(
                f"gave the finish_reason {response.finish_reason!r} to a response that ends with token {ids[-1]}; it "
                f"is 'stop' if and only if that is one of {list(ends)}, else 'length'"
            )
        if not isinstance(response.log_prob, float | int) or not math.isfinite(response.log_prob):
            raise self._make_error(
                f"gave {response.log_prob!r} as log_prob, which must be a finite number of nats (a model with NaN "
                "or infinite weights gives none)"
            )
        if response.log_probs is not None and len(response.log_probs) != len(ids):
            raise self._make_error(f"gave {len(response.log_probs)} log_probs to a response of {len(ids)} tokens")
        return number, response

    def _make_error(self, what: str) -> UserError:
        kind = type(self.generator)
        return UserError(
            f"the generator {kind.__module__}.{kind.__qualname__} {what}. Mend its generate method; "
            "ResponseGenerator.generate says what it has to yield."
        )


def _describe(value: Any) -> str:
    """What something is, in few words."""
    if isinstance(value, list | tuple):
        return (
            f"a {type(value).__name__} of "
            f"{', '.join(dict.fromkeys(type(item).__name__ for item in value)) or 'nothing'}"
        )
    return type(value).__name__


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in words)
