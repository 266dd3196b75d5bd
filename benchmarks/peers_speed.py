"""Latency of the networks of `peers.py`, and its curves: top-1 over MACs, over latency, and over training time.

    python benchmarks/peers_speed.py --workspace DIR [--threads 1] [--epochs 5] [--batch-sizes 1 64] [--plot FILE.svg]

The networks of one seed (`--seed`) are timed in turns in every runtime: operator by operator, compiled, and as an ONNX
file in ONNX Runtime (CPU only). The speed-up is the median of the rounds' own ratios to the network before pruning. One
seed is enough, since latency does not depend on the weights; top-1 is the mean over all seeds in the workspace.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from common.measure import mean_and_deviation, ratios, with_deviation
from common.peer_tables import runs_folder
from common.quick_network import make_network
from common.report import BenchmarkParser, print_table, write_json
from common.runtimes import RUNTIMES, seconds_in
from torch import nn

WHOLE = "before pruning"
Row = dict[str, Any]


def read_runs(arguments: argparse.Namespace) -> list[Row]:
    """Return the workspace's runs of this architecture and length, each with the file of its network."""
    folder = runs_folder(arguments.workspace, arguments.arch, arguments.epochs, arguments.lr)
    runs = [
        json.loads(path.read_text(encoding="utf-8")) | {"file": path.with_suffix(".pt")}
        for path in sorted(folder.glob("*.json"))
    ]
    if not runs:
        raise SystemExit(f"{folder} has no runs: run benchmarks/peers.py with this --workspace first")
    wanted = [run for run in runs if not arguments.methods or run["method"] in arguments.methods]
    return [run for run in wanted if run["macs"] < 1]


def networks_of(arguments: argparse.Namespace, runs: list[Row]) -> dict[str, nn.Module]:
    """Return row name → network of the chosen seed; the first is the network before pruning."""
    found: dict[str, nn.Module] = {}
    for run in runs:
        if run["seed"] == arguments.seed and run["file"].is_file():
            found[name_of(run)] = torch.load(run["file"], weights_only=False, map_location=arguments.device)
    if not found:
        raise SystemExit(f"the workspace has no network of seed {arguments.seed}")
    classes = [module for module in next(iter(found.values())).modules() if isinstance(module, nn.Linear)]
    whole = make_network(arguments.arch, torch.randn(8, 3, 32, 32), classes[-1].out_features)
    return {WHOLE: whole.to(arguments.device)} | found


def name_of(run: Row) -> str:
    """Return the name of a run's row."""
    return f"{run['method']} @ {run['budget']:g}"


def time_all(arguments: argparse.Namespace, networks: dict[str, nn.Module]) -> dict[str, dict[str, Row]]:
    """Return row name → "runtime, batch" → milliseconds per batch and speed-up."""
    torch.manual_seed(0)
    found: dict[str, dict[str, Row]] = {name: {} for name in networks}
    for runtime in arguments.runtimes:
        for batch_size in arguments.batch_sizes:
            images = torch.randn(batch_size, 3, arguments.image_size, arguments.image_size)
            images = images.to(arguments.device)
            seconds = seconds_in(runtime, networks, images, arguments.repeats)
            for name, rounds in seconds.items():
                speed_ups = ratios(seconds[WHOLE], rounds)
                found[name][f"{runtime}, batch {batch_size}"] = {
                    "ms": 1000 * statistics.median(rounds),
                    "speed_up": statistics.median(speed_ups),
                    "speed_up_range": [min(speed_ups), max(speed_ups)],
                }
    return found


def rows_of(runs: list[Row], timed: dict[str, dict[str, Row]]) -> list[Row]:
    """Return a row per method and budget: mean top-1 and MACs over the seeds, and the timings."""
    rows = []
    for name, timings in timed.items():
        same = [run for run in runs if name_of(run) == name]
        rows.append(
            {
                "network": name,
                "method": same[0]["method"] if same else WHOLE,
                "n": len(same),
                "macs": mean_and_deviation([run["macs"] for run in same] or [1.0]),
                "top1": mean_and_deviation([run["top1"] for run in same] or [runs[0]["top1_before"]]),
                "timings": timings,
            }
        )
    return rows


def draw(path: Path, rows: list[Row], runs: list[Row], latency: str) -> None:
    """Draw the three curves.

    Args:
        path: The figure; its suffix says the format.
        rows: Of `rows_of`.
        runs: All runs, for top-1 over training time at the smallest budget.
        latency: Which timing to draw.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_macs, by_latency, by_time = figure.subplots(1, 3)
    budget = min(run["budget"] for run in runs)
    whole = next(row for row in rows if row["method"] == WHOLE)
    for number, method in enumerate(dict.fromkeys(run["method"] for run in runs)):
        color = f"C{number}"
        points = sorted((row for row in rows if row["method"] == method), key=lambda row: row["macs"]["mean"])
        heights = [point["top1"]["mean"] for point in points]
        errors = [point["top1"]["std"] or 0.0 for point in points]
        for axes, places in (
            (by_macs, [point["macs"]["mean"] for point in points]),
            (by_latency, [point["timings"][latency]["ms"] for point in points]),
        ):
            axes.errorbar(places, heights, errors, color=color, marker="o", capsize=3, label=method)
        same = [run for run in runs if run["method"] == method and run["budget"] == budget]
        if same:
            times, tops = (
                [statistics.fmean(values) for values in zip(*(run[key] for run in same), strict=True)]
                for key in ("epoch_seconds", "top1_epochs")
            )
            by_time.plot(times, tops, color=color, marker="o")
    for axes in (by_macs, by_latency):
        axes.axhline(whole["top1"]["mean"], color="grey", linestyle=":", label=WHOLE)
    by_macs.set(xlabel="share of the MACs", ylabel="top-1 %")
    by_latency.set(xlabel=f"ms ({latency}; {whole['timings'][latency]['ms']:.2f} {WHOLE})")
    by_time.set(xlabel=f"seconds of training (at {budget:g}, every epoch)")
    by_macs.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Measure, print, draw and write JSON."""
    parser = BenchmarkParser(__doc__, repeats=15, threads=1)
    parser.add_argument("--workspace", type=Path, default=Path("runs/peers"))
    parser.add_argument("--arch", default="resnet20_b")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--lr", type=float, default=0.1, help="peak rate of the runs")
    parser.add_argument("--methods", nargs="*", help="default: all")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    arguments = parser.parse(
        "peers_speed_{arch}_{threads}threads.json",
        quick={"epochs": 2, "runtimes": ["eager"], "batch_sizes": [1], "repeats": 2, "image_size": 16},
    )
    runs = read_runs(arguments)
    rows = rows_of(runs, time_all(arguments, networks_of(arguments, runs)))
    columns = list(rows[0]["timings"])
    print_table(
        ["network", "n", "MACs", "top-1 %", *(f"{column} ms (×)" for column in columns)],
        [
            [row["network"], str(row["n"]), with_deviation(row["macs"], 3), with_deviation(row["top1"])]
            + [f"{row['timings'][c]['ms']:.2f} ({row['timings'][c]['speed_up']:.2f})" for c in columns]
            for row in rows
        ],
    )
    if arguments.plot is not None:
        draw(arguments.plot, rows, runs, columns[-1])
    write_json(arguments, arguments.repeats, {"rows": rows})


if __name__ == "__main__":
    main()
