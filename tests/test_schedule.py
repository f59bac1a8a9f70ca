"""Settings with one value, or one for each iteration."""

from __future__ import annotations

import pytest

from spin_lightning.schedule import at_iteration, check_schedule
from spin_lightning.types import UserError


def test_schedule_takes_one_value_or_one_for_each_iteration() -> None:
    assert [at_iteration([5e-7, 5e-7, 1e-7], t) for t in range(3)] == [5e-7, 5e-7, 1e-7]
    assert [at_iteration(0.1, t) for t in range(3)] == [0.1] * 3
    check_schedule("beta", 0.1, 4)
    check_schedule("beta", [0.1] * 4, 4)
    for values in ([0.1] * 3, [0.1] * 5, []):
        with pytest.raises(
            UserError, match=rf"beta is a list of {len(values)} values .*has 4 iterations\. Give one value .*list of 4"
        ):
            check_schedule("beta", values, 4)
