"""How long the parts of a rewrite take."""

from __future__ import annotations

import time


class Laps:
    """Seconds by part, from the moment it is made.

    Attributes:
        seconds: Part → seconds since the part before it ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, part: str) -> None:
        """A part of the rewrite is done."""
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now
