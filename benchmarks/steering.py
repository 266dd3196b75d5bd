"""Pruning that watches the explanation, beside pruning that does not: accuracy, and how far explanations move.

    python benchmarks/steering.py DATA --arch resnet20 --pretrained-weights f.pth.tar --selector g.pth.tar \
        [--budget 0.5] [--epochs 2] [--seeds 0 1 2] [--methods isp saliency …] [--workspace runs/steering]

Every method takes the same network to the same share of its MACs, on the channels within blocks, from the same
calibration pictures, and fine-tunes it with the same schedule:

    isp-published      gates learned with the published constants (Gumbel noise, w_R = 1)
    isp                gates learned with logistic noise, hard gates in the forward pass and a w_R that grows by
                       --resource-growth in every epoch that leaves the gates above the budget
    saliency           Gauss–Newton saliency score, one global ranking, one cut
    discriminant+saliency, discriminant, magnitude, random      the same with other scores

Measured: mean squared distance of φ = (a, b, w) from the original network's right after the cut, on calibration
pictures; then on the validation pictures, after fine-tuning: top-1; that distance of φ; share of pictures whose mask
centre, and whose highest Grad-CAM pixel, lies on the object (where the data set has pixel masks). Runs are `main.py` in
processes of their own, kept in --workspace and not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn

from explainers.aem.masks import centres_and_widths
from explainers.aem.saved import SelectorExplanation, load_selector
from explainers.gradcam import class_activation, find_layer, resize
from image_classification.data.build import DataConfig, Placement, evaluation_loader
from image_classification.data.layouts import open_dataset
from image_classification.environment import describe_environment
from image_classification.models import main_and_auxiliary_logits, model_for_weights, read_safely
from pruning.channel_graph import Constraints
from pruning.graph import trace_groups
from pruning.learned.widths import inner_groups

RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ("top1", "phi_mse", "centre_on_object", "gradcam_on_object")
SCORES = ("saliency", "discriminant+saliency", "discriminant", "magnitude", "random")
METHODS = ("isp", "isp-published", *SCORES)


@dataclasses.dataclass(frozen=True)
class Original:
    """The network before pruning, and its selector."""

    model: nn.Module
    selector: SelectorExplanation


def method_words(arguments: argparse.Namespace, method: str, outer: list[str]) -> list[str]:
    """Flags of `main.py` that are the method's own."""
    share = arguments.budget
    if method.startswith("isp"):
        words = ["--pruning-method", "learned", "--budget", f"macs={share}"]
        words += ["--gate-epochs", str(arguments.gate_epochs), "--gate-lr", str(arguments.gate_lr)]
        if method == "isp":
            words += ["--gate-noise", "logistic", "--gate-sampling", "hard"]
            words += ["--resource-growth", str(arguments.resource_growth)]
        return words
    words = ["--one-shot-pruning", f"{1 - share:g}", "--pruning-criterion", method]
    return words + [word for name in outer for word in ("--prune-ignore", name)]


def run(arguments: argparse.Namespace, method: str, seed: int, outer: list[str]) -> Path:
    """Train a method's network unless it is there; its folder."""
    folder = arguments.workspace / f"{method}-{seed}"
    if (folder / "done").exists():
        return folder
    command = [sys.executable, str(ROOT / "main.py"), arguments.data, "--arch", arguments.arch]
    command += ["--pretrained-weights", arguments.pretrained_weights, "--selector", arguments.selector]
    command += ["--workspace", str(folder), "--resume", "auto", "--seed", str(seed), "--console", "plain"]
    command += ["--calibration-size", str(arguments.calibration_size), "--epochs", str(arguments.epochs)]
    command += ["--lr", str(arguments.lr), "--lr-schedule", "cosine", "-b", "64", "--training-only"]
    command += ["--data-backend", arguments.data_backend, "--workers", str(arguments.workers)]
    command += [*method_words(arguments, method, outer), *arguments.flags.split()]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    (folder / "done").touch()
    return folder


def channels_of_sums(model: nn.Module, size: int) -> list[str]:
    """Modules whose channels no method touches: those that learned gates leave alone, too."""
    graph = trace_groups(model, torch.randn(2, 3, size, size), constraints=Constraints(min_width=0.1))
    inner = {group.index for group in inner_groups(graph)}
    return [group.name.partition("#")[0] for group in graph.prunable if group.index not in inner]


def moved_by_cut(folder: Path) -> float:
    """How far φ was from the original network's right after the cut of a run, on its calibration pictures."""
    callbacks = read_safely(folder / "checkpoint.pth.tar")["callbacks"]
    if "learned_pruning" in callbacks:
        return float(callbacks["learned_pruning"]["record"]["explanation"])
    return float(callbacks["pruning"]["history"][-1]["explanation"][1])


def pruned_selector(selector: SelectorExplanation, folder: Path) -> SelectorExplanation:
    """The selector for the pruned network of a run."""
    callbacks = read_safely(folder / "checkpoint.pth.tar")["callbacks"]
    state = callbacks.get("learned_pruning") or callbacks["pruning"]
    return selector.rewritten(state["originals"]["kept"])


