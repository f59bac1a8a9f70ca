"""The opponent in a training step: something that knows the log-probs of both responses of a batch.

Who responds to the prompts is ``generation.base.Player``: the same weights, where an iteration begins.

Two forms. ``StoredOpponent`` reads what was computed once at the iteration's start and kept with
the pairs: no second model in memory. ``ResidentOpponent`` holds a frozen copy and computes at every step. A third
form, such as a frozen adapter, has its place here.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spin_lightning.models.log_probs import pair_log_probs
from spin_lightning.types import PairBatch, PairLogProbs, TokenBatch, TokenLogProbs


class Opponent(nn.Module):
    """The frozen player of an iteration. Subclass it to bring another form; turn it on by class path.

    What it holds stays out of checkpoints: its weights are those of the last iteration's exported policy.
    """

    #: Whether its log-probs are the policy's where an iteration begins, so that the gate may compare them.
    starts_as_policy = True
    #: Whether it needs its weights again where an iteration continues in its middle, those of the run's start too.
    holds_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_drop_weights)
        self.register_load_state_dict_post_hook(_forgive_weights)

    def become(self, policy: nn.Module) -> None:
        """Take over the policy's weights as they are now, at the start of an iteration."""

    def restore(self, load: Callable[[], nn.Module]) -> None:
        """Become the same opponent again where an iteration continues. ``load`` gives its model, checked by hash."""
        if self.holds_weights:
            self.become(load())

    @abstractmethod
    def log_probs(self, batch: Any) -> Any:
        """``PairLogProbs`` of both responses of each pair of a ``PairBatch``, in nats, without gradient."""


class StoredOpponent(Opponent):
    """The default: log-probs that were computed once, by the opponent, and stored with the pairs or tokens."""

    def log_probs(self, batch: PairBatch | TokenBatch) -> PairLogProbs | TokenLogProbs:
        return batch.opponent


class ResidentOpponent(Opponent):
    """A frozen copy in memory, asked at every step. Memory for one more model; the same losses."""

    holds_weights = True

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module | None = None

    @torch.no_grad()
    def become(self, policy: nn.Module) -> None:
        if self.model is None:
            self.model = copy.deepcopy(policy)
        else:
            self.model.load_state_dict(policy.state_dict())
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def log_probs(self, batch: PairBatch) -> PairLogProbs:
        assert self.model is not None, "become() comes first"
        return pair_log_probs(self.model, batch)


#: The words that stand for these two in a config.
OPPONENTS: dict[str, type[Opponent]] = {"stored": StoredOpponent, "resident": ResidentOpponent}


def _drop_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]


def _forgive_weights(module: nn.Module, incompatible: Any) -> None:
    tensors = (kind(remove_duplicate=False) for kind in (module.named_parameters, module.named_buffers))
    own = tuple(key for named in tensors for key, _ in named)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(own or (".",))]
