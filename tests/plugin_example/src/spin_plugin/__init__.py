"""A loss, a generator, a reward and a callback."""

from spin_plugin.callback import CountUpdates
from spin_plugin.generator import NoRepeat
from spin_plugin.loss import HuberLoss
from spin_plugin.reward import ShortAndRight

__all__ = ["CountUpdates", "HuberLoss", "NoRepeat", "ShortAndRight"]
