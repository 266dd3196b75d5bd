"""Cost of the saliency score: one scored batch ÷ a training step of the same batch, in time and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/saliency.py [--cases resnet20 resnet50] [--repeats 7]

training    forward in training mode, cross-entropy, backward, SGD with momentum selector    `score_groups` with the
saliency criterion on a selector's (a, b, w): one forward and three backward passes
            through network and decoder, for all channel groups at once
gradcam     the same on the Grad-CAM map, with 4 random projections taylor      a criterion with one backward pass, for
comparison

Network and decoder are untrained, since time and memory do not depend on the weights. The rows are measured in turns:
in processor time on a CPU, to which other jobs add nothing, by the wall clock on a GPU. Memory is the peak above what
the process held before, in a separate process for each row.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from common.measure import Call, Clock, in_turns, peak_bytes, ratios, rerun, restart_peak, spread
from common.report import BenchmarkParser, print_table, write_json
from torch import Tensor

from explainers.aem.masks import MASK_PRESETS
from explainers.aem.saved_selector import SelectorExplanation
from explainers.aem.selector import Selector, design_selector
from explainers.differentiable.explanation import Explanation
from explainers.differentiable.gradcam_explanation import GradCamExplanation
from explainers.differentiable.remembered import OriginalExplanations
from image_classification.models import create_model
from pruning.criteria import Saliency, Taylor
from pruning.criteria.scoring import score_groups
from pruning.engine.trace_groups import trace_groups

TRAINING = "training"
SCORES = ("selector", "gradcam", "taylor")
TARGETS = {"time_ratio": 3.5, "memory_ratio": 1.0}


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
    """The measurements of one case.

    Args:
        case: Network and batch.
        device: Device to compute on.
        batch_size: Batch size until `enlarge`.
    """

    def __init__(self, case: Case, device: torch.device, batch_size: int) -> None:
        self.case, self.device = case, device
        self.model = create_model(case.arch, num_classes=case.num_classes).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        self.enlarge(batch_size)
        self.step()  # all rows start from a network with momenta

    def enlarge(self, batch_size: int) -> None:
        """Use batches of this size from now on."""
        size = (batch_size, 3, self.case.image_size, self.case.image_size)
        self.images = torch.randn(size, device=self.device)
        self.targets = torch.randint(0, self.case.num_classes, size[:1], device=self.device)

    def prepare(self, row: str) -> Call:
        """Return the call to time for a row; its first call records the original explanation."""
        if row == TRAINING:
            return self.step
        graph = trace_groups(self.model, self.images[:2])
        if row == "taylor":
            return lambda: score_groups(self.model, graph, [(self.images, self.targets)], Taylor())
        originals = OriginalExplanations(self.explanation(row))

        def score() -> object:
            batch = [(self.images, self.targets)]
            if not originals.remembered:
                originals.remember(self.model, batch)
            return score_groups(self.model, graph, batch, Saliency(originals))

        return score

    def explanation(self, row: str) -> Explanation:
        """Return the explanation of a row."""
        if row == "gradcam":
            return GradCamExplanation.of(self.model, self.images[:2])
        design = design_selector(
            self.model,
            self.images[:2],
            kind="rbf",
            geometry=MASK_PRESETS["cifar" if self.case.image_size < 96 else "imagenet"],
            num_classes=self.case.num_classes,
            decoder=self.case.decoder,
        )
        return SelectorExplanation(Selector(design).to(self.device).eval().requires_grad_(False))

    def step(self) -> Tensor:
        """Run one training step and return its loss."""
        self.model.train()
        loss = F.cross_entropy(self.model(self.images), self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def measure_times(
    case: Case, scores: list[str], device: torch.device, repeats: int
) -> dict[str, dict[str, Any]]:
    """Return training and scores → their seconds and their ratio to training, round by round."""
    bench = Bench(case, device, case.batch_size)
    calls = {row: bench.prepare(row) for row in (TRAINING, *scores)}
    seconds = in_turns(calls, Clock(device, processor_time=True).seconds, repeats)
    found = {}
    for row, own in seconds.items():
        found[row] = {"seconds": statistics.median(own), "ratio": spread(ratios(own, seconds[TRAINING]))}
    return found


def measure_memory(case: Case, row: str, device: torch.device) -> int:
    """Return the peak bytes of one run above what the prepared process held."""
    bench = Bench(case, device, 2)
    run = bench.prepare(row)
    held = restart_peak(device)
    bench.enlarge(case.batch_size)
    run()
    return peak_bytes(device) - held


def table_row(case: str, row: str, figures: dict[str, Any]) -> list[str]:
    """Return the cells of a row."""
    ratio = figures["ratio"]
    return [
        case,
        row,
        f"{figures['seconds']:.4f}",
        f"{ratio['median']:.2f}",
        f"{ratio['min']:.2f} … {ratio['max']:.2f}",
        f"{figures['peak_bytes'] / 2**20:.0f}",
        f"{figures['peak_ratio']:.2f}",
    ]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, repeats=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["resnet20", "resnet50"])
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument(
        "--memory-of",
        choices=(TRAINING, *SCORES),
        help="print the peak bytes of one row of the first case, and end",
    )
    return parser.parse(
        "saliency_cost.json", quick={"cases": ["resnet20"], "scores": ["selector"], "repeats": 1}
    )


def main() -> None:
    """Measure, print and write JSON."""
    arguments = parse()
    if arguments.memory_of:
        print(measure_memory(CASES[arguments.cases[0]], arguments.memory_of, arguments.device))
        return
    results, table = {}, []
    for name in arguments.cases:
        rows = measure_times(CASES[name], arguments.scores, arguments.device, arguments.repeats)
        for row, figures in rows.items():
            figures["peak_bytes"] = int(rerun("--memory-of", row, "--cases", name))
            figures["peak_ratio"] = figures["peak_bytes"] / rows[TRAINING]["peak_bytes"]
            table.append(table_row(name, row, figures))
        results[name] = {"case": dataclasses.asdict(CASES[name]), "rows": rows}
    columns = ["case", "row", "seconds", "÷ training", "range", "peak MiB", "÷ training"]
    print_table(columns, table, num_names=2)
    write_json(arguments, arguments.repeats, {"targets": TARGETS, "results": results})


if __name__ == "__main__":
    main()
