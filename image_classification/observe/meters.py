"""Clocks of training: images per second, time spent waiting for data, percentiles of latencies.

Nothing here waits for the GPU: figures of a window are correct if the device was synced at its end, which reading the
window's sums (`metrics.TrainingSums`) does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from image_classification.observe.figures import VALIDATIONS, Figure, register_figures

register_figures(
    ("train", *VALIDATIONS),
    {
        "total_ips": Figure(".2f", "img/s", steers=True),
        "compute_ips": Figure(".2f", "img/s"),
        "data_time": Figure(".5f", "s", steers=True),
    },
)
register_figures("train", {"compute_time": Figure(".5f", "s")})
_PERCENTILES = (50, 95, 99, 100)
register_figures(
    VALIDATIONS,
    {
        "compute_latency": Figure(".5f", "s"),
        **{f"compute_latency_at{percent}": Figure(".5f", "s") for percent in _PERCENTILES},
    },
)


class StepClock:
    """Images per second, time spent waiting for data and time spent computing, over windows of iterations.

    GPU work is asynchronous, so the time of a single iteration means little; that of a window is meaningful if the
    device was synced at its end. `read` is therefore called right after `TrainingSums.flush`.

    Args:
        world_size: Number of ranks; images per second count all of them.
        num_warmup: Number of first iterations of the run that epoch figures leave out (compilation, cuDNN's search).
        clock: Returns seconds; replaceable for tests.

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
        """Start a window now; call after something else took time (validation, a checkpoint)."""
        self._window = _Window()
        self._window_start = self._mark = self._clock()

    def data_ready(self) -> None:
        """Record that the batch has arrived: the time since the last step was spent waiting for data."""
        now = self._clock()
        self._window.data_seconds += now - self._mark
        self._mark = now

    def step_done(self, num_images: int) -> None:
        """Record that the iteration's work has been submitted to the device."""
        self._mark = self._clock()
        self._window.num_images += num_images
        self._window.num_steps += 1
        if self._warmup_left > 0:
            self._warmup_left -= 1
            if self._warmup_left == 0:
                self.start()

    def read(self, prefix: str = "train") -> dict[str, float]:
        """Return `{prefix}.total_ips`, `compute_ips`, `data_time`, `compute_time`, and start a new window."""
        window = self._window
        window.seconds = self._clock() - self._window_start
        if self._warmup_left == 0:
            self._epoch.add(window)
        self.start()
        return window.figures(prefix, self.world_size)

    def read_epoch(self, prefix: str = "train") -> dict[str, float]:
        """Return the same figures over all windows of the epoch, and start a new epoch."""
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
    """Return mean and percentiles of latencies: `{prefix}.compute_latency`, `…_at50`, `…_at95`, `…_at99`, `…_at100`.

    A percentile is a measured latency: the smallest that at least p % of the batches do not exceed.
    """
    if not seconds:
        return {}
    ordered = sorted(seconds)
    figures = {f"{prefix}.compute_latency": sum(ordered) / len(ordered)}
    for percent in _PERCENTILES:
        index = math.ceil(percent * len(ordered) / 100) - 1
        figures[f"{prefix}.compute_latency_at{percent}"] = ordered[max(index, 0)]
    return figures
