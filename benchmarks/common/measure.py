"""Measuring time and memory with as little influence of other jobs on the machine as possible."""

from __future__ import annotations

import contextlib
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

Call = Callable[[], object]
Subject = TypeVar("Subject")
Figure = TypeVar("Figure")


class Clock:
    """Measures seconds on a device. On a GPU it waits until the device has finished.

    Args:
        device: Device of the work.
        processor_time: On a CPU, measure this process's processor time, to which other jobs add nothing; otherwise, and
            on a GPU, elapsed time.
    """

    def __init__(self, device: torch.device, *, processor_time: bool = False) -> None:
        self.device = device
        self._now = time.process_time if processor_time and device.type == "cpu" else time.perf_counter

    def now(self) -> float:
        """Return seconds since some fixed moment."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._now()

    def seconds(self, call: Call) -> float:
        """Return the seconds that one call takes."""
        begin = self.now()
        call()
        return self.now() - begin


def in_turns(
    subjects: Mapping[str, Subject], measure: Callable[[Subject], Figure], repeats: int, warm_up: int = 1
) -> dict[str, list[Figure]]:
    """Measure several things in turns, so that a slow spell of the machine hits all of them.

    Args:
        subjects: Name → subject to measure, such as a call.
        measure: Measures a subject, such as `Clock.seconds`.
        repeats: Number of rounds that count.
        warm_up: Number of rounds before, which choose kernels and fill caches.

    Returns:
        Name → its figure in every round.
    """
    figures: dict[str, list[Figure]] = {name: [] for name in subjects}
    for number in range(-warm_up, repeats):
        for name, subject in subjects.items():
            figure = measure(subject)
            if number >= 0:
                figures[name].append(figure)
    return figures


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return quotients round by round: whatever slows one side slows the other too."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def mean_and_deviation(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and standard deviation; the latter is undefined for a single value, the former without values."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def with_deviation(figure: Mapping[str, float | None], digits: int = 1) -> str:
    """Format `mean_and_deviation` for a table: "12.3 ± 0.4", "12.3" for a single value, "–" without values."""
    mean, deviation = figure["mean"], figure["std"]
    if mean is None:
        return "–"
    return f"{mean:.{digits}f}" if deviation is None else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def rerun(*words: str) -> str:
    """Run this command again with additional words in a fresh process, and return the last line that it printed."""
    command = [sys.executable, *sys.argv, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1]


def restart_peak(device: torch.device) -> int:
    """Reset the peak memory and return the number of bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: restarts VmHWM
    return _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory since `restart_peak`, or since the process began: of a GPU's allocator or of the
    process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    """Read a field of Linux's status of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def limit_process(gib: float, cpu_seconds: float) -> None:
    """Make allocations beyond a memory limit fail, and end the process by SIGXCPU after this much processor time."""
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    seconds = math.ceil(cpu_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))


def resident_memory() -> int:
    """Return the number of resident bytes of this process."""
    return _status("VmRSS")


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yield a list that afterwards holds the peak number of resident bytes of this process meanwhile (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    peak: list[int] = []
    yield peak
    peak.append(_status("VmHWM"))


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not tell {key}")
