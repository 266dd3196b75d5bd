"""Two questions about the training loop, as ratios of images per second measured in turns.

    python benchmarks/training.py [--data DIR] [--arch resnet50] [--batch-size 16] [--output FILE.json]

overhead     main.py on synthetic data ÷ a bare torch loop of 15 lines (same network, precision, memory format)
bottleneck   main.py on real JPEGs (--data, ImageNet layout) ÷ main.py on synthetic data

Every run is a process of its own; its first iterations (compilation, choice of kernels) do not count. The sides take
turns, so a busy machine hurts all alike; the ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classification.environment import describe_environment
from image_classification.models import create_model
from image_classification.report import read_report
from image_classification.trainer import WARMUP_STEPS


def bare_loop(arch: str, batch_size: int, image_size: int, num_steps: int) -> float:
    """The loop that one writes without a framework; returns images per second without the warm-up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model(arch).to(device=device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=device.type == "cuda"
    )
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(0, 1000, (batch_size,), device=device)
    for step in range(WARMUP_STEPS + num_steps):
        if step == WARMUP_STEPS:
            begin = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loss.item()
    return num_steps * batch_size / (time.perf_counter() - begin)


def our_loop(data: list[str], arguments: argparse.Namespace) -> float:
    """Images per second of main.py, from its own report."""
    steps = WARMUP_STEPS + arguments.num_steps
    with tempfile.TemporaryDirectory() as workspace:
        command = [
            sys.executable, str(ROOT / "main.py"), *data, "--arch", arguments.arch, "--batch-size",
            str(arguments.batch_size), "--image-size", str(arguments.image_size), "--epochs", "1", "--prof", str(steps),
            "--training-only", "--amp", "--amp-dtype", "bf16", "--memory-format", "nhwc", "--no-checkpoints",
            "--workspace", workspace, "--num-classes", "1000", "--print-freq", "1000",
            "--workers", str(arguments.workers),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=workspace)
        (report,) = Path(workspace).glob("*.json")
        epochs = [
            line["data"] for line in read_report(report) if line["type"] == "LOG" and len(line["step"]) == 1
        ]
    return float(epochs[-1]["train.total_ips"])


def bare_in_process(arguments: argparse.Namespace) -> float:
    """`bare_loop` in a process of its own."""
    words = [
        str(x) for x in (arguments.arch, arguments.batch_size, arguments.image_size, arguments.num_steps)
    ]
    result = subprocess.run(
        [sys.executable, __file__, "--bare", *words], check=True, capture_output=True, text=True
    )
    return float(result.stdout)


def summary(name: str, above: list[float], below: list[float], target: float) -> dict[str, object]:
    """Ratios pair by pair."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    median = statistics.median(ratios)
    print(
        f"{name:12} {median:.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f}, n = {len(ratios)}; target ≥ {target})"
    )
    return {"name": name, "median": median, "least": ratios[0], "most": ratios[-1], "target": target}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bare", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument(
        "--data", type=Path, default=None, help="directory in ImageNet layout, for bottleneck"
    )
    parser.add_argument("--data-backend", default="auto")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "training.json")
    arguments = parser.parse_args()
    if arguments.bare:
        arch, *numbers = arguments.bare
        print(bare_loop(arch, *map(int, numbers)))
        return
    sides: dict[str, list[float]] = {"bare": [], "synthetic": [], "real": []}
    for _ in range(arguments.repeats):
        sides["bare"].append(bare_in_process(arguments))
        sides["synthetic"].append(our_loop(["--data-backend", "synthetic"], arguments))
        if arguments.data is not None:
            real = [str(arguments.data), "--data-backend", arguments.data_backend]
            sides["real"].append(our_loop(real, arguments))
    for name, values in sides.items():
        if values:
            print(
                f"{name:12} {statistics.median(values):.2f} images/s (from {min(values):.2f} to {max(values):.2f})"
            )
    rows = [summary("overhead", sides["synthetic"], sides["bare"], 0.99)]
    if arguments.data is not None:
        rows.append(summary("bottleneck", sides["real"], sides["synthetic"], 0.97))
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    settings = {k: str(v) for k, v in vars(arguments).items() if k not in ("bare", "output")}
    report = {
        "settings": settings,
        "images_per_second": sides,
        "ratios": rows,
        "environment": describe_environment(device),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
