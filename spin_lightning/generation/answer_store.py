"""Sampled responses of one iteration with their rewards, as shards that a manifest vouches for.

Nothing here generates, scores or judges. Advantages are not kept: they are a pure function of what is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from spin_lightning.advantages import explained_variance
from spin_lightning.runs.shards import IDS, MESSAGES, ShardStore

_NATS = pa.list_(pa.float32())

SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),  # whose policy gave the response
        ("prompt_id", pa.int64()),
        ("answer", pa.int32()),  # 0 to K - 1
        ("prompt", MESSAGES),
        ("response", MESSAGES),
        ("prompt_ids", IDS),
        ("response_ids", IDS),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("log_probs", _NATS),  # of each token, by the policy, in the numerics of a training step
        ("reference_log_probs", _NATS),
        ("sampler_log_probs", _NATS),  # by the generator, when it was sampled
        ("sampler_log_prob", pa.float64()),  # their sum, which every generator gives
        ("values", _NATS),  # what the critic expected before each token
        ("reward", pa.float64()),  # what it counts in training; null: it cannot be judged, or was dropped
        ("rewards", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),  # of which that is the sum
    ]
)

#: What ``describe_answers`` reads, and training.
TRAINING_COLUMNS = [name for name in SCHEMA.names if name not in ("iteration", "prompt", "response", "seed")]


class AnswerStore(ShardStore):
    """The sampled responses of one iteration.

    Raises:
        UserError: The folder holds responses that something else made; the message names each difference.
    """

    schema = SCHEMA
    rows_are = "responses"
    chained_by = "previous_answers_sha256"


def describe_answers(table: pa.Table) -> dict[str, float]:
    """What a person should know before training on sampled responses, under the names that loggers get.

    ``reward/mean`` and what else is of rewards is over those that have one. ``correlation`` is that of reward and
    length. What does not apply is left out.
    """
    count = table.num_rows
    lengths = pc.list_value_length(table["response_ids"])
    distinct = {
        (row["prompt_id"], tuple(row["response_ids"]))
        for row in table.select(["prompt_id", "response_ids"]).to_pylist()
    }
    found: dict[str, float] = {
        "answers": count,
        "completions/mean_length": float(pc.mean(lengths).as_py()),
        "completions/cut": pc.sum(pc.equal(table["finish_reason"], "length")).as_py() / count,
        "completions/distinct": len(distinct) / count,
        "reward/none": table["reward"].null_count / count,
        **_describe_rewards(table),
    }
    gaps = pc.divide(pc.subtract(table["sampler_log_prob"], _sums(table, "log_probs")), pc.cast(lengths, pa.float64()))
    if gaps.null_count < count:
        found["sampler/difference"] = float(pc.mean(pc.abs(gaps)).as_py())
    if table["reference_log_probs"].null_count == 0:
        ratios = pc.subtract(_sums(table, "log_probs"), _sums(table, "reference_log_probs"))
        found["kl/reference"] = float(pc.mean(ratios).as_py())
    return found


def _describe_rewards(table: pa.Table) -> dict[str, float]:
    judged = table.filter(pc.is_valid(table["reward"]))
    if not judged.num_rows:
        return {}
    rewards = torch.tensor(judged["reward"].to_pylist(), dtype=torch.float64)
    lengths = torch.tensor(pc.list_value_length(judged["response_ids"]).to_pylist(), dtype=torch.float64)
    found = {"reward/mean": float(rewards.mean()), "reward/std": float(rewards.std(correction=0))}
    by_name: dict[str, list[float]] = {}
    for parts in judged["rewards"].to_pylist():
        for part in parts or ():
            if part["value"] is not None:
                by_name.setdefault(part["name"], []).append(part["value"])
    found |= {f"reward/{name}": sum(values) / len(values) for name, values in by_name.items()}
    if min(rewards.std(correction=0), lengths.std(correction=0)) > 0:
        found["reward/length_correlation"] = float(torch.corrcoef(torch.stack([rewards, lengths]))[0, 1])
    groups: dict[int, list[float]] = {}
    for prompt, reward in zip(judged["prompt_id"].to_pylist(), rewards.tolist(), strict=True):
        groups.setdefault(prompt, []).append(reward)
    several = [group for group in groups.values() if len(group) > 1]
    if several:
        found["groups/flat"] = Counter(min(group) == max(group) for group in several)[True] / len(several)
    return found


def _sums(table: pa.Table, column: str) -> pa.Array:
    """The sum over each response's tokens; null where the column is."""
    return pa.array([None if values is None else sum(values) for values in table[column].to_pylist()], pa.float64())


def flat(table: pa.Table, column: str) -> torch.Tensor | None:
    """A column of lists end to end, in double precision; None where one of them is null."""
    if table[column].null_count:
        return None
    return torch.tensor(pc.list_flatten(table[column]).to_numpy(), dtype=torch.float64)


def describe_critic(values: torch.Tensor, returns: torch.Tensor) -> dict[str, Any]:
    """How well a critic foresaw what came; nothing where nothing differed."""
    share = explained_variance(values, returns)
    return {} if share != share else {"value/explained_variance": share}
