"""Durable files: everything the package keeps is written beside its place, synced, and moved there in one step."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spin_lightning.types import StorageError, UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes ``path`` when the block ends without an error.

    A reader sees the old file or the new one, whole; a crash leaves the old one.

    Raises:
        StorageError: It cannot be written. The old file is untouched.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    # one name, so that what a kill leaves is overwritten by the next try
    temporary = path.with_name(f".{path.name}.tmp")
    with explaining_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a link there would have something else overwritten
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            with suppress(OSError):  # it must not hide why the block failed
                temporary.unlink(missing_ok=True)


#: What a full or read-only disk says, as an error number or, through libraries that keep only the text, in words.
STORAGE_ERRORS = {
    number: os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
}


@contextmanager
def explaining_storage_errors(path: Path) -> Iterator[None]:
    """Turn what a full or unwritable disk makes libraries raise into one error that says what to do.

    Raises:
        StorageError: In place of the library's error. Any other error passes.
    """
    try:
        yield
    except (StorageError, UserError):
        raise
    except Exception as error:
        reason = STORAGE_ERRORS.get(getattr(error, "errno", None) or 0) or next(
            (words for words in STORAGE_ERRORS.values() if words in str(error)), None
        )
        if reason is None:
            raise
        with suppress(OSError):
            reason += f"; {_size(shutil.disk_usage(_existing(path)).free)} are free there"
        raise StorageError(
            f"cannot write {path}: {reason}. What was there before is untouched. "
            "Make room, or make the folder writable, and run the same command again."
        ) from error


def need_space(folder: Path, size: int, what: str) -> None:
    """Make sure that a folder can be written to and has room, before hours of work end there.

    Raises:
        StorageError: It is read-only, or fewer than ``size`` bytes are free.
    """
    with replacing(folder / ".probe") as probe:
        probe.write_bytes(b"1")
    (folder / ".probe").unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise StorageError(
            f"{what} needs about {_size(size)} in {folder}, and {_size(free)} are free. "
            "Make room and run the same command again, or give the run a folder on another disk."
        )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def hold(folder: Path) -> FileLock:
    """A lock on a run's folder, let go by ``release()`` or by the end of the process, however it ends.

    Raises:
        UserError: Another process works in the folder; the message says which.
        StorageError: The folder cannot be written to.
    """
    with explaining_storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(folder / ".lock"), folder / ".lock_holder"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            known = holder.read_text(encoding="utf-8").strip() if holder.exists() else "unknown"
            raise UserError(
                f"another process is at work in {folder} ({known}); two would overwrite each other's files. "
                "Wait until it ends, or give this run another folder."
            ) from None
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return lock


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and programs, in one step."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None where there is no such file.

    Raises:
        UserError: The file is damaged.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}). It is only ever written whole, so something else changed it. "
            "Restore it from a copy, or remove the folder it is in and run the same command again."
        ) from None


def sha256_of(value: bytes | str | Path | Any) -> str:
    """Hash of bytes, of text, of a file's bytes (a ``Path``), or of any JSON value, in hexadecimal."""
    if isinstance(value, Path):
        with value.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if not isinstance(value, bytes):
        value = (value if isinstance(value, str) else json.dumps(value, sort_keys=True)).encode()
    return hashlib.sha256(value).hexdigest()


def sync(path: Path) -> None:
    """Have the operating system bring a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
