"""Is a pruned network really faster? ResNet-50 at half its MACs, channel counts free and rounded.

    OMP_NUM_THREADS=2 python benchmarks/pruned_speed.py [--batch-sizes 1 64] [--repeats 15] [--device cuda]
                        [--runtime eager|compile|onnxruntime] [--channels-last] [--dtype bfloat16] [--fuse] [--predict]

Every group keeps the same share of its channels, those with the largest L1 norm; the share is the largest that
leaves at most half of the MACs at widths that `--round-to` allows. All networks are timed in turn within each
round (evaluation mode, no gradients, seconds of whole batches), medians count. The row that matters is

    realised = (seconds before ÷ seconds after) ÷ (MACs before ÷ MACs after)        target: ≥ 0.85

with the smallest and largest of the rounds' own ratios as its range. On a slow CPU `--batch-sizes 1 8` may stand
for 1 and 64; the JSON says what was run. `--fuse` merges batch norms into their convolutions first, in all networks
alike, as exporters for inference do. `--predict` puts the latency table's prediction beside the measurement.

`--runtime` says what runs the network: PyTorch operator by operator, `torch.compile` with frozen weights, or the ONNX
file of `pruning export` in ONNX Runtime. The last two merge what works element by element into the convolutions.

On a CPU, glibc gives the memory of large maps back after every operator, and the kernel clears it again at the next:
half of the time at batch 64. `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000` before the command stops that.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from explainers.canonize import fuse_batch_norms
from image_classification.models import create_model
from pruning.channel_graph import ChannelGraph, Constraints
from pruning.cost import CostModel, LatencySettings
from pruning.costs.timing import Call, Stopwatch, inference
from pruning.export import export_network
from pruning.graph import trace_groups
from pruning.surgery import prune_channels

RESULTS = Path(__file__).resolve().parent / "results"
SHARE_OF_MACS = 0.5
TARGET = 0.85


@dataclasses.dataclass
class Variant:
    """A network to time: its name, its size, and the speed-up that the latency table expects per batch size."""

    name: str
    model: nn.Module
    macs: float
    num_parameters: int
    share: float = 1.0
    predicted: dict[int, float] = dataclasses.field(default_factory=dict)


def l1_order(model: nn.Module, graph: ChannelGraph) -> dict[int, np.ndarray]:
    """Positions of every prunable group, largest L1 norm of its producing layers first."""
    orders = {}
    for group in graph.prunable:
        scores = np.zeros(group.width)
        for member in graph.members(group):
            if member.role == "out":
                weights = model.get_parameter(member.tensor).detach().float()
                norms = weights.abs().movedim(member.dim, 0).flatten(1).sum(1).cpu().numpy()
                inside = member.positions >= 0
                np.add.at(scores, member.positions[inside], norms[inside])
        orders[group.index] = np.argsort(-scores, kind="stable")
    return orders


def uniform_mask(graph: ChannelGraph, orders: dict[int, np.ndarray], share: float) -> np.ndarray:
    """Every group keeps its best units, at the allowed width nearest to this share."""
    mask = np.ones(graph.num_units, dtype=bool)
    for group in graph.prunable:
        widths = np.array(graph.allowed_widths(group))
        width = int(widths[np.abs(widths - share * group.width).argmin()])
        mask[group.units[orders[group.index][width:]]] = False
    return mask


def largest_share(graph: ChannelGraph, costs: CostModel, orders: dict[int, np.ndarray]) -> float:
    """The largest common share of channels that leaves at most half of the MACs."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        met = costs.cost("macs", uniform_mask(graph, orders, middle)) <= SHARE_OF_MACS * costs.baseline(
            "macs"
        )
        low, high = (middle, high) if met else (low, middle)
    return low


def make_variants(args: argparse.Namespace, images: Tensor) -> list[Variant]:
    """The network as it is, and pruned with every rounding."""
    torch.manual_seed(args.seed)
    dense = create_model(args.arch).to(args.device)
    if args.channels_last:
        dense = dense.to(memory_format=torch.channels_last)
    variants: list[Variant] = []
    for round_to in args.round_to:
        model = copy.deepcopy(dense)
        graph = trace_groups(model, images[:1].float(), constraints=Constraints(round_to=round_to))
        costs = CostModel(graph, model, images[:1].float(), ("macs", "params"))
        orders = l1_order(model, graph)
        share = largest_share(graph, costs, orders)
        mask = uniform_mask(graph, orders, share)
        if not variants:
            variants.append(Variant("unpruned", dense, costs.baseline("macs"), int(costs.baseline("params"))))
        predicted = predictions(args, dense, graph, images, mask) if args.predict else {}
        prune_channels(model, graph, {g.index: np.flatnonzero(mask[g.units]) for g in graph.prunable})
        costs.refresh()
        name = "free widths" if round_to == 1 else f"multiples of {round_to}"
        small = costs.report()
        variants.append(Variant(name, model, small["macs"], int(small["params"]), share, predicted))
    dtype = getattr(torch, args.dtype)
    for variant in variants:
        if args.fuse:
            variant.model = fuse_batch_norms(variant.model, images[:1].float())
        variant.model.to(dtype)
    return variants


