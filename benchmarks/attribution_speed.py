"""Speed and conservation of the attribution methods, in units of a forward pass.

    OMP_NUM_THREADS=1 python benchmarks/attribution_speed.py [--arch resnet50 vgg16_bn] [--batch-size 16]

Per network and method: CPU-seconds (device seconds with --device cuda) of maps for one batch ÷ those of an
evaluation-mode forward pass of the same batch, measured in turn within each repeat so that a busy machine hits all
alike; median and range over the repeats. Beside it the largest |arrived ÷ started − 1| of the batch, for methods that
keep account, and the peak memory of a CUDA device.

Weights are random, batch norms have random scales and are calibrated on the pictures, which are smooth random fields.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from explainers import EBP, LRP, RAP, GradCAM, IntegratedGradients, Method
from image_classification.models import arch_info, create_model

RESULTS = Path(__file__).resolve().parent / "results"
METHODS: dict[str, Method] = {
    "gradcam": GradCAM(),
    "ebp": EBP(),
    "ebp to the pictures": EBP(stop="input"),
    "lrp zplus": LRP(),
    "lrp epsilon-plus-flat": LRP("epsilon-plus-flat"),
    "rap": RAP(),
    "ig, 8 steps": IntegratedGradients(steps=8),
}


def smooth_pictures(count: int, size: int) -> Tensor:
    """(count, 3, size, size) with the falling spectrum of photographs."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.zeros(count, 3, size, size)
    side = 4
    while side <= size:
        layer = torch.randn(count, 3, side, side, generator=generator) / side**0.5
        pictures += nn.functional.interpolate(layer, size=(size, size), mode="bilinear", align_corners=False)
        side *= 2
    return (pictures - pictures.mean()) / pictures.std()


def calibrated(arch: str, pictures: Tensor) -> nn.Module:
    """A network with random weights and scales, its batch norms' statistics taken from some pictures."""
    torch.manual_seed(0)
    model = create_model(arch)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    model.train()
    with torch.no_grad():
        model(pictures[:8])
    return model.eval()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """CPU-seconds of some work, or seconds on a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - begin
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(arch: str, batch_size: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """One row per method."""
    pictures = smooth_pictures(batch_size, arch_info(arch).image_size)
    model = calibrated(arch, pictures).to(device)
    images = pictures.to(device)
    with torch.no_grad():
        targets = model(images).argmax(1)
    rows = []
    for name, method in METHODS.items():
        prepared = method.prepare(model, images)
        result = prepared(images, targets)
        error = (result.arrived / result.started - 1).abs().max().item()
        ratios, forwards = [], []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(repeats):
            with torch.no_grad():
                forwards.append(seconds(lambda: model(images), device))
            ratios.append(seconds(functools.partial(prepared, images, targets), device) / forwards[-1])
        rows.append(
            {
                "arch": arch,
                "method": name,
                "forward_seconds": statistics.median(forwards),
                "forwards": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "conservation_error": None if error != error or name.startswith("ig") else error,
                "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30
                if device.type == "cuda"
                else None,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table on standard output."""
    table = Table(title="attribution methods, in forward passes of the same batch")
    for column in ("network", "method", "forward passes", "range", "|arrived ÷ started − 1|"):
        table.add_column(column, justify="left" if column in ("network", "method") else "right")
    for row in rows:
        error = "–" if row["conservation_error"] is None else f"{row['conservation_error']:.0e}"
        spread = f"{row['lowest']:.1f} – {row['highest']:.1f}"
        table.add_row(row["arch"], row["method"], f"{row['forwards']:.1f}", spread, error)
    Console(width=110).print(table)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--arch", nargs="+", default=["resnet50", "vgg16_bn", "torchvision/densenet121", "resnet56"]
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--json", type=Path, default=None, help="default: results/attribution_speed_DEVICE.json"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = []
    for arch in arguments.arch:
        rows += measure(arch, arguments.batch_size, arguments.repeats, device)
    show(rows)
    report = {
        "rows": rows,
        "batch_size": arguments.batch_size,
        "repeats": arguments.repeats,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }
    path = arguments.json or RESULTS / f"attribution_speed_{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
