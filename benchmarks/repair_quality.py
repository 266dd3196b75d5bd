"""Accuracy left after cutting the inner widths of a trained network's blocks without training, by repair method.

    python benchmarks/repair_quality.py CHECKPOINT DATA [--widths 0.5 0.25] [--num-calibration 256] [--seeds 0 1 2]

Every group without a residual connection (produced by a single layer) keeps this share of its channels, those that a
criterion scores highest; all other groups are left alone. Seeds select the calibration images, which are used for
scores, statistics and least squares; top-1 is measured on all validation images. Networks of the first seed are kept in
the workspace: `python -m explainers compare CHECKPOINT SMALL DATA` shows the effect on their explanations.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common.report import BenchmarkParser, print_table, write_json
from torch import Tensor, nn

from image_classification.data.build import build_loaders
from image_classification.data.data_config import DataConfig
from image_classification.data.layouts import open_dataset
from image_classification.data.loader import Loader
from image_classification.models import input_of, model_for_weights
from pruning.criteria import create_criterion
from pruning.criteria.scoring import score_groups
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.files.saved_network import save_pruned
from pruning.repair.repairing import RepairSettings, plan_repair

METHODS = ("none", "statistics", "least-squares")
Batches = list[tuple[Tensor, Tensor]]


def loaders_of(
    data: str, model: nn.Module, batch_size: int, num_calibration: int, seed: int
) -> tuple[Batches, Loader]:
    """Return the calibration images of a seed, and the validation split."""
    dataset = open_dataset(data)
    dataset = dataclasses.replace(dataset, preset=dataset.preset.for_network(input_of(model)))
    config = DataConfig(
        data=data, batch_size=batch_size, calibration_size=num_calibration, data_backend="pytorch"
    )
    loaders = build_loaders(config, dataset, device=torch.device("cpu"), seed=seed)
    assert loaders.calibration is not None
    return [(batch.images.clone(), batch.targets) for batch in loaders.calibration], loaders.val


@torch.no_grad()
def top1(model: nn.Module, images: Loader | Batches) -> float:
    """Return the percentage of images whose largest logit is their class."""
    model.eval()
    right = total = 0
    for batch in images:
        shown, targets = batch if isinstance(batch, tuple) else (batch.images, batch.targets)
        right += int((model(shown).argmax(1) == targets).sum())
        total += len(targets)
    return 100 * right / total


def inner_cut(graph: ChannelGraph, scores: dict[int, Tensor], share: float) -> dict[int, Any]:
    """Return group → positions that stay: the best share of every group produced by a single layer."""
    keep = {}
    for group in graph.prunable:
        makers = {m.tensor.rpartition(".")[0] for m in graph.members(group) if m.role == "out"}
        if len(makers) == 1 and group.index in scores:
            count = max(1, round(share * group.width))
            keep[group.index] = scores[group.index].argsort(descending=True)[:count].sort().values.numpy()
    return keep


def cut(
    model: nn.Module, batches: Batches, criterion: str, share: float
) -> tuple[dict[str, nn.Module], float, dict[str, float]]:
    """Return repair method → the small network; share of the MACs that stays; seconds by method."""
    example = batches[0][0][:2]
    graph = trace_groups(model, example)
    keep = inner_cut(graph, score_groups(model, graph, batches, create_criterion(criterion)), share)
    small, seconds = {}, {}
    for method in METHODS:
        network, its_graph = copy.deepcopy(model), copy.deepcopy(graph)
        begin = time.perf_counter()
        plan = plan_repair(network, its_graph, its_graph.keep_mask(keep), RepairSettings(method=method))
        prune_channels(network, its_graph, keep, check=False)
        if method != "none":
            plan.repair(network, batches)
        seconds[method] = time.perf_counter() - begin
        small[method] = network
    return small, trace_groups(small["none"], example).macs / graph.macs, seconds


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all rows: mean and spread over the seeds."""
    model = model_for_weights(None, arguments.checkpoint).eval()
    found: dict[tuple[float, str, str], list[dict[str, float]]] = {}
    original = 0.0
    for seed in arguments.seeds:
        batches, val = loaders_of(
            arguments.data, model, arguments.batch_size, arguments.num_calibration, seed
        )
        validation = [(batch.images.clone(), batch.targets) for batch in val]
        original = top1(model, validation)
        for share in arguments.widths:
            for criterion in arguments.criteria:
                small, macs, seconds = cut(model, batches, criterion, share)
                for method, network in small.items():
                    row = {"top1": top1(network, validation), "macs": macs, "seconds": seconds[method]}
                    found.setdefault((share, criterion, method), []).append(row)
                    print(seed, share, criterion, method, row, flush=True)
                    if seed == arguments.seeds[0]:
                        name = f"{criterion}-{share:g}-{method}.pth.tar"
                        save_pruned(arguments.workspace / name, network)
    rows = [
        {
            "widths": share,
            "criterion": criterion,
            "repair": method,
            "macs": runs[0]["macs"],
            "top1": statistics.mean(run["top1"] for run in runs),
            "spread": statistics.stdev(run["top1"] for run in runs) if len(runs) > 1 else None,
            "seconds": statistics.median(run["seconds"] for run in runs),
        }
        for (share, criterion, method), runs in found.items()
    ]
    return {"original_top1": original, "rows": rows}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, cpu_only=True, seeds=[0, 1, 2])
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="not for a quick run, which takes a fresh network"
    )
    parser.add_argument("data", nargs="?", default="shapes")
    parser.add_argument("--widths", type=float, nargs="+", default=[0.5, 0.25], help="shares of inner widths")
    parser.add_argument("--criteria", nargs="+", default=["magnitude-l2", "discriminant", "reconstruction"])
    parser.add_argument("--num-calibration", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workspace", type=Path, default=Path("runs/repair_quality"))
    quick = {
        "data": "shapes:train=60,val=24",
        "num_calibration": 24,
        "batch_size": 12,
        "seeds": [0],
        "criteria": ["magnitude-l2"],
    }
    arguments = parser.parse("repair_quality.json", quick={**quick, "widths": [0.5]})
    if arguments.checkpoint is None and not arguments.quick:
        parser.error("CHECKPOINT is missing: a trained network")
    return arguments


def main() -> None:
    """Measure, print the table and write it."""
    arguments = parse()
    arguments.workspace.mkdir(parents=True, exist_ok=True)
    if arguments.checkpoint is None:
        from image_classification.models import create_model

        arguments.checkpoint = arguments.workspace / "fresh.pth.tar"
        save_pruned(arguments.checkpoint, create_model("resnet20", num_classes=12))
    results = measure(arguments)
    columns = ("widths", "criterion", "repair", "macs", "top1", "spread", "seconds")
    table = [
        [f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key] or "") for key in columns]
        for row in results["rows"]
    ]
    print(f"before: {results['original_top1']:.1f} %")
    print_table(list(columns), table)
    write_json(arguments, len(arguments.seeds), results)


if __name__ == "__main__":
    main()
