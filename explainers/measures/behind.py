"""Host work that overlaps the device's: figures of the last maps while the next ones are computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self


class Behind:
    """Runs host work in a thread while the device computes the next maps, one task at a time.

    As a context manager it waits for the last task. An error in a task is raised at the next task, or at the end.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="figures")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def do(self, work: Callable[[], None]) -> None:
        """Start a task once the previous one is done."""
        self.wait()
        self._last = self._thread.submit(work)

    def wait(self) -> None:
        """Wait until the current task is done."""
        if self._last is not None:
            self._last.result()
