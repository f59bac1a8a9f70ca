"""The time of a run, from one update and some responses of its own rows on its own model.

Rates are measured, not modelled: seconds for tokens of each kind, multiplied by the tokens that the run has of them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any

import torch

from spin_lightning.data.module import RowDataModule
from spin_lightning.generation.base import Player, opened
from spin_lightning.models.batches import collate_prompts
from spin_lightning.models.loading import disable_dropout, load_policy
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.models.modes import evaluating
from spin_lightning.stages.optim import Float32Master, fused, sum_in_passes
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: Responses that are generated, and the tokens at which they are cut.
RESPONSES, TOKENS = 32, 64


def measure(
    settings: Any,
    data: RowDataModule,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    plan: Mapping[str, Any],
    price_per_hour: float | None,
) -> dict[str, Any]:
    """Seconds of a run and what they cost.

    The real responses of a batch are trained on twice, of which the second time counts; the first pays for what is made
    once. Work is taken to divide evenly among devices, and what they send each other to take no time.

    Args:
        settings: Of the run.
        data: With its rows.
        make_optimizer: Makes the optimiser from weights.
        plan: Of the run, for its tokens and updates.
        price_per_hour: Of one device. None: no cost.

    Raises:
        UserError: The model cannot be loaded, or not as it is trained.
    """
    model = _load(settings, plan)
    device = next(model.parameters()).device
    updates, devices = plan["updates"], plan["devices"]["count"]
    amp = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(plan["model"]["precision"])
    batch = [_move(part, device) for part in collate_prompts(data.prompts[: data.batch_size], data.micro_batch_tokens)]
    tokens = sum(len(part.input_ids) for part in batch)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    is_narrow = weights[0].dtype in (torch.bfloat16, torch.float16)
    optimizer = (
        Float32Master(weights, lambda masters: fused(make_optimizer(masters)))
        if is_narrow
        else fused(make_optimizer(weights))
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with torch.autocast(device.type, amp, enabled=amp is not None):
        for _ in range(2):
            started = _now(device)
            sum_in_passes(lambda part: -response_log_probs(model, part).sum(), batch, weights).backward()
            in_passes = _now(device) - started
            started = _now(device)
            optimizer.step()
            in_step = _now(device) - started
            optimizer.zero_grad()
        del optimizer
        with torch.no_grad(), evaluating(model):
            started = _now(device)
            for part in batch:
                response_log_probs(model, part)
            in_scoring = _now(device) - started
            generated, in_generation = _generate(model, data, device) if updates["generated_tokens"] else (0, 0.0)
    rates = {"training": tokens / in_passes, "scoring": tokens / in_scoring}
    if generated:
        rates["generation"] = generated / in_generation
    iterations = len(updates["per_iteration"])
    seconds = {
        "training": sum(updates["training_tokens"]) / rates["training"] + sum(updates["per_iteration"]) * in_step,
        "scoring": sum(updates["scored_tokens"]) / rates["scoring"],
        "validation": updates["held_out_tokens"] * iterations / rates["scoring"],
        "generation": iterations * updates["generated_tokens"] / rates["generation"] if generated else 0.0,
    }
    seconds = {name: value / devices for name, value in seconds.items()}
    cost = None if price_per_hour is None else price_per_hour * devices * sum(seconds.values()) / 3600
    return {
        "seconds": seconds,
        "tokens_per_second": rates,
        "seconds_of_optimiser": in_step,
        "price_per_hour": price_per_hour,
        "cost": cost,
        "device": str(device),
    }


def _load(settings: Any, plan: Mapping[str, Any]) -> Any:
    given = settings.model
    if plan["model"]["is_packed"]:
        raise UserError("--probe cannot load a model in 4 bits yet. Leave it out; the rest of the plan needs no model.")
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(
        plan["model"]["precision"], torch.float32
    )
    kind = plan["devices"]["kind"]
    if kind == "cuda" and not torch.cuda.is_available():
        say("note: no GPU is here; the probe runs on the CPU, and its time is this CPU's.")
        kind = "cpu"
    model: Any = load_policy(
        given.model_name_or_path,
        revision=given.revision,
        trust_remote_code=given.trust_remote_code,
        attn_implementation=given.attn_implementation,
        dtype=dtype,
    )
    if (adapter := given.get("adapter")) is not None:
        model = resolve_name(adapter.class_path)(**dict((adapter.get("init_args") or {}).items())).apply(model)
    disable_dropout(model)
    return model.to(kind).train()


def _move(batch: Any, device: torch.device) -> Any:
    from lightning.fabric.utilities import move_data_to_device

    return move_data_to_device(batch, device)


def _generate(model: Any, data: Any, device: torch.device) -> tuple[int, float]:
    """Tokens generated for some prompts, each response cut early, and the seconds they took."""
    generator = copy.copy(data.generator)
    generator.max_new_tokens = min(TOKENS, generator.max_new_tokens)
    prompts = [prompt.prompt_ids for prompt in data.prompts[:RESPONSES]]
    with opened(generator, Player(model)) as made:
        started = _now(device)
        found = made.generate(prompts, list(range(len(prompts))), data.encoder.end_ids, data.encoder.pad_id)
        count = sum(len(response.ids) for _, response in found)
    return count, _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
