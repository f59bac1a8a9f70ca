"""What responses are worth: an abstract reward, and one file for each kind."""

from spin_lightning.rewards.base import Answer, Reward, SumOfRewards, check_reward, make_answer, preferred, scored
from spin_lightning.rewards.judge import JudgeReward
from spin_lightning.rewards.model import ModelReward
from spin_lightning.rewards.program import FunctionReward, NumberMatch, TextMatch

__all__ = [
    "Answer",
    "FunctionReward",
    "JudgeReward",
    "ModelReward",
    "NumberMatch",
    "Reward",
    "SumOfRewards",
    "TextMatch",
    "check_reward",
    "make_answer",
    "preferred",
    "scored",
]
