"""Durable files: everything the package keeps is written beside its place, synced, and moved there in one step."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spin_lightning.types import StorageError, UserError

#: Names that a run makes, writes or removes in its folder, and in that of its checkpoints.
RUN_NAMES = (
    r"checkpoints|iteration_\d+|(policy|adapter)(\.partial)?|logs|tensorboard|fast_dev_run|pairs|start_laws"
    r"|evaluation|\w+\.(json|yaml|html|safetensors)"
    r"|step_\d+\.ckpt.*|\.lock(_holder)?|\.probe|\..*\.tmp"
)

_FOLDERS = r"checkpoints|iteration_\d+|(policy|adapter)(\.partial)?|logs|tensorboard|pairs|(start_)?laws|evaluation"
_FILES = r"\w+\.(json|yaml|csv|parquet|safetensors)|step_\d+\.ckpt.*|\.lock(_holder)?|\..*\.tmp"


def iteration_folders(run: Path) -> dict[int, Path]:
    """The folders of a run's iterations by their numbers, in order; a copy beside them, ``iteration_0.bak``, is none.

    Example:
        >>> iteration_folders(Path("/no/run/is/here"))
        {}
    """
    found = [
        path for path in run.glob("iteration_*") if path.is_dir() and re.fullmatch(r"iteration_[0-9]{1,9}", path.name)
    ]
    numbered = {int(path.name.removeprefix("iteration_")): path for path in found}
    return dict(sorted(numbered.items()))


def run_folder(name: str | Path, setting: str) -> Path:
    """The folder on this machine's disk that a setting names, with ``~`` expanded. Nothing is made.

    Raises:
        UserError: It is no name of a folder: empty, a URL, a file, with a control character, or with a ``$VARIABLE``,
            which only a shell replaces.

    Example:
        >>> run_folder("runs/mine", "self_play.output_dir").as_posix()
        'runs/mine'
    """
    text, expected = str(name), f"{setting} must be a folder on this machine's disk, got {str(name)!r}"
    if not text.strip():
        raise UserError(f"{expected}. Give a name, such as runs/mine.")
    if is_url(text):
        raise UserError(f"{expected}, which is a URL. Give a local folder, and copy from or to other places yourself.")
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]", text):
        raise UserError(f"{expected}, which is one of Windows. Give a name of this system.")
    if re.search(r"[\x00-\x1f\x7f-\x9f]", text):
        raise UserError(f"{expected}: it has a control character. Give another name.")
    try:
        path = Path(text).expanduser()
        if any(len(os.fsencode(part)) > 255 for part in path.parts):
            raise ValueError("a name in it is too long")
        existing = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    except (OSError, RuntimeError, ValueError) as error:  # a user that nobody knows; a loop of links
        raise UserError(f"{expected}: {error}. Give another name.") from None
    if existing != path and re.search(r"\$(\w|\{)", text):
        raise UserError(f"{expected}. Only a shell replaces a variable: write out what it stands for.")
    if not existing.is_dir():
        raise UserError(f"{expected}, and {existing} is no folder. Give another name.")
    if re.match("/(proc|sys)(/|$)", str(existing.absolute())):
        raise UserError(f"{expected}, and {existing} is not on a disk. Give another name.")
    return path


def is_url(name: str) -> bool:
    """Whether a name has a scheme, as ``s3://x`` and ``file:x`` do; ``C:/x`` has none. A ``Path`` keeps one slash."""
    return re.match(r"[A-Za-z][\w+.-]+:/|(file|s3a?|gs|hf|hdfs|https?):", name) is not None


def refuse_links(folder: Path, names: str = RUN_NAMES) -> None:
    """Make sure that nothing which a run writes or removes in its folder leads out of it.

    The folder itself may be a link. Looked at are the names in the folder that match the regular expression ``names``,
    and all that is in them; of other names there, which a run leaves alone, nothing is asked.

    Raises:
        UserError: There is a symbolic link, dangling or not. Or a pipe or a device, at which a run would wait for ever.
            Or a file where a folder belongs, or the reverse. Hard links need no check: what exists is replaced, not
            written to.
    """

    def look(entry: os.DirEntry[str]) -> None:
        if entry.is_symlink():
            raise UserError(
                f"{entry.path} is a link to {str(Path(entry.path).readlink())!r}: what the run writes or removes there "
                "would be elsewhere. Put the file or folder itself in its place, remove the link, or make the whole "
                "run folder a link."
            )
        is_folder = entry.is_dir(follow_symlinks=False)
        if not is_folder and not entry.is_file(follow_symlinks=False):
            raise UserError(f"{entry.path} is neither a file nor a folder. Remove it, or use another run folder.")
        if re.fullmatch(_FOLDERS, entry.name) if not is_folder else re.fullmatch(_FILES, entry.name):
            is_one, belongs = ("folder", "file") if is_folder else ("file", "folder")
            raise UserError(
                f"{entry.path} is a {is_one}, and a run has a {belongs} of that name. Remove it, or use another run "
                "folder."
            )
        if is_folder:
            with os.scandir(entry) as entries:
                for inner in entries:
                    look(inner)

    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if re.fullmatch(names, entry.name):
                    look(entry)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes ``path`` when the block ends without an error.

    A reader sees the old file or the new one, whole; a crash leaves the old one.

    Raises:
        StorageError: It cannot be written. The old file is untouched.
        UserError: Its folder is none.

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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise UserError(
                f"{str(path)!r} cannot be written: {str(path.parent)!r} is no folder and cannot be made one "
                f"({error.strerror}). Give another name."
            ) from None
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
            reason += f"; {_format_size(shutil.disk_usage(_nearest_existing(path)).free)} are free there"
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
            f"{what} needs about {_format_size(size)} in {folder}, and {_format_size(free)} are free. "
            "Make room and run the same command again, or give the run a folder on another disk."
        )


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _format_size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def hold(folder: Path) -> FileLock:
    """A lock on a run's folder, let go by ``release()`` or by the end of the process, however it ends.

    Raises:
        UserError: Another process works in the folder; the message says which. Or something in it is a link.
        StorageError: The folder cannot be written to.
    """
    with explaining_storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        lock, holder = FileLock(folder / ".lock"), folder / ".lock_holder"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            known = holder.read_text(encoding="utf-8").strip() if holder.exists() else "unknown"
            raise UserError(
                f"another process is at work in {folder} ({known}); two would overwrite each other's files. "
                "Wait until it ends, or give this run another folder."
            ) from None
        holder.unlink(missing_ok=True)
        with holder.open("x", encoding="utf-8") as stream:  # never into a file that was there
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
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
