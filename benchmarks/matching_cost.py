"""Cost of attribution matching: time and memory of a training step with it ÷ without, and where the time goes.

    python benchmarks/matching_cost.py [--arch resnet50] [--image-size 224] [--batch-size 16] [--bf16]

A step is forward, loss, backward and update of the student, in one process and one thread (or on a GPU). Teacher and
student have the same architecture. The sides take turns, in processor time on a CPU; ratios are taken round by round,
and the table has their median and range. Memory is the peak of a separate process: that of a GPU's allocator, or on a
CPU that of the process beyond the networks and the interpreter.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common.measure import Clock, in_turns, peak_bytes, ratios, rerun, restart_peak, spread
from common.report import BenchmarkParser, print_table, write_json
from torch import Tensor, nn

from explainers.attribution.gradcam import find_layer
from explainers.attribution.method import frozen_copy
from explainers.differentiable.matching import AttributionMatcher
from image_classification.models import create_model

PLAIN = "plain"
MATCHINGS = ("ewa", "swa", "stochastic swa")
TARGETS = {"time": 2.5, "memory": 2.0}
NUM_CLASSES = 20

Parts = dict[str, float]
Row = dict[str, Any]


class Steps:
    """Training steps on random images, with and without matching.

    Args:
        arguments: Arguments of the benchmark.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = arguments.device
        self.bf16 = arguments.bf16
        self.student = create_model(arguments.arch, num_classes=NUM_CLASSES).to(self.device).train()
        self.teacher = frozen_copy(create_model(arguments.arch, num_classes=NUM_CLASSES).to(self.device))
        shape = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
        self.images = torch.randn(shape, device=self.device)
        self.targets = torch.randint(0, NUM_CLASSES, shape[:1], device=self.device)
        self.layer = find_layer(self.teacher, self.images)
        self.optimizer = torch.optim.SGD(self.student.parameters(), 1e-3, momentum=0.9)

    def run(self, side: str) -> Parts:
        """Run one step and return the seconds of its parts."""
        watch = Marks(Clock(self.device, processor_time=True))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if side == PLAIN:
                loss = nn.functional.cross_entropy(self.student(self.images), self.targets)
                watch.mark("student forward")
            else:
                loss = self._matched(side, watch)
        loss.backward()
        watch.mark("backward")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        watch.mark("update")
        return watch.parts

    def _matched(self, side: str, watch: Marks) -> Tensor:
        """Return the loss with matching."""
        drop = 0.3 if side.startswith("stochastic") else 0.0
        matcher = AttributionMatcher(side.split()[-1], ((self.layer, self.layer),), drop)
        view = matcher.look(self.teacher, self.images)
        watch.mark("teacher")
        with matcher.watch(self.student) as features:
            logits = self.student(self.images)
        watch.mark("student forward")
        loss = nn.functional.cross_entropy(logits, self.targets)
        loss = loss + 100 * matcher.loss(features, logits, view)
        watch.mark("maps and inner derivative")
        return loss


class Marks:
    """Seconds between marks."""

    def __init__(self, clock: Clock) -> None:
        self.parts: Parts = {}
        self._clock = clock
        self._last = clock.now()

    def mark(self, part: str) -> None:
        """Record the time since the last mark."""
        now = self._clock.now()
        self.parts[part] = now - self._last
        self._last = now


def step_memory(arguments: argparse.Namespace, side: str) -> int:
    """Return the peak bytes of training steps; on a CPU those beyond what the process held before the first one."""
    steps = Steps(arguments)
    if steps.device.type == "cuda":
        steps.run(side)
        restart_peak(steps.device)
        held = 0
    else:
        held = restart_peak(steps.device)
        steps.run(side)
    for _ in range(2):
        steps.run(side)
    return peak_bytes(steps.device) - held


def summary(side: str, parts: dict[str, list[Parts]], mib: dict[str, float]) -> Row:
    """Return the medians of a side, and its ratios to plain training, round by round."""
    totals = {name: [sum(step.values()) for step in steps] for name, steps in parts.items()}
    return {
        "side": side,
        "seconds": statistics.median(totals[side]),
        "parts": {name: statistics.median(step[name] for step in parts[side]) for name in parts[side][0]},
        "time_ratio": spread(ratios(totals[side], totals[PLAIN])),
        "mib": mib[side],
        "memory_ratio": mib[side] / mib[PLAIN],
    }


def table_row(row: Row) -> list[str]:
    """Return the cells of one side."""
    time = row["time_ratio"]
    return [
        row["side"],
        f"{1000 * row['seconds']:.0f}",
        f"{time['median']:.2f} ({time['min']:.2f} … {time['max']:.2f})",
        f"{row['mib']:.0f}",
        f"{row['memory_ratio']:.2f}",
        ", ".join(f"{name} {1000 * value:.0f}" for name, value in row["parts"].items()),
    ]


def main() -> None:
    """Measure, print and write JSON."""
    parser = BenchmarkParser(__doc__, repeats=5, threads=1)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="AMP in bf16")
    parser.add_argument("--matchings", nargs="+", choices=MATCHINGS, default=list(MATCHINGS))
    parser.add_argument(
        "--memory-of", choices=(PLAIN, *MATCHINGS), help="print the peak bytes of one side, and end"
    )
    small = {"arch": "resnet20", "image_size": 32, "batch_size": 2, "matchings": ["swa"], "repeats": 1}
    arguments = parser.parse("matching_cost.json", quick=small)
    if arguments.memory_of is not None:
        print(step_memory(arguments, arguments.memory_of))
        return
    sides = [PLAIN, *arguments.matchings]
    mib = {side: int(rerun("--memory-of", side)) / 2**20 for side in sides}
    steps = Steps(arguments)
    parts = in_turns({side: side for side in sides}, steps.run, arguments.repeats)
    rows = [summary(side, parts, mib) for side in sides]
    print_table(
        ["side", "ms", "÷ plain", "MiB", "÷ plain", "ms of its parts"], [table_row(row) for row in rows]
    )
    print(f"targets: time ≤ {TARGETS['time']}×, memory ≤ {TARGETS['memory']}×")
    write_json(arguments, arguments.repeats, {"layer": steps.layer, "rows": rows, "targets": TARGETS})


if __name__ == "__main__":
    main()
