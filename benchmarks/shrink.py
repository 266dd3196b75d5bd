"""What shrinking a masked network gains: five networks of the field, a share of every group's channels zeroed.

    OMP_NUM_THREADS=1 python benchmarks/shrink.py [--share 0.4] [--image-size 224] [--batch-size 1] [--repeats 15]

Each network is masked as programs that prune by masks leave it: rows of convolutions, scales and shifts of batch norms
are zero, nothing is smaller. `pruning.shrink` then finds what is dead without being told. Equality is that of the
outputs on pictures that shrinking did not see, relative to the largest output; latency is the median over rounds in
which both networks take turns (evaluation mode, no gradients).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from image_classification.environment import describe_environment
from image_classification.models import create_model
from pruning import save_pruned, shrink, trace_groups
from pruning.costs.timing import Stopwatch, inference
from pruning.rehearsal import condition
from pruning.tracing import named_tensors

RESULTS = Path(__file__).resolve().parent / "results" / "shrink.json"
NETWORKS = ("resnet50", "vgg16_bn", "mobilenet_v2", "torchvision/densenet121", "torchvision/efficientnet_b0")


def mask_channels(model: nn.Module, images: Tensor, share: float, seed: int) -> int:
    """Zero a share of every group's rows, with scale and shift of the batch norms along them; counts the channels."""
    graph = trace_groups(model, images)
    rng, gone = np.random.default_rng(seed), np.zeros(graph.num_units, dtype=bool)
    for group in graph.prunable:
        gone[rng.permutation(group.units)[: int(share * group.width)]] = True
    tensors = named_tensors(model)
    for axis in graph.axes:
        if axis.role != "in" and not axis.tensor.endswith(("running_mean", "running_var")):
            slices = np.flatnonzero((axis.units >= 0) & gone[np.maximum(axis.units, 0)])
            tensors[axis.tensor].data.index_fill_(axis.dim, torch.from_numpy(slices), 0)
    return int(gone.sum())


def seconds_of(models: list[nn.Module], images: Tensor, repeats: int) -> list[list[float]]:
    """Seconds per batch of each network in every round."""
    stopwatch = Stopwatch(images.device)
    with inference(*models):
        for model in models:
            model(images)
        rounds = [
            [stopwatch.read(lambda model=model: model(images)) for model in models] for _ in range(repeats)
        ]
    return [list(column) for column in zip(*rounds, strict=True)]


def largest_difference(before: nn.Module, after: nn.Module, images: Tensor) -> float:
    """Largest difference of outputs, relative to the largest output (or to 1)."""
    with inference(before, after):
        expected, got = before(images), after(images)
    return float((expected - got).abs().max() / max(1.0, float(expected.abs().max())))


def measure(arch: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.randn(4, 3, args.image_size, args.image_size, generator=generator)
    model = create_model(arch)
    condition(model, (images[:2],))
    num_masked = mask_channels(model, images[:2], args.share, args.seed)
    smaller = copy.deepcopy(model)
    begin = time.perf_counter()
    report = shrink(smaller, images[:2])
    taken = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("masked.pth", "shrunk.pth")]
        for path, network in zip(paths, (model, smaller), strict=True):
            save_pruned(path, network)
        num_bytes = [path.stat().st_size for path in paths]
    batch = images[:1].expand(args.batch_size, -1, -1, -1).contiguous()
    rounds = seconds_of([model, smaller], batch, args.repeats)
    seconds = [statistics.median(own) for own in rounds]
    ratios = sorted(before / after for before, after in zip(*rounds, strict=True))
    return {
        "network": arch,
        "masked_channels": num_masked,
        "removed_channels": report.num_removed,
        "gmacs": [macs / 1e9 for macs in report.macs],
        "parameters": list(report.num_parameters),
        "num_bytes": num_bytes,
        "seconds_per_batch": seconds,
        "speed_up": seconds[0] / seconds[1],
        "speed_up_quartiles": [ratios[len(ratios) // 4], ratios[-len(ratios) // 4]],
        "n": args.repeats,
        "max_difference": largest_difference(model, smaller, images[2:]),
        "seconds_to_shrink": taken,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(
        f"{'network':<30} {'GMACs':>15} {'M parameters':>15} {'ms/batch':>17} {'speed-up':>9} {'difference':>10}"
    )
    for row in rows:
        macs, parameters = row["gmacs"], [count / 1e6 for count in row["parameters"]]
        ms = [seconds * 1e3 for seconds in row["seconds_per_batch"]]
        print(
            f"{row['network']:<30} {macs[0]:>6.2f} → {macs[1]:>6.2f} {parameters[0]:>6.2f} → {parameters[1]:>6.2f} "
            f"{ms[0]:>7.1f} → {ms[1]:>7.1f} {row['speed_up']:>9.2f} {row['max_difference']:>10.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--share", type=float, default=0.4, help="of every group's channels that is masked")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = [measure(arch, args) for arch in args.networks]
    print_table(rows)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    payload = {"environment": describe_environment(), "settings": settings, "rows": rows}
    args.output.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
