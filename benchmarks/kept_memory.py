"""What keeping freed memory gains on a CPU: processor time of training steps and forward passes, with and without.

    python benchmarks/kept_memory.py [--arch resnet50] [--image-size 224] [--batch-size 32] [--repeats 5]

Every measurement has a process of its own, both kinds in turns. "speed" is the time without ÷ the time with, round by
round; "memory" the highest resident memory with ÷ without. Training is in bfloat16 with channels-last weights, the
forward pass in float32; a call counts as the fastest of several.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common.measure import Clock, peak_bytes, ratios, rerun, spread
from common.report import BenchmarkParser, print_table, write_json
from torch import nn

from image_classification.host_memory import keep_freed_memory
from image_classification.models import create_model

_SIDES = ("returned", "kept")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the processor seconds of a training step and of a forward pass, and the highest memory in bytes."""
    model = create_model(arguments.arch).to(memory_format=torch.channels_last)
    shape = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    images = torch.randn(shape).to(memory_format=torch.channels_last)
    targets = torch.zeros(arguments.batch_size, dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images).float(), targets)
        loss.backward()
        optimizer.step()

    def infer() -> None:
        with torch.no_grad():
            model(images)

    step = _fastest(train, arguments)
    model.eval()
    return {"training": step, "forward": _fastest(infer, arguments), "memory": peak_bytes(arguments.device)}


def _fastest(call: Callable[[], Any], arguments: argparse.Namespace) -> float:
    clock = Clock(arguments.device, processor_time=True)
    call()  # chooses kernels
    return min(clock.seconds(call) for _ in range(arguments.calls))


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, repeats=5, threads=1, cpu_only=True)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--calls", type=int, default=3, help="calls of each kind in a process")
    parser.add_argument("--one", choices=_SIDES, help=argparse.SUPPRESS)
    small = {"arch": "resnet20", "image_size": 32, "batch_size": 8, "repeats": 1, "calls": 1}
    return parser.parse("kept_memory_{arch}.json", quick=small)


def main() -> None:
    """Measure, print and write JSON."""
    arguments = parse()
    if arguments.one is not None:
        if arguments.one == "kept" and not keep_freed_memory():
            raise SystemExit("glibc is not there, or the environment tunes it already")
        print(json.dumps(measure(arguments)))
        return
    rounds = [{side: json.loads(rerun("--one", side)) for side in _SIDES} for _ in range(arguments.repeats)]

    def figures(name: str, side: str) -> list[float]:
        return [found[side][name] for found in rounds]

    speed = {
        name: spread(ratios(figures(name, "returned"), figures(name, "kept")))
        for name in ("training", "forward")
    }
    memory = spread(ratios(figures("memory", "kept"), figures("memory", "returned")))
    rows = [
        [name, f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"]
        for name, found in (*speed.items(), ("memory", memory))
    ]
    print_table(["", "kept ÷ returned"], rows)
    seconds = {
        name: {side: statistics.median(figures(name, side)) for side in _SIDES}
        for name in ("training", "forward")
    }
    write_json(arguments, arguments.repeats, {"speed": speed, "memory": memory, "seconds": seconds})


if __name__ == "__main__":
    main()
