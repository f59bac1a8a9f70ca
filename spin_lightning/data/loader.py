"""An order of the rows that is a pure function of seed and epoch, and a loader that continues in its middle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, DistributedSampler

from spin_lightning.types import UserError


class ResumableSampler(DistributedSampler[Any]):
    """An order that is a pure function of (seed, epoch), and can begin in its middle.

    Being a ``DistributedSampler``, it is told the epoch by Lightning, and neither replaced nor wrapped.

    Args:
        prompt_ids: The prompt of every row.
        seed: Of the order.
        keeps_prompts_together: Shuffle prompts instead of rows; the rows of one prompt follow each other.
    """

    start = 0

    def __init__(self, prompt_ids: list[int], seed: int, keeps_prompts_together: bool) -> None:
        super().__init__(cast(Any, prompt_ids), num_replicas=1, rank=0, seed=seed)
        self.groups: dict[int, list[int]] = {}
        for index, prompt_id in enumerate(prompt_ids):
            self.groups.setdefault(prompt_id if keeps_prompts_together else index, []).append(index)

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        groups = list(self.groups.values())
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        return itertools.islice((index for group in order for index in groups[group]), start, None)


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning's checkpoints can resume in the middle of an epoch, without making what was served."""

    served = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert isinstance(self.sampler, ResumableSampler) and self.batch_size
        self.served = self.sampler.start // self.batch_size
        for batch in super().__iter__():
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served % len(self) if len(self) else 0, "batch_size": self.batch_size or 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert isinstance(self.sampler, ResumableSampler) and self.batch_size
        if state["served"] and state["batch_size"] != self.batch_size:
            raise UserError(
                f"the run stopped in the middle of an epoch with data.batch_size {state['batch_size']}, got "
                f"{self.batch_size}: rows would be trained on twice or never. Continue with the batch size the run "
                "began with."
            )
        self.sampler.start = state["served"] * self.batch_size


class InTurn:
    """Loaders one after the other, as one.

    Example:
        >>> list(InTurn([1, 2], [3])), len(InTurn([1, 2], [3]))
        ([1, 2, 3], 3)
    """

    def __init__(self, *loaders: Any) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self.loaders)

    def __len__(self) -> int:
        return sum(map(len, self.loaders))
