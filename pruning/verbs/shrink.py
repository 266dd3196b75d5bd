"""`python -m pruning shrink CHECKPOINT OUT`: turns a masked network into a smaller one with the same outputs."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from image_classification.command_parser import positive
from image_classification.config import check
from image_classification.file_writing import copy_file, output_path, write_text
from image_classification.models import (
    LoadedWeights,
    WeightsError,
    apply_weights,
    arch_info,
    create_model,
    head_tensors,
    identity_of,
    load_weights,
    model_for_weights,
)
from image_classification.models.meta_device import on_meta
from image_classification.models.own_code import check_trusted
from image_classification.models.weights import takes_average
from image_classification.plain_data import Plain
from image_classification.verbs import declared
from pruning.costs.latency_measure import measure_networks
from pruning.costs.latency_table import LatencySettings
from pruning.engine.examples import Example
from pruning.files.importing.reading import harmless, read_published
from pruning.files.saved_network import save_pruned
from pruning.masked.shrinking import ShrinkReport, shrink
from pruning.verbs.images import declare_ema

Factory = Callable[[], nn.Module]
_SECONDS = 20.0


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "checkpoint", type=Path, help="a LucidPrune checkpoint, a plain state dict, torchvision's"
    )
    parser.add_argument("out", type=output_path, help="the smaller network's checkpoint")
    parser.add_argument("--arch", default=None, help="not needed where the file says it")
    parser.add_argument(
        "--num-classes", type=positive, default=None, help="default: the rows of the file's classifier"
    )
    parser.add_argument(
        "--factory",
        default=None,
        metavar="MODULE:FUNCTION",
        help="builds a network of your own, unpruned, in place of --arch; the module is imported",
    )
    declare_ema(parser)
    parser.add_argument(
        "--example-size",
        type=positive,
        default=None,
        metavar="PIXELS",
        help="side of the images for tracing, comparing and timing; default: the architecture's",
    )
    parser.add_argument("--num-examples", type=positive, default=4, help="images to compare the outputs on")
    parser.add_argument("--batch-size", type=positive, default=1, help="images per batch when timing")
    parser.add_argument("--latency", action=argparse.BooleanOptionalAction, default=True, help="time both")
    parser.add_argument(
        "--json", type=output_path, default=None, metavar="FILE", help="write the report there as well"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    for name in ("example_size", "num_examples", "batch_size", "num_classes"):
        value = getattr(arguments, name)
        check(value is None or value >= 1, f"--{name.replace('_', '-')} {value}: give a whole number ≥ 1")
    check(
        arguments.arch is None or arguments.factory is None,
        "--arch and --factory exclude each other: the factory says what is built",
    )
    factory = None if arguments.factory is None else find_factory(arguments.factory)
    for path in filter(None, (arguments.out, arguments.json)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with torch.serialization.safe_globals(harmless()):  # figures may be NumPy scalars
        model = load_masked(
            arguments.checkpoint, arguments.arch, arguments.num_classes, factory, ema=arguments.ema
        )
    images = example_images(arguments.num_examples, arguments.example_size or _image_size(model))
    original = copy.deepcopy(model)
    report = shrink(model, images)
    print(report.describe())
    figures = _figures(report)
    if not report.changed:
        copy_file(arguments.checkpoint, arguments.out)
        print(f"{arguments.out}: a copy of {arguments.checkpoint}")
    else:
        save_pruned(arguments.out, model, factory=factory)
        _say_what_is_left_behind(arguments.checkpoint, arguments.out, ema=arguments.ema)
        sizes = [path.stat().st_size for path in (arguments.checkpoint, arguments.out)]
        print(f"file: {sizes[0]:,} → {sizes[1]:,} bytes (÷ {sizes[0] / sizes[1]:.2f})")
        figures["num_bytes"] = sizes
        if arguments.latency:
            figures["seconds_per_batch"] = _timed(original, model, images, arguments.batch_size)
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(figures, indent=2) + "\n")
    return 0


def find_factory(words: str) -> Factory:
    """Import the function named by `MODULE:FUNCTION`.

    Raises:
        ConfigError, ValueError: The name does not exist or is not a function.
    """
    module_name, colon, function = words.partition(":")
    check(bool(module_name and colon and function), f"--factory {words}: write MODULE:FUNCTION")
    try:
        found: Factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--factory {words}: {error}; start in the folder of the module") from error
    check(callable(found), f"--factory {words}: is not a function")
    return found


def load_masked(
    path: Path, arch: str | None, num_classes: int | None, factory: Factory | None, *, ema: bool | None = None
) -> nn.Module:
    """Load a network from a file; masks of torch.nn.utils.prune in a state dict are multiplied in.

    Args:
        path: Any file that `load_weights` reads.
        arch: Architecture; None to use the file's.
        num_classes: Number of classes; None to read it off the classifier.
        factory: Builds a user-defined network.
        ema: Whether to load the averaged weights.

    Raises:
        FileNotFoundError, WeightsError, ModelError: The file is missing or unusable, or does not fit.
    """
    weights = load_weights(path, ema=ema)
    state = merged_masks(weights.state)
    if weights.structure is not None and state.keys() == weights.state.keys():
        return model_for_weights(arch, path, num_classes=num_classes, ema=ema, factory=factory)
    if weights.arch is not None and arch is None:
        check_trusted(weights.arch)
    name = arch or weights.arch
    if factory is not None:
        model = factory()
    else:
        if name is None:
            raise WeightsError(f"{path} does not say its architecture: give --arch")
        model = create_model(name, num_classes=num_classes or classes_in(state, name))
    apply_weights(model, LoadedWeights(state, path, weights.arch))
    return model


def merged_masks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace `X_orig` and `X_mask` (torch.nn.utils.prune) in a state dict by their product `X`."""
    merged = {}
    for name, tensor in state.items():
        mask = state.get(f"{name.removesuffix('_orig')}_mask")
        if name.endswith("_orig") and mask is not None:
            merged[name.removesuffix("_orig")] = tensor * mask.to(tensor.dtype)
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state):
            merged[name] = tensor
    return merged


