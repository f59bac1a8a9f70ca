"""Pairs that a reward has a say in: the best of an opponent's responses against the worst, or none that are right.

What it said is stored with the pairs, so it is asked about a response once, and about a real response once in a game.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

from spin_lightning.data.module import RowDataModule
from spin_lightning.generation.pair_store import PairStore
from spin_lightning.rewards.base import Reward, make_answer, scored, settings_kept
from spin_lightning.types import Prompt, UserError

#: What the sides of a pair may be, in words.
PAIRS = {
    "real_generated": "the real response against each generated one",
    "best_worst": "the best against the worst response to a prompt",
    "real_wrong": "the real response against each generated one that is worth less",
}


@dataclass(frozen=True)
class Ranking:
    """How pairs are made of responses that a reward judges.

    Attributes:
        pairs: ``best_worst``: of a prompt's responses the one with the highest against the one with the lowest reward.
            ``real_wrong``: the real response against each one with a lower reward than it.
        reward: What responses are worth.
    """

    pairs: Literal["best_worst", "real_wrong"]
    reward: Reward

    @property
    def settings(self) -> dict[str, Any]:
        """What the pairs depend on, as manifests keep it."""
        return {"pairs": self.pairs, "reward": settings_kept(self.reward)}

    @property
    def in_words(self) -> str:
        """What the pairs are."""
        return f"{PAIRS[self.pairs]}, by {self.reward.name}"

    def for_maker(self, data: RowDataModule, earlier: Iterable[PairStore]) -> dict[str, Any]:
        """What the maker of the pairs is told.

        Args:
            data: Whose prompts are answered.
            earlier: The pairs of the iterations before.
        """
        by_id = {prompt.prompt_id: prompt for prompt in data.prompts}
        rank = partial(self.rank, by_id)
        if self.pairs == "best_worst":
            return {"rank": rank, "keeps_real": False}
        prompts_hash = data.prompts_hash
        same = (store for store in earlier if store.binding["prompts_sha256"] == prompts_hash)
        return {"rank": rank, "judged": next(same, None)}

    def rank(
        self, prompts: Mapping[int, Prompt], rows: list[dict[str, Any]], known: Mapping[int, float | None]
    ) -> list[dict[str, Any]]:
        """Rows of pairs with what the reward says of both sides.

        Args:
            prompts: By their ids.
            rows: One for each response, with the real one beside it. Those of a prompt follow each other.
            known: What the real responses are worth, as far as the reward was asked about them before.

        Returns:
            For ``best_worst`` one row a prompt, whose two sides are responses; else all rows. A reward of None is that
            of a response that cannot be judged, or that is alone.
        """
        answers = [
            make_answer(
                prompts[row["prompt_id"]],
                row["generated_ids"],
                row["rejected"][0]["content"],
                row["generated_finish_reason"],
            )
            for row in rows
        ]
        # a reward that compares says how likely an answer beats the real one, which ties with itself
        asked = (
            [] if self.pairs == "best_worst" or self.reward.compares else [*{r["prompt_id"] for r in rows} - {*known}]
        )
        reals = [
            make_answer(prompts[i], prompts[i].real_ids, prompts[i].row.real, prompts[i].row.real_finish_reason)
            for i in sorted(asked)
        ]
        values = scored(self.reward, [*answers, *reals])
        known = {**known, **dict(zip(sorted(asked), values[len(answers) :], strict=True))}
        judged = [{**row, "generated_reward": value} for row, value in zip(rows, values, strict=False)]
        found: list[dict[str, Any]] = []
        for prompt_id, group in groupby(judged, lambda row: row["prompt_id"]):
            of_prompt = list(group)
            rewards = [row["generated_reward"] for row in of_prompt]
            if self.pairs == "best_worst":
                of_prompt = [_pair_ends(of_prompt)]
            elif self.reward.compares:
                of_prompt = [{**row, "real_reward": 0.5} for row in of_prompt]
            else:
                of_prompt = [{**row, "real_reward": known[prompt_id]} for row in of_prompt]
            found += [{**row, "rewards": rewards} for row in of_prompt]
        return found


def _pair_ends(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best response of a prompt, the first of equals, in the place of the real one, against the worst, the last."""
    known = [row for row in rows if row["generated_reward"] is not None]
    if len(known) < 2:
        known = [{**row, "generated_reward": None} for row in rows]
        best, worst = known[0], known[-1]
    else:
        best = max(known, key=lambda row: row["generated_reward"])
        worst = min(reversed(known), key=lambda row: row["generated_reward"])
    return {
        **worst,
        "chosen": best["rejected"],
        "real": best["generated"],
        "real_ids": best["generated_ids"],
        "real_finish_reason": best["generated_finish_reason"],
        "real_reward": best["generated_reward"],
    }


def make_ranking(pairs: str, reward: Reward | None) -> Ranking | None:
    """The ranking that settings ask for; None where each response is paired with the real one.

    Raises:
        UserError: They do not suit each other.
    """
    if pairs not in PAIRS:
        raise UserError(f"self_play.pairs must be one of {', '.join(PAIRS)}, got {pairs!r}.")
    if pairs == "real_generated":
        if reward is not None:
            raise UserError(
                "self_play.reward has no say in pairs of real and generated responses. Set self_play.pairs: best_worst "
                "or real_wrong, or leave the reward out."
            )
        return None
    if reward is None:
        raise UserError(
            f"self_play.pairs {pairs} needs a reward that says what responses are worth. Set self_play.reward, such as "
            "--self_play.reward NumberMatch."
        )
    if not isinstance(reward, Reward):
        raise UserError(f"self_play.reward must be a Reward, got {reward!r}.")
    return Ranking(pairs, reward)  # type: ignore[arg-type]
