"""Keeps freed memory in the process, for networks that run on the CPU."""

from __future__ import annotations

import ctypes
import os
import sys

_TUNING = ("GLIBC_TUNABLES", "LD_PRELOAD")
#: `M_TRIM_THRESHOLD` (never), `M_MMAP_MAX` and `M_ARENA_MAX` of glibc's malloc.h.
_SETTINGS = {-1: -1, -4: 0, -8: 1}


_kept = False


def freed_memory_kept() -> bool:
    """Whether `keep_freed_memory` has taken effect in this process."""
    return _kept


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed memory to the kernel, for the rest of the process.

    By default it returns the memory of large tensors after every operator, and the kernel clears it again for the next
    one, which takes up to half of a forward pass. All threads share one heap, since a repair's passes, each in a thread
    of its own, would otherwise not reuse each other's memory.

    Returns:
        Whether it was done: not where the environment already tunes the allocator (`MALLOC_…`, `GLIBC_TUNABLES`,
        `LD_PRELOAD`), nor without glibc.
    """
    global _kept
    tuned = any(name in _TUNING or name.startswith("MALLOC_") for name in os.environ)
    if not _kept and not tuned and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        _kept = mallopt is not None and all(mallopt(name, value) for name, value in _SETTINGS.items())
    return _kept
