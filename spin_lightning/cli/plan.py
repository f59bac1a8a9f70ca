"""``spin-lightning plan``: what a run will read, take and leave behind, before anything is trained.

From the settings of a run and the model's config; weights are read for ``--probe`` only. The equations of its memory
are in ``models.footprint``.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from statistics import fmean
from typing import Any

from spin_lightning.cli.check import find_stage, read_data
from spin_lightning.cli.commands import STAGES
from spin_lightning.cli.plan_table import render
from spin_lightning.data.module import RowDataModule
from spin_lightning.data.report import spread
from spin_lightning.generation.transformers import TransformersGenerator
from spin_lightning.losses import TokenLoss
from spin_lightning.models.batches import pack_rows
from spin_lightning.models.counting import count_adapter, make_on_meta, measure_size
from spin_lightning.models.footprint import (
    CONTEXT,
    NUMERICS,
    Load,
    ModelSize,
    Setup,
    generation_memory,
    peak,
    training_memory,
)
from spin_lightning.models.loading import load_config, refuse_without_causal_head
from spin_lightning.runs.files import read_json, run_folder
from spin_lightning.runs.run_checkpoint import KEPT
from spin_lightning.stages.law_table import bytes_of_law
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: Rows that are drawn and cut into passes to see how many these are.
DRAWN = 1024
#: Of what a phase takes, the most that a setting may leave which is advised although the phase does not fit with it.
HELPS = 0.9
#: Share of a device's memory that a plan may fill. The rest is for what no plan knows.
FILLED = 0.95


@dataclass(frozen=True)
class Options:
    """What this command has beside the settings of a run.

    Attributes:
        json: Print the plan for tools instead.
        probe: Load the model and take the time of a pass and some responses.
        price_per_hour: Of one device.
        memory: Of one device, as ``24GiB``. None: of those here.
        rows: To assume instead of reading data, with the two that follow.
        prompt_tokens: Of each.
        response_tokens: Of each.
        sample: Encode no more rows than this.
    """

    json: bool = False
    probe: bool = False
    price_per_hour: float | None = None
    memory: int | None = None
    rows: int | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    sample: int | None = None


@dataclass(frozen=True)
class Work:
    """Tokens of the rows, and how a batch of them is cut into passes.

    Attributes:
        rows: To train on.
        held_out: Beside them.
        prompts: Tokens of the prompts.
        responses: Of the real responses.
    """

    rows: int
    held_out: int
    prompts: Sequence[int]
    responses: Sequence[int]


def main(args: list[str]) -> None:
    """Print the plan of a run.

    Args:
        args: The arguments of ``fit`` or ``sft``, and this command's own.

    Raises:
        UserError: A run with these settings and data could not begin, or an option is outside its range.
    """
    options, args = take_options(args)
    with redirect_stdout(sys.stderr if options.json else sys.stdout):
        plan = make_plan(options, args)
    if options.json:
        say(json.dumps(plan, indent=1), wraps=False)
    else:
        say("\n".join(["", *render(plan)]), wraps=False)


def take_options(args: Sequence[str]) -> tuple[Options, list[str]]:
    """This command's own options, and the arguments without them.

    Raises:
        UserError: One has no value, or one outside its range.

    Example:
        >>> options, rest = take_options(["--memory", "24GiB", "--devices=2", "--json", "--config", "run.yaml"])
        >>> options.memory == 24 * 2**30, options.json, rest
        (True, True, ['--trainer.devices', '2', '--config', 'run.yaml'])
    """
    taken: dict[str, Any] = {}
    rest: list[str] = []
    known = {f"--{field.name.replace('_', '-')}": field.name for field in fields(Options)}
    remaining = iter(args)
    for arg in remaining:
        flag, equals, value = arg.partition("=")
        if flag in ("--json", "--probe") and not equals:
            taken[known[flag]] = True
        elif flag in known or flag == "--devices":
            value = value if equals else next(remaining, "")
            if flag == "--devices":
                rest += ["--trainer.devices", value]
            else:
                taken[known[flag]] = _read_value(flag, value)
        else:
            rest.append(arg)
    lengths = [name for name in ("rows", "prompt_tokens", "response_tokens") if name in taken]
    if lengths and len(lengths) < 3:
        raise UserError(
            "--rows, --prompt-tokens and --response-tokens stand in for the data together, got only "
            f"{', '.join(lengths)}. Give all three, or none to read the data."
        )
    if "price_per_hour" in taken and "probe" not in taken:
        raise UserError(
            "--price-per-hour is the price of the time that --probe takes, and there is no --probe. Give both, or none."
        )
    if lengths and "probe" in taken:
        raise UserError("--probe needs rows to compute, and --rows stands in for them. Give one of the two.")
    return Options(**taken), rest


def _read_value(flag: str, value: str) -> float | int:
    if flag == "--memory":
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM]i?B)", value)
        if not match or not float(match[1]):
            raise UserError(f"--memory must be a size such as 24GiB or 80GB, got {value!r}.")
        return int(float(match[1]) * {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}[match[2]])
    if flag == "--price-per-hour":
        if not re.fullmatch(r"\d+(\.\d+)?", value):
            raise UserError(f"--price-per-hour must be a number, the price of one device, got {value!r}.")
        return float(value)
    if not (value.isascii() and value.isdigit() and int(value)):
        raise UserError(f"{flag} must be a whole number, at least 1, got {value!r}.")
    return int(value)


def make_plan(options: Options, args: list[str]) -> dict[str, Any]:
    """The plan of a run as numbers: bytes, tokens, counts and seconds.

    Raises:
        UserError: A run with these settings and data could not begin.
    """
    stage, settings, data = find_stage(args)
    if "rollouts" in settings:
        raise UserError(
            "plan does not know the iterations of ppo. A training step of it takes the memory of one of sft with the "
            "same model and data.micro_batch_tokens, and with model.beta above 0 the weights of the reference once "
            "more: plan that, with the settings of sft."
        )
    model, trainer = settings.model, settings.trainer
    if options.rows is None:
        data.sample = options.sample
        config = read_data(settings, data)
    else:
        where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        config = load_config(model.model_name_or_path, **where)
        refuse_without_causal_head(config, model.trust_remote_code)
    work = _find_work(options, data)
    on_meta = make_on_meta(config, model.trust_remote_code)
    size = measure_size(on_meta)
    adapter = find_adapter(settings)
    setup = _find_setup(settings, adapter, None if adapter is None else count_adapter(on_meta, adapter))
    is_game, law = "generator" in settings.data, _find_law(settings.model.get("loss"))
    is_assumed, is_accumulated = options.rows is not None, trainer.accumulate_grad_batches > 1

    def count_updates(micro_batch_tokens: int) -> tuple[dict[str, Any], Load]:
        cut = copy(data)
        cut.micro_batch_tokens = micro_batch_tokens
        found = _plan_updates(settings, cut, work, setup.devices, is_game, law, is_assumed=is_assumed)
        return found, Load(found["largest_pass"], found["largest_scored"], found["passes"], is_accumulated)

    updates, load = count_updates(data.micro_batch_tokens)
    memory = {"training": training_memory(size, load, setup)}
    generator = getattr(data, "generator", None)
    at_once = generator.batch_size if isinstance(generator, TransformersGenerator) and not law else 0  # others: engines

    def measure_generation(batch_size: int) -> dict[str, float]:
        slots = min(batch_size, math.ceil(work.rows * data.examples_per_prompt / setup.devices))
        prompt = data.max_prompt_tokens if is_assumed else max(work.prompts)
        if setup.device == "cpu":  # where what no row uses takes no memory; the longest prompts come first
            prompt = math.ceil(fmean(sorted(work.prompts)[-slots:]))
        keeps_optimiser = not settings.self_play.reset_optimizer
        return generation_memory(size, slots, prompt, data.max_response_tokens, setup, keeps_optimiser=keeps_optimiser)

    if at_once:
        memory["generation"] = measure_generation(at_once)
    has = options.memory if options.memory is not None else _find_memory(setup.device)
    plan: dict[str, Any] = {
        "stage": next(word for word, path in STAGES.items() if resolve_name(path) is stage),
        "model": {
            "name": model.model_name_or_path,
            "weights": size.weights,
            "trained": setup.adapter or size.weights,
            "precision": _find_precision(trainer.precision),
            "is_packed": setup.is_packed,
        },
        "data": {
            "rows": work.rows,
            "held_out": work.held_out,
            "prompt_tokens": spread(work.prompts),
            "real_tokens": spread(work.responses),
            "is_assumed": options.rows is not None,
        },
        "updates": updates,
        "devices": {"kind": setup.device, "count": setup.devices, "is_sharded": setup.is_sharded, "memory": has},
        "memory": {phase: {name: round(part) for name, part in parts.items()} for phase, parts in memory.items()},
        "disk": _plan_disk(settings, stage.folder, size, setup, updates, adapter),
    }
    room = None if has is None else int(has * FILLED) - (CONTEXT if setup.device != "cpu" else 0)
    plan["devices"]["usable"] = room
    lora = setup.adapter or (count_adapter(on_meta, {"r": 16}) if size.packable else None)
    half = max(1, data.micro_batch_tokens // 2)
    others = [
        (f"data.micro_batch_tokens: {half}", count_updates(half)[1], setup),
        *_alternatives(load, setup, lora),
    ]
    alternatives = {
        "training": [(setting, peak(training_memory(size, other_load, other))) for setting, other_load, other in others]
    }
    if at_once:
        sizes = [at_once >> times for times in range(1, at_once.bit_length())]
        alternatives["generation"] = [
            (f"data.generator.batch_size: {count}", peak(measure_generation(count))) for count in sizes
        ]
    plan["advice"] = _advise(plan, room, alternatives)
    if options.probe:
        from spin_lightning.cli.probe import measure

        plan["time"] = measure(settings, data, make_optimizer(settings.model.optimizer), plan, options.price_per_hour)
    return plan


# --- what there is to do ----------------------------------------------------------------------------------------------


def _find_work(options: Options, data: RowDataModule) -> Work:
    if options.rows is None:
        scale = data.report["train"].get("sample_of", len(data.prompts)) / len(data.prompts)
        return Work(
            round(len(data.prompts) * scale),
            data.report["held_out"].get("sample_of", len(data.val_prompts)),
            [len(prompt.prompt_ids) for prompt in data.prompts],
            [len(prompt.real_ids) for prompt in data.prompts],
        )
    assert options.prompt_tokens is not None and options.response_tokens is not None
    held_out = 0 if data.val_data is not None else round(options.rows * data.val_fraction)
    prompt, response = options.prompt_tokens, min(options.response_tokens, data.max_response_tokens)
    if prompt > data.max_prompt_tokens:
        raise UserError(
            f"prompts of {prompt} tokens (--prompt-tokens) are longer than data.max_prompt_tokens "
            f"{data.max_prompt_tokens}, and all would be left out. Give fewer, or raise it."
        )
    return Work(options.rows - held_out, held_out, [prompt], [response])


def _find_law(loss: Any) -> int | None:
    """Of a loss of tokens, which are compared with the opponent's law of the next one: the tokens of a law."""
    if loss is None or not issubclass(kind := resolve_name(loss.class_path), TokenLoss):
        return None
    return int(kind(**dict((loss.get("init_args") or {}).items())).top_k)