def classes_in(state: Mapping[str, Tensor], arch: str) -> int:
    """Return the number of classes of a state dict: the rows of the architecture's classifier."""
    for name in sorted(head_tensors(on_meta(lambda: create_model(arch)))):
        if name in state and state[name].dim():
            return int(state[name].shape[0])
    return 1000


def example_images(count: int, size: int) -> Tensor:
    """Return noise images (count, 3, size, size), the same every time, from low to high contrast."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise * torch.logspace(-1, 1, count).reshape(-1, 1, 1, 1)


def _image_size(model: nn.Module) -> int:
    identity = identity_of(model)
    if identity is None:
        return 224
    return identity.image_size or arch_info(identity.arch).image_size


def _say_what_is_left_behind(path: Path, out: Path, *, ema: bool | None) -> None:
    """Report what the file contains besides the network, and other files that were made for the old widths."""
    content = read_published(path)
    averaged = takes_average(content, ema)
    for key, what in (
        ("casm", "saliency mapping (CASM)"),
        ("state_dict", "plain weights") if averaged else ("ema", "averaged weights"),
        ("optimizer", "optimizer"),
    ):
        if isinstance(content, Mapping) and content.get(key):
            print(f"note: the {what} in {path} is not carried over: the network alone was made smaller")
    print(
        f"note: a selector or saliency mapping (CASM) that was trained for {path} does not fit {out}, whose feature "
        f"maps have fewer channels: keep {path} for it, or train another for {out} with `python -m explainers`"
    )


def _timed(before: nn.Module, after: nn.Module, images: Tensor, batch_size: int) -> list[float]:
    """Measure and print median seconds per batch of both networks, taking turns."""
    settings = LatencySettings(batch_size=batch_size)
    seconds = measure_networks([before, after], Example((images,)), settings, _SECONDS)
    shown = " → ".join(f"{value * 1e3:.1f}" for value in seconds)
    print(f"latency: {shown} ms per batch of {batch_size} (÷ {seconds[0] / seconds[1]:.2f}, {_processors()})")
    return seconds


def _processors() -> str:
    return f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"


def _figures(report: ShrinkReport) -> Plain:
    """Return the report as plain data."""
    return {
        "removed_channels": report.num_removed,
        "widths": {name: list(widths) for name, widths in report.widths.items()},
        "macs": list(report.macs),
        "num_parameters": list(report.num_parameters),
        "max_difference": report.max_difference,
        "folded_layers": report.num_folded,
        "kept": [
            {"group": k.group, "layers": list(k.layers), "count": k.count, "reason": k.reason}
            for k in report.kept
        ],
    }


VERB = declared(declare, run)
