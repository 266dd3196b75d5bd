"""Two questions about the training loop, as ratios of images per second measured in turns.

    python benchmarks/training.py [DIR] [--arch resnet50] [--batch-size 16] [--num-pairs 20] [--repeats 5]

overhead     main.py's loop on synthetic data ÷ a bare torch loop (same network, precision, memory format) bottleneck
main.py on real JPEGs (DIR, ImageNet layout) ÷ main.py on synthetic data; left out without DIR

For overhead the two loops take turns step by step within one process, so that a busy machine slows both equally; a step
of main.py's loop is everything from the end of one step to the end of the next, including logging. For bottleneck every
run is a separate process. First iterations (compilation, choice of kernels) do not count. Ratios are taken pair by
pair; their median and range are printed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from common.jobs import MAIN, log_rows, run_python
from common.measure import Clock, in_turns, ratios, spread
from common.report import BenchmarkParser, print_table, write_json
from torch import nn

from image_classification import job as jobs
from image_classification.callbacks import Callback, TrainLoop
from image_classification.cli import parse_config
from image_classification.data.loader import Batch
from image_classification.job_config import JobConfig
from image_classification.joining import setup_distributed
from image_classification.trainer import WARMUP_STEPS

SYNTHETIC = ["--data-backend", "synthetic"]
TARGETS = {"overhead": 0.99, "bottleneck": 0.97}


class BareLoop(Callback):
    """After each step of the trainer, runs a step of a hand-written loop, and times both.

    Args:
        model: A network like the trainer's, in the same memory format.
        device: Device of both.
    """

    name = "bare_loop"

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model.train(), device
        self.optimizer = torch.optim.SGD(
            model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=device.type == "cuda"
        )
        self.seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        self._clock = Clock(device)
        self._begin = 0.0

    def on_batch_start(self, trainer: TrainLoop, batch: Batch) -> None:
        """Keep the trainer's batch."""
        self.images, self.targets = batch.images, batch.targets

    def on_step_end(self, trainer: TrainLoop) -> None:
        """End the trainer's step and run the bare one."""
        between = self._clock.now()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(self.model(self.images), self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end = self._clock.now()
        if trainer.state.iteration > WARMUP_STEPS:
            self.seconds["ours"].append(between - self._begin)
            self.seconds["bare"].append(end - between)
        self._begin = end


def main_words(data: list[str], arguments: argparse.Namespace, num_steps: int, workspace: str) -> list[str]:
    """Return the arguments of `main.py`."""
    words = [*data, "--arch", arguments.arch, "--batch-size", str(arguments.batch_size)]
    words += ["--image-size", str(arguments.image_size), "--num-classes", "1000"]
    words += ["--epochs", "1", "--prof", str(WARMUP_STEPS + num_steps), "--training-only"]
    words += ["--amp", "--amp-dtype", "bf16", "--memory-format", "nhwc", "--no-checkpoints"]
    words += ["--workspace", workspace, "--workers", str(arguments.workers)]
    return [*words, "--device", arguments.device.type, "--seed", str(arguments.seed)]


def paired_steps(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of trainer steps and of bare steps."""
    with tempfile.TemporaryDirectory() as workspace:
        words = main_words(SYNTHETIC, arguments, arguments.num_pairs, workspace)
        configs = parse_config(JobConfig, words, prog="main.py")
        with setup_distributed(configs.distributed) as distributed:
            job = jobs.prepare(configs, distributed)
            bare = BareLoop(jobs.make_model(job), distributed.device)
            jobs.make_trainer(job, jobs.make_model(job), callbacks=[bare]).fit()
            job.close()
    return bare.seconds


def our_loop(data: list[str], arguments: argparse.Namespace) -> float:
    """Return images per second of main.py, from its own report."""
    with tempfile.TemporaryDirectory() as workspace:
        words = main_words(data, arguments, arguments.num_steps, workspace)
        run_python(MAIN, *words, quiet=True)
        (report,) = Path(workspace).glob("*.json")
        return log_rows(report, epochs=True)[-1]["train.total_ips"]


def summary(name: str, above: list[float], below: list[float]) -> dict[str, str | int | float]:
    """Return ratios pair by pair."""
    return {"name": name, **spread(ratios(above, below)), "n": len(above), "target": TARGETS[name]}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, repeats=5)
    parser.add_argument(
        "data", nargs="?", type=Path, default=None, help="directory in ImageNet layout, for bottleneck"
    )
    parser.add_argument("--data-backend", default="auto")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-pairs", type=int, default=20, help="steps of each loop, for overhead")
    parser.add_argument("--num-steps", type=int, default=10, help="steps of each run, for bottleneck")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    small = {"arch": "resnet20", "batch_size": 4, "image_size": 32, "num_pairs": 2, "num_steps": 2}
    return parser.parse("training.json", quick={**small, "repeats": 1})


def main() -> None:
    """Measure, print and write JSON."""
    arguments = parse()
    seconds = paired_steps(arguments)
    # Images per second are the inverse of seconds per step.
    found = [summary("overhead", seconds["bare"], seconds["ours"])]
    speeds: dict[str, list[float]] = {}
    if arguments.data is not None:
        real = [str(arguments.data), "--data-backend", arguments.data_backend]
        sides = {"synthetic": SYNTHETIC, "real": real}
        speeds = in_turns(sides, lambda words: our_loop(words, arguments), arguments.repeats, warm_up=0)
        found.append(summary("bottleneck", speeds["real"], speeds["synthetic"]))
    for name, values in speeds.items():
        speed = spread(values)
        print(f"{name}: {speed['median']:.2f} images/s ({speed['min']:.2f} – {speed['max']:.2f})")
    rows = []
    for row in found:
        numbers = [f"{row[key]:.3f}" for key in ("median", "min", "max")]
        rows.append([str(row["name"]), *numbers, str(row["n"]), f"≥ {row['target']}"])
    print_table(["ratio", "median", "min", "max", "n", "target"], rows)
    content = {"seconds_per_step": seconds, "images_per_second": speeds, "ratios": found}
    write_json(arguments, arguments.repeats, content)


if __name__ == "__main__":
    main()
