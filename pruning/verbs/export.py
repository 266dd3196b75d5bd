"""`python -m pruning export CHECKPOINT --format onnx|torch-export|state-dict`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from image_classification.command_parser import positive
from image_classification.config import check
from image_classification.file_writing import output_path
from image_classification.models import model_for_weights
from image_classification.observe.provenance import command_line
from image_classification.published_name import is_published
from image_classification.verbs import declared
from pruning.files.exporting import (
    DEFAULT_FORMAT,
    FORMATS,
    SUFFIXES,
    TOLERANCE,
    ExportSettings,
    export_network,
    openvino_difference,
)
from pruning.verbs.images import declare_ema, first_images, noise_images, open_validation, size_of
from pruning.verbs.quantised import quantise_and_compare

_ONNX_BLOCK = 8
"""Block size in channels of the layout in which ONNX Runtime's fast CPU convolutions work."""

_LEAST_JUDGED = 512  # number of validation images for evaluating INT8, if there are that many


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "checkpoint", type=Path, help="network, pruned or not; or timm/NAME, torchvision/NAME"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default=DEFAULT_FORMAT, help="what to write; default: %(default)s"
    )
    parser.add_argument(
        "--output",
        "-o",
        type=output_path,
        default=None,
        metavar="FILE",
        help=f"default: the checkpoint's name with {', '.join(SUFFIXES.values())}",
    )
    parser.add_argument("--arch", default=None, help="not needed for a LucidPrune checkpoint")
    declare_ema(parser)
    parser.add_argument(
        "--image-size", type=positive, default=None, help="side of the images; default: the network's"
    )
    parser.add_argument(
        "--data",
        default=None,
        help="data set whose validation images the file is checked on; default: noise",
    )
    parser.add_argument("--num-images", "--num-pictures", "-n", type=int, default=32, help="how many")
    parser.add_argument(
        "--int8",
        action="store_true",
        help="an INT8 version as well (onnx only; needs --data), compared with the float file",
    )
    parser.add_argument(
        "--calibration-images",
        type=int,
        default=128,
        metavar="N",
        help="training images that set INT8 ranges",
    )
    parser.add_argument(
        "--original",
        type=Path,
        default=None,
        metavar="CHECKPOINT",
        help="with --int8: compare this network as well",
    )
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest difference of a logit")
    parser.add_argument(
        "--opset", type=int, default=None, metavar="N", help="of ONNX; default: what PyTorch writes"
    )
    parser.add_argument(
        "--license", default=None, metavar="ID", help="of the weights, such as apache-2.0; goes into the file"
    )


def run(arguments: argparse.Namespace) -> int:
    """Export, check, and print how to load the file."""
    check(arguments.num_images >= 3, f"--num-images {arguments.num_images}: give at least 3")
    _check_int8(arguments)
    check(arguments.tolerance > 0, f"--tolerance {arguments.tolerance}: must be positive")
    path = arguments.output or _default(arguments.checkpoint, SUFFIXES[arguments.format])
    model = model_for_weights(
        arguments.arch, arguments.checkpoint, image_size=arguments.image_size, ema=arguments.ema
    )
    validation = None
    if arguments.data is None:
        images = noise_images(arguments.num_images, size_of(model, arguments.image_size))
        what = "images of noise"
    else:
        validation = open_validation(
            arguments.data, model, arguments.checkpoint, arguments.image_size, torch.device("cpu")
        )
        images = first_images(validation, arguments.num_images)
        what = f"validation images of {arguments.data}"
    notes = {"command": command_line()}
    if arguments.license is not None:
        notes["license"] = arguments.license
    settings = ExportSettings(tolerance=arguments.tolerance, opset=arguments.opset, notes=notes)
    exported = export_network(model, path, arguments.format, images, settings)
    size = "×".join(map(str, images.shape[1:]))
    print(f"wrote {path} ({path.stat().st_size / 2**20:.2f} MiB): any number of images {size}, normalised")
    print(f"largest difference of a logit on {exported.num_images} {what}: {exported.difference:.1e}")
    if arguments.format == "onnx":
        beside = openvino_difference(exported, model.eval(), images)
        if beside is not None:
            print(f"… and in OpenVINO, which is installed here: {beside:.1e}")
    if arguments.format == "onnx" and (uneven := _num_uneven(model)):
        print(
            f"note: the width of {uneven} convolutions is not a multiple of {_ONNX_BLOCK}, and ONNX Runtime is slow in "
            f"them on a CPU. Prune with --round-to {_ONNX_BLOCK} for it"
        )
    print(f"\nload it with:\n\n{exported.loader}")
    if arguments.int8:
        assert validation is not None
        networks = {arguments.checkpoint.name: model}
        if arguments.original is not None:
            networks[f"original: {arguments.original.name}"] = model_for_weights(None, arguments.original)
        small = quantise_and_compare(
            networks, path, validation, arguments.calibration_images, max(arguments.num_images, _LEAST_JUDGED)
        )
        print(f"wrote {small} and {small.with_suffix('.json').name}; it loads as the float file does")
    return 0


def _check_int8(arguments: argparse.Namespace) -> None:
    """Refuse flags that cannot be combined.

    Raises:
        ConfigError: There is such a combination; the message names the flags.
    """
    if not arguments.int8:
        check(
            arguments.original is None,
            "--original has no effect without --int8: add it, or leave --original out",
        )
        return
    check(arguments.format == "onnx", f"--int8 is for --format onnx, not {arguments.format}")
    check(arguments.data is not None, "--int8 needs images: give --data")
    problem = f"--calibration-images {arguments.calibration_images}: give at least 1"
    check(arguments.calibration_images >= 1, problem)


def _num_uneven(model: nn.Module) -> int:
    """Return the number of convolutions whose output channels are not a multiple of the block."""
    widths = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return sum(width % _ONNX_BLOCK != 0 for width in widths)


def _default(checkpoint: Path, suffix: str) -> Path:
    """Return the default path: `runs/demo/checkpoint.pth.tar` → `runs/demo/checkpoint.onnx`.

    For published weights it is in the current directory: `timm/resnet18` → `resnet18.onnx`.
    """
    if is_published(checkpoint):
        return Path(checkpoint.name.replace(":", "-") + suffix)
    stem = checkpoint.name.removesuffix(".tar").removesuffix(".pth").removesuffix(".pt")
    return checkpoint.with_name(stem + suffix)


VERB = declared(declare, run)
