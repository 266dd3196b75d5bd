"""What the saliency score costs: one scored batch ÷ a training step of the same batch, and peak memory of both.

    OMP_NUM_THREADS=1 python benchmarks/saliency.py [--cases resnet20 resnet50] [--repeats 7] [--output FILE.json]

training    forward in training mode, cross-entropy, backward, SGD with momentum
selector    `score_groups` with the saliency criterion on a selector's (a, b, w): one forward and three backward passes
            through network and decoder, for all channel groups at once
gradcam     the same on the Grad-CAM map, with 4 random projections
taylor      a criterion with one backward pass, for comparison

The network and its decoder are untrained: time and memory do not depend on the weights. All rows are measured in turn
within each repeat, by processor time on a CPU (other jobs of the machine do not count) and by the wall clock on a GPU.
Memory is the peak above what the process held before, in a process of its own for each row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor

from explainers.aem.masks import MASK_PRESETS
from explainers.aem.saved import SelectorExplanation
from explainers.aem.selector import Selector, design_selector
from explainers.explanation import Explanation
from explainers.gradcam_explanation import GradCamExplanation
from image_classification.environment import describe_environment
from image_classification.models import create_model
from pruning.criteria import Saliency, Taylor
from pruning.graph import trace_groups
from pruning.original import OriginalExplanations
from pruning.scoring import score_groups

RESULTS = ROOT / "benchmarks" / "results"
ROWS = ("training", "selector", "gradcam", "taylor")
MAX_TIME, MAX_MEMORY = 3.5, 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a batch."""

    arch: str
    image_size: int
    num_classes: int
    batch_size: int
    decoder: str


CASES = {
    "resnet20": Case("resnet20", 32, 10, 64, "published"),
    "resnet56": Case("resnet56", 32, 10, 64, "published"),
    "mobilenet": Case("mobilenet_v2_cifar", 32, 10, 64, "light"),
    "resnet50": Case("resnet50", 224, 1000, 16, "light"),
}


class Bench:
    """Everything of one case that is measured; with `batch_size` pictures until `enlarge`."""

    def __init__(self, case: Case, device: torch.device, batch_size: int) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.model = create_model(case.arch, num_classes=case.num_classes).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        self.enlarge(batch_size)
        self.step()  # a network with its momenta is where all rows start from

    def enlarge(self, batch_size: int) -> None:
        """Take a batch of this size from now on."""
        size = (batch_size, 3, self.case.image_size, self.case.image_size)
        self.images = torch.randn(size, device=self.device)
        self.targets = torch.randint(0, self.case.num_classes, size[:1], device=self.device)

    def prepare(self, row: str) -> Callable[[], Any]:
        """What is to be timed for a row; its first call remembers the original explanation."""
        if row == "training":
            return self.step
        graph = trace_groups(self.model, self.images[:2])
        if row == "taylor":
            return lambda: score_groups(self.model, graph, [(self.images, self.targets)], Taylor())
        originals = OriginalExplanations(self.explanation(row))

        def score() -> Any:
            batch = [(self.images, self.targets)]
            if not originals.remembered:
                originals.remember(self.model, batch)
            return score_groups(self.model, graph, batch, Saliency(originals))

        return score

    def explanation(self, row: str) -> Explanation:
        if row == "gradcam":
            return GradCamExplanation.of(self.model, self.images[:2])
        design = design_selector(
            self.model, self.images[:2], kind="rbf",
            geometry=MASK_PRESETS["cifar" if self.case.image_size < 96 else "imagenet"],
            num_classes=self.case.num_classes, decoder=self.case.decoder,
        )  # fmt: skip
        return SelectorExplanation(Selector(design).to(self.device).eval().requires_grad_(False))

    def step(self) -> Tensor:
        self.model.train()
        loss = F.cross_entropy(self.model(self.images), self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def clock(device: torch.device) -> float:
    """Seconds: of the processor on a CPU, of the wall once a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def restart_peak(device: torch.device) -> int:
    """Forget the highest memory so far; what is held now, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Highest memory of this process since `restart_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    """A line of Linux's account of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_times(case: Case, device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds and ratio to training, median and range over the repeats."""
    bench = Bench(case, device, case.batch_size)
    runs = {row: bench.prepare(row) for row in ROWS}
    seconds: dict[str, list[float]] = {row: [] for row in ROWS}
    for repeat in range(repeats + 1):
        for row, run in runs.items():
            begin = clock(device)
            run()
            if repeat:  # the first round warms up
                seconds[row].append(clock(device) - begin)
    found = {}
    for row in ROWS:
        ratios = [own / training for own, training in zip(seconds[row], seconds["training"], strict=True)]
        found[row] = {
            "seconds": statistics.median(seconds[row]),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return found


def measure_memory(name: str, row: str, device: torch.device) -> int:
    """Peak bytes of one run above what the prepared process held."""
    case = CASES[name]
    bench = Bench(case, device, 2)
    run = bench.prepare(row)
    held = restart_peak(device)
    bench.enlarge(case.batch_size)
    run()
    return peak_bytes(device) - held


def in_own_process(name: str, row: str, device: torch.device) -> int:
    """`measure_memory` where nothing was allocated before."""
    command = [sys.executable, __file__, "--cases", name, "--memory-of", row, "--device", device.type]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["resnet20", "resnet50"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--memory-of", choices=ROWS, help="print the peak bytes of one row of one case, and end"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "saliency_cost.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.memory_of:
        print(measure_memory(arguments.cases[0], arguments.memory_of, device))
        return
    results = {}
    print(
        f"{'case':12} {'row':9} {'seconds':>9} {'÷ training':>11} {'min … max':>15} {'peak MiB':>9} {'÷ training':>11}"
    )
    for name in arguments.cases:
        rows = measure_times(CASES[name], device, arguments.repeats)
        for row, figures in rows.items():
            figures["peak_bytes"] = in_own_process(name, row, device)
            figures["peak_ratio"] = figures["peak_bytes"] / rows["training"]["peak_bytes"]
            spread = f"{figures['ratio_min']:.2f} … {figures['ratio_max']:.2f}"
            print(
                f"{name:12} {row:9} {figures['seconds']:9.4f} {figures['ratio']:11.2f} {spread:>15} "
                f"{figures['peak_bytes'] / 2**20:9.0f} {figures['peak_ratio']:11.2f}",
                flush=True,
            )
        results[name] = {"case": dataclasses.asdict(CASES[name]), "rows": rows}
    targets = {"time_ratio": MAX_TIME, "memory_ratio": MAX_MEMORY}
    payload = {"environment": describe_environment(device), "repeats": arguments.repeats, "targets": targets}
    arguments.output.write_text(json.dumps({**payload, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
