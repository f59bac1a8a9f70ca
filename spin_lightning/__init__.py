"""Self-play fine-tuning (SPIN, arXiv:2401.01335) of your own language model, on PyTorch Lightning.

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spin_lightning.advantages import Advantage as Advantage
    from spin_lightning.advantages import BestOfGroup as BestOfGroup
    from spin_lightning.advantages import Gae as Gae
    from spin_lightning.advantages import GroupNormalized as GroupNormalized
    from spin_lightning.advantages import LeaveOneOut as LeaveOneOut
    from spin_lightning.data.module import RowDataModule as RowDataModule
    from spin_lightning.data.preferences import PreferenceDataModule as PreferenceDataModule
    from spin_lightning.generation import ContinuousGenerator as ContinuousGenerator
    from spin_lightning.generation import OpenAIGenerator as OpenAIGenerator
    from spin_lightning.generation import ResponseGenerator as ResponseGenerator
    from spin_lightning.generation import TransformersGenerator as TransformersGenerator
    from spin_lightning.generation import VLLMGenerator as VLLMGenerator
    from spin_lightning.generation.synthetic_data import SyntheticDataModule as SyntheticDataModule
    from spin_lightning.losses import AlphaSpinLoss as AlphaSpinLoss
    from spin_lightning.losses import DpopLoss as DpopLoss
    from spin_lightning.losses import IpoLoss as IpoLoss
    from spin_lightning.losses import LengthNormalizedLoss as LengthNormalizedLoss
    from spin_lightning.losses import PairLoss as PairLoss
    from spin_lightning.losses import SelfPlayLoss as SelfPlayLoss
    from spin_lightning.losses import SpaceLoss as SpaceLoss
    from spin_lightning.losses import SpinLoss as SpinLoss
    from spin_lightning.losses import TokenLoss as TokenLoss
    from spin_lightning.losses import TokenSpinLoss as TokenSpinLoss
    from spin_lightning.losses import TSpinLoss as TSpinLoss
    from spin_lightning.models.adapters import LoraAdapter as LoraAdapter
    from spin_lightning.reports.callback import WriteReport as WriteReport
    from spin_lightning.rewards import Answer as Answer
    from spin_lightning.rewards import FunctionReward as FunctionReward
    from spin_lightning.rewards import JudgeReward as JudgeReward
    from spin_lightning.rewards import ModelReward as ModelReward
    from spin_lightning.rewards import NumberMatch as NumberMatch
    from spin_lightning.rewards import Reward as Reward
    from spin_lightning.rewards import SumOfRewards as SumOfRewards
    from spin_lightning.rewards import TextMatch as TextMatch
    from spin_lightning.runs.checkpoints import AtomicCheckpointIO as AtomicCheckpointIO
    from spin_lightning.runs.checkpoints import last_checkpoint as last_checkpoint
    from spin_lightning.runs.run_checkpoint import RunCheckpoint as RunCheckpoint
    from spin_lightning.runs.sharding import ShardedStrategy as ShardedStrategy
    from spin_lightning.runs.trackers import TrackioLogger as TrackioLogger
    from spin_lightning.stages.best_as_real import BestAsReal as BestAsReal
    from spin_lightning.stages.clock import SelfPlay as SelfPlay
    from spin_lightning.stages.dpo import DpoLightningModule as DpoLightningModule
    from spin_lightning.stages.dpo import RecordedPairs as RecordedPairs
    from spin_lightning.stages.evaluate_tasks import EvaluateTasks as EvaluateTasks
    from spin_lightning.stages.export import ExportPolicy as ExportPolicy
    from spin_lightning.stages.health import Health as Health
    from spin_lightning.stages.opponent import Opponent as Opponent
    from spin_lightning.stages.opponent import ResidentOpponent as ResidentOpponent
    from spin_lightning.stages.opponent import StoredOpponent as StoredOpponent
    from spin_lightning.stages.ppo import PpoLightningModule as PpoLightningModule
    from spin_lightning.stages.progress import ShowProgress as ShowProgress
    from spin_lightning.stages.reward import ExportRewardModel as ExportRewardModel
    from spin_lightning.stages.reward import RewardLightningModule as RewardLightningModule
    from spin_lightning.stages.rollouts import Rollouts as Rollouts
    from spin_lightning.stages.samples import ShowAnswers as ShowAnswers
    from spin_lightning.stages.sft import SftLightningModule as SftLightningModule
    from spin_lightning.stages.spin import SpinLightningModule as SpinLightningModule
    from spin_lightning.types import Interrupted as Interrupted
    from spin_lightning.types import NonFiniteError as NonFiniteError
    from spin_lightning.types import RewardUnavailable as RewardUnavailable
    from spin_lightning.types import StorageError as StorageError
    from spin_lightning.types import UserError as UserError

__version__ = "0.1.0"

#: Every public name, by the module it is in. The imports above tell editors and type checkers the same; a test compares
#: them.
_HOMES = {
    "advantages": ("Advantage", "BestOfGroup", "Gae", "GroupNormalized", "LeaveOneOut"),
    "data.module": ("RowDataModule",),
    "data.preferences": ("PreferenceDataModule",),
    "generation": (
        "ContinuousGenerator",
        "OpenAIGenerator",
        "ResponseGenerator",
        "TransformersGenerator",
        "VLLMGenerator",
    ),
    "generation.synthetic_data": ("SyntheticDataModule",),
    "losses": (
        "AlphaSpinLoss",
        "DpopLoss",
        "IpoLoss",
        "LengthNormalizedLoss",
        "PairLoss",
        "SelfPlayLoss",
        "SpaceLoss",
        "SpinLoss",
        "TSpinLoss",
        "TokenLoss",
        "TokenSpinLoss",
    ),
    "models.adapters": ("LoraAdapter",),
    "reports.callback": ("WriteReport",),
    "rewards": (
        "Answer",
        "FunctionReward",
        "JudgeReward",
        "ModelReward",
        "NumberMatch",
        "Reward",
        "SumOfRewards",
        "TextMatch",
    ),
    "runs.checkpoints": ("AtomicCheckpointIO", "last_checkpoint"),
    "runs.run_checkpoint": ("RunCheckpoint",),
    "runs.sharding": ("ShardedStrategy",),
    "runs.trackers": ("TrackioLogger",),
    "stages.best_as_real": ("BestAsReal",),
    "stages.clock": ("SelfPlay",),
    "stages.dpo": ("DpoLightningModule", "RecordedPairs"),
    "stages.evaluate_tasks": ("EvaluateTasks",),
    "stages.export": ("ExportPolicy",),
    "stages.health": ("Health",),
    "stages.opponent": ("Opponent", "ResidentOpponent", "StoredOpponent"),
    "stages.ppo": ("PpoLightningModule",),
    "stages.progress": ("ShowProgress",),
    "stages.rollouts": ("Rollouts",),
    "stages.reward": ("ExportRewardModel", "RewardLightningModule"),
    "stages.samples": ("ShowAnswers",),
    "stages.sft": ("SftLightningModule",),
    "stages.spin": ("SpinLightningModule",),
    "types": ("Interrupted", "NonFiniteError", "RewardUnavailable", "StorageError", "UserError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(["__version__", *_HOME_OF])


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'spin_lightning' has no attribute {name!r}")
    return getattr(import_module(f"spin_lightning.{_HOME_OF[name]}"), name)
