"""Training throughput of a machine: `python -m image_classification throughput`.

Every combination of processes, loading backend and precision trains for some iterations in separate processes, measured
as in NVIDIA's DeepLearningExamples: images per second after the first iterations, the share of time spent waiting for
data, memory and energy. Efficiency refers to weak scaling: the batch per process is constant, so N processes ideally
process N times the images of one.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import torch

from image_classification.command_parser import positive
from image_classification.config import check
from image_classification.data.backends import choose_backend
from image_classification.file_writing import output_path, write_text
from image_classification.joining import DeviceName, DistributedConfig
from image_classification.observe.environment import describe_environment
from image_classification.observe.json_report import read_report
from image_classification.plain_data import Plain
from image_classification.precision import MemoryFormat
from image_classification.verbs import declared

#: Name → flags of a training job.
PRECISIONS = {
    "fp32": ("--no-tf32",),
    "tf32": ("--tf32",),
    "amp": ("--amp", "--amp-dtype", "fp16"),
    "bf16": ("--amp", "--amp-dtype", "bf16"),
}
_WINDOWS = 4  # number of logging steps per measurement
_COLUMNS = ("processes", "backend", "precision", "images/s", "efficiency", "waiting", "memory", "J/image")


@dataclasses.dataclass(kw_only=True)
class Measured:
    """One combination, and its figures.

    Attributes:
        processes, backend, precision: The combination.
        ips: Images per second of all processes.
        efficiency: `ips` ÷ (processes × `ips` per process of the smallest number of processes); None without a smaller
            number.
        waiting: Share of time spent waiting for data, 0 … 1.
        memory_gib: Peak of rank 0's GPU; on a CPU the memory of rank 0's process.
        joules_per_image: Energy per image of rank 0's GPU; None if it is not measured.
        problem: Why there are no figures.
    """

    processes: int
    backend: str
    precision: str
    ips: float | None = None
    efficiency: float | None = None
    waiting: float | None = None
    memory_gib: float | None = None
    joules_per_image: float | None = None
    problem: str | None = None

    def cells(self) -> list[str]:
        """Return a row of the table, with the columns `_COLUMNS`."""
        head = [str(self.processes), self.backend, self.precision]
        if self.problem is not None:
            return [*head, self.problem]
        shares = ["–" if share is None else f"{share:.1%}" for share in (self.efficiency, self.waiting)]
        memory = "–" if self.memory_gib is None else f"{self.memory_gib:.1f} GiB"
        energy = "–" if self.joules_per_image is None else f"{self.joules_per_image:.3f}"
        return [*head, f"{self.ips:,.1f}", *shares, memory, energy]


def measure(row: Measured, arguments: argparse.Namespace) -> None:
    """Train one combination and fill in its figures."""
    with tempfile.TemporaryDirectory(prefix="lucidprune_throughput_") as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        words = [*launcher, str(row.processes), "-m", "image_classification.throughput_run"]
        words += training_flags(row, arguments, Path(folder))
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror:" in line]
            row.problem = lines[0].strip() if lines else f"ended with exit code {done.returncode}"
            return
        entries = [
            entry for entry in read_report(Path(folder) / "experiment_raport.json") if entry["type"] == "LOG"
        ]
    fill_in(row, entries)


def training_flags(row: Measured, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Return the flags of the training job to measure."""
    words = [arguments.data, "--data-backend", row.backend, *PRECISIONS[row.precision]]
    settings: dict[str, object] = {
        "--arch": arguments.arch,
        "--batch-size": arguments.batch_size,
        "--image-size": arguments.image_size,
        "--workers": arguments.workers,
        "--memory-format": arguments.memory_format,
        "--device": arguments.device,
        "--prof": arguments.iterations,
        "--print-freq": max(1, arguments.iterations // _WINDOWS),
        "--epochs": 1,
        "--workspace": folder,
    }
    words += [str(word) for name, value in settings.items() if value is not None for word in (name, value)]
    return [*words, "--training-only", "--no-checkpoints", *(["--compile"] if arguments.compile else [])]


def fill_in(row: Measured, entries: list[Plain]) -> None:
    """Fill in figures from a report: those of the epoch, without the first iterations, and of its last window."""
    (epoch,) = (entry["data"] for entry in entries if len(entry["step"]) == 1)
    *_, window = (entry["data"] for entry in entries if len(entry["step"]) == 2)
    run: dict[str, float] = next((entry["data"] for entry in entries if not entry["step"]), {})
    if "train.total_ips" not in epoch:
        row.problem = "too few iterations: raise --iterations, or lower --batch-size"
        return
    row.ips = epoch["train.total_ips"]
    row.waiting = epoch["train.data_time"] / (epoch["train.data_time"] + epoch["train.compute_time"])
    row.memory_gib = run.get("gpu.peak_memory_gib", window.get("process.memory_gib"))
    row.joules_per_image = window.get("train.joules_per_image")


def add_efficiency(rows: list[Measured]) -> None:
    """Compare each row with the smallest number of processes of the same backend and precision."""
    for row in rows:
        alike = [
            other
            for other in rows
            if other.ips and (other.backend, other.precision) == (row.backend, row.precision)
        ]
        base = min(alike, key=lambda other: other.processes, default=row)
        if row.ips and base.ips and base is not row:
            row.efficiency = row.ips / row.processes / (base.ips / base.processes)


def table(rows: list[Measured]) -> str:
    """Return the rows in Markdown."""
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "data", nargs="?", default="shapes", help="as for main.py; not looked at by the synthetic backend"
    )
    parser.add_argument(
        "--gpus", "--processes", type=int, nargs="+", default=[1], metavar="N", help="processes, one per GPU"
    )
    parser.add_argument(
        "--backends", nargs="+", default=["synthetic"], metavar="NAME", help="as --data-backend"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["fp32"],
        choices=tuple(PRECISIONS),
        help="fp16 with --precision amp",
    )
    parser.add_argument("--arch", "-a", default="resnet50")
    parser.add_argument("--batch-size", "-b", type=positive, default=128, help="per process")
    parser.add_argument("--image-size", type=positive, default=None)
    parser.add_argument("--iterations", type=int, default=100, help="of each measurement")
    parser.add_argument("--workers", "-j", type=int, default=None)
    parser.add_argument("--memory-format", default="nhwc", choices=get_args(MemoryFormat))
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--device", default=DistributedConfig.device, choices=get_args(DeviceName))
    parser.add_argument(
        "--json", type=output_path, default=None, metavar="FILE", help="write the figures there as well"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure all combinations, print the table, write JSON; return 1 if one could not be measured."""
    check(min(arguments.gpus) >= 1, f"--gpus {arguments.gpus}: each must be at least 1")
    check(arguments.iterations >= 8, f"--iterations {arguments.iterations}: at least 8 are needed")
    for name in arguments.backends:
        choose_backend(name, torch.device("cpu"))
    rows = []
    for backend, precision, processes in itertools.product(
        arguments.backends, arguments.precision, sorted(arguments.gpus)
    ):
        row = Measured(processes=processes, backend=backend, precision=precision)
        measure(row, arguments)
        rows.append(row)
        add_efficiency(rows)
        print(" ".join(row.cells()), file=sys.stderr, flush=True)
    print(table(rows))
    if arguments.json is not None:
        write_json(arguments, rows)
    return int(any(row.problem is not None for row in rows))


def write_json(arguments: argparse.Namespace, rows: list[Measured]) -> None:
    """Write settings, environment and figures as JSON."""
    device = torch.device("cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu")
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "plugin")}
    report = {
        "settings": settings | {"data": Path(arguments.data).name},
        "rows": [dataclasses.asdict(row) for row in rows],
        "environment": describe_environment(device),
    }
    write_text(arguments.json, json.dumps(report, indent=2) + "\n")


VERB = declared(declare, run)
