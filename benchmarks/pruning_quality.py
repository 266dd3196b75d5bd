"""Accuracy at the same budget after the same fine-tuning: a comparison of pruning criteria over several seeds.

    python benchmarks/pruning_quality.py DATA --arch resnet20 --workspace DIR [--seeds 0 1 2] [--runs none magnitude]

For every seed one network is trained, and from its weights one run per entry of `--runs`: `none` fine-tunes without
pruning; every other entry is a criterion, with further flags of main.py after colons
(`discriminant:--score-features=pre`). All runs of a seed have the same weights, images, order and schedule: cosine from
`--lr`, with the rewrites in its first part. The table has the last top-1 of every run, mean ± standard deviation over
the seeds.

Everything is done by main.py. Runs finished in DIR are not repeated, and interrupted ones continue, so the script may
be stopped at any time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.jobs import MAIN, log_rows, train_once
from common.measure import mean_and_deviation, with_deviation
from common.report import BenchmarkParser, print_table, write_json

RUNS = ["none", "discriminant", "discriminant:--score-features=pre", "magnitude", "taylor", "random"]

Figures = dict[str, Any]


def train(arguments: argparse.Namespace, workspace: Path, words: list[str]) -> Figures:
    """Run main.py unless the run is finished; return its figures from its report."""
    command = [MAIN, arguments.data, "--arch", arguments.arch, "--raport-file", "report.json"]
    command += ["-b", str(arguments.batch_size), "--amp", "--memory-format", "nhwc"]
    command += ["--device", arguments.device.type, "--lr-schedule", "cosine", *words]
    if arguments.image_size:
        command += ["--image-size", str(arguments.image_size)]
    train_once(workspace, *command)
    return read_figures(workspace / "report.json")


def read_figures(report: Path) -> Figures:
    """Return accuracy after every epoch, the share of the MACs at the end, and the seconds that pruning took."""
    rows = log_rows(report)
    figures: Figures = {"top1": [row["val.top1"] for row in rows if "val.top1" in row]}
    shares = [row["pruning.macs_share"] for row in rows if "pruning.macs_share" in row]
    if shares:
        figures["macs_share"] = shares[-1]
    figures["pruning_seconds"] = 0.0
    for row in rows:
        figures["pruning_seconds"] += sum(
            value for key, value in row.items() if key.startswith("pruning.seconds.")
        )
    return figures


def pruning_words(run: str, arguments: argparse.Namespace) -> list[str]:
    """Return the flags of main.py for an entry of `--runs`."""
    if run == "none":
        return []
    criterion, *more = run.split(":")
    words = ["--iterative-pruning", "--budget", f"macs={arguments.keep}", "--pruning-criterion", criterion]
    words += ["--pruning-step", str(arguments.pruning_step), "--pruning-delta", str(arguments.pruning_delta)]
    return words + more


def run_seed(seed: int, arguments: argparse.Namespace) -> dict[str, Figures]:
    """Run all runs of one seed."""
    folder = arguments.workspace / f"{arguments.arch.replace('/', '_')}-{seed}"
    weights = arguments.pretrained_weights
    found: dict[str, Figures] = {}
    if weights is None:
        words = ["--epochs", str(arguments.pretrain_epochs), "--lr", str(arguments.pretrain_lr)]
        words += ["--warmup", "1", "--seed", str(seed)]
        found["pretrained"] = train(arguments, folder / "pretrained", words)
        weights = folder / "pretrained" / "checkpoint.pth.tar"
    for run in arguments.runs:
        words = ["--pretrained-weights", str(weights), "--warmup", "0", "--seed", str(seed + 100)]
        words += ["--epochs", str(arguments.epochs), "--lr", str(arguments.lr)]
        name = run.replace(":", "_").replace("/", "_")
        found[run] = train(arguments, folder / name, [*words, *pruning_words(run, arguments)])
        print(f"seed {seed} {run}: {found[run]}", flush=True)
    return found


def summarise(seeds: dict[int, dict[str, Figures]]) -> dict[str, Figures]:
    """Return mean and deviation of the last accuracy of every run over the seeds."""
    summary: dict[str, Figures] = {}
    for run in next(iter(seeds.values())):
        last = [figures[run]["top1"][-1] for figures in seeds.values() if run in figures]
        summary[run] = {"n": len(last), **mean_and_deviation(last)}
    return summary


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, seeds=(0, 1, 2))
    parser.add_argument("data")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--pretrained-weights", type=Path, help="start all seeds from these weights")
    parser.add_argument("--pretrain-epochs", type=int, default=8)
    parser.add_argument("--pretrain-lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs that remains")
    parser.add_argument("--pruning-step", type=int, default=4)
    parser.add_argument("--pruning-delta", type=float, default=0.0125)
    quick = {
        "seeds": [0],
        "runs": ["magnitude"],
        "pretrain_epochs": 2,
        "epochs": 1,
        "batch_size": 16,
        "image_size": 32,
        "keep": 0.9,
        "pruning_step": 1,
        "pruning_delta": 0.1,
    }
    return parser.parse("pruning_quality_{arch}.json", quick=quick)


def main() -> None:
    """Run what is missing, print the table and write the results."""
    arguments = parse()
    seeds: dict[int, dict[str, Figures]] = {}
    for seed in arguments.seeds:
        seeds[seed] = run_seed(seed, arguments)
        summary = summarise(seeds)
        rows = [[run, with_deviation(row, 2), str(row["n"])] for run, row in summary.items()]
        print_table(["run", "top-1", "n"], rows)
        write_json(arguments, len(seeds), {"summary": summary, "seeds": seeds})


if __name__ == "__main__":
    main()
