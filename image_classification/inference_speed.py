"""Latency and throughput of inference over batch sizes: `python -m image_classification benchmark`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from image_classification.command_parser import positive
from image_classification.config import check
from image_classification.device_flag import declare_device, device_named
from image_classification.file_writing import output_path, write_text
from image_classification.models import arch_info, create_model, identity_of, model_for_weights
from image_classification.observe.environment import describe_environment
from image_classification.observe.meters import latency_figures
from image_classification.precision import MemoryFormat, Precision, PrecisionConfig
from image_classification.verbs import declared


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """Speed at one batch size; latencies in seconds per batch, `ips` in images per second."""

    batch_size: int
    ips: float
    mean: float
    p50: float
    p95: float
    p99: float
    slowest: float


@torch.inference_mode()
def measure_speed(
    model: nn.Module,
    batch_size: int,
    image_size: int,
    precision: Precision,
    *,
    num_batches: int = 50,
    num_warmup: int = 5,
) -> SpeedRow:
    """Time forward passes on random images.

    Args:
        model: The network, already placed (`precision.place`); it is set to evaluation mode.
        batch_size: Images per batch.
        image_size: Side of the images in pixels.
        precision: Device, autocast, memory format, compilation.
        num_batches: Number of timed batches.
        num_warmup: Number of untimed batches before, for compilation and the choice of kernels.

    Returns:
        Figures over `num_batches`; syncs with the device after every batch, as a serving process does.
    """
    images = speed_images(batch_size, image_size, precision)
    forward = precision.compiled(model.eval())
    time_batches(forward, images, precision, num_warmup)
    return speed_row(batch_size, time_batches(forward, images, precision, num_batches))


def speed_images(batch_size: int, image_size: int, precision: Precision) -> torch.Tensor:
    """Return a batch of noise, (batch_size, 3, image_size, image_size), in the network's input format."""
    images = torch.randn(batch_size, 3, image_size, image_size, device=precision.device)
    return images.contiguous(memory_format=precision.memory_format)


@torch.inference_mode()
def time_batches(
    forward: Callable[[torch.Tensor], object], images: torch.Tensor, precision: Precision, num_batches: int
) -> list[float]:
    """Return the seconds of each forward pass; syncs with the device after every one."""
    seconds: list[float] = []
    for _ in range(num_batches):
        begin = time.perf_counter()
        with precision.autocast():
            forward(images)
        if precision.device.type == "cuda":
            torch.cuda.synchronize(precision.device)
        seconds.append(time.perf_counter() - begin)
    return seconds


def speed_row(batch_size: int, seconds: Sequence[float]) -> SpeedRow:
    """Summarise timed batches."""
    figures = latency_figures(list(seconds), "x")
    at = {percent: figures[f"x.compute_latency_at{percent}"] for percent in (50, 95, 99, 100)}
    mean = figures["x.compute_latency"]
    return SpeedRow(batch_size, batch_size / mean, mean, at[50], at[95], at[99], at[100])


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--arch", "-a", default=None, help="network; not needed with a LucidPrune checkpoint")
    parser.add_argument(
        "--checkpoint", type=Path, default=None, help="weights, pruned ones too; random if left out"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--image-size", type=positive, default=None, help="default: the architecture's")
    parser.add_argument("--num-batches", type=int, default=50, help="batches that count, per batch size")
    declare_device(parser)
    parser.add_argument("--amp", action="store_true", help="fp16 on GPUs, bf16 on CPUs")
    parser.add_argument(
        "--memory-format", choices=get_args(MemoryFormat), default=PrecisionConfig.memory_format
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument(
        "--json", type=output_path, default=None, metavar="FILE", help="write the figures there as well"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure the speed, print a table and write JSON."""
    check(arguments.arch or arguments.checkpoint, "give --arch, --checkpoint, or both")
    check(min(arguments.batch_sizes) >= 1, f"--batch-sizes {arguments.batch_sizes}: each must be at least 1")
    check(arguments.num_batches >= 1, f"--num-batches {arguments.num_batches}: must be at least 1")
    settings = PrecisionConfig(
        amp=arguments.amp, memory_format=arguments.memory_format, compile=arguments.compile
    )
    precision = Precision(settings, device_named(arguments.device))
    model, arch = _network(arguments)
    size = arguments.image_size or arch_info(arch).image_size
    model = precision.place(model)
    rows = [
        measure_speed(model, batch_size, size, precision, num_batches=arguments.num_batches)
        for batch_size in arguments.batch_sizes
    ]
    print(f"{arch} at {size} px on {arguments.device}; milliseconds per batch")
    print(f"{'batch':>6} {'images/s':>10} {'mean':>9} {'p50':>9} {'p95':>9} {'p99':>9} {'slowest':>9}")
    for row in rows:
        times = " ".join(
            f"{1000 * value:9.2f}" for value in (row.mean, row.p50, row.p95, row.p99, row.slowest)
        )
        print(f"{row.batch_size:>6} {row.ips:>10.1f} {times}")
    if arguments.json is not None:
        report: dict[str, object] = {
            "arch": arch,
            "image_size": size,
            "settings": dataclasses.asdict(settings),
            "num_batches": arguments.num_batches,
            "rows": [dataclasses.asdict(row) for row in rows],
            "environment": describe_environment(precision.device),
        }
        write_text(arguments.json, json.dumps(report, indent=2) + "\n")
    return 0


def _network(arguments: argparse.Namespace) -> tuple[nn.Module, str]:
    """Return the network and its architecture's name."""
    if arguments.checkpoint is None:
        return create_model(arguments.arch, image_size=arguments.image_size), arguments.arch
    model = model_for_weights(arguments.arch, arguments.checkpoint, image_size=arguments.image_size)
    identity = identity_of(model)
    return model, arguments.arch or (identity.arch if identity is not None else "")


VERB = declared(declare, run)
