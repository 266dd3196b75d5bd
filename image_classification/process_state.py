"""States of the whole process that blocks of code change for a while, on any number of threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class ProcessState:
    """A state that stays changed as long as any block needs it.

    If every block restored what it had found, two threads whose blocks overlap would leave the change in place for
    good: the second one finds it already made. So the first block to begin makes the change, and the last one to end
    reverts it.

    Args:
        change: Makes the context manager that changes the state and restores it.
    """

    def __init__(self, change: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._blocks = 0
        self._made: contextlib.AbstractContextManager[object] | None = None

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        """Keep the state changed inside the block."""
        with self._lock:
            if self._made is None:
                made = self._change()
                made.__enter__()
                self._made = made
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if not self._blocks and self._made is not None:
                    made, self._made = self._made, None
                    made.__exit__(None, None, None)
