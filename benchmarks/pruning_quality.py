"""Accuracy at the same budget and the same fine-tuning: criteria beside each other, several seeds.

    python benchmarks/pruning_quality.py DATA --arch resnet20 --work-dir DIR [--seeds 0 1 2] [--output FILE.json]

For every seed one network is trained, and from its weights one run per entry of --runs: `none` fine-tunes without
pruning, every other entry is a criterion, with further flags of main.py after colons
(`discriminant:--score-features=pre`). All runs of a seed have the same weights, pictures, order and schedule: cosine
from --lr, rewrites in its first part. Everything goes through main.py. A run that is finished in DIR is not repeated,
an interrupted one continues, so the script may be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classification.environment import describe_environment
from image_classification.report import read_report

RUNS = ["none", "discriminant", "discriminant:--score-features=pre", "magnitude", "taylor", "random"]


def train(arguments: argparse.Namespace, workspace: Path, flags: list[str]) -> dict[str, Any]:
    """One run of main.py, unless it is finished; its figures from its report."""
    done = workspace / "finished"
    if not done.exists():
        command = [
            sys.executable, str(ROOT / "main.py"), arguments.data, "--arch", arguments.arch,
            "--workspace", str(workspace), "--raport-file", "report.json", "--resume", "auto",
            "-b", str(arguments.batch_size), "--amp", "--memory-format", "nhwc", "--lr-schedule", "cosine", *flags,
        ]  # fmt: skip
        if arguments.image_size:
            command += ["--image-size", str(arguments.image_size)]
        print(" ".join(command[1:]), flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        done.touch()
    return read_figures(workspace / "report.json")


def read_figures(report: Path) -> dict[str, Any]:
    """Accuracy after every epoch, and what pruning said."""
    rows = [row["data"] for row in read_report(report) if row.get("type") == "LOG"]
    figures: dict[str, Any] = {"top1": [row["val.top1"] for row in rows if "val.top1" in row]}
    shares = [row["pruning.macs_share"] for row in rows if "pruning.macs_share" in row]
    if shares:
        figures["macs_share"] = shares[-1]
    seconds = [sum(v for k, v in row.items() if k.startswith("pruning.seconds.")) for row in rows]
    figures["pruning_seconds"] = sum(seconds)
    return figures


def pruning_flags(run: str, arguments: argparse.Namespace) -> list[str]:
    """Flags of main.py for an entry of --runs."""
    if run == "none":
        return []
    criterion, *more = run.split(":")
    return [
        "--iterative-pruning", "--budget", f"macs={arguments.keep}", "--pruning-criterion", criterion,
        "--pruning-step", str(arguments.pruning_step), "--pruning-delta", str(arguments.pruning_delta), *more,
    ]  # fmt: skip


def run_seed(seed: int, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All runs of one seed."""
    folder = arguments.work_dir / f"{arguments.arch.replace('/', '_')}-{seed}"
    weights = arguments.pretrained
    found: dict[str, dict[str, Any]] = {}
    if weights is None:
        pretraining = folder / "pretrained"
        flags = [
            "--epochs",
            str(arguments.pretrain_epochs),
            "--lr",
            str(arguments.pretrain_lr),
            "--warmup",
            "1",
        ]
        found["pretrained"] = train(arguments, pretraining, [*flags, "--seed", str(seed)])
        weights = pretraining / "checkpoint.pth.tar"
    for run in arguments.runs:
        flags = [
            "--pretrained-weights",
            str(weights),
            "--epochs",
            str(arguments.epochs),
            "--lr",
            str(arguments.lr),
        ]
        flags += ["--warmup", "0", "--seed", str(seed + 100), *pruning_flags(run, arguments)]
        found[run] = train(arguments, folder / run.replace(":", "_").replace("/", "_"), flags)
        print(f"seed {seed} {run}: {found[run]}", flush=True)
    return found


def summarise(seeds: dict[int, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Mean and spread of the last accuracy of every run over the seeds."""
    summary = {}
    for run in next(iter(seeds.values())):
        last = [figures[run]["top1"][-1] for figures in seeds.values() if run in figures]
        summary[run] = {
            "n": len(last),
            "mean": statistics.mean(last),
            "std": statistics.stdev(last) if len(last) > 1 else float("nan"),
        }
    return summary


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--pretrained", type=Path, default=None, help="start all seeds from these weights")
    parser.add_argument("--pretrain-epochs", type=int, default=8)
    parser.add_argument("--pretrain-lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs that remains")
    parser.add_argument("--pruning-step", type=int, default=4)
    parser.add_argument("--pruning-delta", type=float, default=0.0125)
    parser.add_argument("--output", type=Path, default=None)
    return parser.parse_args()


def main() -> None:
    """Run what is missing, print the table, write the results."""
    arguments = parse()
    seeds: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in arguments.seeds:
        seeds[seed] = run_seed(seed, arguments)
        summary = summarise(seeds)
        print(f"\n{'run':<40} {'top-1':>8} {'± std':>7} {'n':>3}")
        for run, row in summary.items():
            print(f"{run:<40} {row['mean']:>8.2f} {row['std']:>7.2f} {row['n']:>3}", flush=True)
        if arguments.output is not None:
            report = {
                "settings": {
                    k: v.name if isinstance(v, Path) else str(v)
                    for k, v in vars(arguments).items()
                    if k not in ("output", "work_dir")
                },
                "summary": summary,
                "seeds": seeds,
                "environment": describe_environment(),
            }
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
