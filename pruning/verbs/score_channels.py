"""`python -m pruning score`: channel scores by one or several criteria, as table, plot and JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from image_classification.command_parser import positive
from image_classification.config import check
from image_classification.data.build import build_loaders
from image_classification.data.data_config import DataConfig
from image_classification.data.layouts import open_dataset
from image_classification.figure_writing import save_figure
from image_classification.file_writing import output_path, write_text
from image_classification.models import class_names_of, input_of
from image_classification.verbs import declared
from pruning.criteria import FEATURE_CHOICES, Combined, criterion_class, criterion_names
from pruning.criteria.by_name import DEFAULT_CRITERION, make_criterion
from pruning.criteria.combine import DEFAULT_WEIGHT
from pruning.criteria.criterion import DEFAULT_FEATURES
from pruning.criteria.sample_losses import losses_of
from pruning.criteria.scoring import score_groups, score_groups_by
from pruning.engine.trace_groups import trace_groups
from pruning.rewrites.pruner_settings import PrunerSettings
from pruning.task import on_targets
from pruning.training.explanations import build_originals
from pruning.training.pruning_config import PruningConfig
from pruning.training.saliency_flags import EXPLANATIONS
from pruning.verbs.images import example_images, network_of

_BATCH_SIZE = 32


def plot_scores(scores: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Plot one panel per criterion: every channel's score as a point, divided by the mean of its group.

    Args:
        scores: Criterion → group → scores.
        path: Output file.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    widest = max((len(groups) for groups in scores.values()), default=1)
    figure = Figure(figsize=(max(6.0, 0.28 * widest + 2), 3.6 * len(scores)), layout="constrained")
    panels = figure.subplots(len(scores), 1, squeeze=False)[:, 0]
    jitter = np.random.default_rng(0)
    for panel, (criterion, groups) in zip(panels, scores.items(), strict=True):
        for column, values in enumerate(groups.values()):
            points = np.asarray(values, dtype=np.float64)
            mean = points.mean() or 1.0
            x = column + jitter.uniform(-0.3, 0.3, len(points))
            panel.scatter(x, points / mean, s=5, alpha=0.5, color="#2b6cb0", linewidths=0)
            panel.hlines(
                np.median(points) / mean, column - 0.38, column + 0.38, color="#c05621", linewidth=1.5
            )
        panel.set_title(f"{criterion}: score ÷ mean of its group (bar: median)")
        panel.set_xticks(range(len(groups)), list(groups), rotation=90, fontsize=7)
        panel.set_xlim(-0.7, len(groups) - 0.3)
        panel.set_ylabel("relative score")
        panel.axhline(1.0, color="#a0aec0", linewidth=0.8, zorder=0)
        panel.set_ylim(bottom=0)
    save_figure(figure, path, dpi=130)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("checkpoint", type=Path, help="network to score")
    parser.add_argument("data", help="data set; its training split is read")
    parser.add_argument("--arch", default=None, help="not needed for a LucidPrune checkpoint")
    parser.add_argument(
        "--criterion",
        nargs="+",
        default=[DEFAULT_CRITERION],
        metavar="NAME",
        help=f"one or more of {', '.join(criterion_names())}",
    )
    parser.add_argument(
        "--score-features", choices=FEATURE_CHOICES, default=DEFAULT_FEATURES, help="as in training"
    )
    parser.add_argument(
        "--selector", metavar="FILE", help="explanation of the saliency criterion, as in training"
    )
    parser.add_argument("--casm", metavar="FILE", help="the same, of a CASM")
    parser.add_argument("--saliency-explanation", choices=EXPLANATIONS, help="as in training")
    parser.add_argument(
        "--saliency-weight", type=float, default=DEFAULT_WEIGHT, help="as in training, for NAME+saliency"
    )
    parser.add_argument("--batch-size", "-b", type=int, default=_BATCH_SIZE)
    parser.add_argument("--calibration-batches", type=positive, default=PrunerSettings.max_batches)
    parser.add_argument("--image-size", type=positive, default=None, help="default: the data set's")
    parser.add_argument("--data-backend", default=DataConfig.data_backend)
    parser.add_argument("--seed", type=int, default=0, help="chooses the images")
    parser.add_argument(
        "--output",
        type=output_path,
        default=None,
        metavar="DIR",
        help="write scores.json and scores.png there",
    )


def run(arguments: argparse.Namespace) -> int:
    """Score the network by every criterion; print and plot the scores."""
    flags = _saliency_flags(arguments)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
    model = network_of(arguments.arch, arguments.checkpoint, None, arguments.image_size)
    dataset = open_dataset(arguments.data, require_val=False)
    known = class_names_of(model)
    if known is not None:
        dataset = dataset.in_classes(known, str(arguments.checkpoint), "Give the data that it was trained on")
    size = arguments.batch_size * arguments.calibration_batches
    config = DataConfig(
        data=arguments.data,
        data_backend=arguments.data_backend,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        calibration_size=max(min(size, len(dataset.train) // 2), dataset.num_classes),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = dataclasses.replace(dataset, preset=dataset.preset.for_network(input_of(model)))
    loaders = build_loaders(config, dataset, device=device, seed=arguments.seed)
    model = model.to(device)
    graph = trace_groups(model, example_images(loaders.preset.image_size).to(device))
    assert loaders.calibration is not None
    batches = [(batch.images, batch.targets) for batch in loaders.calibration if len(batch) > 1]
    originals = build_originals(
        flags, model, image_size=loaders.preset.image_size, num_classes=dataset.num_classes, fresh=True
    )
    if originals is not None:
        originals.remember(model, batches)
    settings = dataclasses.replace(flags.criterion_settings(), features=arguments.score_features)
    loss = losses_of(dataset.multi_label)
    criteria = [
        make_criterion(name, settings, loss=on_targets(loss), originals=originals)
        for name in arguments.criterion
    ]
    plain = [criterion for criterion in criteria if not isinstance(criterion, Combined)]
    found_by = iter(score_groups_by(model, graph, batches, plain))
    scores = [
        score_groups(model, graph, batches, criterion) if isinstance(criterion, Combined) else next(found_by)
        for criterion in criteria
    ]
    loaders.close()
    named = {
        name: {graph.groups[index].name: values.tolist() for index, values in found.items()}
        for name, found in zip(arguments.criterion, scores, strict=True)
    }
    _print_scores(named)
    if arguments.output is not None:
        write_text(arguments.output / "scores.json", json.dumps(named) + "\n")
        plot_scores(named, arguments.output / "scores.png")
        print(f"wrote {arguments.output / 'scores.json'} and {arguments.output / 'scores.png'}")
    return 0


def _saliency_flags(arguments: argparse.Namespace) -> PruningConfig:
    """Build and check the explanation flags, as for a training that prunes by the given criteria.

    Raises:
        ConfigError: There is no such criterion, or a flag cannot apply.
    """
    check(
        arguments.batch_size >= 2,
        f"--batch-size {arguments.batch_size}: scores compare images, at least 2 are needed",
    )
    for name in arguments.criterion:
        for part in name.split("+"):
            criterion_class(part)
    explained = [name for name in arguments.criterion if "saliency" in name.split("+")]
    explained.sort(key=lambda name: "+" not in name)
    flags = PruningConfig(
        one_shot_pruning=0.5,
        calibration_batches=arguments.calibration_batches,
        pruning_criterion=(explained or arguments.criterion)[0],
        selector=arguments.selector,
        casm=arguments.casm,
        saliency_explanation=arguments.saliency_explanation,
        saliency_weight=arguments.saliency_weight,
    )
    given = (arguments.selector, arguments.casm, arguments.saliency_explanation)
    check(
        bool(explained) or not any(given),
        "--selector, --casm and --saliency-explanation have no effect without --criterion saliency: add it, or leave "
        "them out",
    )
    flags.check_files()
    return flags


def _print_scores(named: dict[str, dict[str, list[float]]]) -> None:
    for criterion, groups in named.items():
        table = Table(title=f"{criterion} scores per channel group")
        table.add_column("group")
        for column in ("width", "least", "median", "mean", "most", "below ½ mean"):
            table.add_column(column, justify="right")
        for group, values in groups.items():
            scores = torch.tensor(values, dtype=torch.float64)
            weak = int((scores < scores.mean() / 2).sum())
            figures = [
                f"{float(x):.4g}" for x in (scores.min(), scores.median(), scores.mean(), scores.max())
            ]
            table.add_row(group, str(len(values)), *figures, str(weak))
        Console(width=None if sys.stdout.isatty() else 120).print(table)


VERB = declared(declare, run)
