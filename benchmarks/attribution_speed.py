"""Speed of attribution methods, in forward passes of the same network on the same images.

    OMP_NUM_THREADS=1 python benchmarks/attribution_speed.py [--arch resnet50 vgg16_bn] [--batch-size 16]

For every network and method: seconds to compute the maps of one batch ÷ seconds of an evaluation-mode forward pass of
that batch. Both are measured in turns, in processor time on a CPU, so that a busy machine has little influence; the
table has the median and the range over the repeats, and the largest |arrived ÷ started − 1| of the batch for methods
that conserve relevance. The JSON also has the peak memory of a GPU.

Weights are random; batch norms take their statistics from the images, which are smooth random fields.
"""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import torch
from common.measure import Call, Clock, in_turns, peak_bytes, ratios, restart_peak, spread
from common.networks import conditioned_network, smooth_images
from common.report import BenchmarkParser, print_table, write_json

from explainers import EBP, LRP, RAP, GradCAM, IntegratedGradients, Method
from image_classification.models import arch_info

METHODS: dict[str, Method] = {
    "gradcam": GradCAM(),
    "ebp": EBP(),
    "ebp to the images": EBP(stop="input"),
    "lrp zplus": LRP(),
    "lrp epsilon-plus-flat": LRP("epsilon-plus-flat"),
    "rap": RAP(),
    "ig, 8 steps": IntegratedGradients(steps=8),
}
ARCHS = ("resnet50", "vgg16_bn", "torchvision/densenet121", "resnet56")

Row = dict[str, Any]


def measure(arch: str, batch_size: int, repeats: int, seed: int, device: torch.device) -> list[Row]:
    """Measure one network and return a row per method."""
    example = smooth_images(batch_size, arch_info(arch).image_size, seed)
    model = conditioned_network(arch, example, seed).to(device)
    images = example.to(device)
    clock = Clock(device, processor_time=True)

    @torch.no_grad()
    def forward() -> None:
        model(images)

    with torch.no_grad():
        targets = model(images).argmax(1)
    rows: list[Row] = []
    for name, method in METHODS.items():
        prepared = method.prepare(model, images)
        result = prepared(images, targets)
        error = (result.arrived / result.started - 1).abs().max().item()
        conserves = math.isfinite(error) and not name.startswith("ig")
        restart_peak(device)
        calls: dict[str, Call] = {"forward": forward, "method": functools.partial(prepared, images, targets)}
        seconds = in_turns(calls, clock.seconds, repeats, warm_up=0)
        rows.append(
            {
                "arch": arch,
                "method": name,
                "forward_seconds": statistics.median(seconds["forward"]),
                "forwards": spread(ratios(seconds["method"], seconds["forward"])),
                "conservation_error": error if conserves else None,
                "peak_gib": peak_bytes(device) / 2**30 if device.type == "cuda" else None,
            }
        )
    return rows


def table_row(row: Row) -> list[str]:
    """Return the cells of one row."""
    forwards, error = row["forwards"], row["conservation_error"]
    return [
        row["arch"],
        row["method"],
        f"{forwards['median']:.1f}",
        f"{forwards['min']:.1f} – {forwards['max']:.1f}",
        "–" if error is None else f"{error:.0e}",
    ]


def main() -> None:
    """Measure, print and write JSON."""
    parser = BenchmarkParser(__doc__, repeats=5)
    parser.add_argument("--arch", nargs="+", default=list(ARCHS))
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse(
        "attribution_speed_{device}.json", quick={"arch": ["resnet20"], "batch_size": 2, "repeats": 1}
    )
    rows = []
    for arch in arguments.arch:
        rows += measure(arch, arguments.batch_size, arguments.repeats, arguments.seed, arguments.device)
    columns = ["network", "method", "forward passes", "range", "|arrived ÷ started − 1|"]
    print_table(columns, [table_row(row) for row in rows], num_names=2)
    write_json(arguments, arguments.repeats, {"rows": rows})


if __name__ == "__main__":
    main()
