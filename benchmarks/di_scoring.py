"""Cost of discriminant scoring relative to a forward pass, and its accuracy: all convolutions of ResNet-50 at 224 px.

    OMP_NUM_THREADS=2 python benchmarks/di_scoring.py [--batch-sizes 32 64] [--repeats 5] [--clock wall]

forward            evaluation-mode forward pass of a batch float32, float64   the same pass with LucidPrune's scoring
attached to every convolution's output; the table has
                   (seconds − forward) ÷ forward
published          scores by automatic differentiation through a float32 matrix inverse, layer by layer, as the
                   published code computes them; timed once, on the feature maps

The first three take turns within each repeat. Errors are those against float64 automatic differentiation of R(m), which
is the definition: per layer the maximum over channels of |score − reference| ÷ reference. Images are smooth random
fields, on which the batch norms take their statistics. Peak memory of scoring and of a training step on the same batch
is measured in separate processes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from common.measure import Call, Clock, in_turns, peak_bytes, rerun, spread
from common.networks import conditioned_network, smooth_images
from common.report import BenchmarkParser, print_table, write_json
from torch import Tensor, nn

from image_classification.models import inference
from pruning.criteria.discriminant import (
    PUBLISHED_RIDGE,
    LayerSummary,
    scores_of_layers,
    summarise_layer,
    target_products,
)
from pruning.criteria.taps import Tap, tapped

NUM_CLASSES = 1000
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
TARGET_SHARES = {32: 0.25, 64: 0.4}
TARGET_SHARE_GPU = 0.3
PENDING_BYTES = 256 << 20

Row = dict[str, Any]
Figures = dict[str, float]


class Scorer:
    """Scores every convolution's output during a forward pass, as `pruning.criteria.scoring` does.

    Args:
        model: Network in evaluation mode.
        targets: (N,) labels of the coming images.
        precision: Precision of the scores.
    """

    def __init__(self, model: nn.Module, targets: Tensor, precision: torch.dtype) -> None:
        self.model, self.targets, self.precision = model, targets, precision
        self.pending: dict[str, LayerSummary] = {}
        self.scores: dict[str, Tensor] = {}

    def __call__(self, images: Tensor) -> None:
        """Run one forward pass with scores."""
        names = convolutions(self.model)
        taps = [Tap(name, "output", 0, functools.partial(self._take, name)) for name in names]
        with tapped(self.model, taps):
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
    """Return the names of all convolutions."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def derivative_scores(features: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute |∂R/∂m| by automatic differentiation through an inverse: in float64 the definition, in float32 as
    published.

    Args:
        features: (N, C, H, W).
        targets: (N,).
        dtype: Type of the arithmetic.

    Returns:
        (C,) scores.
    """
    maps = features.to(dtype).flatten(2)
    labels = F.one_hot(targets, NUM_CLASSES).to(dtype)
    labels = labels - labels.mean(0)
    mask = torch.ones(maps.shape[1], dtype=dtype, device=maps.device, requires_grad=True)
    # One row per image: its centred features, each channel times its gate. R = tr(Lᵀ (K + ridge·I)⁻¹ L).
    rows = ((maps - maps.mean(0)) * mask[None, :, None]).flatten(1)
    kernel = rows @ rows.T + PUBLISHED_RIDGE * torch.eye(len(rows), dtype=dtype, device=maps.device)
    residual = torch.trace(labels.T @ torch.linalg.inv(kernel) @ labels)
    return torch.autograd.grad(residual, mask)[0].abs()


def relative_error(scores: Tensor, reference: Tensor) -> float:
    """Return the largest relative error over the channels with non-zero scores."""
    live = reference > 0
    if not live.any():
        return 0.0
    return float(((scores.double() - reference).abs()[live] / reference[live]).max())


def network_and_batch(arguments: argparse.Namespace, batch_size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the network, images (N, 3, H, W) and targets (N,), on the device."""
    seed, device = arguments.seed, arguments.device
    model = conditioned_network(arguments.arch, smooth_images(16, arguments.image_size, seed + 1), seed)
    images = smooth_images(batch_size, arguments.image_size, seed + 2).to(device)
    generator = torch.Generator().manual_seed(seed + 3)
    targets = torch.randint(0, NUM_CLASSES, (batch_size,), generator=generator)
    return model.to(device), images, targets.to(device)


