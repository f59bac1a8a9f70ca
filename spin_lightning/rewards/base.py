"""What a response is worth: ``Reward``, what it is asked about, and the one way in which every stage asks it.

A reward is a program, a model or a judge. It knows neither policies nor files; whatever it said is stored by whoever
asked, so that it is never asked again.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from spin_lightning.runs.redaction import redacted
from spin_lightning.runs.settings import parameters_of
from spin_lightning.types import FinishReason, Message, Prompt, RewardUnavailable, UserError

#: Share of the responses of one question to a reward that may stay without a reply of whatever it asks.
UNANSWERED = 0.1
#: So many different responses, and a reward for none of them, is a mistake in the settings.
ALL_NONE = 8


@dataclass(frozen=True)
class Answer:
    """A response as a reward sees it.

    Attributes:
        prompt: The turns before it.
        text: Its own text, without its terminator.
        real: The text of the real response to the same prompt; None where the data have none.
        columns: Those columns of its row that a reward named, by their names.
        finish_reason: ``length`` where the response was cut at the cap.
        ids: The response as it was sampled, terminator included; None where nothing was sampled.
        prompt_ids: The prompt as the policy read it; None where no policy did.
        tools: Definitions of the tools that could be called, as chat templates take them.
    """

    prompt: Sequence[Message]
    text: str
    real: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    finish_reason: FinishReason = "stop"
    ids: Sequence[int] | None = None
    prompt_ids: Sequence[int] | None = None
    tools: Sequence[dict[str, Any]] = ()

    def column(self, name: str) -> Any:
        """A column of the row.

        Raises:
            UserError: The row lacks it.
        """
        if name not in self.columns:
            raise UserError(
                f"the reward reads the column {name!r}, and the row has {sorted(self.columns) or 'no such columns'}. "
                "Name a column that the data have, or add it to each row."
            )
        return self.columns[name]

    @property
    def key(self) -> str:
        """Equal for answers about which a reward would say the same: what it sees of them but their ids."""
        return json.dumps(
            [list(self.prompt), self.text, self.finish_reason, self.real, dict(self.columns), list(self.tools)],
            default=repr,
            sort_keys=True,
        )


def make_answer(prompt: Prompt, ids: Sequence[int] | None, text: str, finish_reason: FinishReason) -> Answer:
    """A response to a prompt of the data, as a reward sees it.

    Args:
        prompt: The prompt with its row.
        ids: The response as it was sampled. None: it was not.
        text: The response without its terminator, as ``Encoder.decode`` gives it.
        finish_reason: How it ended.
    """
    row = prompt.row
    real = row.real if row.has_real else None
    return Answer(row.prompt, text, real, row.columns, finish_reason, ids, prompt.prompt_ids, row.tools)


class Reward(ABC):
    """What responses are worth. Subclass it to bring your own; turn it on by class path.

    Stages ask it through ``scored``, which checks what it says.

    Attributes:
        columns: The columns of a row that it reads, beside the prompt and the real response.

    Example:
        >>> class Short(Reward):
        ...     "1 for at most 20 characters."
        ...     def score(self, answers):
        ...         return [float(len(answer.text) <= 20) for answer in answers]
        >>> scored(Short(), [Answer([], "yes"), Answer([], "yes, because of all that was said")])
        [1.0, 0.0]
    """

    columns: tuple[str, ...] = ()

    @property
    def judges_cut(self) -> bool:
        """Whether it can say what a response without an end is worth."""
        return True

    @property
    def needs_real(self) -> bool:
        """Whether it compares with real responses, and judges nothing where there are none."""
        return False

    @abstractmethod
    def score(self, answers: Sequence[Answer]) -> Sequence[float | None]:
        """What each answer is worth; None for one that cannot be judged, which is left out and counted.

        The answers come from any prompts, in any order. Called in the main thread.
        """

    def prefer(self, first: Sequence[Answer], second: Sequence[Answer]) -> Sequence[float | None]:
        """The probability that the first of two answers to a prompt is the better one, for each pair.

        By score that is 1, 1/2 for a tie, or 0; a reward that compares says more, of answers shown in this order.
        None: cannot be judged. Stages ask by ``preferred``, which asks in both orders where ``prefer`` is overridden.
        The score of a reward that compares is the probability that an answer beats the real one.
        """
        scores = scored(self, [*first, *second])
        return [
            None if a is None or b is None else 0.5 if a == b else float(a > b)
            for a, b in zip(scores[: len(first)], scores[len(first) :], strict=True)
        ]

    @property
    def compares(self) -> bool:
        """Whether it compares two answers otherwise than by their scores, so that their order may matter to it."""
        return type(self).prefer is not Reward.prefer

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what it says, as JSON: manifests keep it. The class, and the arguments of its constructor.

        An argument is kept where the object has an attribute of its name. Extend it where more decides.
        """
        kind = type(self)
        names = (name for name in parameters_of(kind) if hasattr(self, name))
        own = {name: _settings_of(getattr(self, name)) for name in names}
        return {"reward": f"{kind.__module__}.{kind.__qualname__}", **own}

    def check_ready(self) -> None:  # noqa: B027  # most need nothing
        """Refuse what can be known to fail, before a model is loaded.

        Raises:
            UserError: Something that the reward needs is missing.
        """

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Let go of models and connections. It may be asked again."""

    def explain_none(self, answers: Sequence[Answer]) -> str:
        """Why it judged none of these answers, and what to do: a sentence or two of the message that ends the run."""
        return "None says that a response cannot be judged. See what the reward needs to judge one."

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__


def _settings_of(value: Any) -> Any:
    if isinstance(value, Reward):
        return value.settings
    if isinstance(value, Mapping):
        return {str(key): _settings_of(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


class SumOfRewards(Reward):
    """Several rewards, added up. What one of them cannot judge has no sum.

    Args:
        rewards: By a name for each.
        weights: What each is multiplied by; 1 where it is left out.

    Raises:
        UserError: There is none, or a weight is of another name or no finite number.

    Example:
        >>> from spin_lightning import NumberMatch, TextMatch
        >>> both = SumOfRewards({"number": NumberMatch(), "text": TextMatch()}, {"text": 0.5})
        >>> scored(both, [Answer([], "The answer is 4.", real="The answer is 4.")])
        [1.5]
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float] | None = None) -> None:
        if not rewards or not all(isinstance(reward, Reward) for reward in rewards.values()):
            raise UserError(
                f"SumOfRewards.rewards must map names to rewards, got {rewards!r}. Such as {{right: NumberMatch}}."
            )
        weights = dict(weights or {})
        if unknown := sorted(weights.keys() - rewards.keys()):
            raise UserError(
                f"SumOfRewards.weights names {', '.join(unknown)}, and the rewards are {', '.join(rewards)}. Use "
                "those names."
            )
        if wrong := {name: value for name, value in weights.items() if not _is_finite(value)}:
            raise UserError(f"SumOfRewards.weights must be finite numbers, got {wrong!r}. 1 adds a reward as it is.")
        self.rewards, self.weights = rewards, weights
        self.columns = tuple(dict.fromkeys(name for reward in rewards.values() for name in reward.columns))

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return self.add({name: scored(reward, answers) for name, reward in self.rewards.items()})

    @property
    def judges_cut(self) -> bool:
        return all(reward.judges_cut for reward in self.rewards.values())

    @property
    def needs_real(self) -> bool:
        return any(reward.needs_real for reward in self.rewards.values())

    def explain_none(self, answers: Sequence[Answer]) -> str:
        needy = [reward for reward in self.rewards.values() if reward.needs_real]
        return needy[0].explain_none(answers) if needy else super().explain_none(answers)

    def add(self, parts: Mapping[str, Sequence[float | None]]) -> list[float | None]:
        """The sum for each answer, of what each reward said."""
        weights = [self.weights.get(name, 1.0) for name in parts]
        return [
            None
            if any(value is None for value in values)
            else math.fsum(weight * value for weight, value in zip(weights, values, strict=True) if value is not None)
            for values in zip(*parts.values(), strict=True)
        ]

    def check_ready(self) -> None:
        for reward in self.rewards.values():
            check_reward(reward)

    def close(self) -> None:
        for reward in self.rewards.values():
            reward.close()


