"""Console output of rank 0: a live progress display on a terminal, plain lines everywhere else.

The display exists only within `Console.progress`, and is removed before an exception propagates, so that a traceback is
printed on a clean screen.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TextIO

from image_classification.extras import optional_import

with optional_import():
    from rich.console import Console as RichConsole
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )


from image_classification.observe.figures import FIGURES, Figure, steering

_PARAMETERS = "PARAMETER"
Detail = Literal["quiet", "normal", "verbose"]


class Console:
    """Prints messages, figures of epochs and progress.

    Args:
        print_freq: Iterations from one plain line to the next.
        live: Whether to draw the live display; by default if the output is a terminal.
        detail: "quiet" shows only messages and the summary, "verbose" every figure of an epoch.
        rich_console: Console to print to; standard output by default.

    If `multiproc.py` has left the terminal to this process and so cannot write the log itself, every plain line also
    goes to the file in the variable RANK_LOG.
    """

    def __init__(
        self,
        print_freq: int,
        live: bool | None = None,
        rich_console: RichConsole | None = None,
        detail: Detail = "normal",
    ) -> None:
        # Only a terminal has a width; elsewhere, lines must not be wrapped.
        self._rich = rich_console or RichConsole(highlight=False, soft_wrap=True)
        self.live = self._rich.is_terminal if live is None else live
        self.print_freq = print_freq
        self._detail = detail
        self._display: Progress | None = None
        log_file = Path(os.environ["RANK_LOG"]) if os.environ.get("RANK_ON_TERMINAL") else None
        self._log: TextIO | None = None if log_file is None else log_file.open("a", encoding="utf-8")

    def log(
        self, step: Sequence[int] | str, data: Mapping[str, object], iteration: int | None = None
    ) -> None:
        """Print the figures of an epoch or of the run; figures of an iteration belong to the progress display."""
        if step == _PARAMETERS or len(step) > 1:
            return
        head = "Summary"
        shown = data
        if step:  # the other figures of an epoch are only in the report
            head = f"Epoch {step[0]}"
            shown = data if self._detail == "verbose" else steering(data)
        line = "  ".join([f"{head}:", *(self.format(key, value) for key, value in shown.items())])
        if step and self._detail == "quiet":
            self.to_log(line)
        else:
            self.message(line)

    def format(self, key: str, value: object) -> str:
        """Format a figure with its name and unit, as registered."""
        figure = FIGURES.get(key, Figure())
        text = str(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            text = format(value, figure.format or (".4g" if isinstance(value, float) else ""))
        return f"{key} {text} {figure.unit or ''}".rstrip()

    def message(self, text: str) -> None:
        """Print a line, above the progress display if there is one."""
        printer = self._rich if self._display is None else self._display.console
        printer.print(escape(text), highlight=False, soft_wrap=True)
        self.to_log(text)

    @contextlib.contextmanager
    def progress(self, total: int, description: str) -> Iterator[ProgressTask]:
        """Show the progress of a loop; contexts may nest (validation within an epoch).

        Args:
            total: Number of iterations.
            description: Name of the loop, such as "Train 3/90".
        """
        if self._detail == "quiet":
            yield SilentTask(self, total, description)
            return
        if not self.live:
            yield PlainTask(self, total, description)
            return
        outermost = self._display is None
        display = self._display or self._new_display()
        if outermost:
            self._display = display
            display.start()
        task = display.add_task(escape(description), total=total, fields="")
        try:
            yield LiveTask(self, display, task, total, description)
        finally:
            display.remove_task(task)
            if outermost:
                self._display = None
                display.stop()

    def _new_display(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[fields]}"),
        )
        return Progress(*columns, console=self._rich, refresh_per_second=4)

    def to_log(self, text: str) -> None:
        """Write a line to the log file, if there is one, but not to the screen."""
        if self._log is not None:
            print(text, file=self._log, flush=True)

    def flush(self) -> None:
        """Print buffered output."""
        self._rich.file.flush()

    def close(self) -> None:
        """Remove the display and close the log file."""
        if self._display is not None:
            self._display.stop()
            self._display = None
        if self._log is not None:
            self._log.close()
            self._log = None


class ProgressTask:
    """Progress of one loop. Fields are remembered, so that figures that are read only now and then stay visible."""

    def __init__(self, console: Console, total: int, description: str) -> None:
        self._console = console
        self._total = total
        self._description = description
        self._done = 0
        self._fields: dict[str, str] = {}
        self._start = time.monotonic()

    def update(self, fields: Mapping[str, object] | None = None, advance: int = 1) -> None:
        """Advance the progress and show figures.

        Args:
            fields: Name → value on the host, such as {"loss": 1.2, "img/s": 950.0}; only new values.
            advance: Number of iterations since the last call; 0 only shows the fields.
        """
        for key, value in (fields or {}).items():
            self._fields[key] = self._console.format(key, value)
        before, self._done = self._done, self._done + advance
        self._show(before)

    def _show(self, before: int) -> None:
        raise NotImplementedError

    def line(self) -> str:
        """Return the state as plain text."""
        seconds = time.monotonic() - self._start
        left = seconds / self._done * (self._total - self._done) if self._done else 0.0
        parts = [f"{self._description} [{self._done}/{self._total}]", *self._fields.values()]
        return "  ".join([*parts, f"ETA {datetime.timedelta(seconds=round(left))}"])

    def due(self, before: int) -> bool:
        """Whether a plain line is due: every `print_freq` iterations and at the end."""
        frequency = self._console.print_freq
        return self._done > before and (
            self._done // frequency > before // frequency or before < self._total <= self._done
        )


class PlainTask(ProgressTask):
    """Prints a line now and then."""

    def _show(self, before: int) -> None:
        if self.due(before):
            self._console.message(self.line())


class SilentTask(ProgressTask):
    """Prints nothing on the screen; the log file gets the plain lines."""

    def _show(self, before: int) -> None:
        if self.due(before):
            self._console.to_log(self.line())


class LiveTask(ProgressTask):
    """Moves a bar of the live display; the log file gets the plain lines."""

    def __init__(
        self, console: Console, display: Progress, task: TaskID, total: int, description: str
    ) -> None:
        super().__init__(console, total, description)
        self._display = display
        self._task = task

    def _show(self, before: int) -> None:
        self._display.update(
            self._task, completed=self._done, fields=escape("  ".join(self._fields.values()))
        )
        if self.due(before):
            self._console.to_log(self.line())
