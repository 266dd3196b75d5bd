"""Timing of the parts of a rewrite."""

from __future__ import annotations

import time


class Laps:
    """Seconds per part, counted from construction.

    Attributes:
        seconds: Part → seconds since the previous part ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, part: str) -> None:
        """Record the end of a part."""
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now
