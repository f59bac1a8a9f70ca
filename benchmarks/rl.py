"""Reinforcement learning beside TRL, an iteration a round: ``python -m benchmarks.rl [ROUNDS [rloo] [grpo]]``.

Needs the environment that `make bench` installs.

The same model, prompts, responses to each, reward and number of updates; both have bfloat16 weights. Contenders take
turns, an iteration a round. CPU seconds and peak memory go to ``docs/reinforcement.json``, and a table to the screen.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from statistics import median
from typing import Any

from benchmarks.models import smollm2
from benchmarks.report import peak, ratios, spread, table, values
from benchmarks.results import machine
from benchmarks.rounds import BENCH, ROOT, Contender, play
from benchmarks.run import versions
from spin_lightning.demos.sums import make_sums

PROMPTS, ANSWERS, UPDATES, MAX_NEW_TOKENS = 12, 8, 2, 48
WARM_UP = 1
#: What is like for like with ours, and the fastest found: no recomputation, and the largest passes.
TRL = {"gradient_checkpointing": False, "bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}, "max_grad_norm": 1.0}


def contenders(rounds: int) -> list[Contender]:
    """Ours and TRL's, with a critic-free advantage of the same name each."""
    rows = BENCH / "workloads" / "sums.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    asked = make_sums(PROMPTS * (WARM_UP + rounds + 1), 0)[0]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    both: dict[str, Any] = {
        "model": str(smollm2(BENCH / "models" / "smollm2")),
        "rows": str(rows),
        "prompts": PROMPTS,
        "answers_per_prompt": ANSWERS,
        "updates": UPDATES,
        "max_new_tokens": MAX_NEW_TOKENS,
        "iterations": WARM_UP + rounds + 1,
    }
    found = []
    for kind, advantage, beta in (("rloo", "LeaveOneOut", 0.05), ("grpo", "GroupNormalized", 0.0)):
        size = PROMPTS * ANSWERS // UPDATES
        trl = {**TRL, "per_device_train_batch_size": size, "beta": beta}
        runs = {"runs": str(BENCH / "runs" / f"trl_{kind}")}
        found.append(Contender(f"TRL {kind.upper()}", "trl_rl", {**both, **runs, "kind": kind, "trl": trl}, "trl"))
        own = {**both, "runs": str(BENCH / "runs" / kind), "advantage": advantage, "beta": beta}
        found.append(Contender(f"spin_lightning {kind.upper()}", "spin_rl", own))
    return found


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    records, load = [], os.getloadavg()[0]
    wanted = [kind.upper() for kind in sys.argv[2:]] or ["RLOO", "GRPO"]
    rows = []
    for kind in wanted:  # memory does not hold all
        pair = [contender for contender in contenders(rounds) if contender.name.endswith(kind)]
        trl, ours = play(pair, rounds, WARM_UP)
        records += [trl, ours]
        for record in (trl, ours):
            lengths = median(sample["mean_length"] for sample in record["samples"])
            faster = spread(ratios(trl, record), ".1f") if record is ours else "1"
            memory = f"{peak(record) / peak(trl):.2f}"
            seconds = spread(values(record), ".1f")
            rows.append([record["name"], seconds, faster, f"{peak(record):.1f}", memory, f"{lengths:.1f}"])
    head = ["contender", "CPU seconds an iteration", "times as fast", "peak GiB", "of TRL's", "tokens a response"]
    print(table(head, rows))
    facts = {
        "command": " ".join(["python -m benchmarks.rl", *sys.argv[1:]]),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": load,
        "machine": machine(),
        "versions": versions(),
    }
    path = ROOT / "docs" / "reinforcement.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for kind in wanted:  # what was not measured now stays as it was
        results[kind.lower()] = {"contenders": [record for record in records if record["name"].endswith(kind)], **facts}
    path.write_text(json.dumps(results, indent=1).replace(f"{ROOT}/", "") + "\n")


if __name__ == "__main__":
    main()
