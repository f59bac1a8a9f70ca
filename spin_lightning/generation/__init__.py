"""How the opponent answers: an abstract generator, and one file for each backend."""

from spin_lightning.generation.base import Player, ResponseGenerator, opened, seed_of
from spin_lightning.generation.continuous import ContinuousGenerator
from spin_lightning.generation.openai import OpenAIGenerator
from spin_lightning.generation.transformers import TransformersGenerator
from spin_lightning.generation.vllm import VLLMGenerator

__all__ = [
    "ContinuousGenerator",
    "OpenAIGenerator",
    "Player",
    "ResponseGenerator",
    "TransformersGenerator",
    "VLLMGenerator",
    "opened",
    "seed_of",
]
