"""A loss of your own.

Run it: python examples/own_loss.py [SFT_MODEL ROWS.jsonl]
On the command line the same class is turned on with --model.loss own_loss.SquaredHinge --model.loss.target 2,
where this file is in the current folder.
"""

import json
import sys
import tempfile
from pathlib import Path

from lightning import Trainer

from spin_lightning import (
    PairLoss,
    RunCheckpoint,
    SelfPlay,
    SpinLightningModule,
    SyntheticDataModule,
    TransformersGenerator,
)
from spin_lightning.demos.language import Language, save_start, write_rows
from spin_lightning.types import PairLogProbs, PairLossOutput


class SquaredHinge(PairLoss):
    """``max(0, target - margin)**2``, with SPIN's margin: a pair whose margin has reached the target is done.

    Args:
        target: The margin to reach. A list has one value an iteration.
    """

    def __init__(self, target: float | list[float] = 1.0) -> None:
        super().__init__()
        self.target = target

    def forward(
        self, policy: PairLogProbs, opponent: PairLogProbs, beta: float, initial: PairLogProbs | None = None
    ) -> PairLossOutput:
        real, generated = beta * (policy.real - opponent.real), beta * (policy.generated - opponent.generated)
        losses = (self.now(self.target) - (real - generated)).clamp_min(0) ** 2
        return PairLossOutput(losses, real.detach(), generated.detach())


if __name__ == "__main__":  # not where another program takes the class
    folder = Path(tempfile.mkdtemp())
    if len(sys.argv) == 3:
        model, rows = sys.argv[1:]
    else:  # two digits; the response has them sorted, reversed or copied
        language = Language(length=2)
        rows = write_rows(folder / "rows.jsonl", language.rows(language.draw_prompts(40, seed=0), seed=0))
        model = save_start(language, folder / "model", seed=0, hidden_size=32)

    module = SpinLightningModule(model, loss=SquaredHinge(target=[1.0, 2.0]), beta=0.5, learning_rate=1e-3)
    data = SyntheticDataModule(rows, batch_size=8, generator=TransformersGenerator(max_new_tokens=8))
    game = SelfPlay(str(folder / "game"), iterations=2, epochs=1)
    trainer = Trainer(
        max_epochs=game.total_epochs,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[game, RunCheckpoint()],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=game.last_checkpoint)

    for iteration, summary in enumerate(json.loads((folder / "game" / "game.json").read_text())["iterations"]):
        print(f"iteration {iteration}: first loss {summary['first_loss']:.4f}, last loss {summary['last_loss']:.4f}")
