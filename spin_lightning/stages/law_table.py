"""What a frozen model says where each token of the real responses stands, scored once and kept in a run's folder.

For each token its own log-prob and the model's law of it, cut to the likeliest tokens and the rest. Shard after shard,
like pairs, so that an interrupted run scores at most one again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from spin_lightning.models.adapters import exported_bytes
from spin_lightning.models.batches import pack_rows
from spin_lightning.models.forward_paths import forward_path_of
from spin_lightning.models.modes import evaluating
from spin_lightning.models.token_laws import top_says
from spin_lightning.progress import progress
from spin_lightning.runs import processes
from spin_lightning.runs.files import need_space
from spin_lightning.runs.settings import versions
from spin_lightning.runs.shards import IDS, ShardStore
from spin_lightning.types import Prompt


class LawStore(ShardStore):
    """Real responses, and what a model says where each of their tokens stands.

    The numbers are bytes, 32-bit and little-endian, as ``numpy.frombuffer`` reads them: of each scored token
    ``real_log_probs`` and ``law_rest`` (float32), and one token after another ``law_ids`` (int32) and
    ``law_log_probs`` (float32), k of each.
    """

    schema = pa.schema(
        [
            ("prompt_id", pa.int64()),
            ("prompt_ids", IDS),
            ("real_ids", IDS),
            ("real_finish_reason", pa.string()),
            *((name, pa.binary()) for name in ("real_log_probs", "law_rest", "law_ids", "law_log_probs")),
        ]
    )
    rows_are = "next-token laws"


def fill_laws(
    store: LawStore,
    prompts: Sequence[Prompt],
    model: Any,
    *,
    numerics: Callable[[], AbstractContextManager[Any]],
    name: str,
    top_k: int,
    shard_size: int,
    micro_batch_tokens: int,
    poll: Callable[[], None],
) -> None:
    """Score what is missing in a table with a model as it is, and finish it. Together, each process its shards.

    Args:
        store: The table.
        prompts: With their real responses.
        model: Who scores.
        numerics: A context with the precision of a training step.
        name: What the model is called in the manifest.
        top_k: Tokens of a law.
        shard_size: Responses in one shard.
        micro_batch_tokens: Tokens in one pass.
        poll: Called before each pass; raises to interrupt.
    """
    if processes.is_first():
        tokens = sum(len(prompt.real_ids) for prompt in prompts)
        need_space(store.folder, exported_bytes(model) + tokens * bytes_of_law(top_k), "what is scored")
    starts = range(0, len(prompts), shard_size)
    names = [f"laws-{start:09d}.parquet" for start in starts]
    own = [(start, shard) for start, shard in processes.deal([*zip(starts, names, strict=True)])]
    missing = [(start, shard) for start, shard in own if not store.has_shard(shard)]
    with torch.no_grad(), numerics(), evaluating(model):
        forward_path_of(model)
        count = sum(len(prompts[start : start + shard_size]) for start, _ in missing)
        with progress("scoring", count, "responses") as phase:
            for start, shard in missing:
                rows = _score(prompts[start : start + shard_size], model, top_k, micro_batch_tokens, poll, phase)
                store.write_shard(shard, rows)
    store.gather()
    statistics = describe_laws(store.read_shards(names, [name for name in store.schema.names if name[:4] != "law_"]))
    store.finish(names, opponent=name, versions=versions(), statistics=statistics)


def bytes_of_law(top_k: int) -> int:
    """Bytes on disk of the law of one token, with the token itself, its log-prob and that of the rest."""
    return 8 * top_k + 12


def _score(
    prompts: Sequence[Prompt], model: Any, top_k: int, micro_batch_tokens: int, poll: Callable[[], None], phase: Any
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": prompt.prompt_id,
            "prompt_ids": prompt.prompt_ids,
            "real_ids": prompt.real_ids,
            "real_finish_reason": prompt.real_finish_reason,
        }
        for prompt in prompts
    ]
    device = next(model.parameters()).device
    for indices, batch, _ in pack_rows(rows, ["real_ids"], micro_batch_tokens):
        poll()
        says = top_says(model, move_data_to_device(batch, device), top_k)
        counts = torch.bincount(batch.response_index, minlength=len(batch)).tolist()
        columns = {
            "real_log_probs": says.real.float(),
            "law_rest": says.laws.rest.float(),
            "law_ids": says.laws.ids.int(),
            "law_log_probs": says.laws.log_probs.float(),
        }
        for name, values in columns.items():
            for index, part in zip(indices, values.cpu().split(counts), strict=True):
                rows[index][name] = part.contiguous().numpy().tobytes()
        phase.advance(len(indices), tokens=len(batch.input_ids))
    return rows


def describe_laws(table: pa.Table) -> dict[str, Any]:
    """Counts of a set of scored responses, and how likely they are: what a person should know before training."""
    import numpy

    log_probs = [numpy.frombuffer(each, dtype="<f4").astype(float) for each in table["real_log_probs"].to_pylist()]
    lengths = table["real_ids"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    cut = sum(reason == "length" for reason in table["real_finish_reason"].to_pylist())
    tokens = sum(map(len, log_probs))
    return {
        "responses": table.num_rows,
        "tokens": tokens,
        "real_mean_length": float(lengths.mean()) if table.num_rows else 0.0,
        "real_clipped_share": cut / max(1, table.num_rows),
        "nll_per_token": -float(sum(each.sum() for each in log_probs)) / max(1, tokens),
    }
