"""What rewards say of a model: numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev


def mean_and_error(groups: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """The mean over groups of their means, and its standard error; None where there are too few groups.

    Responses to one prompt are no independent trials, so the error is that of the prompts' means.

    Example:
        >>> [round(value, 6) for value in mean_and_error([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])]
        [0.5, 0.288675]
    """
    means = [fmean(group) for group in groups if group]
    error = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return (fmean(means) if means else None), error


def pass_at(k: int, right: int, total: int) -> float:
    """Probability that at least one of ``k`` responses is right, without bias from ``right`` of ``total`` samples.

    Source: Chen et al. 2021, arXiv:2107.03374, equation 1.

    Example:
        >>> round(pass_at(2, right=2, total=4), 6)
        0.833333
    """
    return 1.0 - math.comb(total - right, k) / math.comb(total, k)


def best_of(k: int, rewards: Sequence[float]) -> float:
    """Expected highest reward among ``k`` responses, without bias from at least as many samples.

    The mean of the highest over all choices of ``k`` of the samples.

    Example:
        >>> best_of(2, [0.0, 1.0, 1.0]), best_of(3, [0.0, 1.0, 1.0])
        (1.0, 1.0)
    """
    count = len(rewards)
    return math.fsum(
        math.comb(place, k - 1) / math.comb(count, k) * reward for place, reward in enumerate(sorted(rewards))
    )


def powers_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and the number itself.

    Example:
        >>> powers_up_to(6)
        [1, 2, 4, 6]
    """
    return [*(2**n for n in range(most.bit_length()) if 2**n < most), most]


def wilson(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share of ``count`` trials.

    Example:
        >>> [round(end, 4) for end in wilson(0.8, 10)]
        [0.4902, 0.9433]
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)
