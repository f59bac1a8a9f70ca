"""A model whose weights are sharded over processes, and a whole one beside it for all that is not training.

Every forward and backward pass of a sharded model waits for the other processes, so it makes as many in each, and only
in training. Generation, scoring, the held-out NLL, hashes and exports see the whole model, which is an ordinary one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from spin_lightning.models import forward_paths, rope
from spin_lightning.models.head import decoder_of
from spin_lightning.types import ResponseBatch, UserError


class WholeModel:
    """A plain copy of a model that is about to be sharded. It has weights between ``gather`` and ``release``.

    Args:
        model: Its code, its buffers and its config are copied, its weights are not.
    """

    def __init__(self, model: nn.Module) -> None:
        empty = {id(w): nn.Parameter(w.new_empty(0), requires_grad=w.requires_grad) for w in model.parameters()}
        self.model: Any = copy.deepcopy(model, {**empty})
        self.is_there = False

    @torch.no_grad()
    def gather(self, sharded: nn.Module) -> Any:
        """The model with the weights as they are now, whole in each process. Together."""
        for own, weight in zip(self.model.parameters(), sharded.parameters(), strict=True):
            own.data = weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach().clone()
        self.is_there = True
        return self.model

    def release(self) -> None:
        """Give the memory of the weights back."""
        if self.is_there:
            for own in self.model.parameters():
                own.data = own.new_empty(0)
            self.is_there = False


def shard(model: Any, num_processes: int) -> None:
    """Shard a model, layer by layer, so that its log-probs can be computed in training. Together.

    Raises:
        UserError: Its forward path is not one that makes equally many passes in each process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    forward_paths.forward_path_of(model)  # which no sharded model can be tried on
    if rope.boundary_of(model) is not None:
        raise UserError(
            f"{type(model).__name__} changes its rotary positions with the length of a pass, so processes would make "
            "different numbers of passes, which sharded weights do not allow. Set trainer.strategy: ddp."
        )
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (num_processes,))
    lists = [module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)]
    for layer in max(lists, key=len, default=()):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # the weights outside of the layers are gathered by a forward pass of the whole model only, or of what is named one
    model.sharded_pass = MethodType(_pass, model)
    register_fsdp_forward_method(model, "sharded_pass")


def _pass(model: nn.Module, function: Callable[[nn.Module, ResponseBatch], Any], batch: ResponseBatch) -> Any:
    found = function(model, batch)  # no view, which a hook behind it would not survive
    return tuple(part.clone() for part in found) if isinstance(found, tuple) else found.clone()
