"""Self-play fine-tuning (SPIN, arXiv:2401.01335) of your own language model, on PyTorch Lightning.

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spin_lightning.version import __version__

if TYPE_CHECKING:
    from spin_lightning.callbacks import ExportPolicy, Health, RunCheckpoint, SelfPlay, ShowAnswers
    from spin_lightning.checkpoints import AtomicCheckpointIO, last_checkpoint
    from spin_lightning.data import SyntheticDataModule
    from spin_lightning.generation import ContinuousGenerator, ResponseGenerator, TransformersGenerator
    from spin_lightning.losses import (
        AlphaSpinLoss,
        DpopLoss,
        IpoLoss,
        LengthNormalizedLoss,
        PairLoss,
        SpaceLoss,
        SpinLoss,
        TSpinLoss,
    )
    from spin_lightning.module import SpinLightningModule
    from spin_lightning.sft import SftLightningModule
    from spin_lightning.types import Interrupted, NonFiniteError, StorageError, UserError

_HOMES = {
    "callbacks": ("ExportPolicy", "Health", "RunCheckpoint", "SelfPlay", "ShowAnswers"),
    "checkpoints": ("AtomicCheckpointIO", "last_checkpoint"),
    "data": ("SyntheticDataModule",),
    "generation": ("ContinuousGenerator", "ResponseGenerator", "TransformersGenerator"),
    "losses": (
        "AlphaSpinLoss",
        "DpopLoss",
        "IpoLoss",
        "LengthNormalizedLoss",
        "PairLoss",
        "SpaceLoss",
        "SpinLoss",
        "TSpinLoss",
    ),
    "module": ("SpinLightningModule",),
    "sft": ("SftLightningModule",),
    "types": ("Interrupted", "NonFiniteError", "StorageError", "UserError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AlphaSpinLoss",
    "AtomicCheckpointIO",
    "ContinuousGenerator",
    "DpopLoss",
    "ExportPolicy",
    "Health",
    "Interrupted",
    "IpoLoss",
    "LengthNormalizedLoss",
    "NonFiniteError",
    "PairLoss",
    "ResponseGenerator",
    "RunCheckpoint",
    "SelfPlay",
    "SftLightningModule",
    "ShowAnswers",
    "SpaceLoss",
    "SpinLightningModule",
    "SpinLoss",
    "StorageError",
    "SyntheticDataModule",
    "TSpinLoss",
    "TransformersGenerator",
    "UserError",
    "__version__",
    "last_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'spin_lightning' has no attribute {name!r}")
    return getattr(import_module(f"spin_lightning.{_HOME_OF[name]}"), name)
