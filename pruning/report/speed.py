"""Speed of two networks, measured side by side: they take turns, so that a busy machine slows both equally."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch
from torch import nn

from image_classification.inference_speed import speed_images, speed_row, time_batches
from image_classification.observe.monitor import Monitor
from image_classification.plain_data import Plain
from image_classification.precision import MemoryFormat, Precision, PrecisionConfig
from pruning.report.networks import Network

_ROUNDS = 5
_WARMUP = 3
#: Smallest number of images for counting energy: NVML's counter updates about ten times a second.
_ENERGY_IMAGES = 4096


def compare_speed(
    networks: Sequence[Network],
    image_size: int,
    device: torch.device,
    *,
    batch_sizes: Sequence[int],
    num_batches: int,
    memory_format: MemoryFormat = PrecisionConfig.memory_format,
) -> list[Plain]:
    """Measure latency and throughput.

    Args:
        networks: Networks to measure.
        image_size: Side of the images in pixels.
        device: Device to compute on, in float32.
        batch_sizes: Images per batch.
        num_batches: Number of timed batches, per network and batch size.
        memory_format: `nchw` or `nhwc`.

    Returns:
        A row per batch size and network: `network`, `num_batches`, `load` (runnable processes per core meanwhile; None
            if the system does not report it), the fields of `inference_speed.SpeedRow` (seconds per batch) and, if NVML
            reports it, `joules_per_image`.
    """
    precision = Precision(PrecisionConfig(memory_format=memory_format), device)
    placed = {network.name: precision.place(network.model).eval() for network in networks}
    rows = []
    for batch_size in batch_sizes:
        images = speed_images(batch_size, image_size, precision)
        seconds: dict[str, list[float]] = {name: [] for name in placed}
        for model in placed.values():
            time_batches(model, images, precision, _WARMUP)
        for turn in range(_ROUNDS):
            share = num_batches * (turn + 1) // _ROUNDS - num_batches * turn // _ROUNDS
            for name, model in placed.items():
                if share:
                    seconds[name] += time_batches(model, images, precision, share)
        for name, model in placed.items():
            row = {
                "network": name,
                "num_batches": len(seconds[name]),
                "load": _load(),
                **dataclasses.asdict(speed_row(batch_size, seconds[name])),
            }
            energy = _joules_per_image(model, images, precision)
            rows.append(row if energy is None else {**row, "joules_per_image": energy})
    return rows


def _load() -> float | None:
    """Return the number of processes running or waiting to run, per core, averaged over the last minute."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


def _joules_per_image(model: nn.Module, images: torch.Tensor, precision: Precision) -> float | None:
    """Return the GPU's energy per image; None without a GPU or if NVML does not report it."""
    if precision.device.type != "cuda":
        return None
    num_batches = -(-_ENERGY_IMAGES // len(images))
    with Monitor(precision.device, interval=0.1) as monitor:
        monitor.read()
        time_batches(model, images, precision, num_batches)
        return monitor.read(num_batches * len(images)).get("train.joules_per_image")
