"""FSDP2 as a strategy: each process keeps a share of every weight, of its gradient and of the optimiser's state.

Everything that outlives the process is whole: a checkpoint is the one that a single process writes, so any number of
processes continues it, sharded or not. How a model is sharded, its module says (``PolicyModule.shard``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor

from spin_lightning.runs import processes


class ShardedStrategy(DDPStrategy):
    """Shards the policy over all processes (``fully_shard`` of torch): ``--trainer.strategy fsdp2``.

    Weights, gradients and optimiser state then take a share of the memory that they take in one process; a copy of the
    weights is whole on each device while pairs are made, held-out rows are measured and policies are exported.

    Example:
        >>> from lightning import Trainer
        >>> type(Trainer(strategy=ShardedStrategy(), accelerator="cpu", devices=2, logger=False).strategy).__name__
        'ShardedStrategy'
    """

    def configure_ddp(self) -> None:
        """In the place of DDP's wrapper."""
        module: Any = self.lightning_module
        module.shard()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {name: _make_whole(value) for name, value in super().lightning_module_state_dict().items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: _cut_like(own.get(name), value) for name, value in checkpoint["state_dict"].items()}
        super().load_model_state_dict({**checkpoint, "state_dict": state}, strict)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return _make_whole(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = [
            _cut_state(state, [weight for group in optimizer.param_groups for weight in group["params"]])
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False)
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2: weights and optimiser sharded over processes")


def _make_whole(value: Any) -> Any:
    """The same with whole tensors, in the first process; it is the one that keeps them. Together."""
    if _is_sharded(value):
        whole = value.full_tensor()
        return whole.cpu() if processes.is_first() else value
    if isinstance(value, dict):
        return {key: _make_whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_make_whole(item) for item in value]
    return value


def _cut_like(own: Any, value: Any) -> Any:
    """This process's share of a whole tensor, as it has one of its own."""
    if not (_is_sharded(own) and isinstance(value, Tensor)) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _cut_state(state: Any, weights: Sequence[Tensor]) -> Any:
    """An optimiser's state, and that of one inside of it, by a weight's number or in the order of the weights."""
    if isinstance(state, list) and len(state) == len(weights) and all(isinstance(item, Tensor) for item in state):
        return [_cut_like(weight, item) for weight, item in zip(weights, state, strict=True)]
    if not isinstance(state, dict):
        return state
    cut = {key: _cut_state(item, weights) for key, item in state.items() if key != "state"}
    if "state" in state:
        cut["state"] = {
            number: {key: _cut_like(weights[number], item) for key, item in values.items()}
            for number, values in state["state"].items()
        }
    return cut


def whole_norm(norm: Tensor) -> Tensor:
    """A norm as a plain number on the device."""
    return norm.full_tensor() if _is_sharded(norm) else norm  # type: ignore[attr-defined]


def _is_sharded(value: Any) -> bool:
    return hasattr(value, "full_tensor")  # a DTensor, which not every build of torch has
