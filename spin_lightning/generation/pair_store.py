"""The pairs of one iteration on disk: Parquet shards and a manifest that says what made them.

Shards are written once, whole, and the manifest then vouches for them by their hash. Until it says ``complete``, the
folder is work in progress that the same run continues. Nothing here generates or scores.

The rows serve three readers at once: this package (token ids and log-probs), TRL's preference trainers
(``prompt``, ``chosen``, ``rejected`` as message lists) and the SPIN authors' scripts (``real``, ``generated``).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spin_lightning.runs.files import read_json, replacing, sha256_of, write_json
from spin_lightning.types import UserError

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IDS = pa.list_(pa.int32())

SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),  # whose opponent generated the response
        ("prompt_id", pa.int64()),
        ("answer", pa.int32()),  # 0 to K - 1
        ("prompt", _MESSAGES),
        ("chosen", _MESSAGES),
        ("rejected", _MESSAGES),
        ("real", _MESSAGES),
        ("generated", _MESSAGES),
        ("prompt_ids", _IDS),
        ("real_ids", _IDS),
        ("generated_ids", _IDS),
        ("real_finish_reason", pa.string()),
        ("generated_finish_reason", pa.string()),
        ("generated_log_prob", pa.float64()),  # by the sampler, when it was sampled
        ("opponent_real_log_prob", pa.float64()),  # by the opponent of the iteration this folder belongs to
        ("opponent_generated_log_prob", pa.float64()),
        ("initial_real_log_prob", pa.float64()),  # by the opponent of iteration 0, for the losses that ask
        ("initial_generated_log_prob", pa.float64()),
        ("initial_ids", _IDS),
        ("opponent_sha256", pa.string()),  # of the opponent that generated the response
        ("seed", pa.int64()),
    ]
)

TRAINING_COLUMNS = ["prompt_id", *(name for name in SCHEMA.names if name.endswith(("_ids", "_log_prob")))]


class PairStore:
    """Reads and writes the folder of one iteration's pairs.

    Args:
        folder: Where the shards are. The manifest is beside it, ``FOLDER_manifest.json``, so that a folder holds Parquet and nothing else.
        binding: What the pairs depend on. None to read a finished folder as it is.

    Raises:
        UserError: The folder holds pairs that something else made; the message names each difference.
    """

    def __init__(self, folder: Path, binding: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.manifest_path = folder.with_name(f"{folder.name}_manifest.json")
        self.manifest: dict[str, Any] | None = read_json(self.manifest_path)
        if binding is None:
            if self.manifest is None:
                raise UserError(
                    f"{self.manifest_path} is missing, so nothing vouches for the pairs in {folder}. Let the run make them."
                )
        elif self.manifest is None:
            shutil.rmtree(folder, ignore_errors=True)  # shards that nothing vouches for are not read
            self.manifest = {"complete": False, "binding": dict(binding), "shards": []}
            write_json(self.manifest_path, self.manifest)
        elif differing := [
            key
            for key in {**binding, **self.manifest["binding"]}
            if binding.get(key, ...) != self.manifest["binding"].get(key, ...)  # JSON has no Ellipsis
        ]:
            raise UserError(
                f"the pairs in {folder} were made by something else than this run; what differs: {', '.join(differing)}. "
                "Use another self_play.output_dir, or remove that iteration's folder to have its pairs made again."
            )

    @property
    def is_complete(self) -> bool:
        return bool(self.manifest and self.manifest["complete"])

    def has_shard(self, name: str) -> bool:
        """Whether a shard was written, and is the file that was written."""
        return self._damage(name) is None

    def write_shard(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one shard, whole or not at all, and vouch for it."""
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
        path = self._path(name)
        with replacing(path) as temporary:  # absolute below: Arrow takes a:b for a URL
            pq.write_table(table, temporary.absolute(), compression="zstd", write_page_checksum=True)
        entry = {"file": name, "rows": table.num_rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        assert self.manifest is not None
        self.manifest["shards"] = [*(shard for shard in self.manifest["shards"] if shard["file"] != name), entry]
        write_json(self.manifest_path, self.manifest)

    def _path(self, name: str) -> Path:
        """Where a shard is. A manifest is a file that others may have written: its names must not lead elsewhere."""
        path = self.folder / name
        if not re.fullmatch(r"[\w-]+\.parquet", name) or path.is_symlink():
            raise UserError(
                f"{self.manifest_path} names {name!r}, which is no shard of pairs in its folder. Use a folder that this package wrote."
            )
        return path

    def _damage(self, name: str) -> str | None:
        path = self._path(name)
        vouched = {shard["file"]: shard["sha256"] for shard in (self.manifest or {}).get("shards", [])}
        if name not in vouched or not path.exists():
            return "is missing"
        return None if sha256_of(path) == vouched[name] else "is not the file that was written"

    def read_shard(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One shard, only if it is the file that was written.

        Raises:
            UserError: It is missing, has changed, or lies elsewhere.
        """
        path = self._path(name)
        if (state := self._damage(name)) is not None:
            raise UserError(
                f"{path} {state}, so the pairs cannot be trusted. Restore it from a copy, or remove the folder "
                f"{self.folder} and every later iteration, and run the same command again."
            )
        return pq.read_table(path.absolute(), columns=columns, page_checksum_verification=True, partitioning=None)

    def finish(self, names: list[str], **information: Any) -> dict[str, Any]:
        """Say that these shards, in this order, are all, and what is in them."""
        assert self.manifest is not None
        written = {shard["file"]: shard for shard in self.manifest["shards"]}
        shards = [written[name] for name in names]
        self.manifest = {"complete": True, "binding": self.manifest["binding"], **information, "shards": shards}
        write_json(self.manifest_path, self.manifest)
        return self.manifest

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All pairs, checked against the manifest.

        Raises:
            UserError: The pairs are unfinished, or a shard is not the one that was written.
        """
        if not self.is_complete:
            raise UserError(f"the pairs in {self.folder} are unfinished. Continue the run that was making them.")
        assert self.manifest is not None
        return pa.concat_tables([self.read_shard(shard["file"], columns) for shard in self.manifest["shards"]])


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


def identical(table: pa.Table) -> Any:
    """Boolean array, one entry a pair: both responses are the same tokens."""
    import numpy

    pairs = zip(table["real_ids"], table["generated_ids"], strict=True)
    return numpy.array([real.values.equals(generated.values) for real, generated in pairs], dtype=bool)
