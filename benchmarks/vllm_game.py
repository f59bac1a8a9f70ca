"""Whether games with vLLM hold what is promised, on the real thing: ``python -m benchmarks.vllm_game``.

A tiny game in float32 is killed while vLLM answers, and continued; SmolLM2 plays one in bfloat16. vLLM's log-probs are
compared with ours, and its tokens per CPU second with those of ``ContinuousGenerator``. It needs ``.bench/vllm``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models import Shape, random_llama, smollm2
from benchmarks.rounds import BENCH
from spin_lightning import ContinuousGenerator, ResponseGenerator, VLLMGenerator
from spin_lightning.demos.skills import write_skills
from spin_lightning.generation.base import Player, opened, seed_of

PYTHON = str(BENCH / "vllm" / "bin" / "python")
ARGS = ["--enforce-eager", "--max-model-len", "512"]
#: The agreement that bfloat16 allows, in nats a token: on average, and at most.
MEAN, MOST = 0.02, 0.1
#: One thread of vLLM's on the core it is given, and a small cache.
ALONE = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    os.environ.update({"OMP_NUM_THREADS": "1", **ALONE})
    torch.set_num_threads(1)
    folder = BENCH / "runs" / "vllm_game"
    shutil.rmtree(folder, ignore_errors=True)
    rows = write_skills(folder, num_train=48, num_held_out=8)[0]
    tiny, small = untied_llama(BENCH / "models"), smollm2(BENCH / "models" / "smollm2")
    checks = [*tiny_game(folder, tiny, rows), *smollm2_game(folder, small, rows), *speed(small, rows)]
    print("\n" + "\n".join(f"{'holds' if holds else 'FAILS'}  {what}" for what, holds in checks))
    sys.exit(not all(holds for _, holds in checks))


def untied_llama(folder: Path) -> Path:
    """A tiny Llama whose head is not its embeddings: one that vLLM reads anew while it runs, on a CPU too."""
    tied = random_llama(folder / "tiny", Shape(64, 2, 2, 1, 128, 320))
    if not (folder / "tiny_untied" / "tokenizer.json").exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tied, tie_word_embeddings=False)
        torch.nn.init.normal_(model.lm_head.weight, std=0.2)
        model.save_pretrained(folder / "tiny_untied")
        AutoTokenizer.from_pretrained(tied).save_pretrained(folder / "tiny_untied")
    return folder / "tiny_untied"


def fit(folder: Path, model: Path, rows: Path, *more: str) -> subprocess.Popen[bytes]:
    """A game with vLLM, as a user would start it."""
    generator = [f"--data.generator.python={PYTHON}", f"--data.generator.args={json.dumps(ARGS)}"]
    command = [
        *(sys.executable, "-m", "spin_lightning", "fit", f"--model.model_name_or_path={model}"),
        *(f"--data.train_data={rows}", "--data.val_fraction=0.1", "--data.generator=VLLMGenerator", *generator),
        *(f"--self_play.output_dir={folder}", "--trainer.accelerator=cpu", "--self_play.iterations=2", *more),
    ]
    return subprocess.Popen(command)


def tiny_game(folder: Path, model: Path, rows: Path) -> list[tuple[str, bool]]:
    """Played to its end, and killed in the middle of generation and continued."""
    settings = [
        *("--trainer.precision=32-true", "--model.learning_rate=1e-3", "--data.generator.max_new_tokens=16"),
        *("--data.batch_size=8", "--self_play.epochs=1", "--self_play.shard_size=4", "--data.generator.batch_size=4"),
    ]
    codes = [fit(folder / "tiny", model, rows, *settings).wait()]
    first = fit(folder / "killed", model, rows, *settings)
    manifest = folder / "killed" / "iteration_0" / "pairs_manifest.json"
    while first.poll() is None and not (manifest.exists() and json.loads(manifest.read_text())["shards"]):
        time.sleep(0.01)
    servers = groups_of(first.pid)
    first.send_signal(signal.SIGKILL)
    killed = first.wait() == -signal.SIGKILL and not json.loads(manifest.read_text())["complete"]
    time.sleep(3)
    left = [group for group in servers if cpu_seconds(group) is not None]
    codes.append(fit(folder / "killed", model, rows, *settings).wait())
    if codes != [0, 0]:
        return [(f"a tiny game in float32 ended with the exit codes {codes}", False)]
    ids = [[generated_ids(folder / name, k) for k in (0, 1)] for name in ("tiny", "killed")]
    found = [gap(folder / "tiny", k) for k in (0, 1)]
    return [
        (f"a tiny game in float32 is played and continued: exit codes {codes}", codes == [0, 0]),
        (f"it was killed while vLLM answered, which left {len(left)} of {len(servers)} servers", killed and not left),
        (f"the same {sum(map(len, ids[0]))} responses, token for token", ids[0] == ids[1] and bool(servers)),
        (
            f"log-probs, also of weights read while it runs: {told(found)}, in float32 at most 0.001",
            all(each["most"] < 1e-3 for each in found),
        ),
    ]


def smollm2_game(folder: Path, model: Path, rows: Path) -> list[tuple[str, bool]]:
    """Two iterations in bfloat16, in which the policy moves."""
    settings = [
        *("--trainer.precision=bf16-true", "--model.learning_rate=1e-5", "--data.generator.max_new_tokens=64"),
        *("--data.batch_size=8", "--self_play.epochs=1"),
    ]
    code = fit(folder / "smollm2", model, rows, *settings).wait()
    if code:
        return [(f"a game of SmolLM2 ended with the exit code {code}", False)]
    found = [gap(folder / "smollm2", k) for k in (0, 1)]
    holds = all(each["mean"] < MEAN and each["most"] < MOST for each in found)
    return [
        (f"a game of SmolLM2 in bfloat16 is played: exit code {code}", code == 0),
        (f"log-probs: {told(found)}, in bfloat16 at most {MEAN} and {MOST}", holds),
    ]


def speed(model_folder: Path, rows: Path) -> list[tuple[str, bool]]:
    """Tokens per CPU second of both generators, in turns, on the same prompts."""
    from spin_lightning.data.encoding import Encoder
    from spin_lightning.data.rows import load_rows
    from spin_lightning.models.loading import load_tokenizer

    encoder = Encoder(load_tokenizer(str(model_folder)))
    asked = [row.prompt for row in load_rows(str(rows)).rows]
    prompts = [encoder.prompt_ids(list(prompt)) for prompt in asked]
    prompts = [prompts[index % len(prompts)] for index in range(64)]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    player = Player(model, model_folder)
    vllm = VLLMGenerator(PYTHON, ARGS, max_new_tokens=64, batch_size=64)
    ours = ContinuousGenerator(max_new_tokens=64, batch_size=64)
    rates: dict[str, list[float]] = {"vLLM": [], "ContinuousGenerator": []}
    with torch.no_grad(), opened(ours, player), opened(vllm, player):
        for turn in range(5):  # the first to warm up
            for name, generator in zip(rates, (vllm, ours), strict=True):
                rate = tokens_a_second(generator, prompts, turn, encoder)
                rates[name] += [rate] if turn else []
    vllm.shut_down()
    said = ", ".join(f"{name} {', '.join(f'{rate:.0f}' for rate in found)}" for name, found in rates.items())
    return [(f"tokens per CPU second, SmolLM2, 64 prompts, at most 64 tokens: {said}", True)]


def tokens_a_second(generator: ResponseGenerator, prompts: Sequence[list[int]], turn: int, encoder: Any) -> float:
    """Tokens for a second of this process and of the servers it started."""
    seeds = [seed_of(0, turn, index, 0) for index in range(len(prompts))]

    def spent() -> float:
        return time.process_time() + sum(cpu_seconds(group) or 0 for group in groups_of(os.getpid()))

    before = spent()
    answers = generator.generate(prompts, seeds, encoder.end_ids, encoder.pad_id)
    tokens = sum(len(response.ids) for _, response in answers)
    return tokens / (spent() - before)


def groups_of(parent: int) -> list[int]:
    """The process groups that children of a process lead."""
    return [pid for pid, stat in processes() if int(stat[1]) == parent and int(stat[2]) == pid]


def cpu_seconds(group: int) -> float | None:
    """What the processes of a group have taken so far; None if there are none."""
    ticks = [int(stat[11]) + int(stat[12]) for _, stat in processes() if int(stat[2]) == group and stat[0] != "Z"]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def processes() -> list[tuple[int, list[str]]]:
    """All processes, with what ``/proc/PID/stat`` says behind their names."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found.append((int(path.parent.name), path.read_text().rpartition(")")[2].split()))
        except OSError:  # over since
            continue
    return found


def generated_ids(folder: Path, iteration: int) -> dict[int, list[int]]:
    from spin_lightning.generation.pair_store import PairStore

    table = PairStore(folder / f"iteration_{iteration}" / "pairs").read(["iteration", "prompt_id", "generated_ids"])
    own = [row for row in table.to_pylist() if row["iteration"] == iteration]
    return {row["prompt_id"]: row["generated_ids"] for row in own}


def gap(folder: Path, iteration: int) -> dict[str, float]:
    manifest = json.loads((folder / f"iteration_{iteration}" / "pairs_manifest.json").read_text())
    found: dict[str, float] = manifest["statistics"]["sampler_gap"]
    return found


def told(found: list[dict[str, float]]) -> str:
    return ", ".join(
        f"iteration {k} {each['mean']:.2g} on average and {each['most']:.2g} at most ({each['signed']:+.1g} signed)"
        for k, each in enumerate(found)
    )


if __name__ == "__main__":
    main()
