"""Resources used by a run: the GPU's utilisation, memory, power and energy (NVML); CPU and memory.

A thread samples the process's own GPU about once a second, and keeps sums; the training loop reads the means at logging
steps. Without a GPU, a driver or the module `pynvml` the GPU's figures are silently absent.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType

import torch

from image_classification.nvml import open_gpu
from image_classification.observe.figures import Figure, register_figures

_GIB = 2**30

register_figures("train", {"joules_per_image": Figure(".4f", "J")})
register_figures("process", {"cpu_cores": Figure(".2f", "cores"), "memory_gib": Figure(".2f", "GiB")})
register_figures(
    "gpu",
    {
        "util": Figure(".1f", "%"),
        "memory_gib": Figure(".2f", "GiB"),
        "peak_memory_gib": Figure(".2f", "GiB"),
        "power_w": Figure(".1f", "W"),
        "temperature_c": Figure(".1f", "°C"),
    },
)


class Monitor:
    """Measures this process and its GPU.

    Args:
        device: Device of the process; only a CUDA device has GPU figures.
        interval: Seconds between two samples.

    Example:
        with Monitor(device) as monitor:
            …
            logger.log(step, figures | monitor.read(num_images))
    """

    def __init__(self, device: torch.device, interval: float = 1.0) -> None:
        opened = open_gpu(device)
        self._gpu = None if opened is None else _Gpu(*opened)
        self._interval = interval
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._energy = self._gpu.energy() if self._gpu else None
        self._read_time = time.monotonic()
        self._cpu_seconds = _cpu_seconds()
        self._thread: threading.Thread | None = None
        if self._gpu is not None:
            self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
            self._thread.start()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        assert self._gpu is not None
        while not self._stop.is_set():
            sample = self._gpu.sample()
            with self._lock:
                for key, value in sample.items():
                    self._sums[key] = self._sums.get(key, 0.0) + value
                    self._counts[key] = self._counts.get(key, 0) + 1
            self._stop.wait(self._interval)

    def restart(self) -> None:
        """Start another phase: earlier samples, such as those of a validation, are left out of later readings."""
        self.read()

    def read(self, num_images: int = 0) -> dict[str, float]:
        """Return means since the last call.

        Args:
            num_images: Number of images that this process handled in that time, for the energy per image.

        Returns:
            `process.cpu_cores` (CPU seconds of this process and its ended children per second) and
            `process.memory_gib` (currently resident); with a GPU `gpu.util` (%), `gpu.memory_gib`, `gpu.power_w`,
            `gpu.temperature_c`, and `train.joules_per_image` of this process's GPU.
        """
        now = time.monotonic()
        cpu_seconds = _cpu_seconds()
        seconds = max(now - self._read_time, 1e-9)
        figures = {
            "process.cpu_cores": (cpu_seconds - self._cpu_seconds) / seconds,
            "process.memory_gib": _resident_bytes() / _GIB,
        }
        self._read_time = now
        self._cpu_seconds = cpu_seconds
        if self._gpu is None:
            return figures
        with self._lock:
            figures |= {key: total / self._counts[key] for key, total in self._sums.items()}
            self._sums = {}
            self._counts = {}
        joules = self._joules(seconds, figures.get("gpu.power_w"))
        if num_images > 0 and joules is not None:
            figures["train.joules_per_image"] = joules / num_images
        return figures

    def _joules(self, seconds: float, power: float | None) -> float | None:
        """Return the energy since the last reading: from the GPU's counter, or power × time if it has none."""
        assert self._gpu is not None
        before, self._energy = self._energy, self._gpu.energy()
        if before is not None and self._energy is not None:
            return self._energy - before
        return None if power is None else power * seconds

    def close(self) -> None:
        """Stop sampling and release NVML."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._gpu is not None:
            self._gpu.close()
            self._gpu = None


class _Gpu:
    """A GPU, accessed through NVML. Figures that this GPU lacks are left out of the samples."""

    def __init__(self, nvml: ModuleType, handle: object) -> None:
        self._nvml = nvml
        self._handle = handle

    def sample(self) -> dict[str, float]:
        nvml, handle = self._nvml, self._handle
        readings: dict[str, Callable[[], float]] = {
            "gpu.util": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "gpu.memory_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / _GIB,
            "gpu.power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "gpu.temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        }
        sample = {}
        for key, reading in readings.items():
            try:
                sample[key] = float(reading())
            except nvml.NVMLError:
                continue
        return sample

    def energy(self) -> float | None:
        """Return the joules since the driver was loaded; None if the GPU does not count them."""
        try:
            millijoules: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError:
            return None
        return millijoules / 1000

    def close(self) -> None:
        self._nvml.nvmlShutdown()


def _cpu_seconds() -> float:
    """Return the CPU time of this process and its ended children, in seconds."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _resident_bytes() -> int:
    """Return the memory that this process holds now; its peak if there is no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
