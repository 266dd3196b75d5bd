"""What attribution matching costs: time and memory of a training step with it ÷ without, and where the time goes.

    python benchmarks/matching_cost.py [--arch resnet50] [--image-size 224] [--batch-size 16] [--output FILE.json]

A step is forward, loss, backward and update of the student, in one process and one thread (or on the GPU). Teacher and
student have the same architecture. The sides take turns; ratios are taken pair by pair. Memory is the peak of a process
of its own: what the GPU's allocator held, or on a CPU the process's resident memory, of which the network and the
interpreter themselves (measured before the first step) are taken off.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from explainers.base import frozen_copy
from explainers.gradcam import find_layer
from explainers.matching import AttributionMatcher
from image_classification.environment import describe_environment
from image_classification.models import create_model

SIDES = ("plain", "ewa", "swa", "stochastic swa")
TARGETS = {"time": 2.5, "memory": 2.0}


class Steps:
    """Training steps on random pictures, with and without matching."""

    def __init__(self, arch: str, image_size: int, batch_size: int, bf16: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.student = create_model(arch, num_classes=20).to(self.device).train()
        self.teacher = frozen_copy(create_model(arch, num_classes=20).to(self.device))
        self.images = torch.randn(batch_size, 3, image_size, image_size, device=self.device)
        self.targets = torch.randint(0, 20, (batch_size,), device=self.device)
        self.layer = find_layer(self.teacher, self.images)
        self.optimizer = torch.optim.SGD(self.student.parameters(), 1e-3, momentum=0.9)
        self.bf16 = bf16

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def run(self, side: str) -> dict[str, float]:
        """One step; seconds of its parts."""
        clock = Clock(self.device)
        matcher = None
        if side != "plain":
            drop = 0.3 if side.startswith("stochastic") else 0.0
            matcher = AttributionMatcher(side.split()[-1], ((self.layer, self.layer),), drop)
        with self.autocast():
            if matcher is None:
                loss = nn.functional.cross_entropy(self.student(self.images), self.targets)
                clock.mark("student forward")
            else:
                loss = self._matched(matcher, clock)
        loss.backward()
        clock.mark("backward")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.mark("update")
        return clock.parts

    def _matched(self, matcher: AttributionMatcher, clock: Clock) -> Tensor:
        view = matcher.look(self.teacher, self.images)
        clock.mark("teacher")
        with matcher.watch(self.student) as features:
            logits = self.student(self.images)
        clock.mark("student forward")
        loss = nn.functional.cross_entropy(logits, self.targets)
        loss = loss + 100 * matcher.loss(features, logits, view)
        clock.mark("maps and inner derivative")
        return loss


class Clock:
    """Seconds between marks: of the GPU, waited for, or of CPU time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.parts = device, dict[str, float]()
        self._last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()  # a busy machine does not count

    def mark(self, part: str) -> None:
        """What was done since the last mark."""
        now = self._now()
        self.parts[part] = now - self._last
        self._last = now


def peak_mib(make: Callable[[], Steps], side: str) -> float:
    """Memory that three steps take on top of the networks, in MiB."""
    steps = make()
    if steps.device.type == "cuda":
        steps.run(side)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            steps.run(side)
        return torch.cuda.max_memory_allocated() / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        steps.run(side)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="AMP in bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "matching_cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    def make() -> Steps:
        return Steps(arguments.arch, arguments.image_size, arguments.batch_size, arguments.bf16)

    if arguments.memory_of is not None:
        print(peak_mib(make, arguments.memory_of))
        return
    memory = {side: memory_of(side, sys.argv[1:]) for side in SIDES}
    steps = make()
    parts: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for repeat in range(arguments.repeats + 1):
        for side in SIDES:
            found = steps.run(side)
            if repeat:  # the first round chooses kernels and fills caches
                parts[side].append(found)
    rows = [summary(side, parts, memory) for side in SIDES]
    for row in rows:
        shown = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in row["parts"].items())
        print(
            f"{row['side']:15} {1000 * row['seconds']:7.0f} ms  ×{row['time_ratio']['median']:.2f} "
            f"({row['time_ratio']['least']:.2f} … {row['time_ratio']['most']:.2f})  {row['mib']:7.0f} MiB "
            f"×{row['memory_ratio']:.2f}   {shown}"
        )
    print(f"targets: time ≤ {TARGETS['time']}×, memory ≤ {TARGETS['memory']}×")
    report = {
        "settings": {k: str(v) for k, v in vars(arguments).items() if k not in ("output", "memory_of")},
        "layer": steps.layer, "rows": rows, "targets": TARGETS, "n": arguments.repeats,
        "environment": describe_environment(steps.device),
    }  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def memory_of(side: str, words: list[str]) -> float:
    """`peak_mib` in a process of its own."""
    command = [sys.executable, __file__, *words, "--memory-of", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def summary(
    side: str, parts: dict[str, list[dict[str, float]]], memory: dict[str, float]
) -> dict[str, object]:
    """Medians of a side, and its ratios to plain training, pair by pair."""
    totals = {name: [sum(step.values()) for step in steps] for name, steps in parts.items()}
    ratios = sorted(mine / plain for mine, plain in zip(totals[side], totals["plain"], strict=True))
    return {
        "side": side,
        "seconds": statistics.median(totals[side]),
        "parts": {name: statistics.median(step[name] for step in parts[side]) for name in parts[side][0]},
        "time_ratio": {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]},
        "mib": memory[side],
        "memory_ratio": memory[side] / memory["plain"],
    }


if __name__ == "__main__":
    main()
