"""The pairs of one iteration on disk, as shards that a manifest vouches for. Nothing here generates or scores.

The rows serve three readers at once: this package (token ids and log-probs), TRL's preference trainers
(``prompt``, ``chosen``, ``rejected`` as message lists) and the SPIN authors' scripts (``real``, ``generated``).
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from spin_lightning.runs.shards import IDS, MESSAGES, ShardStore

SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),  # whose opponent generated the response
        ("prompt_id", pa.int64()),
        ("answer", pa.int32()),  # 0 to K - 1
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("real", MESSAGES),
        ("generated", MESSAGES),
        ("prompt_ids", IDS),
        ("real_ids", IDS),
        ("generated_ids", IDS),
        ("real_finish_reason", pa.string()),
        ("generated_finish_reason", pa.string()),
        ("generated_log_prob", pa.float64()),  # by the sampler, when it was sampled
        ("opponent_real_log_prob", pa.float64()),  # by the opponent of the iteration this folder belongs to
        ("opponent_generated_log_prob", pa.float64()),
        ("initial_real_log_prob", pa.float64()),  # by the opponent of iteration 0, for the losses that ask
        ("initial_generated_log_prob", pa.float64()),
        ("initial_ids", IDS),
        ("opponent_sha256", pa.string()),  # of the opponent that generated the response
        ("seed", pa.int64()),
    ]
)

TRAINING_COLUMNS = ["prompt_id", *(name for name in SCHEMA.names if name.endswith(("_ids", "_log_prob")))]

#: What ``describe_pairs`` and ``describe_gap`` read.
DESCRIBED_COLUMNS = [
    *("iteration", "real_ids", "generated_ids", "real_finish_reason", "generated_finish_reason"),
    *("generated_log_prob", "opponent_generated_log_prob"),
]


#: What a reward has said of the sides of a pair.
REWARD_COLUMNS = ["real_reward", "generated_reward"]


class PairStore(ShardStore):
    """The pairs of one iteration.

    Raises:
        UserError: The folder holds pairs that something else made; the message names each difference.
    """

    schema = SCHEMA
    rows_are = "pairs"
    chained_by = "previous_pairs_sha256"


class RankedPairStore(PairStore):
    """Pairs whose responses a reward has judged."""

    schema = pa.schema(
        [
            *SCHEMA,
            ("real_reward", pa.float64()),  # null: cannot be judged
            ("generated_reward", pa.float64()),
            ("rewards", pa.list_(pa.float64())),  # of all the opponent's responses to the prompt, in their order
        ]
    )


def own_shards(store: PairStore, iteration: int) -> list[str]:
    """The names of the shards with responses that were generated in this iteration."""
    names = [str(shard["file"]) for shard in store.manifest["shards"]]
    return [name for name in names if name.startswith(f"iteration_{iteration}-")]


def name_sides(report: Mapping[str, Any]) -> tuple[str, str]:
    """What the two sides of the pairs are called that a report is about."""
    real, generated = report.get("sides", ("real", "generated"))
    return real, generated


def describe_rewards(table: pa.Table) -> dict[str, Any]:
    """What a reward says of all the opponent's responses, and how many pairs it tells apart."""
    of_prompts = {row["prompt_id"]: row["rewards"] for row in table.select(["prompt_id", "rewards"]).to_pylist()}
    values = [value for rewards in of_prompts.values() for value in rewards]
    known = [value for value in values if value is not None]
    real, generated = table["real_reward"], table["generated_reward"]
    tied = pc.fill_null(pc.less_equal(real, generated), False)
    return {
        "mean": fmean(known) if known else None,
        "unjudged": len(values) - len(known),
        "pairs_told_apart": table.num_rows - int(pc.sum(unranked(table)).as_py()),
        "pairs_tied": int(pc.sum(tied).as_py()),
    }


def unranked(table: pa.Table) -> Any:
    """Boolean array, one entry a pair: the first response is not known to be worth more than the second."""
    return pc.fill_null(pc.less_equal(table["real_reward"], table["generated_reward"]), True)


def describe_pairs(table: pa.Table) -> dict[str, Any]:
    """Counts and shares of a set of pairs: what a person should know before training on them."""
    if table.num_rows == 0:
        return {"pairs": 0}
    real, generated = table["real_ids"], table["generated_ids"]
    real_lengths, generated_lengths = pc.list_value_length(real), pc.list_value_length(generated)

    stopped = pc.equal(table["generated_finish_reason"], "stop")
    masks = {
        "identical": pa.array(identical(table)),
        "real_clipped": pc.equal(table["real_finish_reason"], "length"),
        "generated_clipped": pc.invert(stopped),
        "empty": pc.and_(pc.equal(generated_lengths, 1), stopped),
    }
    counts = {name: int(pc.sum(mask).as_py()) for name, mask in masks.items()}
    return {
        "pairs": table.num_rows,
        **counts,
        **{f"{name}_share": count / table.num_rows for name, count in counts.items()},
        "real_mean_length": float(pc.mean(real_lengths).as_py()),
        "generated_mean_length": float(pc.mean(generated_lengths).as_py()),
        "generated_tokens": int(pc.sum(generated_lengths).as_py()),
    }


def describe_gap(table: pa.Table) -> dict[str, float]:
    """How far the sampler's log-probs of the generated responses are from the opponent's, in nats a token.

    Returns:
        ``mean`` and ``most`` of the responses' absolute differences, and ``signed``, the mean over all tokens of the
        sampler's minus the opponent's: the divergence of the one from the other, if the sampler samples what it says.
    """
    lengths = pc.list_value_length(table["generated_ids"])
    gaps = pc.subtract(table["generated_log_prob"], table["opponent_generated_log_prob"])
    each = pc.abs(pc.divide(gaps, pc.cast(lengths, pa.float64())))
    return {
        "mean": float(pc.mean(each).as_py()),
        "most": float(pc.max(each).as_py()),
        "signed": pc.sum(gaps).as_py() / pc.sum(lengths).as_py(),
    }


def identical(table: pa.Table) -> Any:
    """Boolean array, one entry a pair: both responses are the same tokens."""
    import numpy

    pairs = zip(table["real_ids"], table["generated_ids"], strict=True)
    return numpy.array([real.values.equals(generated.values) for real, generated in pairs], dtype=bool)
