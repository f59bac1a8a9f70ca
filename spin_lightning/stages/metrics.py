"""What is measured on pairs and on held-out responses, under the names people know from preference training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from spin_lightning.runs import processes
from spin_lightning.types import PairLogProbs, PairLossOutput, ResponseBatch, TokenLogProbs, TokenLossOutput

#: TRL's names for the same numbers, for dashboards that expect them.
ALIASES = {
    "rewards/real": "rewards/chosen",
    "rewards/generated": "rewards/rejected",
    "logps/real": "logps/chosen",
    "logps/generated": "logps/rejected",
}


def wins(real_rewards: Tensor, generated_rewards: Tensor) -> Tensor:
    """1 for a pair whose real response has the higher reward, one half for a tie, else 0; shape ``(B,)``."""
    return (real_rewards > generated_rewards).float() + 0.5 * (real_rewards == generated_rewards).float()


class RewardAccuracy(Metric):
    """Share of pairs whose real response has the higher reward; a tie counts one half.

    Example:
        >>> accuracy = RewardAccuracy()
        >>> accuracy.update(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0]))
        >>> accuracy.compute()
        tensor(0.5000)
    """

    full_state_update = False
    wins: Tensor
    pairs: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("wins", torch.tensor(0.0), dist_reduce_fx="sum", persistent=True)
        self.add_state("pairs", torch.tensor(0.0), dist_reduce_fx="sum", persistent=True)

    def update(self, real_rewards: Tensor, generated_rewards: Tensor, won: Tensor | None = None) -> None:
        """Add the rewards of a batch, each of shape ``(B,)``; ``won``, where it does not follow from them."""
        self.wins += (wins(real_rewards, generated_rewards) if won is None else won).sum()
        self.pairs += real_rewards.numel()

    def compute(self) -> Tensor:
        """The metric over all that was added."""
        return self.wins / self.pairs


class PairMetrics(nn.Module):
    """Rewards, margins, accuracy and log-probs of the pairs of an update, and of those of an epoch.

    Of a loss of tokens the same of its tokens, each against the mean of what the opponent may say in its place.

    Each process knows those of all pairs, so that a checkpoint of any holds them and any number of processes continues.
    """

    def __init__(self) -> None:
        super().__init__()
        names = ("rewards/real", "rewards/generated", "rewards/margins", "logps/real", "logps/generated")
        means = {name: MeanMetric(sync_on_compute=False) for name in names}
        self.means: Any = nn.ModuleDict(means)
        self.accuracy: Any = RewardAccuracy(sync_on_compute=False)
        for metric in means.values():
            metric.persistent(mode=True)  # an epoch's mean survives a resume in the middle of it
        self._update: list[dict[str, Tensor]] = []  # the batches of the update in progress

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow the model to its device, but not to its dtype: sums that come from a checkpoint stay exact."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    @torch.no_grad()
    def forward(
        self,
        parts: Sequence[tuple[PairLossOutput | TokenLossOutput, PairLogProbs | TokenLogProbs]],
        is_first: bool = True,
    ) -> dict[str, Tensor]:
        """Add a batch, given in the parts of this process; return the values over all batches of its update. Together.

        ``is_first`` begins an update.
        """
        columns = [_columns_of(output, policy) for output, policy in parts]
        if processes.world_size() > 1:
            whole = processes.join(torch.cat([torch.empty(5, 0), *(torch.stack(part).cpu() for part in columns)], 1))
            columns = [tuple(whole.to(self.accuracy.wins.device))]
        real, generated, real_log_probs, generated_log_probs, won = (
            torch.cat(column) for column in zip(*columns, strict=True)
        )
        values = {
            "rewards/real": real,
            "rewards/generated": generated,
            "rewards/margins": real - generated,
            "logps/real": real_log_probs,
            "logps/generated": generated_log_probs,
            "rewards/accuracies": won,
        }
        for name, metric in self.means.items():
            metric.update(values[name])
        self.accuracy.update(real, generated, won)
        self._update = [*([] if is_first else self._update), values]
        update = {name: torch.cat([batch[name] for batch in self._update]) for name in values}
        return with_aliases({name: value.float().mean() for name, value in update.items()})

    def compute(self) -> dict[str, Tensor]:
        """The values over everything since the last reset."""
        values = {name: metric.compute() for name, metric in self.means.items()}
        return with_aliases({**values, "rewards/accuracies": self.accuracy.compute()})

    def reset(self) -> None:
        for metric in [*self.means.values(), self.accuracy]:
            metric.reset()


def _columns_of(output: PairLossOutput | TokenLossOutput, policy: PairLogProbs | TokenLogProbs) -> tuple[Tensor, ...]:
    """Rewards and log-probs of both sides of each pair or token, and what the real one won."""
    real, generated = output.real_rewards, output.generated_rewards
    if isinstance(output, TokenLossOutput):
        return real, generated, policy.real.detach(), output.generated_log_probs, output.wins
    assert isinstance(policy, PairLogProbs)
    return real, generated, policy.real.detach(), policy.generated.detach(), wins(real, generated)


def with_aliases(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, also under TRL's names."""
    return {**values, **{ALIASES[name]: value for name, value in values.items() if name in ALIASES}}


def starting_metrics(trainer: Any) -> dict[str, float]:
    """Held-out metrics of the model a run starts from, after the sanity check.

    Empty where there are none to compare with: on a resume, or if the check did not go over all held-out rows.
    """
    data, batches = trainer.datamodule, trainer.num_sanity_val_steps
    if trainer.global_step or batches * data.batch_size < len(data.val_prompts):
        return {}
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    first = getattr(data, "num_held_out_batches", None)
    if first is not None and (batches - first) * data.batch_size < len(data.other_prompts):  # of a part of them
        found = {name: value for name, value in found.items() if not name.startswith("val/other_")}
    return found


def describe_retention(metrics: Mapping[str, Any], start: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a summary says of what was forgotten: ``retention``, or nothing where nothing was measured.

    Args:
        metrics: The metrics as they are now.
        start: Those before training, as ``start.json`` has them.

    Example:
        >>> describe_retention({"val/other_nll": 5.5, "val/nll": 2.0}, {"val/other_nll": 5.0})
        {'retention': {'other_nll': 5.5, 'start': {'other_nll': 5.0}}}
    """
    names = ("other_nll", "other_nll_per_token", "kl_to_start")
    found = {name: float(metrics[f"val/{name}"]) for name in names if f"val/{name}" in metrics}
    began = {name: start[f"val/{name}"] for name in names if start and f"val/{name}" in start}
    return {"retention": {**found, **({"start": began} if began else {})}} if found else {}


def count_tokens(batch: Any) -> int:
    """Tokens that one pass over a batch of responses or pairs computes; 0 of another."""
    parts = [getattr(part, "responses", part) for part in batch] if isinstance(batch, list) else []
    return sum(len(part.input_ids) for part in parts if isinstance(part, ResponseBatch))
