"""The whole game, flat.

Run it: python examples/play_the_game.py [SFT_MODEL ROWS.jsonl]
Without a model and rows of yours it makes both: a language small enough to know exactly, and a short SFT on it.
"""

import json
import sys
import tempfile
from pathlib import Path

from lightning import Trainer

from spin_lightning import (
    ExportPolicy,
    RunCheckpoint,
    SelfPlay,
    SftLightningModule,
    SpinLightningModule,
    SyntheticDataModule,
    TransformersGenerator,
)
from spin_lightning.demos.language import Language, save_start, write_rows

folder = Path(tempfile.mkdtemp())
quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_model_and_rows() -> tuple[str, str]:
    """A prompt is two digits; its response has them sorted, reversed or copied."""
    language = Language(length=2)
    rows = write_rows(folder / "rows.jsonl", language.rows(language.draw_prompts(80, seed=0), seed=0))
    sft = SftLightningModule(save_start(language, folder / "start", seed=0, hidden_size=32), learning_rate=3e-3)
    export = ExportPolicy(str(folder / "sft"))
    trainer = Trainer(max_epochs=4, callbacks=[export], enable_checkpointing=False, **quiet)
    trainer.fit(sft, SyntheticDataModule(rows, batch_size=8))
    return str(folder / "sft" / "policy"), rows


model, rows = sys.argv[1:] if len(sys.argv) == 3 else make_model_and_rows()

# in each iteration the policy learns to tell the real responses from those of the policy of the iteration before
module = SpinLightningModule(model, beta=1.0, learning_rate=1e-3)
data = SyntheticDataModule(rows, batch_size=8, val_fraction=0.1, generator=TransformersGenerator(max_new_tokens=8))
game = SelfPlay(str(folder / "game"), iterations=2, epochs=1)
trainer = Trainer(
    max_epochs=game.total_epochs,
    reload_dataloaders_every_n_epochs=1,
    num_sanity_val_steps=-1,  # the held-out NLL to compare with
    callbacks=[game, RunCheckpoint()],
    **quiet,
)
trainer.fit(module, data, ckpt_path=game.last_checkpoint)

for iteration, summary in enumerate(json.loads((folder / "game" / "game.json").read_text())["iterations"]):
    losses = f"first loss {summary['first_loss']:.4f}, last loss {summary['last_loss']:.4f}"
    print(f"iteration {iteration}: {losses}, held-out NLL {summary['val_nll']:.3f}")
print(f"the last policy is in {folder / 'game' / 'iteration_1' / 'policy'}")
