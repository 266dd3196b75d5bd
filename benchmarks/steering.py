"""Explanation-aware pruning compared with other pruning: accuracy, and how far explanations move.

    python benchmarks/steering.py DATA --pretrained-weights f.pth.tar --selector g.pth.tar [--arch resnet20]
        [--budget 0.5] [--epochs 2] [--seeds 0 1 2] [--methods isp saliency …] [--workspace runs/steering]

Every method takes the same network to the same share of its MACs, on the channels within blocks, from the same
calibration images, and fine-tunes it with the same schedule:

    isp-published      gates learned with the published constants (Gumbel noise, w_R = 1)
    isp                gates learned with logistic noise, hard gates in the forward pass and a w_R that grows by
                       --resource-growth in every epoch that leaves the gates above the budget
    saliency           Gauss–Newton saliency score, one global ranking, one cut
    discriminant+saliency, discriminant, magnitude, random      the same with other scores

The table has mean ± standard deviation over the seeds. On the calibration images, right after the cut: the mean squared
distance of φ = (a, b, w) from the original network's. On the validation images, after fine-tuning: top-1, that
distance, and the share of images whose mask centre, and whose highest Grad-CAM pixel, lies on the object (if the data
set has masks). Runs are separate processes of `main.py`; the workspace keeps them, and they are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from common.jobs import MAIN, train_once
from common.measure import mean_and_deviation, with_deviation
from common.report import BenchmarkParser, print_table, write_json
from torch import Tensor, nn

from explainers.aem.saved_selector import SelectorExplanation, load_selector
from explainers.attribution.gradcam import class_activation, find_layer, resize
from image_classification.data.build import Placement, evaluation_loader
from image_classification.data.data_config import DataConfig
from image_classification.data.layouts import open_dataset
from image_classification.data.loader import Batch
from image_classification.models import main_and_auxiliary_logits, model_for_weights, read_safely
from pruning.engine.constraints import Constraints
from pruning.engine.trace_groups import trace_groups
from pruning.training.learned.widths import inner_groups

FIGURES = ("top1", "phi_mse", "centre_on_object", "gradcam_on_object")
SCORES = ("saliency", "discriminant+saliency", "discriminant", "magnitude", "random")
METHODS = ("isp", "isp-published", *SCORES)

Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Explained:
    """A network and its selector."""

    model: nn.Module
    selector: SelectorExplanation


def method_words(arguments: argparse.Namespace, method: str, outer: list[str]) -> list[str]:
    """Return a method's own flags of `main.py`."""
    share = arguments.budget
    if method.startswith("isp"):
        words = ["--pruning-method", "learned", "--budget", f"macs={share}"]
        words += ["--gate-epochs", str(arguments.gate_epochs), "--gate-lr", str(arguments.gate_lr)]
        if method == "isp":
            words += ["--gate-noise", "logistic", "--gate-sampling", "hard"]
            words += ["--resource-growth", str(arguments.resource_growth)]
        return words
    words = ["--one-shot-pruning", f"{1 - share:g}", "--pruning-criterion", method]
    for name in outer:
        words += ["--prune-ignore", name]
    return words


def run(arguments: argparse.Namespace, method: str, seed: int, outer: list[str]) -> Path:
    """Train a method's network unless it exists, and return its checkpoint."""
    folder = arguments.workspace / f"{method}-{seed}"
    command = [MAIN, arguments.data, "--arch", arguments.arch, "--device", arguments.device.type]
    command += ["--pretrained-weights", str(arguments.pretrained_weights)]
    command += ["--selector", str(arguments.selector), "--seed", str(seed), "--console", "plain"]
    command += ["--calibration-size", str(arguments.calibration_size), "--epochs", str(arguments.epochs)]
    command += ["--lr", str(arguments.lr), "--lr-schedule", "cosine", "-b", "64", "--training-only"]
    command += ["--data-backend", arguments.data_backend, "--workers", str(arguments.workers)]
    train_once(folder, *command, *method_words(arguments, method, outer), *arguments.flags.split())
    return folder / "checkpoint.pth.tar"


def channels_of_sums(original: Explained) -> list[str]:
    """Return the modules whose channels no method prunes, since learned gates leave them alone."""
    images = torch.randn(2, 3, *[original.selector.design.image_size] * 2)
    graph = trace_groups(original.model, images, constraints=Constraints(min_width=0.1))
    inner = {group.index for group in inner_groups(graph)}
    return [group.name.partition("#")[0] for group in graph.prunable if group.index not in inner]


def moved_by_cut(callbacks: dict[str, Any]) -> float:
    """Return how far φ was from the original network's right after a run's cut, on its calibration images."""
    if "learned_pruning" in callbacks:
        return float(callbacks["learned_pruning"]["record"]["explanation"])
    return float(callbacks["pruning"]["history"][-1]["explanation"][1])


def measure_run(arguments: argparse.Namespace, original: Explained, checkpoint: Path) -> Figures:
    """Return all figures of a pruned network."""
    callbacks = read_safely(checkpoint)["callbacks"]
    state = callbacks.get("learned_pruning") or callbacks["pruning"]
    selector = original.selector.rewritten(state["originals"]["kept"])
    pruned = Explained(model_for_weights(None, str(checkpoint)), selector)
    return measure(arguments, original, pruned) | {"phi_mse_after_cut": moved_by_cut(callbacks)}


