"""Network and image folder of the verbs that need no training: their flags, and opening them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from image_classification.config import check
from image_classification.device_flag import declare_device, device_named
from image_classification.host_memory import keep_freed_memory
from image_classification.models import arch_info, identity_of, input_of, model_for_weights
from image_classification.network_input import NetworkInput, check_normalisation
from pruning.criteria import criterion_names
from pruning.criteria.by_name import make_criterion
from pruning.engine.constraints import DEFAULT_MIN_WIDTH, Constraints
from pruning.repair.repairing import REPAIR_METHODS, RepairSettings
from pruning.search.sensitivity import SensitivitySearch
from pruning.verbs.compressing import CompressSettings
from pruning.verbs.plain_images import PlainImages, read_folder
from pruning.verbs.shrink import Factory, find_factory


def declare_network_and_images(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments shared by these verbs."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="trained network: a LucidPrune checkpoint, weights with --arch, or published weights by name, such as "
        "torchvision/resnet50",
    )
    parser.add_argument(
        "images", type=Path, help="folder of images, with or without class folders; labels are not needed"
    )
    parser.add_argument("--arch", default=None, help="architecture of the weights, such as timm/resnet50")
    parser.add_argument(
        "--factory",
        default=None,
        metavar="MODULE:FUNCTION",
        help="builds a network of your own, in place of --arch",
    )
    parser.add_argument("--num-images", "-n", type=int, default=160, help="images to calibrate with")
    parser.add_argument(
        "--repair", choices=REPAIR_METHODS, default=RepairSettings.method, help="as in training"
    )
    parser.add_argument(
        "--criterion",
        default="reconstruction",
        help=f"what orders channels: one of {', '.join(criterion_names())}",
    )
    parser.add_argument("--round-to", type=int, default=Constraints.round_to, help="as in training")
    parser.add_argument("--min-width", type=float, default=DEFAULT_MIN_WIDTH, help="as in training")
    parser.add_argument(
        "--prune-ignore", nargs="+", default=[], metavar="PATTERN", help="modules that are left alone"
    )
    parser.add_argument("--image-size", type=int, default=None, help="default: the architecture's")
    parser.add_argument(
        "--resize", type=int, default=None, help="short side before the crop; default: the architecture's"
    )
    parser.add_argument(
        "--mean",
        type=float,
        nargs=3,
        default=None,
        help="normalisation, of values in 0 … 1; default: the architecture's",
    )
    parser.add_argument(
        "--std", type=float, nargs=3, default=None, help="standard deviation; default: the architecture's"
    )
    parser.add_argument("--seed", type=int, default=0, help="which images are drawn")
    declare_device(parser)


def check_network_and_images(arguments: argparse.Namespace) -> None:
    """Refuse bad numbers before anything is read.

    Raises:
        ConfigError: A number is invalid; the message names the flag.
    """
    for name in ("num_images", "image_size", "resize", "round_to"):
        value = getattr(arguments, name)
        check(value is None or value >= 1, f"--{name.replace('_', '-')} {value}: give a whole number ≥ 1")
    check(arguments.seed >= 0, f"--seed {arguments.seed} is negative")
    check_normalisation(arguments.mean, arguments.std)
    device_named(arguments.device)
    check(
        arguments.arch is None or arguments.factory is None,
        "--arch and --factory exclude each other: the factory says what is built",
    )


def open_network(arguments: argparse.Namespace) -> tuple[nn.Module, Factory | None]:
    """Return the network, on its device and in evaluation mode, and its builder if the flags name one.

    On the CPU, freed memory stays in the process from here on, see `keep_freed_memory`.
    """
    if torch.device(arguments.device).type == "cpu":
        keep_freed_memory()
    factory = None if arguments.factory is None else find_factory(arguments.factory)
    model = model_for_weights(arguments.arch, arguments.checkpoint, factory=factory)
    return model.to(arguments.device).eval(), factory


def read_images(arguments: argparse.Namespace, model: nn.Module, count: int) -> PlainImages:
    """Read up to `count` images of the folder, preprocessed for the network."""
    identity = identity_of(model)
    classes = None if identity is None else identity.num_classes
    return read_folder(arguments.images, count, _format(arguments, model), classes, arguments.seed)


def settings_of(
    arguments: argparse.Namespace, *, search: SensitivitySearch | None = None, announce: Callable[[str], None]
) -> CompressSettings:
    """Return the settings given by the flags: criterion, repair and widths."""
    return CompressSettings(
        criterion=make_criterion(arguments.criterion),
        search=search or SensitivitySearch(),
        repair=RepairSettings(method=arguments.repair),
        constraints=Constraints(arguments.round_to, arguments.min_width, tuple(arguments.prune_ignore)),
        announce=announce,
    )


def _format(arguments: argparse.Namespace, model: nn.Module) -> NetworkInput:
    """Return the image format: from the flags, else the checkpoint, else the architecture."""
    identity = identity_of(model)
    known = input_of(model)
    if known is None and identity is not None:
        known = arch_info(identity.arch).network_input
    if known is None:
        missing = None in (arguments.image_size, arguments.mean, arguments.std)
        check(
            not missing,
            "--image-size, --mean and --std are needed: the checkpoint does not name its architecture",
        )
        known = NetworkInput(arguments.image_size, arguments.image_size, arguments.mean, arguments.std)
    own = None if identity is None or input_of(model) is not None else identity.image_size
    size = int(arguments.image_size or own or known.image_size)
    resize = arguments.resize or round(size * known.resize / known.image_size)
    check(resize >= size, f"--resize {resize} is smaller than the image size {size}: raise it")
    mean, std = tuple(arguments.mean or known.mean), tuple(arguments.std or known.std)
    return NetworkInput(size, resize, mean, std, known.geometry)
