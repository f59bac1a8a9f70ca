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

#: Rounds before those that count: a process asks the system for memory in its first two steps, and hardly any more.
WARM_UP = 2
#: Updates that compiled TRL works before its first round, on other pairs: later ones compile hardly anything.
COMPILING_UPDATES = 2

#: The settings that made TRL fastest on a CPU, with or without ``torch_compile``; ``trl_settings`` measures others.
TRL_BEST: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": False,
    "precompute_ref_log_probs": True,
}
COMPILED: dict[str, Any] = {"torch_compile": True}
WEIGHTS_IN_BFLOAT16: dict[str, Any] = {"model_init_kwargs": {"dtype": "bfloat16"}}


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    ``is_brief`` takes a few minutes a section and keeps what headline ratios need; ``is_quick`` shrinks everything, to
    see that it works.
    """

    threads: int = 1
    rounds: int = 2
    is_quick: bool = False
    is_brief: bool = False

    def size(self, full: Any, brief: Any, quick: Any) -> Any:
        """What belongs to the plan."""
        return quick if self.is_quick else brief if self.is_brief else full

    @property
    def batch_size(self) -> int:
        """Pairs in an update. Eight is TRL's default."""
        return int(self.size(8, 4, 8))

    @property
    def lengths(self) -> Lengths:
        """Of usual prompts and responses."""
        usual: Lengths = self.size(Lengths(), Lengths(longest=256), Lengths(64, 32, longest=128))
        return usual

    @property
    def max_new_tokens(self) -> int:
        """Cap on sampled responses."""
        return int(self.size(384, 128, 24))

    def play(self, contenders: Sequence[Contender], rounds: int | None = None, **more: Any) -> list[dict[str, Any]]:
        """Let contenders take turns, as often as the plan says; one round if it is quick."""
        wanted = 1 if self.is_quick else rounds or self.rounds
        return play(contenders, wanted, **{"threads": self.threads, "warm_up": WARM_UP, **more})


def step(plan: Plan) -> dict[str, Any]:
    """A training step against TRL's, and the share of the machine's peak that each uses."""
    many = plan.size(2 * plan.rounds, plan.rounds, 1)
    work = _step_workload("step", plan, many)
    # in groups, because 24 GiB do not hold all of them at once; all have the same work, the slow ones the first of it
    records = plan.play(
        [
            _trl("TRL compiled", work, **COMPILED),
            _ours("spin_lightning, bf16-mixed", work, "bf16-mixed"),
            _ours("spin_lightning, bf16-true", work, "bf16-true"),
            _products(),
        ],
        many,
    )
    uncompiled = _trl("TRL uncompiled", work)
    if plan.is_brief:
        return _result(records + plan.play([uncompiled], many), work)
    records += plan.play(
        [
            uncompiled,
            _trl("TRL compiled, weights in bfloat16", work, **COMPILED, **WEIGHTS_IN_BFLOAT16),
            _ours("spin_lightning, bf16-true, again", work, "bf16-true"),
        ],
        many,
    )
    records += plan.play(
        [
            _trl("TRL, its defaults", work, is_default=True),
            _ours("spin_lightning, bf16-mixed, again", work, "bf16-mixed"),
        ]
    )
    return _result(records, work)


def without_amx(plan: Plan) -> dict[str, Any]:
    """A training step with the processor's AMX units turned off, as on processors that have none."""
    work = _step_workload("without_amx", plan, plan.rounds)
    contenders = [
        _trl("TRL compiled", work, **COMPILED),
        _ours("spin_lightning, bf16-mixed", work, "bf16-mixed"),
        _ours("spin_lightning, bf16-true", work, "bf16-true"),
        _products(),
    ]
    return _result(plan.play(contenders, variables={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}), work)


def long_run(plan: Plan) -> dict[str, Any]:
    """Whether memory grows: as many steps as it takes to see, from the first one on."""
    steps = plan.size(24, 24, 1)
    work = _step_workload("long_run", plan, steps, warm_up=0, compiling_updates=0)
    contenders = [
        _trl("TRL compiled", work, **COMPILED),
        _ours("spin_lightning, bf16-true", work, "bf16-true"),
        _products(),
    ]
    return _result(plan.play(contenders, steps, warm_up=0), work)


