"""Gain from shrinking masked networks: five well-known networks, with a share of every group's channels zeroed.

    OMP_NUM_THREADS=1 python benchmarks/shrink.py [--share 0.4] [--image-size 224] [--batch-size 1] [--repeats 15]

Each network is masked like the output of programs that prune by masks: rows of convolutions, and scales and shifts of
batch norms are zero, nothing is smaller. `pruning.shrink` then finds the dead channels by itself. The table has MACs,
parameters and latency before and after, and the largest difference of outputs on images that shrinking did not see,
relative to the largest output. Latencies are medians over rounds in which both networks take turns (evaluation mode, no
gradients).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.measure import in_turns, ratios
from common.networks import conditioned_network
from common.report import BenchmarkParser, print_table, write_json
from torch import Tensor, nn

from image_classification.models import inference
from pruning import save_pruned, shrink, trace_groups
from pruning.costs.timing import Stopwatch
from pruning.engine.named_tensors import named_tensors

NETWORKS = ("resnet50", "vgg16_bn", "mobilenet_v2", "torchvision/densenet121", "torchvision/efficientnet_b0")

Row = dict[str, Any]


def mask_channels(model: nn.Module, images: Tensor, share: float, seed: int) -> int:
    """Zero a share of every group's rows, with scale and shift of its batch norms; return the number of channels."""
    graph = trace_groups(model, images)
    rng = np.random.default_rng(seed)
    gone = np.zeros(graph.num_units, dtype=bool)
    for group in graph.prunable:
        gone[rng.permutation(group.units)[: int(share * group.width)]] = True
    tensors = named_tensors(model)
    for axis in graph.axes:
        # Weights that read a channel are kept, as are batch-norm statistics.
        if axis.role != "in" and not axis.tensor.endswith(("running_mean", "running_var")):
            slices = np.flatnonzero((axis.units >= 0) & gone[np.maximum(axis.units, 0)])
            tensors[axis.tensor].data.index_fill_(axis.dim, torch.from_numpy(slices), 0)
    return int(gone.sum())


def seconds_of(masked: nn.Module, smaller: nn.Module, images: Tensor, repeats: int) -> dict[str, list[float]]:
    """Return seconds per batch of both networks in every round."""
    calls = {"masked": lambda: masked(images), "smaller": lambda: smaller(images)}
    with inference(masked, smaller):
        return in_turns(calls, Stopwatch(images.device).read, repeats)


def largest_difference(before: nn.Module, after: nn.Module, images: Tensor) -> float:
    """Return the largest difference of outputs, relative to the largest output (or to 1)."""
    with inference(before, after):
        expected, got = before(images), after(images)
    return float((expected - got).abs().max() / max(1.0, float(expected.abs().max())))


def num_bytes(model: nn.Module) -> int:
    """Return the size of the network's saved file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pth"
        save_pruned(path, model)
        return path.stat().st_size


def measure(arch: str, arguments: argparse.Namespace) -> Row:
    """Measure one row of the table."""
    generator = torch.Generator().manual_seed(arguments.seed)
    images = torch.randn(4, 3, arguments.image_size, arguments.image_size, generator=generator)
    model = conditioned_network(arch, images[:2], arguments.seed).to(arguments.device)
    images = images.to(arguments.device)
    num_masked = mask_channels(model, images[:2], arguments.share, arguments.seed)
    smaller = copy.deepcopy(model)
    begin = time.perf_counter()
    report = shrink(smaller, images[:2])
    taken = time.perf_counter() - begin
    batch = images[:1].expand(arguments.batch_size, -1, -1, -1).contiguous()
    rounds = seconds_of(model, smaller, batch, arguments.repeats)
    seconds = [statistics.median(own) for own in rounds.values()]
    speed_ups = sorted(ratios(rounds["masked"], rounds["smaller"]))
    quarter = len(speed_ups) // 4
    return {
        "network": arch,
        "masked_channels": num_masked,
        "removed_channels": report.num_removed,
        "gmacs": [macs / 1e9 for macs in report.macs],
        "parameters": list(report.num_parameters),
        "num_bytes": [num_bytes(model), num_bytes(smaller)],
        "seconds_per_batch": seconds,
        "speed_up": seconds[0] / seconds[1],
        "speed_up_quartiles": [speed_ups[quarter], speed_ups[-1 - quarter]],
        "max_difference": largest_difference(model, smaller, images[2:]),
        "seconds_to_shrink": taken,
    }


def table_row(row: Row) -> list[str]:
    """Return the cells of one network."""
    parameters = [count / 1e6 for count in row["parameters"]]
    ms = [seconds * 1e3 for seconds in row["seconds_per_batch"]]
    return [
        row["network"],
        f"{row['gmacs'][0]:.2f} → {row['gmacs'][1]:.2f}",
        f"{parameters[0]:.2f} → {parameters[1]:.2f}",
        f"{ms[0]:.1f} → {ms[1]:.1f}",
        f"{row['speed_up']:.2f}",
        f"{row['max_difference']:.1e}",
    ]


def main() -> None:
    """Measure, print and write JSON."""
    parser = BenchmarkParser(__doc__, repeats=15)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--share", type=float, default=0.4, help="of every group's channels that is masked")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=1)
    small = {"networks": ["resnet20"], "image_size": 32, "repeats": 2}
    arguments = parser.parse("shrink.json", quick=small)
    rows = [measure(arch, arguments) for arch in arguments.networks]
    columns = ["network", "GMACs", "M parameters", "ms/batch", "speed-up", "difference"]
    print_table(columns, [table_row(row) for row in rows])
    write_json(arguments, arguments.repeats, {"rows": rows})


if __name__ == "__main__":
    main()
