"""A durable table: Parquet shards, and a manifest that says what made them.

Shards are written once, whole, and the manifest then vouches for them by their hash. Until it says ``complete``, the
folder is work in progress that the same run continues. What the rows are, a subclass says with its schema.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from spin_lightning.runs import processes
from spin_lightning.runs.files import read_json, replacing, sha256_of, write_json
from spin_lightning.types import UserError

#: Columns that tables share: the turns of a conversation, and token ids.
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
IDS = pa.list_(pa.int32())


class ShardStore:
    """Reads and writes a folder of shards.

    Args:
        folder: Where the shards are. The manifest is beside it, ``FOLDER_manifest.json``, so that a folder holds
            Parquet and nothing else.
        binding: What the rows depend on. None to read a finished folder as it is.

    Attributes:
        manifest: Whether the table is complete, its binding, its shards with their hashes, and what ``finish`` was
            told.

    Several processes write one table, each its own shards; with a binding it is opened by all of them together. The
    manifest is the first process's. Beside a shard lies a voucher until the table is finished: what the manifest will
    say of it.

    Raises:
        UserError: The folder holds rows that something else made; the message names each difference.
    """

    #: Columns and their types.
    schema: ClassVar[pa.Schema]
    #: What the rows are, in messages.
    rows_are: ClassVar[str] = "rows"
    #: The key of the binding that holds the hash of the manifest before this one.
    chained_by: ClassVar[str] = "previous_sha256"

    def __init__(self, folder: Path, binding: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.manifest_path = folder.with_name(f"{folder.name}_manifest.json")
        if binding is not None and not processes.is_first():
            processes.wait()  # until the first one has begun it
        manifest: dict[str, Any] | None = read_json(self.manifest_path)
        if manifest is None:
            if binding is None:
                raise UserError(
                    f"{self.manifest_path} is missing, so nothing vouches for the {self.rows_are} in {folder}. Let the "
                    "run make them."
                )
            shutil.rmtree(folder, ignore_errors=True)  # shards that nothing vouches for are not read
            manifest = {"complete": False, "binding": dict(binding), "shards": []}
            write_json(self.manifest_path, manifest)
        elif binding is not None and (differing := find_differing(binding, manifest["binding"])):
            raise UserError(
                f"the {self.rows_are} in {folder} were made by something else than this run; what differs: "
                f"{', '.join(differing)}. Use another output_dir, or remove that iteration's folder to have "
                "them made again."
            )
        if binding is not None and processes.is_first():
            processes.wait()
        self.manifest: dict[str, Any] = manifest
        if not manifest["complete"]:
            self._read_vouchers()

    @property
    def binding(self) -> dict[str, Any]:
        """What the rows depend on."""
        binding: dict[str, Any] = self.manifest["binding"]
        return binding

    @property
    def is_complete(self) -> bool:
        """Whether all shards are there, and the manifest says so."""
        return bool(self.manifest["complete"])

    @property
    def sha256(self) -> str:
        """Hash of the manifest, and so of everything that it vouches for."""
        return sha256_of(self.manifest_path)

    def has_shard(self, name: str) -> bool:
        """Whether a shard was written, and is the file that was written."""
        return self._find_damage(name) is None

    def write_shard(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one shard, whole or not at all, and vouch for it."""
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=self.schema)
        path = self._shard_path(name)
        with replacing(path) as temporary:  # absolute below: Arrow takes a:b for a URL
            pq.write_table(table, temporary.absolute(), compression="zstd", write_page_checksum=True)
        entry = {"file": name, "rows": table.num_rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        self._vouch_for(entry)
        if processes.world_size() == 1:
            write_json(self.manifest_path, self.manifest)
        else:
            write_json(self._voucher_path(name), entry)

    def gather(self) -> None:
        """Wait until every process has written its shards, and learn of those of the others. Together."""
        processes.wait()
        self._read_vouchers()
        processes.wait()  # until all have read what ``finish`` removes

    def read_shard(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One shard, only if it is the file that was written.

        Raises:
            UserError: It is missing, has changed, or lies elsewhere.
        """
        path = self._shard_path(name)
        if (state := self._find_damage(name)) is not None:
            raise UserError(
                f"{path} {state}, so the {self.rows_are} cannot be trusted. Restore it from a copy, or remove the "
                f"folder {self.folder} and every later iteration, and run the same command again."
            )
        return pq.read_table(path.absolute(), columns=columns, page_checksum_verification=True, partitioning=None)

    def read_shards(self, names: Sequence[str], columns: list[str] | None = None) -> pa.Table:
        """Several shards as one table, in the order given."""
        return pa.concat_tables([self.read_shard(name, columns) for name in names])

    def finish(self, names: Sequence[str], **information: Any) -> None:
        """Say that these shards, in this order, are all, and what is in them. Together, after ``gather``."""
        written = {shard["file"]: shard for shard in self.manifest["shards"]}
        shards = [written[name] for name in names]
        self.manifest = {"complete": True, "binding": self.binding, **information, "shards": shards}
        if processes.is_first():
            write_json(self.manifest_path, self.manifest)
            for voucher in self.folder.glob("*.voucher.json"):
                voucher.unlink()
        processes.wait()

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows, checked against the manifest.

        Raises:
            UserError: The table is unfinished, or a shard is not the one that was written.
        """
        if not self.is_complete:
            raise UserError(
                f"the {self.rows_are} in {self.folder} are unfinished. Continue the run that was making them."
            )
        return self.read_shards([shard["file"] for shard in self.manifest["shards"]], columns)

    def _vouch_for(self, entry: Mapping[str, Any]) -> None:
        others = [shard for shard in self.manifest["shards"] if shard["file"] != entry["file"]]
        self.manifest["shards"] = [*others, dict(entry)]

    def _read_vouchers(self) -> None:
        for path in sorted(self.folder.glob("*.voucher.json")):
            self._vouch_for(read_json(path))

    def _voucher_path(self, name: str) -> Path:
        return self.folder / f"{name}.voucher.json"

    def _shard_path(self, name: str) -> Path:
        """Where a shard is. A manifest is a file that others may have written: its names must not lead elsewhere."""
        path = self.folder / name
        if not re.fullmatch(r"[\w-]+\.parquet", name) or path.is_symlink():
            raise UserError(
                f"{self.manifest_path} names {name!r}, which is no shard of {self.rows_are} in its folder. "
                "Use a folder that this package wrote."
            )
        return path

    def _find_damage(self, name: str) -> str | None:
        path = self._shard_path(name)
        vouched = {shard["file"]: shard["sha256"] for shard in self.manifest["shards"]}
        if name not in vouched or not path.exists():
            return "is missing"
        return None if sha256_of(path) == vouched[name] else "is not the file that was written"


def refuse_broken_chain(stores: Sequence[ShardStore], newest: str | None) -> None:
    """Make sure that tables belong together.

    Each manifest names the hash of the one before it, so no other run's can slip in.

    Args:
        stores: From the newest to the oldest.
        newest: The hash that the newest manifest must have.

    Raises:
        UserError: A manifest is not the one that the next, or ``newest``, names.
    """
    for store in stores:
        if store.sha256 != newest:
            raise UserError(
                f"the {store.rows_are} in {store.folder} are not those that this game made for iteration "
                f"{store.binding.get('iteration')}. Restore the folder, or use another output_dir."
            )
        newest = store.binding[store.chained_by]


def refuse_other_binding(store: ShardStore, binding: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Make sure that a table was made from the same rows, ids and settings as what it is combined or continued with.

    Raises:
        UserError: One of ``keys`` differs; the message names each.
    """
    if differing := [key for key in keys if not _agree(store.binding[key], binding[key])]:
        raise UserError(
            f"the {store.rows_are} in {store.folder} were made with other settings than this run has now; what "
            f"differs: {', '.join(differing)}. Use the settings they were made with, or another output_dir."
        )


def find_differing(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """The keys in which two bindings differ.

    Example:
        >>> find_differing({"seed": 1, "reward": {"name": "a", "source_sha256": "0"}}, {"reward": {"name": "a"}})
        ['seed']
    """
    return [key for key in {**new, **old} if not _agree(new.get(key, ...), old.get(key, ...))]  # JSON has no Ellipsis


#: Keys that earlier versions did not keep, and that cannot always be known: where one side lacks one, nothing differs.
_KNOWN_SOMETIMES = {"source_sha256"}


def _agree(new: Any, old: Any) -> bool:
    if not (isinstance(new, Mapping) and isinstance(old, Mapping)):
        return bool(new == old)
    keys = {*new, *old} - (_KNOWN_SOMETIMES - (new.keys() & old.keys()))
    return all(_agree(new.get(key, ...), old.get(key, ...)) for key in keys)