def authors(plan: Plan) -> dict[str, Any]:
    """A training step against that of the authors' released code, re-created."""
    work = _step_workload("authors", plan, plan.rounds)
    base = {"model": work.model, "workload": str(work.folder)}
    way = {**base, "gradient_checkpointing": True, "per_device": plan.batch_size}
    best = {**base, "gradient_checkpointing": False, "per_device": 1}
    # in two groups, for memory's sake
    records = plan.play(
        [
            Contender("the authors' way", "authors_way", way),
            _ours("spin_lightning, bf16-true", work, "bf16-true"),
            _products(),
        ]
    )
    records += plan.play(
        [
            Contender("the authors' way, at its best", "authors_way", best),
            _ours("spin_lightning, bf16-mixed", work, "bf16-mixed"),
        ]
    )
    return _result(records, work)


def trl_settings(plan: Plan) -> dict[str, Any]:
    """TRL's best settings on this machine, and those that do not work. Two contenders at a time, to save memory."""
    work = _step_workload("trl_settings", plan, 1, warm_up=1)
    tried: dict[str, dict[str, Any]] = {
        "best: 1 pair at a time, no checkpointing, reference precomputed": {},
        "torch_compile": COMPILED,
        "2 pairs at a time": {"pairs": 2},
        "with gradient checkpointing": {"gradient_checkpointing": True},
        "reference model resident": {"precompute_ref_log_probs": False},
        "padding_free": {"padding_free": True},
        "weights in bfloat16 (small updates are lost)": WEIGHTS_IN_BFLOAT16,
        "4 pairs at a time": {"pairs": 4},
        "8 pairs at a time": {"pairs": 8},
    }
    records: list[dict[str, Any]] = plan.play([_products()], rounds=1, warm_up=0)
    names = list(tried)
    for start in range(0, len(names), 2):
        chosen = [_trl(name, work, **tried[name]) for name in names[start : start + 2]]
        records += plan.play(chosen, rounds=1, warm_up=1)
    return _result(records, work)


