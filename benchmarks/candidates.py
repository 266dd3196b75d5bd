"""Time to measure the candidates of a search: beginnings of passes run once for all ÷ every pass whole.

    python benchmarks/candidates.py [--arch resnet50] [--image-size 96] [--images 32] [--repeats 3]

A candidate keeps half of one group; every group of the network is one. Both sides measure the same candidates in turns,
as they are and repaired, and their losses must be equal. Weights are random, with batch-norm statistics of the images,
which are noise with the spectrum of photographs.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch
from common.measure import Clock, ratios, spread
from common.networks import conditioned_network, smooth_images
from common.report import BenchmarkParser, print_table, write_json

from image_classification.host_memory import keep_freed_memory
from pruning.engine.trace_groups import trace_groups
from pruning.repair.local_repair import LocalRepair
from pruning.search.loss_change import LossChange


def judges(
    arguments: argparse.Namespace,
) -> tuple[dict[str, tuple[LossChange, LossChange]], list[dict[int, np.ndarray]]]:
    """Return, by what candidates are, a judge that shares beginnings and one that does not; and the candidates."""
    images = smooth_images(arguments.images, arguments.image_size)
    model = conditioned_network(arguments.arch, images[:8]).to(arguments.device)
    images, targets = images.to(arguments.device), torch.arange(len(images), device=arguments.device) % 10
    graph = trace_groups(model, images[:2])
    batches = list(zip(images.split(arguments.batch_size), targets.split(arguments.batch_size), strict=True))
    pairs = {}
    for name, repair in (("cut", None), ("repaired", LocalRepair(model, graph, batches))):
        pairs[name] = (
            LossChange(model, graph, batches, repair=repair),
            LossChange(model, graph, batches, repair=repair),
        )
        pairs[name][1].shares = False
    return pairs, [{group.index: np.arange(max(1, group.width // 2))} for group in graph.prunable]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, repeats=3, threads=1)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    small = {"arch": "resnet20", "image_size": 16, "images": 8, "repeats": 1}
    return parser.parse("candidates_{arch}.json", quick=small)


def main() -> None:
    """Measure, print and write JSON."""
    arguments = parse()
    if arguments.device.type == "cpu":
        keep_freed_memory()
    clock = Clock(arguments.device, processor_time=True)
    pairs, cuts = judges(arguments)
    rows: dict[str, object] = {}
    for name, (sharing, whole) in pairs.items():
        losses = [
            judge.measure(cuts) for judge in (sharing, whole)
        ]  # also chooses kernels, and solves for layers
        seconds: dict[str, list[float]] = {"shared": [], "whole": []}
        for _ in range(arguments.repeats):
            seconds["shared"].append(clock.seconds(lambda judge=sharing: judge.measure(cuts)))
            seconds["whole"].append(clock.seconds(lambda judge=whole: judge.measure(cuts)))
        rows[name] = {
            "candidates": len(cuts),
            "equal": bool(np.array_equal(*losses)),
            "seconds": seconds,
            "ratio": spread(ratios(seconds["shared"], seconds["whole"])),
        }
    print_table(
        ["candidates", "number", "equal", "shared s", "whole s", "ratio"],
        [
            [
                name,
                str(len(cuts)),
                str(row["equal"]),
                *(f"{statistics.median(row['seconds'][side]):.1f}" for side in ("shared", "whole")),
                f"{row['ratio']['median']:.2f}",
            ]
            for name, row in rows.items()
        ],
    )
    write_json(arguments, arguments.repeats, {"rows": rows})


if __name__ == "__main__":
    main()
