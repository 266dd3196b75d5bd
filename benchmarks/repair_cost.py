"""Cost of repairing a rewrite, in forward passes and in memory.

    python benchmarks/repair_cost.py [--arch resnet50] [--images 64] [--group layer3.0.conv1]

passes   seconds of the repair after one group has lost half of its channels ÷ seconds of a forward pass of the original
         network over the same images
memory   highest memory of the repair ÷ that of a training step on as many images (forward, backward, SGD with momentum)

Images are noise with the spectrum of photographs; weights are random, with batch norm statistics of the images.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import numpy as np
import torch
from common.measure import Clock, peak_bytes, ratios, restart_peak, spread
from common.networks import conditioned_network, smooth_images
from common.report import BenchmarkParser, write_json
from torch import Tensor, nn

from image_classification.host_memory import keep_freed_memory
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.repair.repairing import RepairReport, RepairSettings, plan_repair


def repaired(
    model: nn.Module, graph: ChannelGraph, group: str, images: Tensor, clock: Clock
) -> tuple[float, RepairReport]:
    """Return the seconds of a repair, and its report."""
    model, graph = copy.deepcopy(model), copy.deepcopy(graph)
    chosen = graph.group(group)
    keep = {chosen.index: np.arange(chosen.width // 2)}
    plan = plan_repair(model, graph, graph.keep_mask(keep), RepairSettings(scope="cut"))
    prune_channels(model, graph, keep)
    begin = clock.now()
    report = plan.repair(model, list(images.split(32)))
    return clock.now() - begin, report


def training_step(model: nn.Module, images: Tensor) -> None:
    """Run one step of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    targets = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    nn.functional.cross_entropy(model.train()(images), targets).backward()
    optimizer.step()


def forward(model: nn.Module, images: Tensor) -> None:
    """Run a pass over all images, in chunks of the size that the repair uses."""
    with torch.no_grad():
        for part in images.split(32):
            model.eval()(part)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, repeats=3, threads=1)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--group", default="layer3.0.conv1")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument(
        "--keep-memory", action="store_true", help="keep freed memory, as the commands do on a CPU (Linux)"
    )
    small = {"arch": "resnet20", "image_size": 32, "images": 16, "repeats": 1, "group": "layer3.0.conv1"}
    return parser.parse("repair_cost_{arch}.json", quick=small)


def main() -> None:
    """Measure, print and write JSON."""
    arguments = parse()
    if arguments.keep_memory:
        keep_freed_memory()
    clock, device = Clock(arguments.device, processor_time=True), arguments.device
    images = smooth_images(arguments.images, arguments.image_size)
    model = conditioned_network(arguments.arch, images[:8]).to(device)
    images = images.to(device)
    graph = trace_groups(model, images[:2])

    forward(model, images)  # warm-up: chooses kernels
    times: dict[str, list[float]] = {"forward": [], "repair": []}
    memory: dict[str, list[int]] = {"repair": [], "training": []}
    for _ in range(arguments.repeats):
        times["forward"].append(clock.seconds(lambda: forward(model, images)))
        before = restart_peak(device)
        seconds, report = repaired(model, graph, arguments.group, images, clock)
        times["repair"].append(seconds)
        memory["repair"].append(peak_bytes(device) - before)
        before = restart_peak(device)
        training_step(copy.deepcopy(model), images)
        memory["training"].append(peak_bytes(device) - before)
        print(report.describe(), flush=True)
    passes = ratios(times["repair"], times["forward"])
    share = ratios(memory["repair"], memory["training"])
    print(f"passes  {statistics.median(passes):.2f} (target ≤ 2)")
    print(f"memory  {statistics.median(share):.2f} of a training step's (target ≤ 1)")
    write_json(
        arguments,
        arguments.repeats,
        {"passes": spread(passes), "memory_share": spread(share), "seconds": times, "bytes": memory},
    )


if __name__ == "__main__":
    main()
