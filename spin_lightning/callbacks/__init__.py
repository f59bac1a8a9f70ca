"""The clock of the game, and what watches it: one file each."""

from spin_lightning.callbacks.checkpoint import RunCheckpoint
from spin_lightning.callbacks.export import ExportPolicy
from spin_lightning.callbacks.health import Health
from spin_lightning.callbacks.samples import ShowAnswers
from spin_lightning.callbacks.self_play import SelfPlay

__all__ = ["ExportPolicy", "Health", "RunCheckpoint", "SelfPlay", "ShowAnswers"]
