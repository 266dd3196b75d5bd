"""`python -m explainers classify`: predicted classes and probabilities of image files, with heat-maps beside the
images.

python -m explainers classify dog.jpg cat.jpg --checkpoint best.pth.tar --class-names names.txt --output page.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from explainers.attribution.method import create_method
from explainers.plots import Panel, save_grid, to_image
from explainers.verbs.method_flags import offered_methods
from image_classification.config import ConfigError, check
from image_classification.data.decode import UnreadableError
from image_classification.data.single_image import pixels_of
from image_classification.figure_writing import check_figure
from image_classification.file_writing import output_path, write_text
from image_classification.models import (
    arch_info,
    identity_of,
    input_of,
    main_and_auxiliary_logits,
    model_for_weights,
    remember_input,
)
from image_classification.models.factory import class_names_of
from image_classification.network_input import NetworkInput
from image_classification.plain_data import Plain
from image_classification.small_files import read_json, read_text
from image_classification.verbs import declared


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="the network")
    parser.add_argument("--arch", default=None, help="not needed for a LucidPrune checkpoint")
    parser.add_argument(
        "--class-names",
        type=Path,
        default=None,
        metavar="FILE",
        help="a text file with a name per line, or a JSON list; default: those in the checkpoint, else numbers",
    )
    parser.add_argument("--top", type=int, default=5, help="classes to print per image")
    parser.add_argument(
        "--multi-label",
        action="store_true",
        help="several classes per image: each has a probability of its own",
    )
    parser.add_argument(
        "--method",
        choices=tuple(offered_methods()),
        default="gradcam",
        help="heat-map beside each image, for its first class",
    )
    parser.add_argument(
        "--output",
        "-o",
        type=output_path,
        default=None,
        metavar="FILE",
        help="also write a page of images and heat-maps",
    )
    parser.add_argument(
        "--json", type=output_path, default=None, metavar="FILE", help="also write what is printed as JSON"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    if arguments.output is not None:
        check_figure(arguments.output, "--output")
    check(arguments.top >= 1, f"--top {arguments.top}: give at least 1")
    model = model_for_weights(arguments.arch, arguments.checkpoint).eval().requires_grad_(False)
    wanted = _wanted(model)
    images = torch.stack([_read(path, wanted) for path in arguments.images])
    logits = _logits(model, images)
    names = _names(arguments.class_names, class_names_of(model), logits.shape[1])
    chances = logits.sigmoid() if arguments.multi_label else logits.softmax(1)
    rows = [_best(values, names, arguments.top) for values in chances]
    for path, row in zip(arguments.images, rows, strict=True):
        said = ", ".join(f"{entry['name']} {100 * entry['probability']:.1f} %" for entry in row)
        print(f"{path}: {said}")
    if arguments.json is not None:
        plain = {str(path): row for path, row in zip(arguments.images, rows, strict=True)}
        write_text(arguments.json, json.dumps(plain, indent=2) + "\n")
    if arguments.output is not None:
        _save_page(arguments.output, model, images, logits.argmax(1), rows, wanted, arguments.method)
        print(f"{arguments.output}: {len(rows)} images with {arguments.method}")
    return 0


def _wanted(model: nn.Module) -> NetworkInput:
    """Return a network's input description; its architecture's default if the file does not record one."""
    images = input_of(model)
    identity = identity_of(model)
    if images is None:
        assert identity is not None, "model_for_weights builds networks by name"
        images = arch_info(identity.arch).network_input
        remember_input(model, images)
    return images


def _read(path: Path, wanted: NetworkInput) -> Tensor:
    check(path.is_file(), f"IMAGE {path}: there is no such file")
    try:
        return pixels_of(path, wanted)
    except UnreadableError as error:
        raise ConfigError(f"IMAGE {path} cannot be read: {error}") from error


@torch.inference_mode()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return logits (N, L), computed image by image, so that any number of files fits into memory."""
    return torch.cat([main_and_auxiliary_logits(model(image[None]))[0].float() for image in images])


def _names(path: Path | None, known: Sequence[str] | None, num_classes: int) -> list[str]:
    """Return names by class index, from a file or as stored with the network.

    Raises:
        ConfigError: The file is missing, or has another number of names.
    """
    if path is None:
        return list(known or (f"class {index}" for index in range(num_classes)))
    if path.suffix == ".json":
        content = read_json(path, "--class-names")
        check(isinstance(content, list), f"--class-names {path}: give a JSON list of names")
        names = [str(name) for name in content]
    else:
        lines = read_text(path, "--class-names").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    check(
        len(names) == num_classes,
        f"--class-names {path} has {len(names)} names, the network {num_classes} classes: give one per class",
    )
    return names


def _best(chances: Tensor, names: Sequence[str], count: int) -> list[Plain]:
    values, classes = chances.topk(min(count, len(chances)))
    return [
        {"class": index, "name": names[index], "probability": value}
        for value, index in zip(values.tolist(), classes.tolist(), strict=True)
    ]


def _save_page(
    path: Path,
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    rows: Sequence[Sequence[Plain]],
    wanted: NetworkInput,
    method: str,
) -> None:
    result = create_method(method).prepare(model, images[:1])(images, classes)
    panels = []
    for image, heatmap, row in zip(images, result.map.cpu().numpy(), rows, strict=True):
        shown = to_image(image.numpy(), wanted.mean, wanted.std)
        title = f"{row[0]['name']} {100 * row[0]['probability']:.0f} %"
        panels.append([Panel(title, shown), Panel(method, shown, heatmap, result.signed)])
    save_grid(path, panels)


VERB = declared(declare, run)
