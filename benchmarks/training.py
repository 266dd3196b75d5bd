"""Two questions about the training loop, as ratios of images per second measured in turns.

    python benchmarks/training.py [--data DIR] [--arch resnet50] [--batch-size 16] [--output FILE.json]

overhead     main.py's loop on synthetic data ÷ a bare torch loop (same network, precision, memory format)
bottleneck   main.py on real JPEGs (--data, ImageNet layout) ÷ main.py on synthetic data

For overhead the two loops take turns step by step within one process, which a busy machine disturbs least; a step of
ours is everything from the end of one to the end of the next, logging included. For bottleneck every run is a process
of its own. First iterations (compilation, choice of kernels) do not count; ratios are taken pair by pair.
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
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classification import job as jobs
from image_classification.callbacks import Callback
from image_classification.cli import parse_config
from image_classification.data.loader import Batch
from image_classification.distributed import setup_distributed
from image_classification.environment import describe_environment
from image_classification.report import read_report
from image_classification.trainer import WARMUP_STEPS, Trainer


class BareLoop(Callback):
    """After each step of the trainer does a step of a loop that one writes without a framework, and times both.

    Args:
        model: A network like the trainer's, in the same memory format.
        device: Of both.
    """

    name = "bare_loop"

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model.train(), device
        self.optimizer = torch.optim.SGD(
            model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=device.type == "cuda"
        )
        self.pairs: list[tuple[float, float]] = []
        self._begin = 0.0

    def on_batch_start(self, trainer: Trainer, batch: Batch) -> None:
        self.images, self.targets = batch.images, batch.targets

    def on_step_end(self, trainer: Trainer) -> None:
        between = self._now()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(self.model(self.images), self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end = self._now()
        if trainer.state.iteration > WARMUP_STEPS:
            self.pairs.append((between - self._begin, end - between))
        self._begin = end

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def paired_steps(arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of (our, bare) steps."""
    with tempfile.TemporaryDirectory() as workspace:
        words = main_words(
            ["--data-backend", "synthetic"], arguments, WARMUP_STEPS + arguments.num_pairs, workspace
        )
        configs = parse_config(jobs.SECTIONS, words, prog="main.py")
        with setup_distributed(configs["distributed"]) as distributed:
            job = jobs.prepare(configs, distributed)
            bare = BareLoop(jobs.make_model(job), distributed.device)
            jobs.make_trainer(job, jobs.make_model(job), callbacks=[bare]).fit()
            job.close()
    return bare.pairs


def main_words(data: list[str], arguments: argparse.Namespace, num_steps: int, workspace: str) -> list[str]:
    """The words after `main.py`."""
    return [
        *data, "--arch", arguments.arch, "--batch-size", str(arguments.batch_size), "--image-size",
        str(arguments.image_size), "--epochs", "1", "--prof", str(num_steps), "--training-only", "--amp", "--amp-dtype",
        "bf16", "--memory-format", "nhwc", "--no-checkpoints", "--workspace", workspace, "--num-classes", "1000",
        "--workers", str(arguments.workers),
    ]  # fmt: skip


def our_loop(data: list[str], arguments: argparse.Namespace) -> float:
    """Images per second of main.py, from its own report."""
    steps = WARMUP_STEPS + arguments.num_steps
    with tempfile.TemporaryDirectory() as workspace:
        command = [sys.executable, str(ROOT / "main.py"), *main_words(data, arguments, steps, workspace)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=workspace)
        (report,) = Path(workspace).glob("*.json")
        epochs = [
            line["data"] for line in read_report(report) if line["type"] == "LOG" and len(line["step"]) == 1
        ]
    return float(epochs[-1]["train.total_ips"])


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
    parser.add_argument(
        "--data", type=Path, default=None, help="directory in ImageNet layout, for bottleneck"
    )
    parser.add_argument("--data-backend", default="auto")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-pairs", type=int, default=20, help="steps of each loop, for overhead")
    parser.add_argument("--num-steps", type=int, default=10, help="steps of each run, for bottleneck")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, for bottleneck")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "training.json")
    arguments = parser.parse_args()
    ours, bare = zip(*paired_steps(arguments), strict=True)
    # Images per second are the inverse of seconds per step.
    rows = [summary("overhead", list(bare), list(ours), 0.99)]
    sides: dict[str, list[float]] = {"synthetic": [], "real": []}
    for _ in range(arguments.repeats):
        if arguments.data is not None:
            sides["synthetic"].append(our_loop(["--data-backend", "synthetic"], arguments))
            real = [str(arguments.data), "--data-backend", arguments.data_backend]
            sides["real"].append(our_loop(real, arguments))
    for name, values in sides.items():
        if values:
            print(
                f"{name:12} {statistics.median(values):.2f} images/s (from {min(values):.2f} to {max(values):.2f})"
            )
    if arguments.data is not None:
        rows.append(summary("bottleneck", sides["real"], sides["synthetic"], 0.97))
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    settings = {k: str(v) for k, v in vars(arguments).items() if k != "output"}
    report = {
        "settings": settings,
        "seconds_per_step": {"ours": ours, "bare": bare},
        "images_per_second": sides,
        "ratios": rows,
        "environment": describe_environment(device),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