def predictions(
    args: argparse.Namespace, dense: nn.Module, graph: ChannelGraph, images: Tensor, mask: np.ndarray
) -> dict[int, float]:
    """Batch size → speed-up of the pruned network that the latency table expects."""
    model, found = copy.deepcopy(dense).to(getattr(torch, args.dtype)), {}
    for batch_size in args.batch_sizes:
        settings = LatencySettings(batch_size=batch_size, seconds=args.table_seconds)
        costs = CostModel(graph, model, images[:1], ("latency",), latency=settings, announce=print)
        found[batch_size] = costs.current("latency") / costs.cost("latency", mask)
    return found


def eager(model: nn.Module, images: Tensor) -> Call:
    """The network as PyTorch runs it, operator by operator."""
    return lambda: model(images)


def compiled(model: nn.Module, images: Tensor) -> Call:
    """Compiled for this shape, with its weights as constants: batch norms merged, weights packed for the device."""
    run = torch.compile(model, dynamic=False, options={"freezing": True})
    return lambda: run(images)


def in_onnxruntime(model: nn.Module, images: Tensor) -> Call:
    """The file that `pruning export --format onnx` writes, in ONNX Runtime on as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        export_network(model, file, "onnx", torch.randn(3, *images.shape[1:]))
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    pictures = images.numpy()
    return lambda: session.run(["logits"], {"images": pictures})


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": in_onnxruntime,
}


def measure(variants: list[Variant], images: Tensor, repeats: int, runtime: str) -> list[list[float]]:
    """Seconds per batch of every variant in every round, taking turns."""
    stopwatch = Stopwatch(images.device)
    models = [variant.model for variant in variants]
    torch.compiler.reset()  # else the compiler's limit of versions counts those of other batch sizes
    with inference(*models):
        calls = [RUNTIMES[runtime](model, images) for model in models]
        for _ in range(2):
            for call in calls:
                call()
        rounds = [[stopwatch.read(call) for call in calls] for _ in range(repeats)]
    return [list(column) for column in zip(*rounds, strict=True)]


def rows_of(variants: list[Variant], seconds: list[list[float]], batch_size: int) -> list[dict[str, Any]]:
    """Speed-ups with their ranges, as plain data."""
    rows = []
    base, base_seconds = variants[0], seconds[0]
    for variant, own in zip(variants, seconds, strict=True):
        fewer_macs = base.macs / variant.macs
        ratios = [before / after for before, after in zip(base_seconds, own, strict=True)]
        median = statistics.median(own)
        speed_up = statistics.median(base_seconds) / median
        row: dict[str, Any] = {
            "network": variant.name,
            "batch_size": batch_size,
            "gmacs": variant.macs / 1e9,
            "parameters": variant.num_parameters,
            "share_of_channels": variant.share,
            "fewer_macs": fewer_macs,
            "seconds_per_batch": median,
            "images_per_second": batch_size / median,
            "speed_up": speed_up,
            "realised": speed_up / fewer_macs,
            "realised_range": [min(ratios) / fewer_macs, max(ratios) / fewer_macs],
        }
        if batch_size in variant.predicted:
            row["predicted_speed_up"] = variant.predicted[batch_size]
            row["prediction_error"] = variant.predicted[batch_size] / speed_up - 1
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(
        f"{'network':<16} {'batch':>5} {'GMACs':>7} {'÷ MACs':>7} {'ms/batch':>9} {'speed-up':>8} "
        f"{'realised':>8}  range"
    )
    for row in rows:
        low, high = row["realised_range"]
        predicted = f"  table {row['prediction_error']:+.1%}" if "prediction_error" in row else ""
        print(
            f"{row['network']:<16} {row['batch_size']:>5} {row['gmacs']:>7.3f} {row['fewer_macs']:>7.3f} "
            f"{row['seconds_per_batch'] * 1e3:>9.2f} {row['speed_up']:>8.3f} {row['realised']:>8.3f}  "
            f"{low:.2f}–{high:.2f}{predicted}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--runtime", default="eager", choices=tuple(RUNTIMES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--fuse", action="store_true", help="merge batch norms into convolutions first")
    parser.add_argument("--predict", action="store_true", help="also what the latency table expects")
    parser.add_argument("--table-seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    args.device = torch.device(args.device)
    if args.runtime == "onnxruntime" and (args.device.type != "cpu" or args.dtype != "float32"):
        parser.error("--runtime onnxruntime measures float32 on a CPU")
    return args


def main() -> None:
    args = parse()
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(args.seed)
    shape = (max(args.batch_sizes), 3, args.image_size, args.image_size)
    images = torch.randn(shape, generator=generator).to(args.device, dtype)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    variants = make_variants(args, images)
    rows = []
    for batch_size in args.batch_sizes:
        seconds = measure(variants, images[:batch_size], args.repeats, args.runtime)
        rows += rows_of(variants, seconds, batch_size)
    print_rows(rows)
    cuda = args.device.type == "cuda"
    where = {
        "device": torch.cuda.get_device_name(args.device)
        if cuda
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "allocator": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
    }
    settings = {
        key: str(value) if isinstance(value, torch.device) else value
        for key, value in vars(args).items()
        if key != "output"
    }
    output = args.output or RESULTS / f"pruned_speed_{args.arch}_{args.device.type}_{args.runtime}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        json.dumps({"where": where, "settings": settings, "target": TARGET, "rows": rows}, indent=1) + "\n"
    )
    print(f"written to {output}")


if __name__ == "__main__":
    main()
