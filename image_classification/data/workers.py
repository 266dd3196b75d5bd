"""Parallel application of a function to many files, in several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from image_classification.config import check_setting

Item = TypeVar("Item")
Result = TypeVar("Result")
_CHUNK = 16


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int | None
) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order.

    Args:
        function: A module's function; its module is imported in each worker and should be light.
        items: Arguments that can be pickled.
        num_workers: Number of processes; one per core by default, 0 to work in this process. No more are started than
            needed.

    Raises:
        SettingError: `num_workers` is negative.
        RuntimeError: A worker died, as happens when a decoding library crashes.
    """
    workers = num_cores() if num_workers is None else num_workers
    check_setting(workers >= 0, "workers", workers, "give 0 (no process besides this one) or more")
    if workers == 0 or len(items) <= _CHUNK:
        yield from map(function, items)
        return
    # Spawned, not forked: the caller may have threads, and a fork would copy their locks.
    with ProcessPoolExecutor(min(workers, -(-len(items) // _CHUNK)), mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(function, items, chunksize=_CHUNK)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (out of memory, or a decoder crashed on a damaged file); "
                "without workers it stops at the file in question"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
