"""Checkpoint files: written beside their place, hashed, moved there in one step, and checked before use."""

from __future__ import annotations

import io
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import nn

from spin_lightning.runs.files import replacing, run_folder, sha256_of
from spin_lightning.terminal import say
from spin_lightning.types import NonFiniteError, UserError


def checkpoint_folder(output_dir: Path | str) -> str:
    """Where the run in a folder keeps its checkpoints."""
    return str(Path(output_dir) / "checkpoints")


def last_checkpoint(output_dir: Path | str) -> str | None:
    """The newest undamaged checkpoint of the run in a folder, or None where there never was one.

    Raises:
        UserError: There are checkpoints, and all of them are damaged; or it is no name of a folder.
    """
    return newest_checkpoint(Path(checkpoint_folder(run_folder(output_dir, "output_dir"))))


def newest_checkpoint(folder: Path) -> str | None:
    """The same, in the folder of the checkpoints themselves."""
    paths = checkpoints_in(folder)
    for path in paths:
        if (reason := damage(path)) is None:
            return str(path)
        say(f"note: {path} {reason}; trying the one before it")
    if paths:
        raise UserError(
            f"every checkpoint in {paths[0].parent} is damaged. Restore one with its .sha256 file from a copy, "
            "or remove that folder to play the last iteration again from its beginning."
        )
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint that has a hash beside it, or None."""
    vouched = hash_file(path)
    if not vouched.exists():
        return f"has no {vouched.name} beside it"
    known = [line.split()[0] for line in vouched.read_text(errors="replace").splitlines() if line.strip()]
    return None if sha256_of(path) in known else "is not the file that was written"


def hash_file(path: Path) -> Path:
    """The file beside a checkpoint with its SHA-256, as ``sha256sum -c`` reads it."""
    return path.with_name(f"{path.name}.sha256")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that ``RunCheckpoint`` keeps in a folder, the newest first."""
    return sorted(
        (path for path in folder.glob("step_*.ckpt") if re.fullmatch(r"step_\d{9,}", path.stem)), reverse=True
    )


def refuse_non_finite(model: nn.Module) -> None:
    """Make sure that weights are worth keeping.

    Raises:
        NonFiniteError: A weight is NaN or infinite.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise NonFiniteError(
                f"weight {name} is NaN or infinite, so nothing is saved. "
                "The last checkpoint is whole: continue from it with a lower learning rate."
            )


class _Stream(io.FileIO):
    """A file that is written whole or says why not, and remembers it: torch raises an error without the reason."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
            raise
        return memoryview(data).nbytes


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints that a crash, a full disk or a flipped bit cannot turn into something else.

    A checkpoint is written beside its place, synced, and moved there: a crash leaves the old one whole. Its SHA-256 is
    kept beside it, and checked before it is read. Reading never runs code (``weights_only``). Of use to any Lightning
    project: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    Lightning's own writer stages in $TMPDIR; across file systems a kill in the middle destroys both.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            StorageError: There is no room, or the folder cannot be written to.
            UserError: The path is not on this machine.
        """
        path = _require_local(path)
        with replacing(path) as temporary:
            with _Stream(temporary, "wb") as stream:
                try:
                    torch.save(checkpoint, stream)
                except RuntimeError as error:
                    raise stream.error or error from None
            digest = sha256_of(temporary)
            # both the new and the old one are vouched for until the new one is in its place
            lines = [f"{digest}  {path.name}\n"]
            if path.exists() and hash_file(path).exists():
                lines += hash_file(path).read_text(errors="replace").splitlines(keepends=True)[:1]
            with replacing(hash_file(path)) as hashes:
                hashes.write_text("".join(lines), encoding="utf-8")

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint from this machine's disk; only tensors and plain values, whatever ``weights_only`` says.

        Raises:
            UserError: It is not the file that was written, there is none on this machine, or it holds code.
        """
        path = existing_checkpoint(path)
        if hash_file(path).exists() and (reason := damage(path)) is not None:
            raise UserError(f"{path} {reason}. Restore it from a copy, or continue from another checkpoint.")
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except (EOFError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {str(error)[:200]}") from error
        except Exception as error:  # pickle's own UnpicklingError among others
            raise UserError(
                f"{path} holds something else than tensors and plain values, and is not opened: reading it could run "
                f"code ({type(error).__name__}). Use a checkpoint that this package wrote."
            ) from error

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and its hash."""
        super().remove_checkpoint(path)
        hash_file(Path(path)).unlink(missing_ok=True)


def existing_checkpoint(path: Any) -> Path:
    """The file of a checkpoint on this machine's disk.

    Raises:
        UserError: There is none, or the name is a URL.
    """
    file = _require_local(path)
    with suppress(OSError):  # a name that is too long
        if file.is_file():
            return file
    raise UserError(f"there is no checkpoint {str(path)!r}. Give the path of a file that a run saved, or leave it out.")


def _require_local(path: Any) -> Path:
    if "://" in str(path):
        raise UserError(
            f"checkpoints are kept on a local disk only, got {path}. Copy from or to other places yourself."
        )
    return Path(path)
