"""Environment of a measurement: processor, accelerator, versions. Every published result includes it."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from image_classification.host_memory import freed_memory_kept

_PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "numpy", "pillow")


def processor_name() -> str:
    """Return the processor's model name, or the architecture if it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_environment(device: torch.device | None = None) -> dict[str, str | int | float | None]:
    """Return hardware and versions as plain data.

    Args:
        device: Device of the measurement, whose GPU is named.
    """
    versions = {name: _version(name) for name in _PACKAGES}
    gpu = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "freed_memory_kept": freed_memory_kept(),
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version is not None},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
