"""Settings that may change from iteration to iteration: one value, or a list with one value an iteration."""

from __future__ import annotations

from typing import TypeVar

from spin_lightning.types import UserError

T = TypeVar("T")


def at_iteration(value: T | list[T], iteration: int) -> T:
    """The value that holds in this iteration.

    Example:
        >>> at_iteration([5e-7, 1e-7], 1), at_iteration(0.1, 7)
        (1e-07, 0.1)
    """
    return value[iteration] if isinstance(value, list) else value


def check_schedule(name: str, value: object, iterations: int) -> None:
    """Refuse a list whose length is not the number of iterations.

    Raises:
        UserError: The list is too short or too long.
    """
    if isinstance(value, list) and len(value) != iterations:
        raise UserError(
            f"{name} is a list of {len(value)} values {value!r}, but the game has {iterations} iterations. "
            f"Give one value for all iterations, or a list of {iterations}."
        )
