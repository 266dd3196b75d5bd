"""What a rewrite costs: the decision against exhaustive evaluation, the surgery, and the callback when idle.

    python benchmarks/rewrite.py DATA [--arch resnet50] [--rewrites 5] [--output FILE.json]

decision   seconds of our search (estimate all candidates, measure a shortlist on a few batches) ÷ seconds of the
           published way (measure every candidate on all calibration batches), and how good the choice is: the share of
           rewrites with the same winner, and the winner's exhaustive loss relative to the best one's
surgery    seconds to cut network, momentum and average, and to bind anew
idle       images/s of training with the callback attached and nothing due ÷ without, in turns

DATA is a data set (ImageNet layout, an archive, shapes); calibration pictures come from its training split. Weights are
those of --checkpoint, or random with batch-norm statistics of the pictures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classification.data.build import DataConfig, build_loaders
from image_classification.data.layouts import open_dataset
from image_classification.ema import Ema
from image_classification.environment import describe_environment
from image_classification.models import create_model, model_for_weights
from pruning.channel_graph import Constraints
from pruning.pruner import Pruner
from pruning.search import GreedySearch, Situation
from pruning.surgery import prune_channels

Batches = list[tuple[Tensor, Tensor]]


def open_calibration(arguments: argparse.Namespace, device: torch.device) -> tuple[Batches, int]:
    """Calibration batches and number of classes."""
    dataset = open_dataset(arguments.data, require_val=False)
    size = arguments.batches * arguments.batch_size
    config = DataConfig(
        data=arguments.data,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        calibration_size=size,
    )
    loaders = build_loaders(config, dataset, device=device)
    assert loaders.calibration is not None
    batches = [(batch.images, batch.targets) for batch in loaders.calibration]
    loaders.close()
    return batches, dataset.num_classes


def settle_statistics(model: nn.Module, batches: Batches) -> None:
    """Give batch norms the statistics of real pictures, so that losses mean something."""
    model.train()
    with torch.no_grad():
        for images, _ in batches:
            model(images)
    model.eval()


def clock(device: torch.device) -> float:
    """Now, after the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_decision(pruner: Pruner, batches: Batches, device: torch.device) -> dict[str, float]:
    """One decision both ways, on the network as it is; then the rewrite by the exhaustive winner."""
    pruner._scores = pruner.score(batches)
    targets = pruner.course.targets(pruner.completed + 1)

    def situation(judge_batches: int) -> Situation:
        pruner.judge_batches = judge_batches
        return pruner._situation(targets, pruner._judge(batches))

    begin = clock(device)
    ours = GreedySearch(shortlist=4).choose(situation(2))
    between = clock(device)
    exhaustive = GreedySearch(shortlist=0).choose(situation(len(batches)))
    end = clock(device)
    losses = {c.group: c.measured for c in exhaustive.candidates if c.measured is not None}
    best = min(losses, key=lambda group: losses[group])
    (ours_index, *_) = ours.keep or {-1: None}
    chosen = pruner.graph.groups[ours_index].name
    keep = exhaustive.keep
    begin_surgery = clock(device)
    prune_channels(
        pruner.model, pruner.graph, keep, optimizers=[pruner.optimizer] if pruner.optimizer else [],
        emas=[pruner.ema] if pruner.ema else [],
    )  # fmt: skip
    pruner.costs.refresh()
    surgery = clock(device) - begin_surgery
    pruner.completed += 1
    return {
        "candidates": float(len(losses)),
        "ours_s": between - begin,
        # the estimates of the exhaustive search are its own, and not part of the published way
        "exhaustive_s": end - between,
        "same_winner": float(chosen == best),
        "loss_ratio": losses.get(chosen, float("nan")) / losses[best],
        "surgery_s": surgery,
    }


def measure_idle(
    model: nn.Module, batches: Batches, pruner: Pruner, repeats: int, device: torch.device
) -> list[float]:
    """Images/s with the question `due?` in every iteration ÷ without, pair by pair."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def train(ask: bool) -> float:
        begin = clock(device)
        for iteration, (images, targets) in enumerate(batches[:4]):
            loss = nn.functional.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ask:
                assert not pruner.due(-iteration)
        return 1 / (clock(device) - begin)

    model.train()
    train(True)
    return [train(True) / train(False) for _ in range(repeats)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--rewrites", type=int, default=5)
    parser.add_argument("--delta", type=float, default=5e-3)
    parser.add_argument("--idle-repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "rewrite.json")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    batches, num_classes = open_calibration(arguments, device)
    if arguments.checkpoint is None:
        model = create_model(arguments.arch, num_classes=num_classes).to(device)
        settle_statistics(model, batches)
    else:
        model = model_for_weights(arguments.arch, arguments.checkpoint, device=device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    for images, targets in batches[:1]:  # momentum buffers, so that surgery has them to cut
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    begin = clock(device)
    pruner = Pruner(
        model, batches[0][0][:2], optimizer=optimizer, ema=Ema(model, 0.999).module, delta=arguments.delta,
        constraints=Constraints(min_width=0.1), max_batches=arguments.batches,
    )  # fmt: skip
    analysis = clock(device) - begin
    rows = []
    for _ in range(arguments.rewrites):
        rows.append(measure_decision(pruner, batches, device))
        print({key: round(value, 4) for key, value in rows[-1].items()}, flush=True)
    idle = measure_idle(model, batches, pruner, arguments.idle_repeats, device)
    ratios = [row["ours_s"] / row["exhaustive_s"] for row in rows]
    report = {
        "settings": {k: str(v) for k, v in vars(arguments).items() if k != "output"},
        "analysis_s": analysis,
        "rewrites": rows,
        "decision_ratio_median": statistics.median(ratios),
        "same_winner_share": float(np.mean([row["same_winner"] for row in rows])),
        "worst_loss_ratio": max(row["loss_ratio"] for row in rows),
        "surgery_s_median": statistics.median(row["surgery_s"] for row in rows),
        "idle_ratio_median": statistics.median(idle),
        "idle_ratios": idle,
        "environment": describe_environment(device),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"analysis           {analysis:.2f} s")
    print(f"decision ratio     {report['decision_ratio_median']:.3f} (target ≤ 0.05)")
    print(
        f"same winner        {report['same_winner_share']:.2f}; worst loss ratio {report['worst_loss_ratio']:.4f}"
    )
    print(f"surgery            {report['surgery_s_median']:.3f} s (target ≤ 1 s on 2 cores)")
    print(f"idle               {report['idle_ratio_median']:.4f} (target ≥ 0.995)")


if __name__ == "__main__":
    main()
