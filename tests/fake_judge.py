"""A judge behind OpenAI's chat completions, over real sockets: its replies and its faults are for a test to say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fake_vllm import FakeVllm


def shown(question: str, name: str = "response") -> str:
    """What stands between the marks of a question."""
    mark, _, text = question.split(f"<{name} ")[-1].partition(">\n")
    return text.split(f"\n</{name} {mark}>")[0]


def completion(text: str, law: dict[str, float] | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    if law is not None:
        top = [{"token": token, "logprob": math.log(p)} for token, p in law.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": top}]}
    return {"choices": [choice]}


class FakeJudge(FakeVllm):
    """Replies to chats by ``reply(question, body)``: a text, the law of its first token, a status, or anything."""

    request_queue_size = 64  # or connections that are made together wait for a second

    def __init__(self, reply: Callable[[str, Any], Any]) -> None:
        super().__init__(lambda *args: ([], []))
        self.reply_to = reply
        self.models = [{"id": "judge"}]
        self.has_log_probs, self.hears_probe = True, False

    def answer(self, path: str, body: Any) -> Any:
        if path != "/v1/chat/completions":
            return super().answer(path, body)
        question = body["messages"][-1]["content"]
        if question.startswith("Repeat this number") and not self.hears_probe:
            given: Any = {question.split()[-1]: 1.0} if self.has_log_probs else question.split()[-1]
        else:
            given = self.reply_to(question, body)
        if isinstance(given, dict) and not given.keys() & {"choices"}:
            law = given if "logprobs" in body else None
            return completion(max(given, key=lambda token: given[token]), law)
        return completion(given) if isinstance(given, str) else given

    @property
    def chats(self) -> list[Any]:
        """What it was asked, but for the question by which it is got to know."""
        asked = [body for path, body in self.asked if path == "/v1/chat/completions"]
        return [body for body in asked if not body["messages"][-1]["content"].startswith("Repeat this number")]


def count_vowels(completions: Any) -> list[float]:
    """A reward that most responses of a random model differ by."""
    return [float(sum(char in "aeiou" for char in completion[0]["content"])) for completion in completions]
