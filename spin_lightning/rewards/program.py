"""Rewards that a program computes: the final number, the same text, or a function of yours.

Nothing here runs what a model wrote. A function of yours may, at your risk.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import traceback
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib import import_module
from typing import Any, Literal

from spin_lightning.rewards.base import Answer, Reward
from spin_lightning.runs.files import sha256_of
from spin_lightning.types import Interrupted, Message, NonFiniteError, RewardUnavailable, StorageError, UserError

#: What stands before a final number: in words, in GSM8K, in MATH.
PATTERN = r"answer\s+is\b|####|\\boxed\s*\{"
#: A number: with a sign, thousands set apart by commas, decimals, an exponent; or a fraction.
_UNSIGNED = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-+]?)\s*[$€£¥₹]?\s*(?P<sign2>[-+]?)(?P<number>{_UNSIGNED})(?P<exponent>[eE][-+]?\d+)?"
    rf"(?:\s*/\s*(?P<under>{_UNSIGNED}))?(?![A-Za-z_]*\d)"
)
#: What LaTeX and typography write otherwise.
_PLAIN = (
    (re.compile("[\u2212\u2010\u2011\u2013]"), "-"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\[!,;$ ]"), " "),
    (re.compile(r"\\(?=[%$€£])|\\(?:text|mathrm|mathbf)\b"), ""),
    (re.compile(r"[*_`]"), ""),
)
#: Digits of a number that is read. A longer one is no result, and a long exponent would fill memory.
MOST_DIGITS = 100


class NumberMatch(Reward):
    r"""Whether the final number of a response is that of the real one: 1, ``partial`` for another number, 0 for none.

    The final number is the first one behind the last match of ``pattern`` in the response, on the same line or, where
    nothing follows there, the next. Commas between thousands, currency, percent signs and a full stop do not count.
    Numbers are compared as exact fractions: ``0.5``, ``1/2`` and ``\frac{1}{2}`` are equal. A response that was cut has
    no final number.

    Args:
        pattern: What stands before the number, a regular expression in which case does not matter; or one with a group
            that is the number. None: ``answer is``, ``####`` or ``\boxed{``.
        partial: The reward of a number that is wrong. Below 1. It helps a policy that gives none to begin with, and
            "any number" is learnt before "the right one": for short warm-ups.
        tolerance: How far a number may be from the real one, as an absolute difference. 0.01, as ReFT has it, also
            takes 0.001 for 0.009.
        column: The column of the data with the right number, alone or behind ``pattern``. None: the real response.

    Raises:
        UserError: A setting is outside its range.

    Source: ReFT, arXiv:2401.08967, section 3.2 (partial reward 0.1) and its code (tolerance 0.01).

    Example:
        >>> reward, real = NumberMatch(), "5 + 7 = 12. The answer is 12."
        >>> texts = ["So the answer is $12.00.", "The answer is 13.", "I do not know."]
        >>> reward.score([Answer([], text, real=real) for text in texts])
        [1.0, 0.1, 0.0]
    """

    def __init__(
        self,
        pattern: str | None = None,
        partial: float = 0.1,
        tolerance: float = 0.0,
        column: str | None = None,
    ) -> None:
        if not 0 <= partial < 1:
            raise UserError(
                f"NumberMatch.partial must be in [0, 1), got {partial!r}: a wrong number is worth less than the right "
                "one. ReFT has 0.1; 0 turns it off."
            )
        if not 0 <= tolerance < float("inf"):
            raise UserError(f"NumberMatch.tolerance must be at least 0, got {tolerance!r}. 0 compares exactly.")
        try:
            self._pattern = re.compile(PATTERN if pattern is None else pattern, re.IGNORECASE)
        except re.error as error:
            raise UserError(
                f"NumberMatch.pattern must be a regular expression, got {pattern!r}: {error}. Write a backslash before "
                "characters such as ( and $."
            ) from None
        self.pattern, self.partial, self.tolerance, self.column = pattern, partial, tolerance, column
        self.columns = () if column is None else (column,)

    @property
    def needs_real(self) -> bool:
        return self.column is None

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._score_one(answer) for answer in answers]

    def _score_one(self, answer: Answer) -> float | None:
        right = self._right_number(answer)
        if right is None:
            return None
        found = self.find_number(answer.text) if answer.finish_reason == "stop" else None
        if found is None:
            return 0.0
        return 1.0 if abs(found - right) <= Fraction(str(self.tolerance)) else float(self.partial)

    def _right_number(self, answer: Answer) -> Fraction | None:
        if self.column is None:
            return None if answer.real is None else self.find_number(answer.real)
        text = str(answer.column(self.column))
        found = self.find_number(text)
        return found if found is not None else _read_number(text, is_alone=True)

    def find_number(self, text: str) -> Fraction | None:
        r"""The final number of a text; None if there is none.

        Example:
            >>> NumberMatch().find_number(r"Hence \boxed{\frac{-3}{4}}.")
            Fraction(-3, 4)
        """
        if not (found := list(self._pattern.finditer(text))):
            return None
        last = found[-1]
        if self._pattern.groups:
            group = next((part for part in last.groups() if part is not None), "")
            return _read_number(group)
        behind = text[last.end() :].lstrip(" \t:*_`=")
        return _read_number(behind.lstrip().partition("\n")[0])

    def explain_none(self, answers: Sequence[Answer]) -> str:
        first = answers[0]
        pattern = PATTERN if self.pattern is None else self.pattern
        if self.column is not None:
            return (
                f"The column {self.column!r} has no number that can be read, such as {first.columns[self.column]!r}. "
                "Name the column with the result."
            )
        if first.real is None:
            return "The data have no real responses to compare with: name the column with the result, as `column`."
        return (
            f"The real responses have no number behind {pattern!r}, such as {first.real[-200:]!r}. Set `pattern` to "
            "what stands before the result there, or name a column with it, as `column`."
        )


def _read_number(text: str, is_alone: bool = False) -> Fraction | None:
    """The first number in a text, exactly; with ``is_alone`` only if there is nothing but the number and its unit."""
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    found = _NUMBER.search(text)
    if found is None or (is_alone and re.search(r"\w", text[: found.start()])):
        return None
    exponent = found["exponent"] or ""
    power = exponent.lstrip("eE+-").lstrip("0") or "0"
    if len(found["number"]) + len(found["under"] or "") > MOST_DIGITS or len(power) > 3 or int(power) > MOST_DIGITS:
        return None
    number = Fraction(found["number"].replace(",", "") + exponent)
    if found["under"] is not None:
        under = Fraction(found["under"].replace(",", ""))
        if not under:
            return None
        number /= under
    return -number if "-" in (found["sign"], found["sign2"]) else number


class TextMatch(Reward):
    """1 for a response that is the real one but for case and white space, else 0. A response that was cut is not.

    Args:
        column: The column of the data with the right text. None: the real response.

    Example:
        >>> TextMatch().score([Answer([], " the  LIST is ab.", real="The list is ab.")])
        [1.0]
    """

    def __init__(self, column: str | None = None) -> None:
        self.column = column
        self.columns = () if column is None else (column,)

    @property
    def needs_real(self) -> bool:
        return self.column is None

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        scores: list[float | None] = []
        for answer in answers:
            right = answer.real if self.column is None else answer.column(self.column)
            is_right = answer.finish_reason == "stop" and _folded(answer.text) == _folded(str(right))
            scores.append(None if right is None else float(is_right))
        return scores

    def explain_none(self, answers: Sequence[Answer]) -> str:
        return (
            "There is no text to compare with: the data have no real responses. Name the column with it, as `column`."
        )


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


#: What TRL's trainers hand to a reward function beside the columns; here they have nothing to say.
_OF_TRAINER: dict[str, Any] = {
    "trainer_state": None,
    "log_extra": lambda column, values: None,
    "log_metric": lambda name, value: None,
}
_OWN = ("prompts", "completions", "completion_ids")


class FunctionReward(Reward):
    """A function of yours, with the signature of TRL's reward functions: those written for its GRPO run unchanged.

    ``f(prompts, completions, completion_ids, **columns)`` gives one number or None for each completion. It is handed
    what it has parameters for; with ``**kwargs`` also the columns named in ``columns``. A parameter without a default
    that is none of these names a column of the data, and ``real`` the real response where no column is named so. It is
    called in the main thread, where a function that sets an alarm, as math-verify does, has to be; a coroutine is run
    to its end. Code that a model wrote is run only if the function does.

    Args:
        function: Where it is: ``module:function``, in any module that can be imported from the current folder.
        columns: Columns of the data that it is given beside those that it has parameters for.
        form: What it is given. ``conversational``: prompts are lists of messages, and completions lists of one message.
            ``plain``: both are texts, as TRL has them where prompts in the data are texts; several turns stand below
            each other.

    Raises:
        UserError: There is no such function; or, in ``score``, it ends with an error.

    Example:
        >>> FunctionReward("string:capwords").columns
        ('s',)
    """

    def __init__(
        self,
        function: str,
        columns: list[str] | None = None,
        form: Literal["conversational", "plain"] = "conversational",
    ) -> None:
        if form not in ("conversational", "plain"):
            raise UserError(f"FunctionReward.form must be 'conversational' or 'plain', got {form!r}.")
        self.function, self.form = function, form
        self._call = _find_function(function)
        parameters = inspect.signature(self._call).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._names = set(named)
        self._takes_real = "real" in named and "real" not in (columns or ())
        needed = [
            name
            for name, p in named.items()
            if p.default is p.empty and name not in (*_OWN, *_OF_TRAINER, *(["real"] if self._takes_real else []))
        ]
        self.columns = tuple(dict.fromkeys([*needed, *(columns or ())]))

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        given: dict[str, Any] = {
            **_OF_TRAINER,
            "prompts": [self._form_prompt(answer.prompt) for answer in answers],
            "completions": [self._form_completion(answer.text) for answer in answers],
            "completion_ids": [None if answer.ids is None else list(answer.ids) for answer in answers],
            **({"real": [answer.real for answer in answers]} if self._takes_real else {}),
            **{name: [answer.column(name) for answer in answers] for name in self.columns},
        }
        if not self._takes_all:
            given = {name: value for name, value in given.items() if name in self._names}
        try:
            scores = self._call(**given)
            if inspect.isawaitable(scores):
                scores = asyncio.run(_finish(scores))
        except (UserError, StorageError, NonFiniteError, RewardUnavailable, Interrupted, MemoryError):
            raise
        except Exception as error:
            frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
            inside = [place for place in frames if place[0] == inspect.getsourcefile(inspect.unwrap(self._call))]
            place = f" ({inside[-1][0]}, line {inside[-1][1]})" if inside else ""
            said = " ".join(str(error).split())[:300]
            raise UserError(
                f"the reward function {self.function} ends with {type(error).__name__}{said and f': {said}'}{place}. "
                "Mend it; for a response that it cannot judge let it return None. It is given "
                f"{', '.join(sorted(given.keys() - _OF_TRAINER.keys()))}, in the form {self.form}."
            ) from error
        return scores  # type: ignore[no-any-return]  # `scored` looks at it

    def _form_prompt(self, prompt: Sequence[Message]) -> Any:
        if self.form == "conversational":
            return [dict(turn) for turn in prompt]
        return "\n\n".join(turn["content"] for turn in prompt)

    def _form_completion(self, text: str) -> Any:
        return text if self.form == "plain" else [{"role": "assistant", "content": text}]

    @property
    def settings(self) -> dict[str, Any]:
        """Its arguments, and where it can be had a hash of the function's own source, not of what that calls."""
        try:
            source = inspect.getsource(inspect.unwrap(self._call))
        except (OSError, TypeError):  # of C, or of no file
            return super().settings
        return {**super().settings, "source_sha256": sha256_of(source)}

    @property
    def name(self) -> str:
        return f"FunctionReward({self.function})"


async def _finish(scores: Any) -> Any:
    return await scores


def _find_function(name: str) -> Callable[..., Any]:
    expected = f"FunctionReward.function must be such as my_rewards:is_polite, got {name!r}"
    module, colon, path = str(name).partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *path.split("."))):
        raise UserError(f"{expected}. Give the module and the function, with a colon between.")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise UserError(f"{expected}, and there is no module {error.name!r}. Run where its file is.") from None
        raise UserError(f"{expected}, and {module} needs {error.name!r}, which is not installed. Install it.") from None
    except Exception as error:
        raise UserError(
            f"{expected}, and importing {module} ends with {type(error).__name__}: {error}. Mend it."
        ) from error
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        functions = sorted(n for n, value in vars(import_module(module)).items() if inspect.isfunction(value))
        raise UserError(f"{expected}, and {module} has no such function; it has {', '.join(functions) or 'none'}.")
    return found  # type: ignore[no-any-return]
