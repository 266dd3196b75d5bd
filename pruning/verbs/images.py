"""Networks and images for the verbs that inspect them: choice of weights, and the validation split."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from image_classification.config import check
from image_classification.models import (
    arch_info,
    class_names_of,
    create_model,
    identity_of,
    input_of,
    model_for_weights,
    read_safely,
)
from image_classification.plain_data import Plain
from pruning.report.measure import EvaluationImages, open_images

_SETTINGS = ("image_size", "resize", "mean", "std", "geometry")


def declare_ema(parser: argparse.ArgumentParser) -> None:
    """Declare `--ema`, which selects a checkpoint's weights."""
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take the averaged weights, or with --no- the last ones; default: the averaged ones where there are any",
    )


def size_of(model: nn.Module, image_size: int | None) -> int:
    """Return the side of a network's images: the requested one, else the one it was built with, else its
    architecture's.
    """
    identity = identity_of(model)
    if image_size is not None or identity is None:
        check(
            image_size is not None, "--image-size is missing: the checkpoint does not name its architecture"
        )
        assert image_size is not None
        return image_size
    if (images := input_of(model)) is not None:
        return images.image_size
    return identity.image_size or arch_info(identity.arch).image_size


def open_validation(
    data: str, model: nn.Module, checkpoint: Path, image_size: int | None, device: torch.device
) -> EvaluationImages:
    """Open a data set's validation split at the size and with the normalisation that a network expects.

    Args:
        data: The data set.
        model: The network.
        checkpoint: File that the network was read from; the run's configuration in it, if any, describes its images.
        image_size: Requested size, if any.
        device: Device of the images.

    Raises:
        ConfigError: The network has another number of classes.
    """
    identity = identity_of(model)
    settings = _settings_of(checkpoint)
    if image_size is not None:
        settings |= {"image_size": image_size, "resize": None}
    elif settings.get("image_size") is None and identity is not None and input_of(model) is None:
        settings["image_size"] = identity.image_size
    images = open_images(settings, device, data, input_of(model))
    known = class_names_of(model)
    if known is not None:
        dataset = images.dataset.in_classes(known, str(checkpoint), "Give the data that it was trained on")
        images = dataclasses.replace(images, dataset=dataset)
    classes = None if identity is None else identity.num_classes
    check(
        classes in (None, images.dataset.num_classes),
        f"DATA {data} has {images.dataset.num_classes} classes, the network {classes}: give the data that it was "
        "trained on",
    )
    return images


def _settings_of(checkpoint: Path) -> Plain:
    """Return the image settings in a run's checkpoint; nothing for files of other origin."""
    content = read_safely(checkpoint)
    config = content.get("config") if isinstance(content, Mapping) else None
    return {key: config.get(key) for key in _SETTINGS} if isinstance(config, Mapping) else {}


def first_images(images: EvaluationImages, count: int) -> Tensor:
    """Return the first `count` normalised images of the split, (count, 3, H, W), on the CPU."""
    collected: list[Tensor] = []
    with images.loader(count) as loader:
        for batch in loader:
            collected.append(batch.images.float().cpu())
    return torch.cat(collected)[:count]


def noise_images(count: int, size: int) -> Tensor:
    """Return noise images (count, 3, size, size), the same every time."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def example_images(image_size: int) -> torch.Tensor:
    """Return two noise images, the same every time."""
    return torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def network_of(
    arch: str | None, checkpoint: Path | None, num_classes: int | None, image_size: int | None
) -> nn.Module:
    """Build a network by name, or load it from a checkpoint with its widths."""
    if checkpoint is None:
        check(arch is not None, "give the architecture's name")
        return create_model(str(arch), num_classes=num_classes or 1000, image_size=image_size)
    model = model_for_weights(arch, checkpoint, num_classes=num_classes, image_size=image_size)
    assert identity_of(model) is not None
    return model
