"""Waits for another rank at the store of the process group, which has no timeout: for work that may take hours."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from image_classification.peers import PeerError

_POLL_SECONDS = 0.05, 1.0  # between two polls of the store: first and longest interval
num_waits = itertools.count()  # all ranks wait for the same things in the same order


def store() -> Any:
    """Return the key-value store by which the ranks found each other."""
    return dist.distributed_c10d._get_default_store()


def wait_until(reached: Callable[[], bool], what: str) -> None:
    """Poll without a timeout; a lost store means that its rank is gone.

    Raises:
        PeerError: The store cannot be reached.
    """
    pause, longest = _POLL_SECONDS
    try:
        while not reached():
            time.sleep(pause)
            pause = min(2 * pause, longest)
    except RuntimeError as error:
        raise PeerError(f"another rank ended before {what} ({error})") from error
