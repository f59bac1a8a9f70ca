"""Keep freed memory for the next step on a CPU, instead of giving it back and asking for it again."""

from __future__ import annotations

import ctypes
import sys

_LARGEST_FROM_HEAP = 32 * 2**20  # the most glibc takes
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Let the C library reuse the blocks of a few MB that training and generation allocate and free thousands of times.

    By default each comes from the system and goes back to it, and its pages are cleared anew: a tenth of a small model's
    time. Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 * 2**20)
