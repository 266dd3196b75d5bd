"""`python -m pruning VERB …`: looks at what pruning would do and at what it did, and takes networks in and out.

groups ARCH                  the coupled channel groups: members, widths, what cannot be pruned and why
score CHECKPOINT DATA        channel scores by one or several criteria, as table, plot and JSON
report RUN                   everything about a run in one HTML file
compare FIRST SECOND         costs, widths and accuracy of two networks
export CHECKPOINT            a network as ONNX, torch.export or plain state dict
import FILE OUT              published checkpoints as checkpoints of ours
shrink CHECKPOINT OUT        cut away what a masked network has no use for
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from image_classification.config import check
from image_classification.data.build import DataConfig, build_loaders
from image_classification.data.layouts import open_dataset
from image_classification.models import create_model, identity_of, model_for_weights
from image_classification.verbs import Verb, run_verb
from pruning.channel_graph import ChannelGraph, Constraints
from pruning.config import PruningConfig, parse_limits
from pruning.criteria import FEATURE_CHOICES, Combined, criterion_class, criterion_names
from pruning.explanations import build_originals
from pruning.graph import trace_groups
from pruning.importing import job as import_job
from pruning.named_criteria import make_criterion
from pruning.plots import plot_scores
from pruning.report import verb as report
from pruning.saliency_flags import EXPLANATIONS
from pruning.scoring import score_groups, score_groups_by
from pruning.shrink_job import declare as declare_shrink
from pruning.shrink_job import run as run_shrink
from pruning.verbs import compare, export
from pruning.verbs.pictures import size_of


def example_images(image_size: int) -> torch.Tensor:
    """Two pictures of noise, the same every time."""
    return torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------- groups


def _declare_groups(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arch", help="network: one of our own, torchvision/NAME or timm/NAME")
    parser.add_argument(
        "--checkpoint", type=Path, default=None, help="look at this (pruned) network's widths"
    )
    parser.add_argument("--num-classes", type=int, default=None, help="default: the checkpoint's, or 1000")
    parser.add_argument("--image-size", type=int, default=None, help="default: the architecture's")
    parser.add_argument(
        "--round-to", type=int, default=1, help="as in training: what widths would be allowed"
    )
    parser.add_argument("--min-width", type=float, default=0.1, help="as in training")
    parser.add_argument(
        "--prune-ignore", action="append", default=[], metavar="PATTERN", help="as in training"
    )
    parser.add_argument(
        "--prune-limit", action="append", default=[], metavar="PATTERN=LEAST", help="as in training"
    )
    parser.add_argument("--members", action="store_true", help="list the tensors of every group too")
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write everything there as well"
    )


def _run_groups(arguments: argparse.Namespace) -> int:
    model = _network(arguments.arch, arguments.checkpoint, arguments.num_classes, arguments.image_size)
    size = size_of(model, arguments.image_size)
    constraints = Constraints(
        arguments.round_to,
        arguments.min_width,
        tuple(arguments.prune_ignore),
        parse_limits(arguments.prune_limit),
    )
    graph = trace_groups(model, example_images(size), constraints=constraints)
    rows = [_group_row(graph, index) for index in range(len(graph.groups))]
    _print_groups(arguments.arch, graph, rows, arguments.members)
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"arch": arguments.arch, "groups": rows}, indent=2) + "\n", encoding="utf-8"
        )
    return 0


def _group_row(graph: ChannelGraph, index: int) -> dict[str, Any]:
    """One group as plain data."""
    group = graph.groups[index]
    members = graph.members(group)
    return {
        "group": group.name,
        "width": group.width,
        "channels_per_unit": group.channels_per_unit,
        "least_width": graph.allowed_widths(group)[0],
        "modules": list(dict.fromkeys(member.tensor.rpartition(".")[0] for member in members)),
        "tensors": [{"name": m.tensor, "dim": m.dim, "role": m.role} for m in members],
        "prunable": group.prunable,
        "reason": group.reason,
        "notes": list(group.notes),
    }


def _print_groups(arch: str, graph: ChannelGraph, rows: list[dict[str, Any]], with_members: bool) -> None:
    table = Table(title=f"{arch}: {len(graph.prunable)} of {len(rows)} channel groups can be pruned")
    for column, justify in (("group", "left"), ("width", "right"), ("least", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("coupled modules", overflow="fold")
    table.add_column("why not, or what to know", overflow="fold")
    for row in rows:
        modules = row["modules"] if with_members or len(row["modules"]) <= 4 else [*row["modules"][:3], "…"]
        unit = f" × {row['channels_per_unit']}" if row["channels_per_unit"] > 1 else ""
        why = "; ".join(filter(None, [row["reason"], *row["notes"]]))
        least = str(row["least_width"]) if row["prunable"] else "–"
        table.add_row(row["group"], f"{row['width']}{unit}", least, ", ".join(modules), why)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


# ---------------------------------------------------------------------------------------------- score


def _declare_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="network to score")
    parser.add_argument("data", help="data set; its training split is read")
    parser.add_argument("--arch", default=None, help="not needed for a checkpoint of ours")
    parser.add_argument(
        "--criterion",
        nargs="+",
        default=["discriminant"],
        metavar="NAME",
        help=f"one or more of {', '.join(criterion_names())}",
    )
    parser.add_argument("--score-features", choices=FEATURE_CHOICES, default="post", help="as in training")
    parser.add_argument(
        "--selector", metavar="FILE", help="explanation of the saliency criterion, as in training"
    )
    parser.add_argument("--casm", metavar="FILE", help="the same, of a CASM")
    parser.add_argument("--saliency-explanation", choices=EXPLANATIONS, help="as in training")
    parser.add_argument(
        "--saliency-weight", type=float, default=0.5, help="as in training, for NAME+saliency"
    )
    parser.add_argument("--batch-size", "-b", type=int, default=32)
    parser.add_argument("--calibration-batches", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=None, help="default: the data set's")
    parser.add_argument("--data-backend", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="chooses the pictures")
    parser.add_argument(
        "--output", type=Path, default=None, metavar="DIR", help="write scores.json and scores.png there"
    )


def _run_score(arguments: argparse.Namespace) -> int:
    flags = _saliency_flags(arguments)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
    model = _network(arguments.arch, arguments.checkpoint, None, arguments.image_size)
    dataset = open_dataset(arguments.data, require_val=False)
    size = arguments.batch_size * arguments.calibration_batches
    config = DataConfig(
        data=arguments.data,
        data_backend=arguments.data_backend,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        calibration_size=max(min(size, len(dataset.train) // 2), dataset.num_classes),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    criteria = [
        make_criterion(name, arguments.score_features, originals=originals, flags=flags)
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
        (arguments.output / "scores.json").write_text(json.dumps(named) + "\n", encoding="utf-8")
        plot_scores(named, arguments.output / "scores.png")
        print(f"wrote {arguments.output / 'scores.json'} and {arguments.output / 'scores.png'}")
    return 0


def _saliency_flags(arguments: argparse.Namespace) -> PruningConfig:
    """The flags about explanations, checked with the others as those of a training that prunes by the given criteria.

    Raises:
        ConfigError: No such criterion, or a flag that cannot apply.
    """
    check(
        arguments.batch_size >= 2,
        f"--batch-size {arguments.batch_size}: scores compare pictures, at least 2 are needed",
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


# ---------------------------------------------------------------------------------------------- common


def _network(
    arch: str | None, checkpoint: Path | None, num_classes: int | None, image_size: int | None
) -> nn.Module:
    """The network by name, or from a checkpoint with its widths."""
    if checkpoint is None:
        check(arch is not None, "give the architecture's name")
        return create_model(str(arch), num_classes=num_classes or 1000, image_size=image_size)
    model = model_for_weights(arch, checkpoint, num_classes=num_classes, image_size=image_size)
    assert identity_of(model) is not None
    return model


VERBS = {
    "groups": Verb("list the coupled channel groups of a network", _declare_groups, _run_groups),
    "score": Verb("score the channels of a network on a data set", _declare_score, _run_score),
    "report": Verb("everything about a run in one HTML file", report.declare, report.run),
    "export": Verb("write a network as ONNX, torch.export or plain state dict", export.declare, export.run),
    "compare": Verb("costs, widths and accuracy of two networks", compare.declare, compare.run),
    "import": Verb("turn published checkpoints into checkpoints of ours", import_job.declare, import_job.run),
    "shrink": Verb("cut away what a masked network has no use for", declare_shrink, run_shrink),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status is 0, or 2 if the job could not be done."""
    return run_verb(
        VERBS, arguments, prog="python -m pruning", description="What pruning would do, and what it did."
    )


if __name__ == "__main__":
    sys.exit(main())