def measure(arguments: argparse.Namespace, batch_size: int) -> Row:
    """Measure seconds, shares and errors for one batch size."""
    model, images, targets = network_and_batch(arguments, batch_size)
    clock = Clock(arguments.device, processor_time=arguments.clock == "cpu")
    scorers = {name: Scorer(model, targets, precision) for name, precision in PRECISIONS.items()}
    calls: dict[str, Call] = {"forward": lambda: model(images)}
    for name, scorer in scorers.items():
        calls[name] = functools.partial(scorer, images)
    with inference(model):
        seconds = in_turns(calls, clock.seconds, arguments.repeats)
    published, errors = check_and_time_published(model, images, targets, scorers, clock)
    forward = seconds["forward"]
    shares, fastest = {}, {}
    for name in scorers:
        # Pair measurements adjacent in time: whatever slows one slows the other.
        pairs = zip(seconds[name], forward, strict=True)
        shares[name] = spread([(scored - plain) / plain for scored, plain in pairs])
        fastest[name] = min(seconds[name]) / min(forward) - 1
    shares["published"] = spread([published / statistics.median(forward)])
    fastest["published"] = published / min(forward)
    target = TARGET_SHARES.get(batch_size) if arguments.device.type == "cpu" else TARGET_SHARE_GPU
    return {
        "batch_size": batch_size,
        "seconds": seconds | {"published": [published]},
        "share_of_forward": shares,
        "share_of_forward_by_fastest": fastest,
        "target_share": target,
        "max_relative_error": {name: max(of_layer.values()) for name, of_layer in errors.items()},
        "median_relative_error": {
            name: statistics.median(of_layer.values()) for name, of_layer in errors.items()
        },
        "relative_error_by_layer": errors,
    }


def check_and_time_published(
    model: nn.Module, images: Tensor, targets: Tensor, scorers: dict[str, Scorer], clock: Clock
) -> tuple[float, dict[str, Figures]]:
    """Return the published method's seconds over all layers, and the errors of every method by layer."""
    errors: dict[str, Figures] = {name: {} for name in (*scorers, "published")}
    total = 0.0

    def compare(name: str, features: Tensor) -> None:
        nonlocal total
        with torch.enable_grad():
            maps = features.detach().clone()
            reference = derivative_scores(maps, targets, torch.float64)
            begin = clock.now()
            published = derivative_scores(maps, targets, torch.float32)
            total += clock.now() - begin
        errors["published"][name] = relative_error(published, reference)
        for way, scorer in scorers.items():
            errors[way][name] = relative_error(scorer.scores[name], reference)

    taps = [Tap(name, "output", 0, functools.partial(compare, name)) for name in convolutions(model)]
    with tapped(model, taps), torch.no_grad():
        model(images)
    return total, errors


def peak_memory(arguments: argparse.Namespace) -> int:
    """Return this process's peak bytes with a training step ("train"), with scoring ("float32", "float64") or
    neither.
    """
    model, images, targets = network_and_batch(arguments, arguments.batch_sizes[0])
    if arguments.memory_of == "train":
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.9)
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
    elif arguments.memory_of != "none":
        with torch.no_grad():
            Scorer(model, targets, PRECISIONS[arguments.memory_of])(images)
    return peak_bytes(arguments.device)


def measure_memory(batch_size: int) -> Row:
    """Return peaks, each of a fresh process, and their ratios to training."""
    peaks = {}
    for work in ("none", "train", *PRECISIONS):
        peaks[work] = int(rerun("--memory-of", work, "--batch-sizes", str(batch_size)))
    shares = {name: peaks[name] / peaks["train"] for name in PRECISIONS}
    return {"batch_size": batch_size, "peak_bytes": peaks, "ratio_to_training": shares}


def print_tables(speed: list[Row], memory: list[Row]) -> None:
    """Print shares, errors and peaks."""
    rows = []
    for row in speed:
        for way, share in row["share_of_forward"].items():
            rows.append(
                [
                    str(row["batch_size"]),
                    way,
                    f"{share['median']:.3f}",
                    f"{share['min']:.3f} … {share['max']:.3f}",
                    f"{row['share_of_forward_by_fastest'][way]:.3f}",
                    f"{row['max_relative_error'][way]:.1e}",
                    f"{row['median_relative_error'][way]:.1e}",
                    str(row["target_share"] or "–"),
                ]
            )
    columns = [
        "N",
        "way",
        "÷ forward",
        "range",
        "fastest",
        "largest error",
        "median error",
        "target ÷ forward",
    ]
    print_table(columns, rows, num_names=2)
    for row in memory:
        peaks = ", ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in row["peak_bytes"].items())
        shares = ", ".join(f"{name} {value:.2f}" for name, value in row["ratio_to_training"].items())
        print(f"peak memory at N = {row['batch_size']}: {peaks}; scoring ÷ training: {shares} (target 1.0)")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, repeats=5)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor seconds, with one thread the fair measure on a machine that others load",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory rows")
    parser.add_argument(
        "--memory-of", choices=("none", "train", *PRECISIONS), help="print one peak in bytes, and end"
    )
    small = {"arch": "resnet20", "image_size": 32, "batch_sizes": [8], "repeats": 1}
    return parser.parse("di_scoring_{device}_{clock}.json", quick=small)


def main() -> None:
    """Measure, print and write JSON."""
    arguments = parse()
    if arguments.memory_of:
        print(peak_memory(arguments))
        return
    speed = [measure(arguments, size) for size in arguments.batch_sizes]
    memory = [] if arguments.no_memory else [measure_memory(size) for size in arguments.batch_sizes]
    print_tables(speed, memory)
    write_json(arguments, arguments.repeats, {"speed": speed, "memory": memory})


if __name__ == "__main__":
    main()
