"""Memory of a long run on a CPU: shapes that recur, and freed blocks that are kept for the next step."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Lengths that decide the shape of a matrix product on a CPU are multiples of this.
LENGTH_STEP = 64

_LARGEST_FROM_HEAP = 8 * 2**20
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def rounded(length: int, step: int = LENGTH_STEP) -> int:
    """The next multiple of a step."""
    return -(-length // step) * step


def round_up(tensor: Tensor, dim: int = 0, on_gpu: int = 1) -> Tensor:
    """Zeros behind a tensor, up to a length that recurs: a multiple of ``LENGTH_STEP``, on a GPU of ``on_gpu``.

    oneDNN, which multiplies torch's bfloat16 matrices on a CPU, compiles a kernel of a few hundred KB for each new
    shape and never lets go of it, so that passes of ever different lengths would take tens of MB more every step.
    """
    step = LENGTH_STEP if tensor.device.type == "cpu" else on_gpu
    missing = rounded(tensor.shape[dim], step) - tensor.shape[dim]
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, missing)) if missing else tensor


def make_zeros(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Zeros on the device of a tensor, and in its dtype if no other is given.

    On a CPU the system gives their pages when they are first written to: what is never used takes no memory.
    """
    dtype = dtype or like.dtype
    if like.device.type != "cpu":
        return like.new_zeros(shape, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(*shape)


def keep_freed_memory() -> None:
    """Let the C library reuse the blocks of a few MB that training and generation allocate and free thousands of times.

    By default each may go back to the system and come from it anew, its pages cleared: a tenth of a small model's time.
    Larger blocks always do, such as the cache of keys and values: they are few, and would leave holes that nothing
    fits. Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 * 2**20)