@torch.no_grad()
def measure(
    arguments: argparse.Namespace, original: Original, model: nn.Module, selector: SelectorExplanation
) -> dict[str, float]:
    """All figures of a network on the validation pictures."""
    dataset = open_dataset(arguments.data, progress=False)
    data = DataConfig(data=arguments.data, data_backend=arguments.data_backend, workers=arguments.workers)
    place = Placement(device=torch.device("cpu"))
    with_masks = dataset.val.targets.mask_paths is not None
    sums, count = dict.fromkeys(FIGURES if with_masks else FIGURES[:2], 0.0), 0
    model.eval()
    layer = find_layer(model, torch.randn(1, 3, *[selector.design.image_size] * 2))
    for batch in evaluation_loader(
        dataset.val, data.resolved_preset(dataset.preset), data, place, with_masks=with_masks
    ):
        classes = main_and_auxiliary_logits(original.model(batch.images))[0].argmax(1)
        before = original.selector(original.model, batch.images, classes)
        raw, logits = selector.raw_and_logits(model, batch.images, classes)
        sums["top1"] += float((logits.argmax(1) == batch.targets).sum())
        sums["phi_mse"] += float((selector.selector.phi(raw) - before).square().mean(1).sum())
        count += len(batch)
        if batch.masks is None:
            continue
        on_object = batch.masks == (batch.targets + 1)[:, None, None].to(batch.masks.dtype)
        centres, _ = centres_and_widths(raw, selector.design.geometry)
        with torch.enable_grad():
            maps, _ = class_activation(model, layer, batch.images, classes)
        heat = resize(maps, batch.images.shape[2:]).flatten(1).argmax(1)
        sums["centre_on_object"] += hits(
            on_object, centres.round().long()[:, 1], centres.round().long()[:, 0]
        )
        width = batch.images.shape[-1]
        sums["gradcam_on_object"] += hits(on_object, heat // width, heat % width)
    figures = {name: value / count for name, value in sums.items()}
    return {name: value * (1 if name == "phi_mse" else 100) for name, value in figures.items()}


def hits(on_object: Tensor, rows: Tensor, columns: Tensor) -> float:
    """How many points lie on the object."""
    height, width = on_object.shape[1:]
    index = torch.arange(len(on_object))
    return float(on_object[index, rows.clamp(0, height - 1), columns.clamp(0, width - 1)].sum())


def summary(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds."""
    return {
        name: {
            "mean": statistics.fmean(row[name] for row in rows),
            "std": statistics.stdev(row[name] for row in rows) if len(rows) > 1 else 0.0,
        }
        for name in rows[0]
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--pretrained-weights", required=True)
    parser.add_argument("--selector", required=True)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--gate-epochs", type=int, default=60)
    parser.add_argument("--gate-lr", type=float, default=0.05)
    parser.add_argument("--resource-growth", type=float, default=1.2)
    parser.add_argument("--calibration-size", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data-backend", default="pytorch")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--flags", default="", help="further flags of all runs, in one word")
    parser.add_argument("--workspace", type=Path, default=Path("runs/steering"))
    parser.add_argument("--output", type=Path, default=RESULTS / "steering_shapes.json")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, measure, print, write."""
    arguments = parse()
    model = model_for_weights(arguments.arch, arguments.pretrained_weights).eval()
    original = Original(model, load_selector(arguments.selector))
    size = original.selector.design.image_size
    outer = channels_of_sums(model, size)
    results: dict[str, Any] = {"unpruned": [measure(arguments, original, model, original.selector)]}
    for seed in arguments.seeds:
        for method in arguments.methods:
            folder = run(arguments, method, seed, outer)
            network = model_for_weights(None, str(folder / "checkpoint.pth.tar"))
            figures = measure(arguments, original, network, pruned_selector(original.selector, folder))
            figures["phi_mse_after_cut"] = moved_by_cut(folder)
            results.setdefault(method, []).append(figures)
            write(arguments, results)
    names = results[arguments.methods[0]][0]
    print(f"{'method':22}" + "".join(f"{name:>24}" for name in names))
    for method, rows in results.items():
        cells = [f"{c['mean']:14.3f} ± {c['std']:.3f}" for c in summary(rows).values()]
        print(f"{method:22}" + "".join(f"{cell:>24}" for cell in cells))


def write(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """The results so far, as JSON."""
    settings = {
        name: str(value) for name, value in vars(arguments).items() if name not in ("workspace", "output")
    }
    settings |= {name: Path(settings[name]).name for name in ("data", "pretrained_weights", "selector")}
    payload = {
        "environment": describe_environment(),
        "settings": settings,
        "selector": dict(load_selector(arguments.selector).figures),
        "summary": {method: {"n": len(rows), **summary(rows)} for method, rows in results.items()},
        "runs": results,
    }
    arguments.output.write_text(json.dumps(payload, indent=1) + "\n")


if __name__ == "__main__":
    main()
