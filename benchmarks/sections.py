"""What is measured: each section names its contenders, gives all of them the same work, and returns what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.flops import least_flops
from benchmarks.models import Shape, random_llama, smollm2
from benchmarks.rounds import BENCH, Contender, play
from benchmarks.workload import SYSTEM, Lengths, describe, make_exchanges, read_pairs, write_workload

#: Pairs in an update, everywhere: TRL's default.
BATCH = 8
MAX_NEW_TOKENS = 384
#: Rounds before those that count: a process asks the system for memory in its first two steps, and hardly any more.
WARM_UP = 2

#: The settings that made TRL fastest on a CPU; section ``trl_settings`` measures the others.
TRL_BEST: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": False,
    "precompute_ref_log_probs": True,
}


@dataclass(frozen=True)
class Plan:
    """How much to measure. ``is_quick`` shrinks everything, to see that it works."""

    threads: int = 1
    rounds: int = 2
    is_quick: bool = False

    def play(self, contenders: Sequence[Contender], rounds: int | None = None, **more: Any) -> list[dict[str, Any]]:
        wanted = 1 if self.is_quick else rounds or self.rounds
        return play(contenders, wanted, **{"threads": self.threads, "warm_up": WARM_UP, **more})


def step(plan: Plan) -> dict[str, Any]:
    """A training step against TRL's, and the share of the machine's peak that ours uses."""
    many = 2 * plan.rounds
    model, folder, lengths = _step_workload("step", plan, many)
    # in groups, because 24 GiB do not hold all of them at once; all have the same work, the slow ones the first of it
    records = plan.play(
        [
            _trl("TRL, its best settings", model, folder, **_best_at(1)),
            _ours("spin_lightning, bf16-true", model, folder, "bf16-true"),
            _ours("spin_lightning, bf16-mixed", model, folder, "bf16-mixed"),
        ],
        many,
    )
    records += plan.play(
        [
            _trl("TRL, its defaults", model, folder, per_device_train_batch_size=BATCH),
            _ours("spin_lightning, bf16-true, again", model, folder, "bf16-true"),
            _products(),
        ]
    )
    # eight at a time, its default, take 20 GiB without checkpointing: nothing fits beside them
    records += plan.play(
        [
            _trl("TRL, best settings but 4 pairs at a time", model, folder, **_best_at(4)),
            _ours("spin_lightning, bf16-true, a third time", model, folder, "bf16-true"),
        ]
    )
    return {"contenders": records, "workload": describe(folder), "least_flops": lengths}


def without_amx(plan: Plan) -> dict[str, Any]:
    """A training step with the processor's AMX units turned off, as on processors that have none."""
    model, folder, lengths = _step_workload("without_amx", plan, plan.rounds)
    contenders = [
        _trl("TRL, its best settings", model, folder, **_best_at(1)),
        _ours("spin_lightning, bf16-true", model, folder, "bf16-true"),
        _products(),
    ]
    records = plan.play(contenders, variables={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"})
    return {"contenders": records, "workload": describe(folder), "least_flops": lengths}


def long_run(plan: Plan) -> dict[str, Any]:
    """Whether memory grows: as many steps as it takes to see, from the first one on."""
    steps = 1 if plan.is_quick else 24
    model, folder, lengths = _step_workload("long_run", plan, steps, warm_up=0)
    contenders = [
        _trl("TRL, its best settings", model, folder, **_best_at(1)),
        _ours("spin_lightning, bf16-true", model, folder, "bf16-true"),
    ]
    records = plan.play(contenders, steps, warm_up=0)
    return {"contenders": records, "workload": describe(folder), "least_flops": lengths}


def authors(plan: Plan) -> dict[str, Any]:
    """A training step against that of the authors' released code, re-created."""
    model, folder, lengths = _step_workload("authors", plan, plan.rounds)
    base = {"model": model, "workload": str(folder)}
    # in two groups, for memory's sake
    records = plan.play(
        [
            Contender("the authors' way", "authors_way", {**base, "gradient_checkpointing": True, "per_device": BATCH}),
            _ours("spin_lightning, bf16-true", model, folder, "bf16-true"),
        ]
    )
    records += plan.play(
        [
            Contender(
                "the authors' way, at its best",
                "authors_way",
                {**base, "gradient_checkpointing": False, "per_device": 1},
            ),
            _ours("spin_lightning, bf16-mixed", model, folder, "bf16-mixed"),
        ]
    )
    return {"contenders": records, "workload": describe(folder), "least_flops": lengths}


def trl_settings(plan: Plan) -> dict[str, Any]:
    """TRL's best settings on this machine, and those that do not work. Two contenders at a time, to save memory."""
    model, folder, lengths = _step_workload("trl_settings", plan, 1)
    best = _best_at(1)
    tried: dict[str, dict[str, Any]] = {
        "best: 1 pair at a time, no checkpointing, reference precomputed": best,
        "2 pairs at a time": _best_at(2),
        "with gradient checkpointing": {**best, "gradient_checkpointing": True},
        "reference model resident": {**best, "precompute_ref_log_probs": False},
        "padding_free": {**best, "padding_free": True},
        "weights in bfloat16 (small updates are lost)": {**best, "model_init_kwargs": {"dtype": "bfloat16"}},
        "torch_compile": {**best, "torch_compile": True},
        "8 pairs at a time": _best_at(8),
    }
    records: list[dict[str, Any]] = []
    names = list(tried)
    for start in range(0, len(names), 2):
        chosen = [_trl(name, model, folder, **tried[name]) for name in names[start : start + 2]]
        records += plan.play(chosen, rounds=1, warm_up=1)
    return {"contenders": records, "workload": describe(folder), "least_flops": lengths}


def generation(plan: Plan) -> dict[str, Any]:
    """Sampled tokens a CPU second, of a chat model answering at its natural length."""
    model, encoder = _smollm2()
    prompts = _prompts("generation", 8 if plan.is_quick else 64, encoder)
    base = {"model": model, "prompts": str(prompts), "max_new_tokens": 24 if plan.is_quick else MAX_NEW_TOKENS}

    def ours(generator: str, batch_size: int) -> dict[str, Any]:
        return {**base, "way": "ours", "generator": generator, "batch_size": batch_size}

    def plain(batch_size: int, is_sorted: bool) -> dict[str, Any]:
        return {**base, "way": "plain", "batch_size": batch_size, "is_sorted": is_sorted}

    def take_turns(contenders: list[Contender], rounds: int, warm_up: int) -> list[dict[str, Any]]:
        return plan.play(
            contenders,
            rounds,
            warm_up=warm_up,
            describe=lambda sample: sample["tokens"] / sample["seconds"],
            unit="tokens/s",
        )

    records = take_turns(
        [
            Contender("transformers generate, 16 as they come", "generation", plain(16, False)),
            Contender("transformers generate, 64 sorted", "generation", plain(64, True)),
        ],
        rounds=1,
        warm_up=0,  # a round takes minutes, in which the first calls are nothing
    )
    fast = [
        Contender("ContinuousGenerator, 32 slots", "generation", ours("ContinuousGenerator", 32)),
        Contender("ContinuousGenerator, 64 slots", "generation", ours("ContinuousGenerator", 64)),
    ]
    if (BENCH / "vllm" / "bin" / "python").exists():
        vllm = {**base, "batch_size": 64}
        fast.append(Contender("vLLM for CPU, 64", "vllm_generation", vllm, "vllm"))
        # what the game asks of a generator: the same answer for the same seed, whatever is asked beside it
        seeded = {**vllm, "is_seeded": True}
        fast.append(Contender("vLLM for CPU, 64, a seed for each prompt", "vllm_generation", seeded, "vllm"))
    records += take_turns(fast, rounds=min(plan.rounds, 2), warm_up=1)
    return {"contenders": records, "prompts": len(json.loads(prompts.read_text())["prompts"])}


def iteration(plan: Plan) -> dict[str, Any]:
    """A whole iteration: the same prompts, the same number of updates."""
    model, encoder = _smollm2()
    count = BATCH if plan.is_quick else 8 * BATCH
    prompts = _prompts("iteration", count, encoder)
    base = {"model": model, "max_new_tokens": 24 if plan.is_quick else MAX_NEW_TOKENS, "generation_batch": 64}
    public = {**base, "prompts": str(prompts), "trl": _best_at(1)}
    own = {**base, "rows": str(prompts.parent / "rows.jsonl"), "batch_size": BATCH}
    own |= {"generator": "ContinuousGenerator", "precision": "bf16-true"}
    contenders = [
        Contender(
            "generate + TRL, best settings", "trl_iteration", {**public, "runs": str(BENCH / "runs" / "public")}, "trl"
        ),
        Contender("spin_lightning", "spin_iteration", {**own, "runs": str(BENCH / "runs" / "own")}),
    ]
    return {"contenders": plan.play(contenders, rounds=1, warm_up=0), "prompts": count}


def prompt_length(plan: Plan) -> dict[str, Any]:
    """How a step's cost grows with the prompts: two pairs a step, answers of 128 tokens."""
    model, encoder = _smollm2()
    lengths = (64, 256) if plan.is_quick else (64, 256, 1024, 2048)
    laws = [Lengths(length, 128, spread=0, longest=4096) for length in (lengths[-2], *lengths)]  # the first to warm up
    folder = _write("prompt_length", encoder, [law for law in laws for _ in range(2)], batch_size=2)
    contenders = [
        _trl("TRL, its best settings", model, folder, gradient_accumulation_steps=2, **TRL_BEST),
        _ours("spin_lightning, bf16-true", model, folder, "bf16-true"),
    ]
    return {"contenders": play(contenders, len(lengths), threads=plan.threads), "points": lengths}


def answers_per_prompt(plan: Plan) -> dict[str, Any]:
    """How a step's cost falls when its 16 pairs share prompts: prompts of 256 tokens, answers of 64."""
    model, encoder = _smollm2()
    points = (1, 4) if plan.is_quick else (1, 2, 4, 8, 16)
    records = []
    for answers in points:
        law = Lengths(256, 64, spread=0)
        folder = _write(f"answers_{answers}", encoder, [law] * (16 // answers), 16, answers)
        settings = {"epochs": 3, "data": {"answers_per_prompt": answers, "keep_prompts_together": True}}
        records += plan.play(
            [_ours(f"spin_lightning, K = {answers}", model, folder, "bf16-true", **settings)], rounds=1
        )
    return {"contenders": records, "points": points}


def vocabulary(plan: Plan) -> dict[str, Any]:
    """How a step's cost grows with the vocabulary, on small random models."""
    points = (32_000, 64_000) if plan.is_quick else (32_000, 64_000, 128_000, 256_000)
    shapes = [Shape(hidden=256, layers=8, heads=4, kv_heads=2, intermediate=768, vocabulary=size) for size in points]
    return {"contenders": _random_models("vocabulary", plan, points, shapes), "points": points}


def model_size(plan: Plan) -> dict[str, Any]:
    """How a step's cost grows with the model, on random weights."""
    shapes = [
        Shape(hidden=384, layers=8, heads=6, kv_heads=2, intermediate=1024),
        Shape(),
        Shape(hidden=960, layers=32, heads=15, kv_heads=5, intermediate=2560),
    ]
    shapes = shapes[:1] if plan.is_quick else shapes
    points = [shape.weights for shape in shapes]
    return {"contenders": _random_models("model_size", plan, points, shapes), "points": points}


#: Everything that ``make bench`` measures, in this order.
SECTIONS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    section.__name__: section
    for section in (
        step,
        without_amx,
        long_run,
        authors,
        generation,
        iteration,
        prompt_length,
        answers_per_prompt,
        vocabulary,
        model_size,
    )
}

#: Measured only when named.
EXTRA: dict[str, Callable[[Plan], dict[str, Any]]] = {"trl_settings": trl_settings}


# --- contenders and workloads -----------------------------------------------------------------------------------------


def _trl(name: str, model: str, folder: Path, **trl: Any) -> Contender:
    return Contender(
        name, "trl_step", {"model": model, "workload": str(folder), "runs": _runs(name), "trl": trl}, "trl"
    )


def _ours(name: str, model: str, folder: Path, precision: str, **more: Any) -> Contender:
    settings = {"model": model, "workload": str(folder), "runs": _runs(name), "precision": precision, **more}
    return Contender(name, "spin_step", settings)


def _best_at(pairs: int) -> dict[str, Any]:
    """TRL's best settings with so many pairs at a time, ``BATCH`` in an update."""
    return {**TRL_BEST, "per_device_train_batch_size": pairs, "gradient_accumulation_steps": BATCH // pairs}


def _products() -> Contender:
    return Contender("matrix products alone", "flops", {"shape": asdict(Shape())})


def _runs(name: str) -> str:
    return str(BENCH / "runs" / name.replace(" ", "_"))


def _smollm2() -> tuple[str, Any]:
    folder = str(smollm2(BENCH / "models" / "smollm2"))
    return folder, _encoder(folder)


def _encoder(folder: str) -> Any:
    from spin_lightning.data.encoding import Encoder
    from spin_lightning.models.loading import load_tokenizer

    return Encoder(load_tokenizer(folder))


def _write(name: str, encoder: Any, laws: Sequence[Lengths], batch_size: int, answers: int = 1) -> Path:
    exchanges = make_exchanges(
        laws,
        lambda text: len(encoder.tokenizer.encode(text, add_special_tokens=False)),
        _template_tokens(encoder),
        answers,
    )
    return write_workload(name, BENCH / "workloads", exchanges, encoder, batch_size)


def _template_tokens(encoder: Any) -> int:
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ""}]
    return len(encoder.prompt_ids(turns))


def _step_workload(name: str, plan: Plan, rounds: int, warm_up: int = WARM_UP) -> tuple[str, Path, list[float]]:
    """Batches to warm up with, then one a round; with the least work of each round."""
    model, encoder = _smollm2()
    rounds = 1 if plan.is_quick else rounds
    usual = Lengths(64, 32, longest=128) if plan.is_quick else Lengths()
    folder = _write(name, encoder, [usual] * BATCH * (warm_up + rounds), BATCH)
    pairs = read_pairs(str(folder))
    starts = range(warm_up * BATCH, len(pairs), BATCH)
    return model, folder, [least_flops(pairs[start : start + BATCH], Shape()) for start in starts]


def _prompts(name: str, count: int, encoder: Any) -> Path:
    """Prompts and real answers as token ids, with the same rows beside them as a user has them."""
    folder = _write(name, encoder, [Lengths()] * count, BATCH)
    pairs = read_pairs(str(folder))
    path = folder / "prompts.json"
    asked = {"prompts": [pair["prompt_ids"] for pair in pairs], "real": [pair["chosen_ids"] for pair in pairs]}
    path.write_text(json.dumps({**asked, "terminator_id": encoder.terminator_id, "pad_id": encoder.pad_id}))
    return path


def _random_models(name: str, plan: Plan, points: Sequence[int], shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    records = []
    for point, shape in zip(points, shapes, strict=True):
        model = str(random_llama(BENCH / "models" / f"{name}_{point}", shape))
        folder = _write(f"{name}_{point}", _encoder(model), [Lengths(128, 100, spread=0)] * 8, batch_size=2)
        contenders = [
            _trl(f"TRL, its best settings, {point:,}", model, folder, gradient_accumulation_steps=2, **TRL_BEST),
            _ours(f"spin_lightning, bf16-true, {point:,}", model, folder, "bf16-true"),
        ]
        records += plan.play(contenders)
    return records
