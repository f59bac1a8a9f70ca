"""What a comparison says, and how sure that is: numbers in, words out.

Two arms are compared in pairs, seed by seed, so that what a seed does to both is no difference. With one seed they are
compared row by row, which says nothing of what another seed would have given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from statistics import fmean, stdev

#: Of the intervals.
CONFIDENCE = 0.95
_DRAWS = 2000
_STEPS = 400


@dataclass(frozen=True)
class Values:
    """What was measured of an arm, by seed.

    Attributes:
        name: Of the arm, with what belongs to it, as a temperature.
        by_seed: The mean over the rows.
        by_row: The same for each row, by seed; None for a row that has no value. Empty where rows are not known.
    """

    name: str
    by_seed: Mapping[int, float]
    by_row: Mapping[int, Sequence[float | None]]

    @property
    def mean(self) -> float:
        """Over the seeds, NaN where there are none."""
        return fmean(self.by_seed.values()) if self.by_seed else math.nan


@dataclass(frozen=True)
class Judgement:
    """Whether an arm is better than another, by one metric.

    Attributes:
        metric: What was measured.
        arm: The one in question.
        reference: The one that it is compared with.
        values: Of both, the mean over the seeds that both have.
        difference: The arm's minus the reference's, with the ends of its interval.
        over: What the interval is over: ``seeds`` or ``rows``.
        count: How many of them.
        seeds: How many seeds both have.
        noise: The standard deviation of the reference over its seeds. None: it has one.
        word: ``better``, ``worse`` or ``too close to call``.
    """

    metric: str
    arm: str
    reference: str
    values: tuple[float, float]
    difference: tuple[float, float, float]
    over: str
    count: int
    seeds: int
    noise: float | None
    word: str


def judge(metric: str, arm: Values, reference: Values, lower_is_better: bool) -> Judgement | None:
    """Whether an arm is better than a reference; None where no seed has both.

    It is better, or worse, if the whole interval of the paired differences is beyond 0, and beyond the noise: the
    standard deviation of the reference over its seeds. With one seed there is no such noise, and the interval is over
    rows; so it is too where the differences of all seeds are the same number, as a t-interval of such is none.

    Example:
        >>> sft = Values("sft", {0: 5.0, 1: 5.1, 2: 4.9}, {})
        >>> judge("NLL", Values("game", {0: 4.0, 1: 4.2, 2: 3.8}, {}), sft, lower_is_better=True).word
        'better'
    """
    seeds = [
        seed
        for seed, value in arm.by_seed.items()
        if math.isfinite(value) and math.isfinite(reference.by_seed.get(seed, math.nan))
    ]
    if not seeds:
        return None
    differences = [arm.by_seed[seed] - reference.by_seed[seed] for seed in seeds]
    over, count, interval = "seeds", len(seeds), t_interval(differences)
    if len(seeds) == 1 or stdev(differences) == 0:
        of_rows = _differences_of_rows(arm, reference, seeds)
        if len(of_rows) > 1:
            over, count, interval = "rows", len(of_rows), bootstrap_interval(of_rows)
    known = [value for value in reference.by_seed.values() if math.isfinite(value)]
    noise = stdev(known) if len(known) > 1 else None
    _, low, high = interval
    word = "too close to call"
    if low > (noise or 0.0):
        word = "worse" if lower_is_better else "better"
    elif high < -(noise or 0.0):
        word = "better" if lower_is_better else "worse"
    values = fmean(arm.by_seed[seed] for seed in seeds), fmean(reference.by_seed[seed] for seed in seeds)
    return Judgement(metric, arm.name, reference.name, values, interval, over, count, len(seeds), noise, word)


def _differences_of_rows(arm: Values, reference: Values, seeds: Sequence[int]) -> list[float]:
    """Of each row that has values of both with every seed, the mean difference."""
    parts = [(arm.by_row.get(seed, ()), reference.by_row.get(seed, ())) for seed in seeds]
    differences = []
    for place in range(min(min(len(mine), len(theirs)) for mine, theirs in parts)):
        pairs = [(mine[place], theirs[place]) for mine, theirs in parts]
        known = [a - b for a, b in pairs if a is not None and b is not None]
        differences += [fmean(known)] if len(known) == len(pairs) else []
    return differences


def best_of_arms(arms: Sequence[Values], lower_is_better: bool) -> Values | None:
    """The arm with the best mean, the first of equals; None where none has one.

    Example:
        >>> best_of_arms([Values("a", {0: 2.0}, {}), Values("b", {0: 1.0}, {})], lower_is_better=True).name
        'b'
    """
    known = [arm for arm in arms if math.isfinite(arm.mean)]
    return min(known, key=lambda arm: arm.mean if lower_is_better else -arm.mean, default=None)


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of some values with the ends of Student's interval. One value has an infinite one.

    Example:
        >>> [round(end, 4) for end in t_interval([1.0, 2.0, 3.0])]  # 2 +- 4.3027 / sqrt(3)
        [2.0, -0.4841, 4.4841]
    """
    mean = fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of some values with the ends of the percentile interval of 2,000 resampled means, the same each time.

    Example:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        (1.0, 1.0, 1.0)
    """
    random, mean = Random(0), fmean(values)
    means = sorted(fmean(random.choices(values, k=len(values))) for _ in range(_DRAWS))
    tail = round((1 - CONFIDENCE) / 2 * _DRAWS)
    return mean, means[tail], means[-1 - tail]


@cache
def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's distribution, above the median.

    With ``t = sqrt(n) tan(a)`` the density becomes proportional to ``cos(a) ** (n - 1)``, here by Simpson's rule.

    Example:
        >>> [round(t_quantile(0.975, freedom), 3) for freedom in (1, 2, 4, 30)]
        [12.706, 4.303, 2.776, 2.042]
    """

    def integral(angle: float) -> float:
        step = angle / _STEPS
        terms = (
            (1 if place in (0, _STEPS) else 4 if place % 2 else 2) * math.cos(place * step) ** (freedom - 1)
            for place in range(_STEPS + 1)
        )
        return math.fsum(terms) * step / 3

    wanted, low, high = (probability - 0.5) * 2 * integral(math.pi / 2), 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) < wanted else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def sentence(judgements: Sequence[Judgement], sft: Sequence[str], failed: Mapping[str, str]) -> str:
    """All that a comparison says, as one sentence.

    Args:
        judgements: One for each metric, the most important first.
        sft: The arms that are plain SFT.
        failed: Why an arm has no numbers, by its name with the seed.
    """
    parts = [_say_one(judgement, sft) for judgement in judgements] or ["nothing can be compared"]
    if any(judgement.seeds == 1 for judgement in judgements):
        parts.append("with one seed the intervals are over rows: with other seeds this may be otherwise")
    if failed:
        parts.append(f"left out: {', '.join(f'{name} ({why})' for name, why in failed.items())}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _say_one(judgement: Judgement, sft: Sequence[str]) -> str:
    arm, reference, word = judgement.arm, judgement.reference, judgement.word
    mine, theirs = (f"{value:.3f}" for value in judgement.values)
    mean, low, high = judgement.difference
    if word == "worse":  # the better one is named first
        mean, low, high = -mean, -high, -low
    noise = "" if judgement.noise is None else f", noise {judgement.noise:.3f}"
    what = judgement.over if judgement.count != 1 else judgement.over.removesuffix("s")
    spread = f"95 % {low:+.3f} to {high:+.3f} over {judgement.count} {what}"
    if not math.isfinite(low):
        spread = "one seed, and no rows to compare"
    numbers = f"difference {mean:+.3f}, {spread}{noise}"
    if low == high == 0:  # an interval around nothing would read as certainty
        numbers = f"no difference in any of {judgement.count} {what}{noise}"
    if word == "too close to call":
        return (
            f"on {judgement.metric} it is too close to call: {mine} ({arm}) against {theirs} ({reference}), {numbers}"
        )
    if word == "better":
        return f"on {judgement.metric} {arm} is better than {reference}, {mine} against {theirs}, {numbers}"
    plain = f"plain SFT ({reference})" if reference.partition(" at ")[0] in sft else reference
    return f"on {judgement.metric} {plain} is better than {arm}, {theirs} against {mine}, {numbers}"
