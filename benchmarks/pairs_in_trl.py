"""Whether TRL trains on what ``spin-lightning pairs`` writes, and on the ids that the game had.

Run it in an environment with TRL and pyarrow:

    python benchmarks/pairs_in_trl.py MODEL RUN/iteration_0/pairs PAIRS.jsonl [MORE.parquet ...]

It makes two updates of ``DPOTrainer`` on each file, and compares the ids that TRL made with those in the game's table.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def main(model: str, store: str, *files: str) -> None:
    """Train on each file, and print how many of its rows have the ids of the game."""
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = {(row["iteration"], row["prompt_id"], row["answer"]): row for row in pq.read_table(store).to_pylist()}
    for file in files:
        kind = "parquet" if file.endswith(".parquet") else "json"
        rows = load_dataset(kind, data_files=file, split="train")
        with tempfile.TemporaryDirectory() as folder:
            trainer: Any = trl.DPOTrainer(
                model=AutoModelForCausalLM.from_pretrained(model),
                processing_class=AutoTokenizer.from_pretrained(model),
                train_dataset=rows,
                args=trl.DPOConfig(
                    folder, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
                ),
            )
            loss = trainer.train().training_loss
        same = {"prompt": 0, "chosen": 0, "rejected": 0}
        for row in trainer.train_dataset:
            pair = own[row["iteration"], row["prompt_id"], row["response_number"]]
            for side, column in (("prompt", "prompt_ids"), ("chosen", "real_ids"), ("rejected", "generated_ids")):
                same[side] += row[f"{side}_ids"][: len(pair[column])] == pair[column]
        shown = ", ".join(f"{side} {count}" for side, count in same.items())
        print(f"TRL {trl.__version__}, {Path(file).name}: loss {loss:.4f}; of {len(rows)} rows the same ids: {shown}")


if __name__ == "__main__":
    main(*sys.argv[1:])
