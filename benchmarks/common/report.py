"""Common interface of benchmarks: arguments, table, and JSON file with the environment of the measurement."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import ROOT
from image_classification.observe.environment import describe_environment

RESULTS = ROOT / "benchmarks" / "results"


class BenchmarkParser(argparse.ArgumentParser):
    """Argument parser of a benchmark: common arguments and its own.

    Args:
        description: The script's docstring, shown unchanged by `--help`.
        repeats: Default of `--repeats`; None if nothing is repeated.
        seeds: Default of `--seeds` for benchmarks that run with several seeds; the others have `--seed`.
        threads: Default of `--threads`; None leaves the number to PyTorch and to OMP_NUM_THREADS.
        cpu_only: Whether everything runs on the CPU, so that there is no `--device`.
    """

    def __init__(
        self,
        description: str | None,
        *,
        repeats: int | None = None,
        seeds: Sequence[int] | None = None,
        threads: int | None = None,
        cpu_only: bool = False,
    ) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self.add_argument("--output", type=Path, help="JSON file; default: a file in benchmarks/results/")
        self.add_argument(
            "--quick", action="store_true", help="a trial run of seconds; its figures mean nothing"
        )
        self.add_argument("--threads", type=int, default=threads, help="of PyTorch, in child processes too")
        if cpu_only:
            self.set_defaults(device="cpu")
        else:
            default = "cuda" if torch.cuda.is_available() else "cpu"
            self.add_argument("--device", default=default, help="default: a GPU if there is one")
        if repeats is not None:
            self.add_argument("--repeats", type=int, default=repeats, help="measurements of each side")
        if seeds is None:
            self.add_argument("--seed", type=int, default=0)
        else:
            self.add_argument("--seeds", type=int, nargs="+", default=list(seeds))

    def parse(self, output: str, quick: Mapping[str, object]) -> argparse.Namespace:
        """Read the command line, and set the number of threads and the seed.

        Args:
            output: Name of the default file in benchmarks/results/, with arguments in braces: `"speed_{arch}.json"`.
            quick: Argument → default under `--quick`. Values given on the command line take precedence.

        Returns:
            The arguments. `device` is a `torch.device`, `output` is always set: a quick run without `--output` writes
            to runs/quick/, never to the results.
        """
        arguments = self.parse_args()
        if arguments.quick:
            self.set_defaults(**quick)
            arguments = self.parse_args()
        if arguments.output is None:
            folder = Path("runs/quick") if arguments.quick else RESULTS
            arguments.output = folder / output.format(**vars(arguments)).replace("/", "_")
        arguments.device = torch.device(arguments.device)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
            os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        torch.manual_seed(getattr(arguments, "seed", 0))
        return arguments


def write_json(arguments: argparse.Namespace, n: int, content: Mapping[str, object]) -> None:
    """Write a benchmark's results to `--output`, below a head with the same fields in all benchmarks.

    Args:
        arguments: Arguments of the benchmark; all are recorded except locations on this machine.
        n: Number of measurements of each figure: repeats, or seeds.
        content: The results.
    """
    path: Path = arguments.output
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        _plain(head(arguments, n) | dict(content)), indent=1, ensure_ascii=False, allow_nan=False
    )
    path.write_text(text + "\n", encoding="utf-8")
    print(f"written to {path}", flush=True)


def head(arguments: argparse.Namespace, n: int) -> dict[str, object]:
    """Return what was run: commit, number of measurements, and environment (hardware, versions, threads, load,
    date).
    """
    script = Path(sys.argv[0]).name
    places = ("output", "workspace", "memory_of")
    return {
        "benchmark": Path(script).stem,
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "commit": _commit(),
        "n": n,
        "settings": {name: value for name, value in vars(arguments).items() if name not in places},
        "environment": describe_environment(arguments.device),
    }


def _commit() -> str | None:
    """Return the checked-out commit, with the suffix -dirty if files differ; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _plain(value: Any) -> Any:
    """Convert a value for JSON: paths to their names, devices to text, undefined numbers to null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], num_names: int = 1) -> None:
    """Print a table.

    Args:
        columns: Headings.
        rows: Cells of every row.
        num_names: Number of leading text columns, which are left-aligned; numbers are right-aligned.
    """
    lines = [columns, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    for line in lines:
        names = [cell.ljust(width) for cell, width in zip(line[:num_names], widths, strict=False)]
        numbers = [
            cell.rjust(width) for cell, width in zip(line[num_names:], widths[num_names:], strict=True)
        ]
        print("  ".join(names + numbers), flush=True)
