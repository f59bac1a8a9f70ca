"""A generator of your own.

Run it: python examples/own_generator.py [SFT_MODEL ROWS.jsonl]
On the command line the same class is turned on with --data.generator own_generator.OneByOne, where this file is in the
current folder.
"""

import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from lightning import Trainer

from spin_lightning import ResponseGenerator, RunCheckpoint, SelfPlay, SpinLightningModule, SyntheticDataModule
from spin_lightning.demos.language import Language, save_start, write_rows
from spin_lightning.types import Response


class OneByOne(ResponseGenerator):
    """The shortest generator: each prompt by itself, and without a cache. Temperature 1 is the opponent as it is."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        terminator_ids: int | Collection[int],
        pad_id: int,
    ) -> Iterator[tuple[int, Response]]:
        model = self.opponent.model
        ends = {terminator_ids} if isinstance(terminator_ids, int) else set(terminator_ids)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            random = torch.Generator().manual_seed(seed)  # the same response whatever else is answered
            ids: list[int] = []
            log_prob = 0.0
            while len(ids) < self.max_new_tokens and not ends & set(ids[-1:]):
                logits = model(input_ids=torch.tensor([prompt + ids], device=model.device), use_cache=False).logits
                log_probs = logits[0, -1].float().cpu().log_softmax(-1)
                ids.append(int(torch.multinomial(log_probs.exp(), 1, generator=random)))
                log_prob += float(log_probs[ids[-1]])
            yield index, Response(ids, "stop" if ids[-1] in ends else "length", log_prob)


if __name__ == "__main__":  # not where another program takes the class
    folder = Path(tempfile.mkdtemp())
    if len(sys.argv) == 3:
        model, rows = sys.argv[1:]
    else:  # two digits; the response has them sorted, reversed or copied
        language = Language(length=2)
        rows = write_rows(folder / "rows.jsonl", language.rows(language.draw_prompts(40, seed=0), seed=0))
        model = save_start(language, folder / "model", seed=0, hidden_size=32)

    module = SpinLightningModule(model, beta=1.0, learning_rate=1e-3)
    data = SyntheticDataModule(rows, batch_size=8, generator=OneByOne(max_new_tokens=8))
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
        pairs = summary["pairs"]
        print(f"iteration {iteration}: {pairs['pairs']} pairs, answers of {pairs['generated_mean_length']:.1f} tokens")
