"""Is a pruned network actually faster? ResNet-50 at half its MACs, with free and with rounded channel counts.

    OMP_NUM_THREADS=2 python benchmarks/pruned_speed.py [--batch-sizes 1 64] [--repeats 15] [--device cuda]
                        [--runtime eager|compile|onnxruntime] [--channels-last] [--dtype bfloat16] [--fuse] [--predict]

Every group keeps the same share of its channels, those with the largest L1 norm; the share is the largest that leaves
at most half of the MACs at widths that `--round-to` allows. All networks are timed in turns (evaluation mode, no
gradients, seconds of whole batches); medians count. The column that matters is

    realised = (seconds before ÷ seconds after) ÷ (MACs before ÷ MACs after)        target: ≥ 0.85

with the range of the rounds' own ratios. On a slow CPU `--batch-sizes 1 8` may replace 1 and 64. `--fuse` first merges
batch norms into their convolutions in all networks, as exporters for inference do. `--predict` adds the latency table's
prediction to the measurement.

`--runtime` selects what runs the network: PyTorch operator by operator, `torch.compile` with frozen weights, or the
ONNX file of `pruning export` in ONNX Runtime. The last two merge elementwise operators into the convolutions.

On a CPU, glibc returns the memory of large maps to the kernel after every operator, and the kernel clears it again at
the next one: half of the time at batch 64. `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000` before the command
stops that; the JSON records such variables.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import statistics
from typing import Any

import numpy as np
import torch
from common.measure import ratios
from common.networks import uniform_cut
from common.report import BenchmarkParser, print_table, write_json
from common.runtimes import RUNTIMES, seconds_in
from torch import Tensor, nn

from explainers.attribution.canonize import fuse_batch_norms
from image_classification.models import create_model
from pruning.costs.cost_model import CostModel
from pruning.costs.latency_table import LatencySettings
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.constraints import Constraints
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups

TARGET = 0.85

Row = dict[str, Any]


@dataclasses.dataclass
class Variant:
    """A network to time.

    Attributes:
        name: Name in the table.
        model: The network.
        macs: MACs of one image.
        num_parameters: Number of parameters of the network.
        share: Share of the prunable channels that it kept.
        predicted: Batch size → speed-up predicted by the latency table.
    """

    name: str
    model: nn.Module
    macs: float
    num_parameters: int
    share: float = 1.0
    predicted: dict[int, float] = dataclasses.field(default_factory=dict)


def make_variants(arguments: argparse.Namespace, images: Tensor) -> list[Variant]:
    """Return the original network, and one pruned with every rounding."""
    dense = create_model(arguments.arch).to(arguments.device)
    if arguments.channels_last:
        dense = dense.to(memory_format=torch.channels_last)
    costs = CostModel(trace_groups(dense, images[:1].float()), dense, images[:1].float(), ("macs", "params"))
    whole = costs.report()
    variants = [Variant("unpruned", dense, whole["macs"], int(whole["params"]))]
    variants += [pruned(arguments, dense, images, round_to) for round_to in arguments.round_to]
    for variant in variants:
        if arguments.fuse:
            variant.model = fuse_batch_norms(variant.model, images[:1].float())
        variant.model.to(getattr(torch, arguments.dtype))
    return variants


def pruned(arguments: argparse.Namespace, dense: nn.Module, images: Tensor, round_to: int) -> Variant:
    """Return a copy of the network at half its MACs."""
    model = copy.deepcopy(dense)
    graph = trace_groups(model, images[:1].float(), constraints=Constraints(round_to=round_to))
    costs = CostModel(graph, model, images[:1].float(), ("macs", "params"))
    keep = uniform_cut(model, graph, costs)
    mask = graph.keep_mask(keep)
    prunable = np.concatenate([group.units for group in graph.prunable])
    share = float(mask[prunable].mean())
    predicted = predictions(arguments, dense, graph, images, mask) if arguments.predict else {}
    prune_channels(model, graph, keep)
    costs.refresh()
    name = "free widths" if round_to == 1 else f"multiples of {round_to}"
    small = costs.report()
    return Variant(name, model, small["macs"], int(small["params"]), share, predicted)


def predictions(
    arguments: argparse.Namespace, dense: nn.Module, graph: ChannelGraph, images: Tensor, mask: np.ndarray
) -> dict[int, float]:
    """Return batch size → speed-up of the pruned network predicted by the latency table."""
    model = copy.deepcopy(dense).to(getattr(torch, arguments.dtype))
    found = {}
    for batch_size in arguments.batch_sizes:
        settings = LatencySettings(batch_size=batch_size, seconds=arguments.table_seconds)
        costs = CostModel(graph, model, images[:1], ("latency",), latency=settings, announce=print)
        found[batch_size] = costs.current("latency") / costs.cost("latency", mask)
    return found


def measure(variants: list[Variant], images: Tensor, repeats: int, runtime: str) -> dict[str, list[float]]:
    """Return seconds per batch of every variant in every round, measured in turns."""
    networks = {variant.name: variant.model for variant in variants}
    return seconds_in(runtime, networks, images, repeats)


def rows_of(variants: list[Variant], seconds: dict[str, list[float]], batch_size: int) -> list[Row]:
    """Return speed-ups with their ranges."""
    rows = []
    base = variants[0]
    base_median = statistics.median(seconds[base.name])
    for variant in variants:
        fewer_macs = base.macs / variant.macs
        by_round = ratios(seconds[base.name], seconds[variant.name])
        median = statistics.median(seconds[variant.name])
        row: Row = {
            "network": variant.name,
            "batch_size": batch_size,
            "gmacs": variant.macs / 1e9,
            "parameters": variant.num_parameters,
            "share_of_channels": variant.share,
            "fewer_macs": fewer_macs,
            "seconds_per_batch": median,
            "images_per_second": batch_size / median,
            "speed_up": base_median / median,
            "realised": base_median / median / fewer_macs,
            "realised_range": [min(by_round) / fewer_macs, max(by_round) / fewer_macs],
        }
        if batch_size in variant.predicted:
            row["predicted_speed_up"] = variant.predicted[batch_size]
            row["prediction_error"] = variant.predicted[batch_size] / row["speed_up"] - 1
        rows.append(row)
    return rows


def print_rows(rows: list[Row]) -> None:
    """Print the table."""
    table = []
    for row in rows:
        low, high = row["realised_range"]
        table.append(
            [
                row["network"],
                str(row["batch_size"]),
                f"{row['gmacs']:.3f}",
                f"{row['fewer_macs']:.3f}",
                f"{row['seconds_per_batch'] * 1e3:.2f}",
                f"{row['speed_up']:.3f}",
                f"{row['realised']:.3f}",
                f"{low:.2f}–{high:.2f}",
                f"{row['prediction_error']:+.1%}" if "prediction_error" in row else "–",
            ]
        )
    columns = [
        "network",
        "batch",
        "GMACs",
        "÷ MACs",
        "ms/batch",
        "speed-up",
        "realised",
        "range",
        "table's error",
    ]
    print_table(columns, table)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, repeats=15)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--runtime", default="eager", choices=tuple(RUNTIMES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--fuse", action="store_true", help="merge batch norms into convolutions first")
    parser.add_argument("--predict", action="store_true", help="also what the latency table expects")
    parser.add_argument("--table-seconds", type=float, default=60.0)
    small = {"arch": "resnet20", "image_size": 32, "batch_sizes": [1], "round_to": [1, 8], "repeats": 2}
    arguments = parser.parse("pruned_speed_{arch}_{device}_{runtime}.json", quick=small)
    if arguments.runtime == "onnxruntime" and (
        arguments.device.type != "cpu" or arguments.dtype != "float32"
    ):
        parser.error("--runtime onnxruntime measures float32 on a CPU")
    return arguments


def main() -> None:
    """Measure, print and write JSON."""
    arguments = parse()
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (max(arguments.batch_sizes), 3, arguments.image_size, arguments.image_size)
    images = torch.randn(shape, generator=generator).to(arguments.device, getattr(torch, arguments.dtype))
    if arguments.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    variants = make_variants(arguments, images)
    rows = []
    for batch_size in arguments.batch_sizes:
        seconds = measure(variants, images[:batch_size], arguments.repeats, arguments.runtime)
        rows += rows_of(variants, seconds, batch_size)
    print_rows(rows)
    allocator = {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}
    write_json(arguments, arguments.repeats, {"allocator": allocator, "target": TARGET, "rows": rows})


if __name__ == "__main__":
    main()