def generation(plan: Plan) -> dict[str, Any]:
    """Sampled tokens a CPU second, of a chat model answering at its natural length."""
    many = plan.size(64, 24, 8)
    base, count = _asked("generation", plan, many)

    def plain(batch_size: int, is_sorted: bool) -> dict[str, Any]:
        return {**base, "way": "plain", "batch_size": batch_size, "is_sorted": is_sorted}

    slow = [Contender(f"transformers generate, {many} sorted", "generation", plain(many, True))]
    fast = [_continuous(base, many)]
    peers = {f"vLLM for CPU, {many}": {"batch_size": many}}
    if not plan.is_brief:
        slow.append(Contender("transformers generate, 16 as they come", "generation", plain(16, False)))
        fast.append(_continuous(base, many // 2))
        # what the game asks of a generator: the same response for the same seed, whatever is asked beside it
        peers[f"vLLM for CPU, {many}, a seed for each prompt"] = {"batch_size": many, "is_seeded": True}
    # a round takes minutes, in which the first calls are nothing
    records = plan.play(slow, rounds=1, warm_up=0)
    records += plan.play([*fast, *_vllm(peers, base), _products()], warm_up=1)
    return {"contenders": records, "prompts": count, "answers_per_prompt": 1}


def several_answers(plan: Plan) -> dict[str, Any]:
    """The same where each prompt gets four responses, as with ``data.answers_per_prompt``."""
    answers = 4
    base, count = _asked("several_answers", plan, 2 if plan.is_quick else 16, answers)
    slots = answers * count
    both: dict[str, dict[str, Any]]
    both = {"prompt repeated": {"batch_size": slots}, "n=4": {"batch_size": slots, "answers_per_prompt": answers}}
    peers = _vllm({f"vLLM for CPU, {slots}, {how}": settings for how, settings in both.items()}, base)
    records = plan.play([_continuous(base, slots), *peers, _products()], warm_up=1)
    return {"contenders": records, "prompts": count, "answers_per_prompt": answers}


def iteration(plan: Plan) -> dict[str, Any]:
    """A whole iteration: the same prompts, the same number of updates."""
    base, count = _asked("iteration", plan, plan.size(64, 12, 8))
    base |= {"generation_batch": count}
    answers = Path(base["prompts"]).with_name("answers.json")
    answers.unlink(missing_ok=True)
    public = {**base, "answers": str(answers), "runs": str(BENCH / "runs" / "public")}
    own = {**base, "rows": str(answers.with_name("rows.jsonl")), "batch_size": plan.batch_size}
    own |= {"generator": "ContinuousGenerator", "runs": str(BENCH / "runs" / "own")}
    best = _best_at(1, plan.batch_size)
    contenders = [
        Contender("generate + TRL compiled", "trl_iteration", {**public, "trl": {**best, **COMPILED}}, "trl"),
        Contender("generate + TRL uncompiled", "trl_iteration", {**public, "trl": best}, "trl"),
        Contender("spin_lightning, bf16-mixed", "spin_iteration", {**own, "precision": "bf16-mixed"}),
        Contender("spin_lightning, bf16-true", "spin_iteration", {**own, "precision": "bf16-true"}),
        _products(),
    ]
    if plan.is_brief:
        del contenders[1]
    # one after the other: each has one round, and memory does not hold all
    records = [plan.play([contender], rounds=1, warm_up=0)[0] for contender in contenders]
    return {"contenders": records, "prompts": count, "batch_size": plan.batch_size}


def prompt_length(plan: Plan) -> dict[str, Any]:
    """How a step's cost grows with the prompts: two pairs a step, responses of 128 tokens."""
    model, encoder = _smollm2()
    lengths = plan.size((64, 256, 1024, 2048), (64, 256), (64, 256))
    steps = (lengths[-2], *lengths)  # the first to warm up
    pairs = [Lengths(length, 128, spread=0, longest=4096) for length in steps for _ in range(2)]
    folder = _write("prompt_length", encoder, pairs, batch_size=2)
    before = _write("before_prompt_length", encoder, pairs, batch_size=2, seed=1)
    work = Work(model, folder, before, len(steps), 2)
    return {"contenders": _grow(plan, work, len(lengths), warm_up=1), "points": lengths}


def answers_per_prompt(plan: Plan) -> dict[str, Any]:
    """How a step's cost falls when its 16 pairs share prompts: prompts of 256 tokens, responses of 64."""
    model, encoder = _smollm2()
    points = plan.size((1, 2, 4, 8, 16), (1, 4), (1, 4))
    records = plan.play([_products()], rounds=1)
    for answers in points:
        pair = Lengths(256, 64, spread=0)
        folder = _write(f"answers_{answers}", encoder, [pair] * (16 // answers), 16, answers)
        settings = {"epochs": 3, "data": {"answers_per_prompt": answers, "keep_prompts_together": True}}
        ours = _ours(f"spin_lightning, bf16-true, {answers}", Work(model, folder), "bf16-true", **settings)
        records += plan.play([ours], rounds=1)
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


Section = Callable[[Plan], dict[str, Any]]

#: Everything that ``make bench`` measures, in this order.
SECTIONS: dict[str, Section] = {
    section.__name__: section
    for section in (
        step,
        generation,
        several_answers,
        iteration,
        authors,
        long_run,
        prompt_length,
        answers_per_prompt,
        vocabulary,
        model_size,
    )
}

#: Measured only when named. ``without_amx`` differs from ``step`` where there is AMX to turn off.
EXTRA: dict[str, Section] = {"without_amx": without_amx, "trl_settings": trl_settings}

#: What ``--brief`` measures.
BRIEF = ("step", "generation", "iteration")


# --- contenders and workloads -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Pairs for training steps.

    Attributes:
        model: Folder of the model that trains.
        folder: Where the pairs of all rounds lie, those of the warm-up included.
        before: Other pairs, on which those who compile train before their first round. None: the rounds show it.
        updates_before: Updates that these make.
        batch_size: Pairs in an update.
        least_flops: Least work of each round that counts.
    """

    model: str
    folder: Path
    before: Path | None = None
    updates_before: int = 0
    batch_size: int = 2
    least_flops: Sequence[float] = ()


def _result(records: list[dict[str, Any]], work: Work) -> dict[str, Any]:
    """What a section of training steps returns."""
    facts = {"workload": describe(work.folder), "least_flops": work.least_flops, "batch_size": work.batch_size}
    return {"contenders": records, **facts}


def _trl(name: str, work: Work, pairs: int = 1, is_default: bool = False, **trl: Any) -> Contender:
    """TRL at its best settings with so many pairs at a time, or at its defaults, and more settings over them."""
    chosen = {"per_device_train_batch_size": work.batch_size} if is_default else _best_at(pairs, work.batch_size)
    settings = {"model": work.model, "workload": str(work.folder), "runs": _runs(name), "trl": {**chosen, **trl}}
    if trl.get("torch_compile") and work.before:
        settings |= {"before": str(work.before), "updates_before": work.updates_before}
    return Contender(name, "trl_step", settings, "trl")


def _ours(name: str, work: Work, precision: str, **more: Any) -> Contender:
    settings = {"model": work.model, "workload": str(work.folder), "runs": _runs(name), "precision": precision, **more}
    return Contender(name, "spin_step", settings)


def _grow(plan: Plan, work: Work, rounds: int, warm_up: int, suffix: str = "") -> list[dict[str, Any]]:
    """Who is compared where something grows. In two groups: 24 GiB do not hold all of them at the largest points."""
    first = [
        _trl(f"TRL compiled{suffix}", work, **COMPILED),
        _ours(f"spin_lightning, bf16-mixed{suffix}", work, "bf16-mixed"),
        _products(),
    ]
    second = [
        _trl(f"TRL uncompiled{suffix}", work),
        _ours(f"spin_lightning, bf16-true{suffix}", work, "bf16-true"),
    ]
    return [
        record for group in (first, second) for record in play(group, rounds, warm_up=warm_up, threads=plan.threads)
    ]


def _best_at(pairs: int, batch_size: int) -> dict[str, Any]:
    """TRL's best settings with so many pairs at a time."""
    return {**TRL_BEST, "per_device_train_batch_size": pairs, "gradient_accumulation_steps": batch_size // pairs}


def _continuous(base: dict[str, Any], slots: int) -> Contender:
    settings = {**base, "way": "ours", "generator": "ContinuousGenerator", "batch_size": slots}
    return Contender(f"ContinuousGenerator, {slots} slots", "generation", settings)


def _vllm(contenders: dict[str, dict[str, Any]], base: dict[str, Any]) -> list[Contender]:
    """These contenders; nobody where vLLM is not installed."""
    if not (BENCH / "vllm" / "bin" / "python").exists():
        print(f"  without {', '.join(contenders)}: not installed (make bench-vllm)", flush=True)
        return []
    return [Contender(name, "vllm_generation", {**base, **more}, "vllm") for name, more in contenders.items()]


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


def _write(
    name: str, encoder: Any, lengths: Sequence[Lengths], batch_size: int, answers: int = 1, seed: int = 0
) -> Path:
    exchanges = make_exchanges(
        lengths,
        lambda text: len(encoder.tokenizer.encode(text, add_special_tokens=False)),
        _template_tokens(encoder),
        answers,
        seed,
    )
    return write_workload(name, BENCH / "workloads", exchanges, encoder, batch_size)


def _template_tokens(encoder: Any) -> int:
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ""}]
    return len(encoder.prompt_ids(turns))


def _step_workload(
    name: str, plan: Plan, rounds: int, warm_up: int = WARM_UP, compiling_updates: int = COMPILING_UPDATES
) -> Work:
    """Batches to warm up with, then one a round; with the least work of each round."""
    model, encoder = _smollm2()
    size, rounds = plan.batch_size, plan.size(rounds, rounds, 1)
    # a brief one compiles while it warms up
    compiling_updates = plan.size(compiling_updates, 0, min(compiling_updates, 1))
    folder = _write(name, encoder, [plan.lengths] * size * (warm_up + rounds), size)
    before = None
    if compiling_updates:
        before = _write(f"before_{name}", encoder, [plan.lengths] * size * compiling_updates, size, seed=1)
    pairs = read_pairs(str(folder))
    starts = range(warm_up * size, len(pairs), size)
    least = [least_flops(pairs[start : start + size], Shape()) for start in starts]
    return Work(model, folder, before, compiling_updates, size, least)


def _asked(name: str, plan: Plan, count: int, answers: int = 1) -> tuple[dict[str, Any], int]:
    """Prompts and real responses as token ids, with the same rows beside them as a user has them.

    Returns:
        What every contender is told, and how many prompts there are. Each stands in the file as often as it is to be
        answered.
    """
    model, encoder = _smollm2()
    folder = _write(name, encoder, [plan.size(Lengths(), plan.lengths, Lengths())] * count, plan.batch_size)
    pairs = [pair for pair in read_pairs(str(folder)) for _ in range(answers)]
    path = folder / "prompts.json"
    asked = {"prompts": [pair["prompt_ids"] for pair in pairs], "real": [pair["chosen_ids"] for pair in pairs]}
    path.write_text(json.dumps({**asked, "terminator_id": encoder.terminator_id, "pad_id": encoder.pad_id}))
    base = {"model": model, "prompts": str(path), "max_new_tokens": plan.max_new_tokens, "shape": asdict(Shape())}
    return base, count


def _random_models(name: str, plan: Plan, points: Sequence[int], shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    records = []
    for point, shape in zip(points, shapes, strict=True):
        model = str(random_llama(BENCH / "models" / f"{name}_{point}", shape))
        encoder = _encoder(model)
        lengths = [Lengths(128, 100, spread=0)] * 2 * (WARM_UP + plan.rounds)
        folder = _write(f"{name}_{point}", encoder, lengths, batch_size=2)
        before = _write(f"before_{name}_{point}", encoder, lengths[: 2 * COMPILING_UPDATES], batch_size=2, seed=1)
        work = Work(model, folder, before, COMPILING_UPDATES)
        records += _grow(plan, work, 1 if plan.is_quick else plan.rounds, WARM_UP, f", {point:,}")
    return records
