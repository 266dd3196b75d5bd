"""Meters: figures gathered during training that reach the host only when they are read.

Updating a meter with a tensor adds it on its own device; nothing waits for the GPU. `Meters.read` moves the
figures of a logging step to the host in one copy per device, and that copy is the only synchronisation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch

Kind = Literal["mean", "last", "max"]
Value = float | torch.Tensor


class Meter:
    """One figure: a weighted mean, the last value or the maximum, over a window and over the epoch.

    Args:
        kind: How values are joined. A mean of means weighted by its counts is exact.
    """

    def __init__(self, kind: Kind = "mean") -> None:
        self.kind = kind
        self._value: Value = 0.0
        self._weight: Value = 0.0
        self._epoch_value = 0.0
        self._epoch_weight = 0.0

    def update(self, value: Value, weight: Value = 1) -> None:
        """Add a value of `weight` samples. Tensors are 0-dimensional and stay on their device."""
        value, weight = _accumulable(value), _accumulable(weight)
        if self.kind == "mean":
            self._value = self._value + value * weight
        elif self.kind == "max" and not _is_empty(self._weight):
            both = torch.as_tensor(self._value), torch.as_tensor(value)
            self._value = torch.maximum(*both)
        else:
            self._value = value
        self._weight = self._weight + weight

    def pending(self) -> tuple[Value, Value]:
        """What was gathered since the last `settle`: (sum or value, weight), perhaps on a device."""
        return self._value, self._weight

    def settle(self, value: float, weight: float) -> float | None:
        """Close the window with its numbers on the host, add them to the epoch, return its figure."""
        self._value = self._weight = 0.0
        if weight == 0:
            return None
        if self.kind == "mean":
            self._epoch_value += value
        elif self.kind == "max" and self._epoch_weight:
            self._epoch_value = max(self._epoch_value, value)
        else:
            self._epoch_value = value
        self._epoch_weight += weight
        return value / weight if self.kind == "mean" else value

    def settle_epoch(self) -> float | None:
        """Close the epoch and return its figure; None if there was no value."""
        value, weight = self._epoch_value, self._epoch_weight
        self._epoch_value = self._epoch_weight = 0.0
        if weight == 0:
            return None
        return value / weight if self.kind == "mean" else value


class Meters:
    """The meters of a run by key, read together.

    Example:
        meters.update("train.loss", loss, len(images))   # every iteration, no synchronisation
        logger.log((epoch, iteration), meters.read())    # every --print-freq iterations, one
        logger.log((epoch,), meters.read_epoch())
    """

    def __init__(self, kinds: dict[str, Kind] | None = None) -> None:
        self._meters = {key: Meter(kind) for key, kind in (kinds or {}).items()}

    def update(self, key: str, value: Value, weight: Value = 1) -> None:
        """Add a value; an unknown key becomes a mean."""
        self._meters.setdefault(key, Meter()).update(value, weight)

    def read(self) -> dict[str, float]:
        """Figures since the last reading, without those that had no value. Waits for the device once."""
        pending = {key: meter.pending() for key, meter in self._meters.items()}
        numbers = _to_host([number for pair in pending.values() for number in pair])
        figures = {}
        for index, key in enumerate(pending):
            figure = self._meters[key].settle(numbers[2 * index], numbers[2 * index + 1])
            if figure is not None:
                figures[key] = figure
        return figures

    def read_epoch(self) -> dict[str, float]:
        """Figures of the epoch, what was not read yet included; begins a new epoch."""
        self.read()
        figures = {key: meter.settle_epoch() for key, meter in self._meters.items()}
        return {key: figure for key, figure in figures.items() if figure is not None}


class StepClock:
    """Images per second, time spent waiting for data and time spent computing, over windows of iterations.

    GPU work is asynchronous, so the time of one iteration means little; that of a window does when the device
    was waited for at its end, which reading the meters does. `read` is therefore called right after
    `Meters.read`.

    Args:
        world_size: Images per second count all ranks.
        num_warmup: First iterations of the run that no figure of an epoch includes (compilation, cuDNN's
            search).
        clock: Seconds; for tests.

    Example:
        for images, targets in loader:
            clock.data_ready()
            …
            clock.step_done(len(images))
    """

    def __init__(
        self, world_size: int = 1, num_warmup: int = 0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.world_size = world_size
        self._clock = clock
        self._warmup_left = num_warmup
        self._epoch = _Window()
        self.start()

    def start(self) -> None:
        """Begin a window now; to call after something else took time (validation, a checkpoint)."""
        self._window = _Window()
        self._window_start = self._mark = self._clock()

    def data_ready(self) -> None:
        """The batch is here: what passed since the last step was waiting for data."""
        now = self._clock()
        self._window.data_seconds += now - self._mark
        self._mark = now

    def step_done(self, num_images: int) -> None:
        """The iteration's work has been handed to the device."""
        self._mark = self._clock()
        self._window.num_images += num_images
        self._window.num_steps += 1
        if self._warmup_left > 0:
            self._warmup_left -= 1
            if self._warmup_left == 0:
                self.start()

    def read(self, prefix: str = "train") -> dict[str, float]:
        """`{prefix}.total_ips`, `compute_ips`, `data_time`, `compute_time`; begins a new window."""
        window = self._window
        window.seconds = self._clock() - self._window_start
        if self._warmup_left == 0:
            self._epoch.add(window)
        self.start()
        return window.figures(prefix, self.world_size)

    def read_epoch(self, prefix: str = "train") -> dict[str, float]:
        """The same figures over all windows of the epoch; begins a new epoch."""
        self.read(prefix)
        figures = self._epoch.figures(prefix, self.world_size)
        self._epoch = _Window()
        return figures


