"""A judge behind OpenAI's ``/v1/chat/completions``: the probabilities of the most likely tokens, or texts that vote."""

from __future__ import annotations

import math
import os
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from spin_lightning.generation.server import Refused, Server, Unanswered
from spin_lightning.rewards.base import UNANSWERED, refuse_unanswered
from spin_lightning.rewards.judge_model import NOW
from spin_lightning.runs import signals
from spin_lightning.runs.redaction import redacted
from spin_lightning.terminal import say
from spin_lightning.types import Message, RewardUnavailable, UserError

#: Seconds before a request that was not answered is sent again, up to half more by chance. After the last there is no
#: reply.
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
#: The longest pause that a server may ask for.
LONGEST_PAUSE = 60.0
#: Seconds between two looks whether the run was asked to end.
POLL_SECONDS = 0.2
#: Asks for the most likely tokens at a reply's begin.
FIRST_TOKEN = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}
#: The probability that the labels among them must have.
LEAST_MASS = 0.01
#: Tokens of a reply that is read as text: "Rating: **8**".
TEXT_TOKENS = 16


class _Unreadable(Exception):
    """A reply in which no label can be found."""


class ServerJudge:
    """A language model that a server speaks for.

    Args:
        url: Where the server is.
        model: The name that it knows the model by. None: the only one that it serves.
        key_variable: The environment variable with the key. None: there is none.
        timeout_seconds: For one reply.
        concurrency: Requests under way at once.
        rationale: Tokens of reasoning before the label.
        votes: How often each question is asked where there are no log-probs.

    Raises:
        UserError: A setting is outside its range.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        key_variable: str | None,
        timeout_seconds: float,
        concurrency: int,
        rationale: int,
        votes: int,
    ) -> None:
        if not 0 < timeout_seconds < math.inf:
            raise UserError(f"JudgeReward.timeout_seconds must be positive, got {timeout_seconds!r}.")
        is_name = key_variable is None or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key_variable)
        if not is_name or redacted(key_variable) != key_variable:  # it is not shown: it may be the key
            raise UserError(
                "JudgeReward.key_variable must be the name of an environment variable, such as OPENAI_API_KEY, and not "
                "the key. Set the variable, and give its name."
            )
        self.server, self.model = Server(url, key_variable), model
        self.timeout_seconds, self.concurrency, self.rationale, self.votes = (
            timeout_seconds,
            concurrency,
            rationale,
            votes,
        )
        self._has_log_probs = False
        self._settled: set[str] = set()  # labels that it was asked to repeat
        self._said: set[float] = set()  # pauses that were told of
        self._has_paused = False  # in the last questions
        self._saying = threading.Lock()

    def check_ready(self) -> None:
        """Make sure that the key is there. The server is asked nothing yet.

        Raises:
            UserError: It is not.
        """
        name = self.server.key_variable
        if name is not None and not os.environ.get(name):
            raise UserError(
                f"the environment variable {name} is not set, which is to hold the key for the judge at "
                f"{self.server.url}. Set it, or leave JudgeReward.key_variable out where no key is needed."
            )

    def close(self) -> None:
        """Nothing is kept between questions."""

    def ask(self, questions: Sequence[list[Message]], labels: Sequence[str]) -> list[list[float] | None]:
        """For each question the probabilities of the labels; None where no reply came, or none that can be read.

        Raises:
            UserError: The server refuses the key, the model or the request, or more than a tenth of its replies cannot
                be read.
            RewardUnavailable: More than a tenth of the questions stayed without a reply.
        """
        if not questions:
            return []
        found: list[list[float] | None] = []
        unanswered, unreadable = [], []
        is_over = threading.Event()
        self._has_paused = False
        pool = ThreadPoolExecutor(min(self.concurrency, len(questions)), thread_name_prefix="judge")
        try:
            self._settle(labels, is_over)
            futures = [pool.submit(self._ask_one, question, labels, is_over) for question in questions]
            for future in futures:
                while not _is_done(future):
                    signals.end_if_asked()
                try:
                    found.append(future.result())
                except Unanswered as error:
                    found.append(None)
                    unanswered.append(str(error))
                    # no need to wait for the rest where it is too many already
                    refuse_unanswered(len(unanswered), len(questions), self._who, unanswered[0])
                except (_Unreadable, Refused) as error:
                    found.append(None)
                    unreadable.append(str(error))
        finally:
            is_over.set()
            self.server.hang_up()
            pool.shutdown(cancel_futures=True)
        if not self._has_paused:  # it replies again: the next time that it does not is told of anew
            self._said.clear()
        if len(unreadable) > UNANSWERED * len(questions):
            raise UserError(
                f"{self._who} gave no label to {len(unreadable)} of {len(questions)} questions: {unreadable[0]}. It "
                f"has to reply with one of {', '.join(labels)}. Take a judge that follows instructions, or let it "
                "reason first (rationale: 256)."
            )
        return found

    @property
    def _who(self) -> str:
        return f"the judge at {self.server.url}"

    def _ask_one(self, question: Sequence[Message], labels: Sequence[str], is_over: threading.Event) -> list[float]:
        """The probabilities of the labels. Runs in a thread of its own."""
        turns = list(question)
        if self.rationale:
            text, _ = self._complete(turns, is_over, max_tokens=self.rationale, temperature=0.0)
            turns += [{"role": "assistant", "content": text}, {"role": "user", "content": NOW}]
        if self._has_log_probs:
            _, top = self._complete(turns, is_over, **FIRST_TOKEN)
            if top:
                return self._read_law(top, labels)
        counts = dict.fromkeys(labels, 0.0)
        last = ""
        for vote in range(self.votes):
            # sampled, unless there is one vote only
            settings: dict[str, Any] = {"temperature": float(self.votes > 1), "seed": vote}
            last, _ = self._complete(turns, is_over, max_tokens=TEXT_TOKENS, **settings)
            if (label := find_label(last, labels)) is not None:
                counts[label] += 1.0
        if not (total := sum(counts.values())):
            raise _Unreadable(f"it replied {last[:80]!r}")
        return [count / total for count in counts.values()]

    def _read_law(self, top: Mapping[str, float], labels: Sequence[str]) -> list[float]:
        weights = dict.fromkeys(labels, 0.0)
        for token, probability in top.items():
            if token.strip() in weights:
                weights[token.strip()] += probability
        if (total := sum(weights.values())) < LEAST_MASS:
            raise _Unreadable(f"its most likely tokens are {', '.join(map(repr, list(top)[:5]))}")
        return [weight / total for weight in weights.values()]

    def _settle(self, labels: Sequence[str], is_over: threading.Event) -> None:
        """Find out what the server is, before the first question: its model, and whether it gives log-probs.

        It is asked to repeat the last label. One that is several tokens would be taken for another, which it begins
        with, as 10 for 1.

        Raises:
            UserError: The last label is several tokens to it.
            RewardUnavailable: It does not reply.
        """
        if labels[-1] in self._settled:
            return
        asked: Message = {"role": "user", "content": f"Repeat this number, and say nothing else: {labels[-1]}"}
        try:
            self.model = self.model or self._find_model(is_over)
            try:
                _, top = self._complete([asked], is_over, **FIRST_TOKEN)
            except Refused as refusal:
                if refusal.status not in (400, 422):
                    raise UserError(f"{self._who} refuses to be asked: {refusal}.") from None
                top = None  # of some servers, because of the log-probs
            except _Unreadable as error:
                raise UserError(f"{self._who} is no server of chat completions: {error}.") from None
        except Unanswered as error:
            raise RewardUnavailable(
                f"{self._who} does not reply ({error}). What is finished is saved: see to it that it does, and run the "
                "same command again"
            ) from None
        said = max(top, key=lambda token: top[token]).strip() if top else ""
        if said != labels[-1] and said in labels and labels[-1].startswith(said):
            raise UserError(
                f"{self._who} spells {labels[-1]} in several tokens, so its log-probs do not tell it from {said}. Set "
                "highest: 9, which rates from 1 to 9."
            )
        if not top:
            say(f"note: {self._who} gives no log-probs: its texts are read, {self.votes} for each question.")
        self._has_log_probs = bool(top)
        self._settled.add(labels[-1])

    def _find_model(self, is_over: threading.Event) -> str:
        answer = self._ask_patiently("/v1/models", None, is_over)
        try:
            served = [str(entry["id"]) for entry in answer["data"]]
        except (TypeError, KeyError):
            raise UserError(f"{self._who} does not list its models. Set JudgeReward.model to the name.") from None
        if len(served) != 1:
            raise UserError(f"{self._who} serves {', '.join(served) or 'no model'}. Set JudgeReward.model to one.")
        return served[0]

    def _complete(
        self, turns: Sequence[Message], is_over: threading.Event, **settings: Any
    ) -> tuple[str, dict[str, float] | None]:
        """The text of a reply, and the probabilities of its most likely first tokens, if it has them."""
        body = {"model": self.model, "messages": list(turns), "n": 1, **settings}
        answer = self._ask_patiently("/v1/chat/completions", body, is_over)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            if not isinstance(text, str):
                raise TypeError
        except (TypeError, KeyError, IndexError):
            raise _Unreadable(f"it replied {str(answer)[:200]!r}") from None
        try:
            tokens = choice["logprobs"]["content"][0]["top_logprobs"]
            top: dict[str, float] = {}
            for entry in tokens:
                top[str(entry["token"])] = top.get(str(entry["token"]), 0.0) + math.exp(float(entry["logprob"]))
            return text, top
        except (TypeError, KeyError, IndexError, ValueError, OverflowError):
            return text, None

    def _ask_patiently(self, path: str, body: Any, is_over: threading.Event) -> Any:
        for pause in (*PAUSES, None):
            try:
                return self.server.ask(path, body, self.timeout_seconds)
            except Refused as refusal:
                if refusal.status in (401, 403):
                    raise UserError(
                        f"{self._who} refuses the key ({refusal}). Put one that it takes into an environment variable, "
                        f"and name that as JudgeReward.key_variable (now {self.server.key_variable!r})."
                    ) from None
                if refusal.status in (404, 405):
                    raise UserError(
                        f"{self._who} does not serve the model {self.model!r} or {path} ({refusal}). Give the url "
                        "without /v1/chat/completions, and the model by the server's own name."
                    ) from None
                raise
            except Unanswered as error:
                if pause is None or is_over.is_set():
                    raise
                wait = max(pause, min(error.after or 0.0, LONGEST_PAUSE))
                self._say_pause(pause, wait, error)
                if is_over.wait(wait * random.uniform(1.0, 1.5)):
                    raise
        raise AssertionError

    def _say_pause(self, pause: float, wait: float, error: Unanswered) -> None:
        """Say that a request is sent again: of all that wait as long, once."""
        with self._saying:
            self._has_paused = True
            if pause not in self._said:
                self._said.add(pause)
                say(f"note: {self._who} did not reply ({error}); trying again in {wait:g} s")


def find_label(text: str, labels: Sequence[str]) -> str | None:
    """The first label in a text that stands alone, behind reasoning in tags if there is any.

    Example:
        >>> find_label("Rating: **8**/10", ["8", "9", "10"]), find_label("It is 1.5", ["1", "2"])
        ('8', None)
    """
    text = text.rpartition("</think>")[2]
    pattern: Callable[[str], str] = lambda label: rf"(?<![\w.,-]){re.escape(label)}(?!\w|[.,]\d)"  # noqa: E731
    found = re.search("|".join(map(pattern, sorted(labels, key=len, reverse=True))), text)
    return None if found is None else found[0]


def _is_done(future: Any) -> bool:
    try:
        future.exception(timeout=POLL_SECONDS)
        return True
    except TimeoutError:
        return future.done()
