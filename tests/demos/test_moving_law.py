"""A law that changes, and a reward in its place: the policy follows, measured exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
from games import read

from spin_lightning.demos.moving_law import IsReversed, play
from spin_lightning.rewards.base import Answer


@pytest.mark.slow
def test_the_policy_follows_the_new_law_and_the_reward(tmp_path: Path) -> None:
    """The laboratory's own size: three minutes. A smaller model does not learn what no row shows it."""
    games = play(tmp_path)
    stays, changes, with_history, rewarded = games.values()
    assert stays[:4] == changes[:4] == rewarded[:4]  # until the target moves
    for moved, iterations in ((changes, 1), (with_history, 2)):
        assert moved[3].new > 0.75 and max(point.new for point in moved[3 + iterations :]) < 0.75
        assert moved[6].old > stays[6].old + 0.2
    assert rewarded[6].is_reversed > 0.6 > 0.3 > stays[6].is_reversed
    assert read(tmp_path / "moving_law.json")["it changes"][6]["new"] == changes[6].new


def test_the_reward_knows_the_reversed_prompt() -> None:
    asked = [{"role": "user", "content": "201"}]
    assert IsReversed().score([Answer(asked, "102"), Answer(asked, "201")]) == [1.0, 0.0]  # type: ignore[arg-type]