def _plan_updates(
    settings: Any, data: Any, work: Work, devices: int, is_game: bool, law: int | None, *, is_assumed: bool
) -> dict[str, Any]:
    """Updates of each iteration, and what a batch of them becomes. Generated responses are as long as the real ones."""
    samples = is_game and not law
    answers, has_pairs = 1 if law else data.examples_per_prompt, samples or data.needs_rejected
    sides = ["real_ids", "generated_ids"] if has_pairs else ["real_ids"]
    drawn = [_draw_batch(data, work, random.Random(number)) for number in range(max(2, DRAWN // data.batch_size))]
    made = [[batch for _, batch, _ in pack_rows(rows, sides, data.micro_batch_tokens)] for rows in drawn]
    passes = [(len(batch.input_ids), len(batch.scored)) for batches in made for batch in batches]
    counts = [math.ceil(len(batches) / devices) for batches in made]
    cap = data.max_response_tokens
    longest = max(p + r for p, r in zip(work.prompts, work.responses, strict=True)) + (cap if has_pairs else 0)
    longest_scored = max(work.responses) + (cap if has_pairs else 0)
    if is_assumed:  # and may be as long as the settings allow
        longest, longest_scored = data.max_prompt_tokens + len(sides) * cap, len(sides) * cap
    epochs, histories = [settings.trainer.max_epochs or 1], [1]
    if is_game:
        played = settings.self_play
        epochs = played.epochs if isinstance(played.epochs, list) else [played.epochs] * played.iterations
        histories = [1 + min(number, data.history if samples else 0) for number in range(played.iterations)]
    pairs = 1 if is_game and settings.self_play.pairs == "best_worst" else answers  # of a prompt
    batches = [math.ceil(work.rows * pairs * history / data.batch_size) for history in histories]
    limit = settings.trainer.limit_train_batches
    if limit is not None:
        batches = [min(count, limit) if isinstance(limit, int) else int(count * limit) for count in batches]
    accumulated = settings.trainer.accumulate_grad_batches
    updates = [math.ceil(count / accumulated) * times for count, times in zip(batches, epochs, strict=True)]
    seen = [count * times for count, times in zip(batches, epochs, strict=True)]
    if not is_game:
        updates = [_end_sft(settings, updates[0])]
        seen = [min(updates[0] * accumulated, max(seen[0], 0) or math.inf)]
    per_batch = sum(tokens for tokens, _ in passes) / len(made)
    prompt, response = fmean(work.prompts), fmean(work.responses)
    scored = [0]
    if has_pairs:
        scored = [round(history * work.rows * answers * (prompt + 2 * response)) for history in histories]
    elif law:
        scored = [round(work.rows * (prompt + response))] * len(histories)
    return {
        "of": "pairs" if has_pairs else "rows",
        "per_iteration": updates,
        "pairs": data.batch_size * accumulated,
        "batches": accumulated,
        "passes": max(counts),
        "mean_passes": fmean(counts),
        "largest_pass": max(longest, *(tokens for tokens, _ in passes)),
        "largest_scored": max(longest_scored, *(scored for _, scored in passes)),
        "training_tokens": [round(per_batch * count) for count in seen],
        "generated_tokens": round(work.rows * answers * response) if samples else 0,
        "scored_tokens": scored,
        "law_bytes": round(work.rows * response * bytes_of_law(law)) * len(histories) if law else 0,
        "held_out_tokens": round(work.held_out * (prompt + response)),
    }


def _end_sft(settings: Any, updates: int) -> int:
    """Updates of supervised fine-tuning, which other settings than its epochs may end."""
    ends = [settings.model.get("max_updates"), settings.trainer.max_steps, updates]
    if not (given := [end for end in ends if end is not None and end > 0]):
        raise UserError(
            f"plan cannot tell how many updates trainer.max_epochs {settings.trainer.max_epochs!r} makes. Give a "
            "number of epochs, or model.max_updates."
        )
    return int(min(given))


def _draw_batch(data: Any, work: Work, rng: random.Random) -> list[dict[str, Any]]:
    """Rows of a batch, as a pair store has them: of their tokens only the number matters, and whether they differ."""
    rows: list[dict[str, Any]] = []
    together = data.examples_per_prompt if getattr(data, "keep_prompts_together", False) else 1
    while len(rows) < data.batch_size:
        number, place = len(rows), rng.randrange(len(work.prompts))
        shared = {"prompt_id": number, "prompt_ids": [0] * work.prompts[place], "real_ids": [0] * work.responses[place]}
        rows += [{**shared, "generated_ids": [1 + answer] * rng.choice(work.responses)} for answer in range(together)]
    return rows[: data.batch_size]


# --- how it is trained ------------------------------------------------------------------------------------------------


def find_adapter(settings: Any) -> dict[str, Any] | None:
    """The settings of an adapter, if the model is to have one. Only their names are known here."""
    adapter = settings.model.get("adapter")
    if adapter is None:
        return None
    given = dict((adapter.get("init_args") or {}).items())
    if given.get("path"):  # one that is continued has the settings of its folder
        saved = read_json(Path(given["path"]).expanduser() / "adapter_config.json") or {}
        given |= {name: saved[name] for name in ("r", "target_modules", "modules_to_save", "use_dora") if name in saved}
    return given


def _find_setup(settings: Any, adapter: Mapping[str, Any] | None, trained: int | None) -> Setup:
    trainer = settings.trainer
    device = _find_device(str(trainer.accelerator))
    strategy = _name_of(trainer.strategy)
    if strategy.rpartition(".")[2] not in ("auto", "None", "ddp", "fsdp2", "DDPStrategy", "ShardedStrategy"):
        raise UserError(
            f"trainer.strategy {strategy!r} is not one that a run takes. Set auto with trainer.devices: 1, ddp, or "
            "fsdp2 for weights that one device does not hold."
        )
    opponent = settings.model.get("opponent")
    return Setup(
        NUMERICS[_find_precision(trainer.precision)],
        state=_measure_state(settings.model.optimizer),
        device=device,
        adapter=trained,
        is_packed=bool(adapter and adapter.get("quantize")),
        recomputes=settings.model.gradient_checkpointing,
        devices=_count_devices(trainer.devices, device) * trainer.num_nodes,
        is_sharded="ShardedStrategy" in strategy or strategy == "fsdp2",
        resident_opponent="resident" in _name_of(opponent).lower(),
    )


def _find_precision(precision: Any) -> str:
    """A precision of the trainer by its full name."""
    name = str(precision or "32-true")
    name = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}.get(name, name)
    if name not in NUMERICS:
        raise UserError(f"plan knows no trainer.precision {precision!r}. It knows {', '.join(NUMERICS)}.")
    return name


def _name_of(chosen: Any) -> str:
    """The name of a setting that is a word, a class path, or a class path with settings."""
    return str(chosen.get("class_path")) if hasattr(chosen, "get") else str(chosen)


def _find_device(accelerator: str) -> str:
    import torch

    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if accelerator == "cpu" else "cuda"


def _count_devices(devices: Any, device: str) -> int:
    import torch

    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        return max(1, len(devices))
    if devices in ("auto", -1):
        return max(1, torch.cuda.device_count()) if device == "cuda" else 1
    if isinstance(devices, str) and re.fullmatch(r"\d+(,\d+)+", devices):
        return devices.count(",") + 1
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"plan needs a number of devices, at least 1, got trainer.devices {devices!r}.")
    return devices


def _measure_state(chosen: Any) -> float:
    """Bytes that an optimiser keeps for a weight, found out on a small one."""
    import torch

    weight = torch.zeros(64, 64, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    optimizer = make_optimizer(chosen)([weight])
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.ndim]
    return sum(value.nbytes for value in kept) / weight.numel()


def make_optimizer(chosen: Any) -> Callable[..., Any]:
    """The optimiser of the settings, to be given weights."""
    return partial(resolve_name(chosen.class_path), **dict((chosen.get("init_args") or {}).items()))


def _find_memory(device: str) -> int | None:
    """Bytes of the smallest device of this kind that is here; None if there is none."""
    import torch

    if device == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = Path("/sys/fs/cgroup/memory.max")
        text = limit.read_text().strip() if limit.exists() else "max"
        return min(total, int(text)) if text.isdigit() else total
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min((torch.cuda.get_device_properties(index).total_memory for index in range(count)), default=None)


def _plan_disk(
    settings: Any, folder: str, size: ModelSize, setup: Setup, updates: Mapping[str, Any], adapter: Any
) -> dict[str, Any]:
    """Bytes on disk when the run is over, at most, and what is free."""
    numerics, iterations = setup.numerics, len(updates["per_iteration"])
    trained = setup.adapter or size.weights
    export = size.weights * numerics.stored
    if adapter is not None:
        is_merged = adapter.get("merged", True) and not setup.is_packed
        export = trained * numerics.stored + (export if is_merged else 0)
    pairs = 0
    if updates["generated_tokens"]:  # ids of four bytes; those of an earlier iteration are kept again
        pairs = 4 * sum(updates["scored_tokens"])
    path = run_folder(settings[folder].output_dir, f"{folder}.output_dir")
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    parts = {
        "checkpoints": round((KEPT + 1) * trained * (numerics.stored + numerics.master + setup.state)),
        "exports": export * iterations,
        "pairs": pairs,
        "laws": updates["law_bytes"],
    }
    return {**parts, "total": sum(parts.values()), "free": shutil.disk_usage(existing).free, "folder": str(path)}


# --- what would help --------------------------------------------------------------------------------------------------


def _advise(
    plan: Mapping[str, Any], room: int | None, alternatives: Mapping[str, Sequence[tuple[str, float]]]
) -> list[dict[str, Any]]:
    """What does not fit, and for each setting that would help what it would leave to be taken.

    Args:
        plan: As far as it is made.
        room: Bytes that may be filled. None: that is not known.
        alternatives: For each phase settings, and the bytes that the phase would take with each, the mildest first.
    """
    advice: list[dict[str, Any]] = []
    if plan["disk"]["total"] > plan["disk"]["free"]:
        advice.append({"what": "disk", "setting": "self_play.output_dir or export.output_dir on a larger disk"})
    for phase, others in alternatives.items():
        if room is None or (needs := peak(plan["memory"][phase])) <= room:
            continue
        before = needs
        for setting, takes in others:
            fits, is_more = takes <= room, setting.startswith("the same with")
            without, before = (before if is_more else needs), takes
            if takes < HELPS * without or (fits and without > room):
                advice.append({"what": phase, "setting": setting, "takes": round(takes), "fits": fits})
            if fits and phase == "generation":  # the smaller ones are the same setting
                break
        if phase == "generation" and plan["devices"]["kind"] != "cpu":
            advice.append({"what": phase, "setting": "VLLMGenerator on devices of its own", "takes": 0, "fits": True})
    return advice


def _alternatives(load: Load, setup: Setup, lora: int | None) -> list[tuple[str, Load, Setup]]:
    """Settings that take less memory, and what they make of a plan; one after another, each alone."""
    found = []
    true = NUMERICS["bf16-true"]
    if setup.numerics != true:
        found.append(("trainer.precision: bf16-true", load, replace(setup, numerics=true)))
    if setup.resident_opponent:
        found.append(("model.opponent: stored", load, replace(setup, resident_opponent=False)))
    if not setup.recomputes:
        found.append(("model.gradient_checkpointing: true", load, replace(setup, recomputes=True)))
    small = replace(setup, adapter=lora)
    if setup.adapter is None and lora is not None:
        found.append(("model.adapter: LoraAdapter, r 16", load, small))
    if lora is not None and not setup.is_packed:
        packed = replace(small, is_packed=True, numerics=true)
        found.append(("LoraAdapter with quantize: nf4", load, packed))
        if not setup.recomputes:
            found.append(("the same with gradient_checkpointing", load, replace(packed, recomputes=True)))
    if not setup.is_sharded:
        for devices in (2, 4, 8):
            if devices >= setup.devices:
                shared = replace(setup, devices=devices, is_sharded=True)
                found.append((f"trainer.strategy: fsdp2 on {devices} devices", load, shared))
    return found
