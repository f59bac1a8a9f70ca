"""Which of several ways to compute the same thing is the fastest on this processor: found by trying them.

A way that wins on one processor may lose on another. So a kernel names its candidates, the first of which is the one to
fall back on, and they are timed once, on numbers of the model's shape. Candidates differ by rounding, and so do two
runs that take different ones. A run therefore records what it takes and a resumed one takes the same; a candidate has
to be clearly faster, so that what else the machine does hardly ever decides; and in float32, where a run is expected to
repeat to the bit and less is gained, the first one is taken without a trial.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spin_lightning.models import compiled_layers, decode_attention, shared_prompt
from spin_lightning.models.attention import heads_of
from spin_lightning.models.modes import compute_dtype
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: A trial ends after this many seconds, or this many calls of each candidate.
TRIAL_SECONDS, TRIAL_CALLS = 0.25, 20
#: How far the results of candidates may differ, in units of the dtype's precision, relative to the largest.
AGREEMENT = 4.0


@dataclass(frozen=True)
class Kernel:
    """Several functions with the same arguments and, within rounding, the same result.

    Attributes:
        candidates: By name. The first is the one to fall back on. Results are tensors, or tuples that begin with one.
        make_inputs: Arguments as a model's shape makes them, of usual length, in a dtype.
        worth: How many times as fast as the first candidate another must be to be taken. Far from what is measured, so
            that two trials agree.
        on_gpu: The candidate for a GPU, where there is no trial. Empty: the first.
    """

    candidates: Mapping[str, Callable[..., Any]]
    make_inputs: Callable[[Any, torch.dtype], tuple[Any, ...]]
    worth: float
    on_gpu: str = ""


#: All kernels that have more than one candidate.
KERNELS = {
    "prompt_attention": Kernel(shared_prompt.CANDIDATES, shared_prompt.make_inputs, worth=1.2),
    "decode_attention": Kernel(decode_attention.CANDIDATES, decode_attention.make_inputs, worth=1.5),
    "layers": Kernel(compiled_layers.CANDIDATES, compiled_layers.make_inputs, worth=math.inf, on_gpu="compiled"),
}

_pinned: dict[tuple[str, torch.dtype], str] = {}
_tried: dict[tuple[Any, ...], str] = {}


def check_kernels(choices: Mapping[str, str], setting: str) -> None:
    """Refuse a kernel or a candidate that does not exist.

    Raises:
        UserError: One does not; the message lists those that do.
    """
    known = {name: list(kernel.candidates) for name, kernel in KERNELS.items()}
    for name, candidate in choices.items():
        if candidate not in known.get(name, []):
            there_are = "; ".join(f"{own}: {' or '.join(names)}" for own, names in known.items())
            raise UserError(f"{setting} knows no {name!r} of {candidate!r}. There are {there_are}.")


def pin_kernels(model: nn.Module, choices: Mapping[str, str]) -> None:
    """Have this process take these candidates without a trial, in the place of those pinned before.

    They hold for models that compute in the dtype in which this one does here and now, so for its copies too.
    """
    dtype = _dtype_of(model)
    _pinned.clear()
    _pinned.update({(name, dtype): candidate for name, candidate in choices.items()})


@torch.no_grad()
def find_error(model: nn.Module, name: str, candidate: str) -> str:
    """Why a model cannot take a candidate here; empty if it can."""
    candidates = KERNELS[name].candidates
    if candidate not in candidates:
        return f"this version has {', '.join(candidates)}"
    inputs = _make_inputs(model, name)
    result = _run(candidates[candidate], inputs) if inputs else ""
    return result if isinstance(result, str) else ""


def first_of(name: str) -> str:
    """The candidate to fall back on."""
    return next(iter(KERNELS[name].candidates))


def kernel_of(model: nn.Module, name: str) -> str:
    """The candidate that a model takes: the one pinned, else the fastest in a trial, which is made once a process.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=9)
        >>> kernel_of(LlamaForCausalLM(LlamaConfig(**sizes)), "decode_attention")  # in float32
        'grouped'
    """
    dtype = _dtype_of(model)
    if choice := _pinned.get((name, dtype)):
        return choice
    if KERNELS[name].on_gpu and next(model.parameters()).device.type != "cpu":
        return KERNELS[name].on_gpu
    if dtype not in (torch.bfloat16, torch.float16):
        return first_of(name)
    try:
        key = (name, dtype, torch.get_num_threads(), next(model.parameters()).device.type, *heads_of(model))
    except Exception:  # a config that names its sizes otherwise, or has others in each layer
        return first_of(name)
    if key not in _tried:
        inputs = _make_inputs(model, name)
        _tried[key] = first_of(name) if inputs is None else _try_candidates(name, KERNELS[name], inputs)
    return _tried[key]


def _dtype_of(model: nn.Module) -> torch.dtype:
    return compute_dtype(next(model.parameters()).device, model)


def _make_inputs(model: nn.Module, name: str) -> tuple[Any, ...] | None:
    """What the candidates of a model are tried on; None where they are not."""
    if next(model.parameters()).device.type != "cpu":
        return None
    try:
        return KERNELS[name].make_inputs(model, _dtype_of(model))
    except Exception:  # as in kernel_of
        return None


def _run(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """What a candidate gives, in float32; or the error it gives, in words."""
    try:
        result = function(*inputs)
    except Exception as error:  # a kernel that torch does not have here may say so in any way
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    return (result if isinstance(result, Tensor) else result[0]).float()


@torch.no_grad()
def _try_candidates(name: str, kernel: Kernel, inputs: tuple[Any, ...]) -> str:
    first, results = first_of(name), {own: _run(function, inputs) for own, function in kernel.candidates.items()}
    expected = results[first]
    if isinstance(expected, str):  # it is all there is to compare with
        return first
    allowed = AGREEMENT * torch.finfo(inputs[0].dtype).eps * expected.abs().max()
    others = {own: result for own, result in results.items() if own != first and isinstance(result, Tensor)}
    equal = [first, *(own for own, result in others.items() if (result - expected).abs().max() <= allowed)]
    seconds = _time_candidates([kernel.candidates[own] for own in equal], inputs)
    fastest, least = min(zip(equal, seconds, strict=True), key=lambda pair: pair[1])
    gain = seconds[equal.index(first)] / least
    if gain < kernel.worth:
        return first
    say(f"note: {name} is {fastest}, here {gain:.1f} times as fast as {first} (model.kernels can pin it).")
    return fastest


def _time_candidates(functions: list[Callable[..., Tensor]], inputs: tuple[Any, ...]) -> list[float]:
    """The least seconds of a call of each, taking turns."""
    least = [float("inf")] * len(functions)
    end = time.perf_counter() + TRIAL_SECONDS
    for _ in range(TRIAL_CALLS):
        for place, function in enumerate(functions):
            start = time.perf_counter()
            function(*inputs)
            least[place] = min(least[place], time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return least
