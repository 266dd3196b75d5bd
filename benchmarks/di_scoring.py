"""Speed, accuracy and memory of discriminant scoring on ResNet-50 at 224, all 53 convolutions.

    OMP_NUM_THREADS=2 python benchmarks/di_scoring.py [--batch-sizes 32 64] [--repeats 5] [--device cuda]

Rows, every one measured in turn within each repeat so that a busy machine hits all alike:

    forward         evaluation-mode forward pass of the batch
    float32, float64   the same forward with our scoring of every convolution's output attached; its share is
                    (seconds − forward) ÷ forward
    published       scores by automatic differentiation through a float32 matrix inverse, layer by layer, as the
                    published code does; timed on the stored feature maps

Errors are against float64 automatic differentiation of R(m), the definition, per layer: max over channels of
|score − reference| ÷ reference. Pictures are smooth random fields; batch norms are calibrated on some of them.
Memory is measured in processes of its own: peak of a training step and of scoring, same batch.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pruning.criteria.discriminant import (
    PUBLISHED_RIDGE,
    LayerSummary,
    scores_of_layers,
    summarise_layer,
    target_products,
)
from pruning.hooks import Tap, tapped

RESULTS = Path(__file__).resolve().parent / "results"
NUM_CLASSES = 1000
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
TARGET_SHARES = {32: 0.25, 64: 0.4}
PENDING_BYTES = 256 << 20


def make_pictures(num_images: int, seed: int, size: int = 224) -> Tensor:
    """Smooth random pictures (N, 3, size, size) with the falling spectrum of photographs."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.zeros(num_images, 3, size, size)
    for cells in (4, 8, 16, 32, 64, 112):
        noise = torch.randn(num_images, 3, cells, cells, generator=generator) * (8 / cells) ** 0.5
        pictures += F.interpolate(noise, size=size, mode="bilinear")
    return pictures


def make_network(device: torch.device) -> nn.Module:
    """ResNet-50 with random weights and batch norms that have seen pictures."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).to(device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(make_pictures(16, seed=1).to(device))
    return model.eval()


class Scorer:
    """Scores of every convolution's output during a forward pass, as `pruning.scoring` makes them."""

    def __init__(self, model: nn.Module, targets: Tensor, precision: torch.dtype) -> None:
        self.model, self.targets, self.precision = model, targets, precision
        self.pending: dict[str, LayerSummary] = {}
        self.scores: dict[str, Tensor] = {}

    def __call__(self, images: Tensor) -> None:
        """One forward pass with scores."""
        with tapped(
            self.model,
            [Tap(n, "output", 0, functools.partial(self._take, n)) for n in convolutions(self.model)],
        ):
            self.model(images)
        self._flush()

    def _take(self, name: str, features: Tensor) -> None:
        self.pending[name] = summarise_layer(features, self.precision)
        if sum(summary.nbytes for summary in self.pending.values()) > PENDING_BYTES:
            self._flush()

    def _flush(self) -> None:
        gram = target_products(self.targets, len(self.targets))
        found, _ = scores_of_layers(list(self.pending.values()), gram, PUBLISHED_RIDGE)
        self.scores.update(zip(self.pending, found, strict=True))
        self.pending = {}


def convolutions(model: nn.Module) -> list[str]:
    """Names of all convolutions."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def derivative_scores(features: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """|∂R/∂m| by automatic differentiation through an inverse: in float64 the definition, in float32 as published."""
    maps = features.to(dtype).flatten(2)
    labels = F.one_hot(targets, NUM_CLASSES).to(dtype)
    labels = labels - labels.mean(0)
    mask = torch.ones(maps.shape[1], dtype=dtype, device=maps.device, requires_grad=True)
    rows = ((maps - maps.mean(0)) * mask[None, :, None]).flatten(1)
    kernel = rows @ rows.T + PUBLISHED_RIDGE * torch.eye(len(rows), dtype=dtype, device=maps.device)
    residual = torch.trace(labels.T @ torch.linalg.inv(kernel) @ labels)
    return torch.autograd.grad(residual, mask)[0].abs()


def timed(work: Callable[[], Any], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def relative_error(scores: Tensor, reference: Tensor) -> float:
    """Largest relative error over the channels that have a score at all."""
    live = reference > 0
    return float(((scores.double() - reference).abs()[live] / reference[live]).max()) if live.any() else 0.0


def measure(batch_size: int, repeats: int, device: torch.device, clock: Clock) -> dict[str, Any]:
    """All rows for one batch size."""
    model = make_network(device)
    images = make_pictures(batch_size, seed=2).to(device)
    targets = torch.randint(0, NUM_CLASSES, (batch_size,), generator=torch.Generator().manual_seed(3)).to(
        device
    )
    scorers = {
        "float32": Scorer(model, targets, torch.float32),
        "float64": Scorer(model, targets, torch.float64),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("forward", *scorers, "published")}
    with torch.no_grad():
        model(images)
        for _ in range(repeats):
            seconds["forward"].append(timed(lambda: model(images), device, clock))
            for name, scorer in scorers.items():
                seconds[name].append(timed(functools.partial(scorer, images), device, clock))
    errors = check_and_time_published(model, images, targets, scorers, seconds["published"], device, clock)
    forward = seconds["forward"]
    # Differences of neighbours in time: what slows one slows the other.
    shares = {name: [(s - f) / f for s, f in zip(seconds[name], forward, strict=True)] for name in scorers}
    shares["published"] = [s / statistics.median(forward) for s in seconds["published"]]
    return {
        "batch_size": batch_size,
        "seconds": seconds,
        "share_of_forward": {
            name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in shares.items()
        },
        "share_of_forward_by_fastest": {n: min(seconds[n]) / min(forward) - 1 for n in scorers}
        | {"published": min(seconds["published"]) / min(forward)},
        "target_share": TARGET_SHARES.get(batch_size) if device.type == "cpu" else 0.3,
        "max_relative_error": {n: max(e.values()) for n, e in errors.items()},
        "median_relative_error": {n: statistics.median(e.values()) for n, e in errors.items()},
        "relative_error_by_layer": errors,
    }


def check_and_time_published(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    scorers: dict[str, Scorer],
    published_seconds: list[float],
    device: torch.device,
    clock: Clock,
) -> dict[str, dict[str, float]]:
    """Errors of every way per layer; the published way's seconds over all layers are appended to the list."""
    errors: dict[str, dict[str, float]] = {name: {} for name in (*scorers, "published")}
    total = 0.0

    def compare(name: str, features: Tensor) -> None:
        nonlocal total
        with torch.enable_grad():
            maps = features.detach().clone()
            reference = derivative_scores(maps, targets, torch.float64)
            found: list[Tensor] = []
            total += timed(
                lambda: found.append(derivative_scores(maps, targets, torch.float32)), device, clock
            )
        errors["published"][name] = relative_error(found[0], reference)
        for way, scorer in scorers.items():
            errors[way][name] = relative_error(scorer.scores[name], reference)

    taps = [Tap(name, "output", 0, functools.partial(compare, name)) for name in convolutions(model)]
    with tapped(model, taps), torch.no_grad():
        model(images)
    published_seconds.append(total)
    return errors


