"""`python -m pruning export CHECKPOINT --format onnx|torch-export|state-dict`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from image_classification.config import check
from image_classification.models import model_for_weights
from pruning.export import FORMATS, SUFFIXES, TOLERANCE, export_network
from pruning.verbs.pictures import first_images, noise_images, open_validation, size_of

_ONNX_BLOCK = 8
"""Channels of a block in the layout that ONNX Runtime computes convolutions in fast, on a CPU."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", type=Path, help="network, pruned or not")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="what to write; onnx by default")
    parser.add_argument(
        "--output", "-o", type=Path, default=None, metavar="FILE",
        help=f"default: the checkpoint's name with {', '.join(SUFFIXES.values())}",
    )  # fmt: skip
    parser.add_argument("--arch", default=None, help="not needed for a checkpoint of ours")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    parser.add_argument(
        "--image-size", type=int, default=None, help="side of the pictures; default: the network's"
    )
    parser.add_argument(
        "--data",
        default=None,
        help="data set whose validation pictures the file is checked on; default: noise",
    )
    parser.add_argument("--num-pictures", "-n", type=int, default=32, help="how many")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest difference of a logit")


def run(arguments: argparse.Namespace) -> int:
    """Export, check, and print how to load the file."""
    check(arguments.num_pictures >= 3, f"--num-pictures {arguments.num_pictures}: give at least 3")
    check(arguments.tolerance > 0, f"--tolerance {arguments.tolerance}: must be positive")
    path = arguments.output or _default(arguments.checkpoint, SUFFIXES[arguments.format])
    model = model_for_weights(
        arguments.arch, arguments.checkpoint, image_size=arguments.image_size, ema=arguments.ema
    )
    if arguments.data is None:
        images = noise_images(arguments.num_pictures, size_of(model, arguments.image_size))
        what = "pictures of noise"
    else:
        pictures = open_validation(
            arguments.data, model, arguments.checkpoint, arguments.image_size, torch.device("cpu")
        )
        images = first_images(pictures, arguments.num_pictures)
        what = f"validation pictures of {arguments.data}"
    exported = export_network(model, path, arguments.format, images, tolerance=arguments.tolerance)
    size = "×".join(map(str, images.shape[1:]))
    print(f"wrote {path} ({path.stat().st_size / 2**20:.2f} MiB): any number of pictures {size}, normalised")
    print(f"largest difference of a logit on {exported.num_images} {what}: {exported.difference:.1e}")
    if arguments.format == "onnx" and (uneven := _num_uneven(model)):
        print(
            f"note: the width of {uneven} convolutions is no multiple of {_ONNX_BLOCK}, and ONNX Runtime is slow in "
            f"them on a CPU. Prune with --round-to {_ONNX_BLOCK} for it"
        )
    print(f"\nload it with:\n\n{exported.loader}")
    return 0


def _num_uneven(model: nn.Module) -> int:
    """Convolutions whose output is no whole number of blocks."""
    widths = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return sum(width % _ONNX_BLOCK != 0 for width in widths)


def _default(checkpoint: Path, suffix: str) -> Path:
    """`runs/demo/checkpoint.pth.tar` → `runs/demo/checkpoint.onnx`."""
    stem = checkpoint.name.removesuffix(".tar").removesuffix(".pth").removesuffix(".pt")
    return checkpoint.with_name(stem + suffix)