class _Window:
    """Sums over some iterations; times in seconds."""

    def __init__(self) -> None:
        self.num_images = self.num_steps = 0
        self.seconds = self.data_seconds = 0.0

    def add(self, other: _Window) -> None:
        self.num_images += other.num_images
        self.num_steps += other.num_steps
        self.seconds += other.seconds
        self.data_seconds += other.data_seconds

    def figures(self, prefix: str, world_size: int) -> dict[str, float]:
        if self.num_steps == 0:
            return {}
        compute = max(self.seconds - self.data_seconds, 1e-9)
        return {
            f"{prefix}.total_ips": world_size * self.num_images / max(self.seconds, 1e-9),
            f"{prefix}.compute_ips": world_size * self.num_images / compute,
            f"{prefix}.data_time": self.data_seconds / self.num_steps,
            f"{prefix}.compute_time": compute / self.num_steps,
        }


def latency_figures(seconds: Sequence[float], prefix: str = "val") -> dict[str, float]:
    """Mean and percentiles of latencies: `{prefix}.compute_latency`, `…_at50`, `…_at95`, `…_at99`, `…_at100`.

    A percentile is a latency that was measured: the smallest that at least p % of the batches do not exceed.
    """
    if not seconds:
        return {}
    ordered = sorted(seconds)
    figures = {f"{prefix}.compute_latency": sum(ordered) / len(ordered)}
    for percent in (50, 95, 99, 100):
        index = math.ceil(percent * len(ordered) / 100) - 1
        figures[f"{prefix}.compute_latency_at{percent}"] = ordered[max(index, 0)]
    return figures


def _accumulable(value: Value) -> Value:
    """Numbers as they are; tensors detached and in float64, so that long sums stay exact."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)


def _is_empty(weight: Value) -> bool:
    return isinstance(weight, float) and weight == 0.0


def _to_host(values: Sequence[Value]) -> list[float]:
    """All numbers on the host, with one copy per device."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    fetched: dict[int, float] = {}
    for device in {tensor.device for tensor in tensors}:
        here = [tensor for tensor in tensors if tensor.device == device]
        for tensor, number in zip(here, torch.stack(here).tolist(), strict=True):
            fetched[id(tensor)] = number
    return [fetched[id(value)] if isinstance(value, torch.Tensor) else value for value in values]