def peak_memory(work: str, batch_size: int, device: torch.device) -> int:
    """Peak bytes of a training step ("train"), scoring ("float32", "float64") or the network alone ("none").

    Run in a process of its own; on CPUs the peak of the resident set.
    """
    model = make_network(device)
    images = make_pictures(batch_size, seed=2).to(device)
    targets = torch.randint(0, NUM_CLASSES, (batch_size,), generator=torch.Generator().manual_seed(3)).to(
        device
    )
    if work == "train":
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.9)
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
    elif work != "none":
        with torch.no_grad():
            Scorer(model, targets, getattr(torch, work))(images)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(batch_size: int, device: torch.device) -> dict[str, Any]:
    """Peaks, each from a fresh process, and the ratios to training."""
    peaks = {}
    for work in ("none", "train", "float32", "float64"):
        command = [
            sys.executable,
            __file__,
            "--peak-of",
            work,
            "--batch-sizes",
            str(batch_size),
            "--device",
            str(device),
        ]
        peaks[work] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratios = {name: peaks[name] / peaks["train"] for name in ("float32", "float64")}
    return {"batch_size": batch_size, "peak_bytes": peaks, "ratio_to_training": ratios}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    cpu_info = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpu_info.exists():
        models = [
            line.split(":", 1)[1].strip()
            for line in cpu_info.read_text().splitlines()
            if "model name" in line
        ]
        name = models[0] if models else name
    return {
        "device": name,
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def print_tables(rows: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    """The results for people."""
    columns = ("÷ forward: median", "min … max", "fastest", "max error", "median")
    print(
        f"{'N':>4} {'way':>10} {columns[0]:>18} {columns[1]:>16} {columns[2]:>8} {columns[3]:>10} {columns[4]:>9}"
    )
    for row in rows:
        for way, share in row["share_of_forward"].items():
            print(
                f"{row['batch_size']:>4} {way:>10} {share['median']:>18.3f} {share['min']:>7.3f} …{share['max']:>7.3f} "
                f"{row['share_of_forward_by_fastest'][way]:>8.3f} {row['max_relative_error'][way]:>10.1e} "
                f"{row['median_relative_error'][way]:>9.1e}"
            )
        print(f"     target {row['target_share']}, error 1e-5")
    for row in memory:
        peaks = ", ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in row["peak_bytes"].items())
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in row["ratio_to_training"].items())
        print(f"{row['batch_size']:>4} peak memory: {peaks}; scoring ÷ training: {ratios} (target 1.0)")


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: processor seconds, with OMP_NUM_THREADS=1 the fair measure on a machine that others load.",
    )
    parser.add_argument("--no-memory", action="store_true", help="Leave out the memory rows.")
    parser.add_argument(
        "--peak-of", choices=("none", "train", "float32", "float64"), help="Print one peak and stop."
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.peak_of:
        print(peak_memory(args.peak_of, args.batch_sizes[0], device))
        return
    rows = [measure(size, args.repeats, device, CLOCKS[args.clock]) for size in args.batch_sizes]
    memory = [] if args.no_memory else [measure_memory(size, device) for size in args.batch_sizes]
    print_tables(rows, memory)
    RESULTS.mkdir(exist_ok=True)
    sizes = "_".join(f"n{size}" for size in args.batch_sizes)
    path = RESULTS / f"di_scoring_{device.type}_{sizes}_{torch.get_num_threads()}threads_{args.clock}.json"
    path.write_text(
        json.dumps(
            {"machine": describe_machine(device), "clock": args.clock, "speed": rows, "memory": memory},
            indent=1,
        )
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
