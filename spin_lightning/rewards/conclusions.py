"""What follows from rewards: a summary of them, and rows for the stages that learn from them. Rows in, rows out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from spin_lightning.rewards.statistics import best_of, mean_and_error, pass_at, powers_up_to, wilson
from spin_lightning.types import Prompt

Row = Mapping[str, Any]
#: The responses to one prompt, in their order, each with what a reward said of it: ``reward``, and ``over_next``, the
#: probability that it is better than the one after it.
Group = Sequence[Row]


def describe_rewards(groups: Sequence[Group], right_from: float | None, compares: bool) -> dict[str, Any]:
    """The numbers of a summary.

    Args:
        groups: The responses to each prompt.
        right_from: A response is right if its reward is at least this. None: 1 where all rewards are within [0, 1] and
            no probabilities; of others nothing is right or wrong.
        compares: Whether the rewards are probabilities of being better.
    """
    judged = [[row["reward"] for row in group if row["reward"] is not None] for group in groups]
    mean, error = mean_and_error(judged)
    ks = powers_up_to(most) if (most := max(map(len, judged))) else []
    if right_from is None and not compares and all(0 <= value <= 1 for values in judged for value in values):
        right_from = 1.0
    pass_at_k: dict[str, float | None] = {}
    if right_from is not None:
        right = [(sum(value >= right_from for value in values), len(values)) for values in judged]
        pass_at_k = {str(k): _mean([pass_at(k, r, n) for r, n in right if n >= k]) for k in ks}
    rows = [row for group in groups for row in group]
    lengths = [len(row["response_ids"]) for row in rows if row["response_ids"] is not None]
    by_name = {}
    for name in dict.fromkeys(name for row in rows for name, _ in row["rewards"] or ()):
        said = [[value for row in group if (value := dict(row["rewards"])[name]) is not None] for group in groups]
        by_name[name], _ = mean_and_error(said)
    return {
        "unjudged": sum(len(unjudged_of(group)) for group in groups),
        "mean": mean,
        "standard_error": error,
        **({"mean_by_reward": by_name} if by_name else {}),
        "right_from": right_from,
        "pass_at": pass_at_k,
        "best_of": {str(k): _mean([best_of(k, values) for values in judged if len(values) >= k]) for k in ks},
        "empty_or_nul": sum(not can_be_real(row) for row in rows),  # which are no rows to train on
        "cut_share": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "mean_tokens": fmean(lengths) if lengths else None,
    }


def unjudged_of(group: Group) -> list[Row]:
    """The responses of a prompt that the reward neither rated nor compared."""
    compared = {place + step for place, row in enumerate(group) if row["over_next"] is not None for step in (0, 1)}
    return [row for place, row in enumerate(group) if row["reward"] is None and place not in compared]


def why_unjudged(rows: Sequence[Row], judges_cut: bool) -> str:
    """Why a reward gave responses no number, as far as they tell; empty where they do not."""
    cut = sum(row["finish_reason"] == "length" for row in rows)
    if judges_cut or not cut:
        return ""
    return f"{cut} were cut, and the reward judges whole responses: raise data.generator.max_new_tokens"


def why_no_best(groups: Sequence[Group], best_from: float | None, compares: bool) -> str:
    """Why no prompt has a best response to train on."""
    rows = [row for group in groups for row in group]
    judged = [row for row in rows if row["reward"] is not None]
    ended = [row for row in judged if row["finish_reason"] == "stop"]
    if not judged:
        return "responses were compared with each other, not rated" if compares else "no response was judged"
    if not ended:
        return "all judged responses were cut: raise data.generator.max_new_tokens"
    if not any(map(can_be_real, ended)):
        return "all judged responses that came to their end are empty or hold NUL characters"
    return f"no reward is at least {best_from:g} (score.best_from)"


def why_no_pairs(groups: Sequence[Group], compares: bool) -> str:
    """Why there is no pair of a better and a worse response to a prompt."""
    if all(row["reward"] is None and row["over_next"] is None for group in groups for row in group):
        return "no response was judged"
    if compares:
        return "no response is clearly better than the one that it was compared with"
    if max(map(len, groups)) == 1:
        return "each prompt has one response: set data.answers_per_prompt to 2 or more"
    rewards = [{row["reward"] for row in group if row["reward"] is not None} for group in groups]
    if all(len(values) < 2 for values in rewards):
        return "all judged responses to a prompt have the same reward"
    return "the better response of each prompt is empty or holds a NUL character"


def describe_wins(comparisons: Sequence[Row], compares: bool) -> dict[str, Any]:
    """How often one model's response was better than the other's.

    Args:
        comparisons: Of each pair the prompt, and the probability that ours is better, shown first and shown second.
        compares: Whether the order in which they are shown can matter.
    """
    pairs = [(row["prompt_id"], row["shown_first"], row["shown_second"]) for row in comparisons]
    judged = [(prompt, (one + two) / 2, abs(one - two)) for prompt, one, two in pairs if one is not None]
    by_prompt = [[value for _, value, _ in group] for _, group in groupby(judged, lambda pair: pair[0])]
    rate, _ = mean_and_error(by_prompt)
    values = [value for _, value, _ in judged]
    return {
        "pairs": len(judged),
        "unjudged": len(pairs) - len(judged),
        "win_rate": rate,
        # of the prompts: several responses to one are no independent trials
        "interval": None if rate is None else list(wilson(rate, len(by_prompt))),
        "wins": sum(value > 0.5 for value in values),
        "ties": sum(value == 0.5 for value in values),
        "losses": sum(value < 0.5 for value in values),
        "order_sensitivity": _mean([gap for *_, gap in judged]) if compares else None,
    }


def can_be_real(row: Row) -> bool:
    """Whether a response may stand in data as a real one: it says something, and has no NUL character."""
    return bool(row["response"].strip()) and "\0" not in row["response"]


def best_rows(
    groups: Sequence[Group], prompts: Mapping[int, Prompt], best_from: float | None
) -> Iterator[dict[str, Any]]:
    """Of each prompt the best response that came to its end, as a row for ``sft``; none below ``best_from``."""
    for group in groups:
        ended = [
            row for row in group if row["reward"] is not None and row["finish_reason"] == "stop" and can_be_real(row)
        ]
        best = max(ended, key=lambda row: row["reward"], default=None)  # the first of equals
        if best is not None and (best_from is None or best["reward"] >= best_from):
            prompt = prompts[best["prompt_id"]]
            turns = [*prompt.row.prompt, {"role": "assistant", "content": best["response"]}]
            yield {"messages": turns, **_tools_of(prompt), "reward": best["reward"]}


def pair_rows(groups: Sequence[Group], prompts: Mapping[int, Prompt], compares: bool) -> Iterator[dict[str, Any]]:
    """Pairs of a better and a worse response, as rows for ``reward`` and ``dpo``.

    By scores the best and the worst response to a prompt. Of a reward that compares, each pair that it compared: a
    response with the real one, or with the prompt's next.
    """
    for group in groups:
        prompt = prompts[group[0]["prompt_id"]]
        if not compares:
            judged = [row for row in group if row["reward"] is not None and "\0" not in row["response"]]
            judged.sort(key=lambda row: row["reward"])
            if judged and can_be_real(judged[-1]) and judged[-1]["reward"] > judged[0]["reward"]:
                margin = judged[-1]["reward"] - judged[0]["reward"]
                yield _pair_row(prompt, judged[-1], judged[0], 1.0, margin)
            continue
        for place, row in enumerate(group):
            if row["over_next"] is not None:
                yield from _labelled_row(prompt, row, group[place + 1], row["over_next"])
            elif row["reward"] is not None and 0 <= row["reward"] <= 1:
                real = {"response": row["real"], "finish_reason": prompt.row.real_finish_reason}
                yield from _labelled_row(prompt, row, real, row["reward"])


def _labelled_row(prompt: Prompt, first: Row, second: Row, p: float) -> Iterator[dict[str, Any]]:
    better, worse = (first, second) if p > 0.5 else (second, first)
    differ = p != 0.5 and better["response"] != worse["response"]
    if differ and can_be_real(better) and "\0" not in worse["response"]:
        yield _pair_row(prompt, better, worse, max(p, 1 - p))


def _pair_row(prompt: Prompt, better: Row, worse: Row, preference: float, margin: float = 0.0) -> dict[str, Any]:
    return {
        "prompt": list(prompt.row.prompt),
        **_tools_of(prompt),
        "chosen": [{"role": "assistant", "content": better["response"]}],
        "rejected": [{"role": "assistant", "content": worse["response"]}],
        "chosen_finish_reason": better["finish_reason"],
        "rejected_finish_reason": worse["finish_reason"],
        "preference": preference,
        "margin": margin,
    }


def _tools_of(prompt: Prompt) -> dict[str, Any]:
    return {"tools": list(prompt.row.tools)} if prompt.row.tools else {}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
