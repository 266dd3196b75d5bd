"""Progress of long file work: a live bar on a terminal, an occasional plain line in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]
_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress_bar(description: str, total: int, enabled: bool = True) -> Iterator[Advance]:
    """Show the progress of `total` steps on stderr; the context value is called with the number of steps done."""
    if not enabled or total == 0:
        yield lambda _steps: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda steps: bar.update(task, advance=steps)
    else:
        yield _plain_lines(description, total)


def _plain_lines(description: str, total: int) -> Advance:
    """Report progress without a terminal: a line every ten seconds, so that quick work prints nothing."""
    done = 0
    last = time.monotonic()

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            print(f"{description}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return advance
