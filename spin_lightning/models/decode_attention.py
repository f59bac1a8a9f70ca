"""Attention of one query a row to the keys and values of a cache: what decoding on a CPU spends its time on.

Torch's kernel has fast matrix products only for several queries at a time, which heads that share their keys can be
given to it as. In C, built where there is a compiler, each key is read once for these heads and turned to float32 on
the way. Without AMX, 8 rows of 160 to 320 keys in bfloat16 took 0.92 to 1.8 ms as the kernel does it, 0.25 to 0.43 ms
with a group's heads as queries, and 0.09 to 0.15 ms in C; with AMX the second was found to be slower than the first.
Which one a model takes in bfloat16 is therefore tried (see ``kernels``).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spin_lightning.models.attention import heads_of

#: Numbers that the function in C treats at a time.
_WIDTH = 16
#: Rows and keys of a trial.
TRIAL_ROWS, TRIAL_KEYS = 8, 256


def attend_grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """As the kernel does it itself: each head by itself.

    Args:
        query: Shape ``(B, heads, 1, head_dim)``.
        key: Shape ``(B, key_heads, K, head_dim)``; ``heads`` is a multiple of ``key_heads``.
        value: As ``key``.
        mask: Numbers to add to the scores, shape ``(B, 1, 1, K)``, or ``(B, heads, 1, K)``.
        scale: Factor of the scores. None: 1 / sqrt(head_dim).

    Returns:
        Shape ``(B, heads, 1, head_dim)``.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def attend_folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """The heads that share a key head as queries of one head; a head with keys of its own asks twice.

    Arguments and result are those of :func:`attend_grouped`, which is called where the mask differs by head.
    """
    if mask.shape[1] > 1:
        return attend_grouped(query, key, value, mask, scale)
    rows, heads, _, head_dim = query.shape
    key_heads, group = key.shape[1], heads // key.shape[1]
    queries = query.reshape(rows, key_heads, group, head_dim)
    if group == 1:
        queries = queries.expand(-1, -1, 2, -1)
    output = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scale)
    return output[:, :, :group].reshape(rows, heads, 1, value.shape[-1])


def attend_compiled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """In C. Keys that the mask hides are not read, so rows of any widths may come together.

    Arguments and result are those of :func:`attend_grouped`, which is called where the mask differs by head, is one of
    truth values, or where values have another width than keys.

    Raises:
        NotImplementedError: In another dtype than bfloat16, with heads of a width that is no multiple of 16, or where
            nothing can be compiled.
    """
    if key.dtype is not torch.bfloat16:
        raise NotImplementedError(f"in C there are sums of bfloat16 only, not of {key.dtype}")
    (rows, heads, _, head_dim), (_, key_heads, keys, _) = query.shape, key.shape
    if head_dim % _WIDTH:
        raise NotImplementedError(f"in C the width of heads is a multiple of {_WIDTH}, not {head_dim}")
    if value.shape[-1] != head_dim or mask.shape[1] > 1 or not mask.is_floating_point():
        return attend_grouped(query, key, value, mask, scale)
    attend = _build(head_dim, heads // key_heads)
    query, mask = query.to(key.dtype), mask.to(key.dtype)  # as autocast has it
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output = torch.empty(rows, heads, 1, head_dim, dtype=key.dtype)
    failed = attend(
        *(query.data_ptr(), query.stride(0), query.stride(1)),
        *(key.data_ptr(), key.stride(0), key.stride(1), key.stride(2)),
        *(value.data_ptr(), value.stride(0), value.stride(1), value.stride(2)),
        *(mask.data_ptr(), mask.stride(0) if len(mask) > 1 else 0, mask.stride(-1)),
        *(output.data_ptr(), rows, key_heads, keys, head_dim**-0.5 if scale is None else scale),
    )
    if failed:
        raise MemoryError(f"no memory for the scores of {keys} keys")
    return output


@cache
def _build(head_dim: int, group: int) -> Callable[..., int]:
    """The function in ``decode_attention.c`` for this processor. Takes a third of a second, once a process.

    Raises:
        NotImplementedError: There is no compiler, or it cannot do it.
    """
    named = (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc")
    compiler = next((path for name in named if name and (path := shutil.which(name.split()[0]))), None)
    if compiler is None:
        raise NotImplementedError("attention in C cannot be built here: there is no C compiler")
    source = Path(__file__).with_suffix(".c")
    with TemporaryDirectory() as folder:
        part, library = Path(folder, "attend.o"), Path(folder, "attend.so")
        # linked by a command of its own: given -ffast-math, it would change how the whole process treats tiny numbers.
        # And without OpenMP, whose threads are then those of torch
        flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", f"-DHEAD_DIM={head_dim}"]
        compiling = [compiler, "-c", *flags, f"-DGROUP={group}", str(source), "-o", str(part)]
        linking = [compiler, "-shared", str(part), "-o", str(library), "-lm"]
        try:
            for command in (compiling, linking):
                subprocess.run(command, check=True, capture_output=True, timeout=60)
            attend: Callable[..., int] = ctypes.CDLL(str(library)).attend
        except (OSError, subprocess.SubprocessError) as error:
            raise NotImplementedError(f"attention in C cannot be built here: {error}") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    states = [pointer, number, number, number]
    attend.argtypes = [  # type: ignore[attr-defined]
        *(pointer, number, number, *states, *states, pointer, number, number),
        *(pointer, number, number, number, ctypes.c_float),
    ]
    return attend


CANDIDATES = {"grouped": attend_grouped, "folded": attend_folded, "compiled": attend_compiled}


def make_inputs(model: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the candidates, as a model's heads make them.

    Raises:
        AttributeError: The config does not say how many heads there are, and how wide.
    """
    heads, key_heads, head_dim = heads_of(model)
    random = torch.Generator().manual_seed(0)
    query = torch.randn(TRIAL_ROWS, heads, 1, head_dim, generator=random)
    key, value = torch.randn(2, TRIAL_ROWS, key_heads, TRIAL_KEYS, head_dim, generator=random)
    mask = torch.zeros(TRIAL_ROWS, 1, 1, TRIAL_KEYS)
    mask[0, ..., : TRIAL_KEYS // 2] = -torch.inf
    return query.to(dtype), key.to(dtype), value.to(dtype), mask.to(dtype), None