def check_reward(reward: Any) -> None:
    """Refuse a reward that cannot be asked, or whose settings a manifest cannot keep. Before a model is loaded.

    Raises:
        UserError: It is none, lacks what it needs, or ``settings`` is no dict that JSON can hold.
    """
    if not isinstance(reward, Reward):
        raise UserError(f"a reward must be a Reward, got {reward!r}. Such as NumberMatch, or a subclass of your own.")
    try:
        is_kept = json.loads(json.dumps(reward.settings)) == reward.settings
    except (TypeError, ValueError):
        is_kept = False
    if not is_kept:
        raise UserError(
            f"{reward.name}.settings must be a dict that JSON can hold, got {reward.settings!r}. Override it: give the "
            "class, and numbers and texts that decide what it says."
        )
    if isinstance(reward.columns, str) or not all(isinstance(name, str) for name in reward.columns):
        raise UserError(
            f"{reward.name}.columns must be names of columns, got {reward.columns!r}. Give a tuple of texts."
        )
    reward.check_ready()


def refuse_without_real(reward: Reward, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts alone for a reward that compares with real responses, before anything is generated.

    Raises:
        UserError: No prompt has a real response.
    """
    if reward.needs_real and not any(prompt.row.has_real for prompt in prompts):
        answers = [make_answer(prompt, None, "", "stop") for prompt in prompts[:1]]
        raise UserError(f"the reward {reward.name} can judge nothing. {reward.explain_none(answers)}")


def settings_kept(reward: Reward) -> dict[str, Any]:
    """The settings of a reward as manifests keep them: without secrets."""
    return redacted(reward.settings)


def scored(reward: Reward, answers: Sequence[Answer]) -> list[float | None]:
    """What a reward says of answers, checked: how every stage asks one.

    Equal answers to a prompt are asked about once.

    Returns:
        A finite number for each answer, or None for one that cannot be judged.

    Raises:
        UserError: It did not give one finite number or None for each answer, or judged none of them.
        RewardUnavailable: More than a tenth of the answers have no reward, as whatever it asks does not reply.
    """
    return scored_with_parts(reward, answers)[0]


def scored_with_parts(
    reward: Reward, answers: Sequence[Answer]
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """The same, and of a sum what each of its rewards said, by name; empty for any other reward."""
    if isinstance(reward, SumOfRewards):
        parts = {name: scored(part, answers) for name, part in reward.rewards.items()}
        return reward.add(parts), parts
    asked: dict[str, Answer] = {}
    for answer in answers:
        asked.setdefault(answer.key, answer)
    distinct = list(asked.values())
    with _plain_numerics():
        values = _checked(reward, "score", reward.score(distinct) if distinct else [], len(distinct))
    if len(values) >= ALL_NONE and all(value is None for value in values):
        raise UserError(
            f"the reward {reward.name} judged none of {len(values)} responses. {reward.explain_none(distinct)}"
        )
    known = dict(zip(asked, values, strict=True))
    return [known[answer.key] for answer in answers], {}


def preferred(reward: Reward, first: Sequence[Answer], second: Sequence[Answer]) -> list[float | None]:
    """The probabilities that the first of two answers is the better one, as a reward says, checked.

    One that compares is asked in both orders, and what it says of them is averaged.

    Raises:
        UserError: It did not give one number from 0 to 1, or None, for each pair.
        RewardUnavailable: More than a tenth of the pairs have none, as whatever it asks does not reply.
    """
    return [None if pair is None else (pair[0] + pair[1]) / 2 for pair in preferred_by_order(reward, first, second)]


def preferred_by_order(
    reward: Reward, first: Sequence[Answer], second: Sequence[Answer]
) -> list[tuple[float, float] | None]:
    """The same, with what it says where the first is shown first, and where it is shown second.

    Equal answers are a tie, about which nobody is asked. None where one of both cannot be judged.
    """
    keys = [(a.key, b.key) for a, b in zip(first, second, strict=True)]
    pairs = {key: (a, b) for key, a, b in zip(keys, first, second, strict=True) if key[0] != key[1]}
    ours, theirs = [a for a, _ in pairs.values()], [b for _, b in pairs.values()]
    forward = _probabilities(reward, ours, theirs)
    # of scores, the other order says the same
    backward = (
        _probabilities(reward, theirs, ours) if reward.compares else [None if p is None else 1 - p for p in forward]
    )
    known = {
        key: None if p is None or q is None else (p, 1 - q) for key, p, q in zip(pairs, forward, backward, strict=True)
    }
    return [known.get(key, (0.5, 0.5)) for key in keys]


def _probabilities(reward: Reward, first: Sequence[Answer], second: Sequence[Answer]) -> list[float | None]:
    with _plain_numerics():
        values = _checked(reward, "prefer", reward.prefer(first, second) if first else [], len(first))
    if wrong := [value for value in values if value is not None and not 0 <= value <= 1]:
        raise UserError(
            f"the reward {reward.name} prefers with {wrong[0]!r}. Mend its prefer: give probabilities, 0 to 1."
        )
    return values


def refuse_unanswered(unanswered: int, total: int, who: str, why: str) -> None:
    """End a run in which too many questions to a judge stayed without a reply.

    Raises:
        RewardUnavailable: More than a tenth did.
    """
    if unanswered > UNANSWERED * total:
        raise RewardUnavailable(
            f"{who} did not reply about {unanswered} of {total} responses ({why}). What is finished is saved: see to "
            "it that it replies, and run the same command again"
        )


def _checked(reward: Reward, method: str, given: Any, wanted: int) -> list[float | None]:
    mend = f"Mend its {method}: it must give a finite number for each response, or None for one that cannot be judged."
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise UserError(f"the reward {reward.name} gave {type(given).__name__} instead of a list. {mend}")
    if len(values) != wanted:
        raise UserError(f"the reward {reward.name} gave {len(values)} values for {wanted} responses. {mend}")
    values = [value.item() if hasattr(value, "item") else value for value in values]
    if wrong := [value for value in values if value is not None and not _is_finite(value)]:
        raise UserError(f"the reward {reward.name} gave {wrong[0]!r}, of {len(wrong)} values that are none. {mend}")
    return [None if value is None else float(value) for value in values]


@contextmanager
def _plain_numerics() -> Iterator[None]:
    """A reward computes as it always does, whatever the precision of the policy is that is trained meanwhile."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
