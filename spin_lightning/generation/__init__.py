"""How the opponent answers: an abstract generator, and one file for each backend."""

from spin_lightning.generation.base import Player, ResponseGenerator, opened, seed_of
from spin_lightning.generation.continuous import ContinuousGenerator
from spin_lightning.generation.transformers import TransformersGenerator

__all__ = ["ContinuousGenerator", "Player", "ResponseGenerator", "TransformersGenerator", "opened", "seed_of"]
