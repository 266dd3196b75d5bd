"""Timing on a busy machine: calls take turns, and each call's median is used.

Turns keep a slow spell of the machine (other jobs, clocks) from hitting one candidate only, and leave caches about as
cold for each as they are inside a network.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
_CALLS_PER_READING_CUDA = 10


class Stopwatch:
    """Measures the seconds of one call on a device, by CUDA events on a GPU and the monotonic clock elsewhere.

    Args:
        device: Device that the call computes on.
        many: Read the clock once for several calls on a GPU, so that launch overhead does not hide the kernel's time.
    """

    def __init__(self, device: torch.device, many: bool = False) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._calls = _CALLS_PER_READING_CUDA if many and self._cuda else 1
        if self._cuda:
            with torch.cuda.device(device):
                self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def read(self, call: Call) -> float:
        """Return the seconds of one call."""
        if not self._cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        torch.cuda.synchronize(self._device)
        stream = torch.cuda.current_stream(self._device)
        self._start.record(stream)
        for _ in range(self._calls):
            call()
        self._end.record(stream)
        self._end.synchronize()
        milliseconds: float = self._start.elapsed_time(self._end)
        return milliseconds / 1000 / self._calls


def interleaved_medians(
    calls: Sequence[Call], stopwatch: Stopwatch, repeats: int, seconds: float, warm_up: int = 1
) -> list[float]:
    """Return the median seconds of each call over rounds in which every call takes its turn.

    Args:
        calls: What to time.
        stopwatch: Reads the clock.
        repeats: Number of rounds; fewer if the time runs out, but at least 3.
        seconds: Time to spend.
        warm_up: Number of warm-up rounds, whose readings are discarded but whose time counts.
    """
    for _ in range(warm_up):
        for call in calls:
            call()
    readings: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    for number in range(max(3, repeats)):
        spent = time.perf_counter() - begin
        if number >= 3 and spent * (number + 1) / number > seconds:
            break
        for reading, call in zip(readings, calls, strict=True):
            reading.append(stopwatch.read(call))
    return [statistics.median(reading) for reading in readings]