@torch.no_grad()
def measure(arguments: argparse.Namespace, original: Explained, network: Explained) -> Figures:
    """Return the figures of a network on the validation images."""
    dataset = open_dataset(arguments.data, progress=False)
    data = DataConfig(data=arguments.data, data_backend=arguments.data_backend, workers=arguments.workers)
    with_masks = dataset.val.targets.mask_paths is not None
    sums = dict.fromkeys(FIGURES if with_masks else FIGURES[:2], 0.0)
    count = 0
    network.model.eval()
    layer = find_layer(network.model, torch.randn(1, 3, *[network.selector.design.image_size] * 2))
    preset = data.resolved_preset(dataset.preset)
    place = Placement(device=torch.device("cpu"))
    for batch in evaluation_loader(dataset.val, preset, data, place, with_masks=with_masks):
        for name, value in measure_batch(batch, original, network, layer).items():
            sums[name] += value
        count += len(batch)
    figures = {name: 100 * value / count for name, value in sums.items()}
    figures["phi_mse"] /= 100
    return figures


def measure_batch(batch: Batch, original: Explained, network: Explained, layer: str) -> Figures:
    """Return sums of the figures over the images of a batch."""
    # Masks and maps of both networks are for the class that the original network predicts.
    classes = main_and_auxiliary_logits(original.model(batch.images))[0].argmax(1)
    before = original.selector(original.model, batch.images, classes)
    raw, logits = network.selector.raw_and_logits(network.model, batch.images, classes)
    distances = (network.selector.selector.phi(raw) - before).square().mean(1)
    sums = {
        "top1": float((logits.argmax(1) == batch.targets).sum()),
        "phi_mse": float(distances.sum()),
    }
    if batch.masks is None:
        return sums
    on_object = batch.masks == (batch.targets + 1)[:, None, None].to(batch.masks.dtype)
    centres, _ = network.selector.selector.centres(raw, network.selector.design.image_size)
    columns, rows = centres.round().long().unbind(1)
    sums["centre_on_object"] = hits(on_object, rows, columns)
    with torch.enable_grad():
        maps, _ = class_activation(network.model, layer, batch.images, classes)
    highest = resize(maps, batch.images.shape[2:]).flatten(1).argmax(1)
    width = batch.images.shape[-1]
    sums["gradcam_on_object"] = hits(on_object, highest // width, highest % width)
    return sums


def hits(on_object: Tensor, rows: Tensor, columns: Tensor) -> float:
    """Return how many points, one in each of (N, H, W), are on the object."""
    height, width = on_object.shape[1:]
    index = torch.arange(len(on_object))
    return float(on_object[index, rows.clamp(0, height - 1), columns.clamp(0, width - 1)].sum())


def summary(rows: list[Figures]) -> dict[str, dict[str, float | None]]:
    """Return mean and standard deviation of every figure over the seeds."""
    return {name: mean_and_deviation([row[name] for row in rows]) for name in rows[0]}


def write(arguments: argparse.Namespace, results: dict[str, list[Figures]]) -> None:
    """Write the results so far as JSON."""
    content = {
        "selector": dict(load_selector(arguments.selector).figures),
        "summary": {method: {"n": len(rows), **summary(rows)} for method, rows in results.items()},
        "runs": results,
    }
    write_json(arguments, len(arguments.seeds), content)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, seeds=(0, 1, 2))
    parser.add_argument("data")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--pretrained-weights", type=Path, required=True)
    parser.add_argument("--selector", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--gate-epochs", type=int, default=60)
    parser.add_argument("--gate-lr", type=float, default=0.05)
    parser.add_argument("--resource-growth", type=float, default=1.2)
    parser.add_argument("--calibration-size", type=int, default=256)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data-backend", default="pytorch")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--flags", default="", help="further flags of all runs, in one word")
    parser.add_argument("--workspace", type=Path, default=Path("runs/steering"))
    small = {"methods": ["saliency"], "seeds": [0], "epochs": 1, "calibration_size": 16}
    return parser.parse("steering_shapes.json", quick=small)


def main() -> None:
    """Run what is missing, measure, print and write JSON."""
    arguments = parse()
    model = model_for_weights(arguments.arch, str(arguments.pretrained_weights)).eval()
    original = Explained(model, load_selector(arguments.selector))
    outer = channels_of_sums(original)
    results = {"unpruned": [measure(arguments, original, original)]}
    for seed in arguments.seeds:
        for method in arguments.methods:
            checkpoint = run(arguments, method, seed, outer)
            results.setdefault(method, []).append(measure_run(arguments, original, checkpoint))
            write(arguments, results)
    columns = [*FIGURES, "phi_mse_after_cut"]
    rows = []
    for method, found in results.items():
        figures = summary(found)
        cells = [with_deviation(figures[name], 3) if name in figures else "–" for name in columns]
        rows.append([method, *cells])
    print_table(["method", *columns], rows)


if __name__ == "__main__":
    main()
