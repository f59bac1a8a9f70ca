from torch.nn import functional as F

from spin_lightning import PairLoss, UserError
from spin_lightning.losses import log_ratios
from spin_lightning.types import PairLossOutput


class HuberLoss(PairLoss):
    """The margin is pulled to ``target``, squared near it and linear far away.

    Args:
        delta: Where linear begins. Positive; a list has one value an iteration.
        target: The margin at which a pair teaches nothing more.

    Raises:
        UserError: ``delta`` is not positive.
    """

    def __init__(self, delta: float | list[float] = 1.0, target: float = 1.0) -> None:
        super().__init__()
        if not all(value > 0 for value in (delta if isinstance(delta, list) else [delta])):
            raise UserError(f"model.loss.delta must be positive, got {delta!r}. 1 is a start.")
        self.delta, self.target = delta, target

    def forward(self, policy, opponent, beta, initial=None):
        real, generated = (beta * ratio for ratio in log_ratios(policy, opponent))
        gap = self.target - (real - generated)
        losses = F.huber_loss(gap, gap.new_zeros(()).expand_as(gap), reduction="none", delta=self.now(self.delta))
        return PairLossOutput(losses, real.detach(), generated.detach())
