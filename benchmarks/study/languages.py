"""The study's languages: strings of digits, laws with at most three responses, and what a student sees of them.

Each language has a target task, which is fine-tuned on, and another task that pre-training taught as well: what a
student forgets of it is measured. A prompt says by its first token which task it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from benchmarks.study.stacked import Shape

PAD, ASK, ANSWER, END = range(4)  # as the laboratory's tokenizer numbers them
FIRST_DIGIT = 4
ASK_OTHER = FIRST_DIGIT + 10
VOCABULARY = ASK_OTHER + 1

Digits = tuple[int, ...]

RULES: dict[str, Callable[[Digits], Digits]] = {
    "sorted": lambda prompt: tuple(sorted(prompt)),
    "reversed": lambda prompt: prompt[::-1],
    "copied": lambda prompt: prompt,
    "rotated": lambda prompt: (*prompt[1:], prompt[0]),
    **{f"plus {c}": lambda prompt, c=c: tuple((digit + c) % 10 for digit in prompt) for c in range(10)},  # type: ignore[misc]
}


@dataclass(frozen=True)
class Task:
    """A law: rules with their probabilities. Where two rules give one response, these add.

    Example:
        >>> Task({"sorted": 0.6, "reversed": 0.3, "copied": 0.1}).answers((1, 2, 1))
        {(1, 1, 2): 0.6, (1, 2, 1): 0.4}
    """

    law: dict[str, float]

    def answers(self, prompt: Digits) -> dict[Digits, float]:
        found: dict[Digits, float] = {}
        for rule, probability in self.law.items():
            answer = RULES[rule](prompt)
            found[answer] = round(found.get(answer, 0.0) + probability, 12)
        return found

    def draw(self, prompt: Digits, rng: Random) -> Digits:
        (rule,) = rng.choices(list(self.law), list(self.law.values()))
        return RULES[rule](prompt)


@dataclass(frozen=True)
class Language:
    """What is learned, and from where.

    Attributes:
        length: Digits of a prompt and of its responses.
        target: What the demonstrations are drawn from.
        before: What pre-training showed of the target's prompts, apart from slips.
        slips: Probability that pre-training replaced a digit of a target's response by any digit.
        other: The task that is to be retained.
        shape: Of the student.
        pretraining_updates: Of 64 rows each, half of them the target's prompts.
    """

    length: int
    target: Task
    before: Task
    slips: float
    other: Task
    shape: Shape
    pretraining_updates: int = 3000

    @property
    def response_tokens(self) -> int:
        return self.length + 1

    @property
    def prompt_tokens(self) -> int:
        return self.length + 2


_SHIFT = Task({"plus 0": 0.6, "plus 1": 0.3, "plus 2": 0.1})
_RULES = Task({"sorted": 0.6, "reversed": 0.3, "copied": 0.1})
_MIRRORS = Task({"reversed": 0.5, "copied": 0.3, "rotated": 0.2})


def _shift(shape: Shape) -> Language:
    return Language(6, _SHIFT, Task({f"plus {c}": 0.2 for c in range(5)}), 0.05, _MIRRORS, shape)


def _rules(shape: Shape) -> Language:
    return Language(5, _RULES, Task({"sorted": 0.2, "reversed": 0.2, "copied": 0.6}), 0.05, _SHIFT, shape)


#: A language and a student. ``shift``: each digit plus 0, 1 or 2, which needs one decision and then no slip. ``rules``:
#: sorted, reversed or copied; the smaller student cannot sort.
LANGUAGES: dict[str, Language] = {
    "shift": _shift(Shape(VOCABULARY)),
    "rules": _rules(Shape(VOCABULARY)),
    "shift, smaller student": _shift(Shape(VOCABULARY, hidden=16, heads=2)),
    "rules, larger student": _rules(Shape(VOCABULARY, hidden=64)),
}


def draw_prompts(language: Language, count: int, seed: str, without: Collection[Digits] = ()) -> list[Digits]:
    """Different prompts, uniformly drawn, none of them in ``without``."""
    rng, taken, found = Random(seed), set(without), []
    while len(found) < count:
        prompt = tuple(rng.randrange(10) for _ in range(language.length))
        if prompt not in taken:
            taken.add(prompt)
            found.append(prompt)
    return found


def with_slips(answer: Digits, probability: float, rng: Random) -> Digits:
    """Each digit replaced by any digit with this probability."""
    return tuple(rng.randrange(10) if rng.random() < probability else digit for digit in answer)


def wrong_answer(task: Task, prompt: Digits, answer: Digits, rng: Random) -> Digits:
    """The answer with one digit changed, so that no rule gives it."""
    while True:
        place, digit = rng.randrange(len(answer)), rng.randrange(10)
        changed = (*answer[:place], digit, *answer[place + 1 :])
        if changed not in task.answers(prompt):
            return changed


def demonstrations(
    language: Language, count: int, wrong: float, seed: int, without: Collection[Digits]
) -> tuple[list[Digits], list[Digits]]:
    """So many prompts with a response each, of which a share ``wrong``, to the nearest row, is not valid."""
    rng = Random(f"demonstrations/{seed}")
    prompts = draw_prompts(language, count, f"demonstrations/{seed}", without)
    answers = [language.target.draw(prompt, rng) for prompt in prompts]
    for place in rng.sample(range(count), round(wrong * count)):
        answers[place] = wrong_answer(language.target, prompts[place], answers[place], rng)
    return prompts, answers


def prompt_ids(prompts: Sequence[Digits], *, other: bool = False) -> Tensor:
    """Shape ``(B, length + 2)``."""
    ask = ASK_OTHER if other else ASK
    return torch.tensor([[ask, *(FIRST_DIGIT + digit for digit in prompt), ANSWER] for prompt in prompts])


def response_ids(answers: Sequence[Digits]) -> Tensor:
    """Shape ``(B, length + 1)``, the end included."""
    return torch.tensor([[*(FIRST_DIGIT + digit for digit in answer), END] for answer in answers])
