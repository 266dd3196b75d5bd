"""Finished networks and real images for the verbs that look at them: which weights, and the validation split."""

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
    """`--ema`: which of a checkpoint's weights are taken."""
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take the averaged weights, or with --no- the last ones; default: the averaged ones where there are any",
    )


def size_of(model: nn.Module, image_size: int | None) -> int:
    """Side of a network's images: what is asked for, else what it was built with, else its architecture's."""
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
    """The validation split of a data set at the size and with the normalisation that a network wants.

    Args:
        data: The data set.
        model: The network.
        checkpoint: Where it was read: the run's configuration in it, if any, says what its images were like.
        image_size: What is asked for instead.
        device: Where images go.

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
    """What a run's own checkpoint says of its images; nothing for files of other origin."""
    content = read_safely(checkpoint)
    config = content.get("config") if isinstance(content, Mapping) else None
    return {key: config.get(key) for key in _SETTINGS} if isinstance(config, Mapping) else {}


def first_images(images: EvaluationImages, count: int) -> Tensor:
    """(count, 3, H, W) normalised images of the split, on the CPU."""
    collected: list[Tensor] = []
    with images.loader(count) as loader:
        for batch in loader:
            collected.append(batch.images.float().cpu())
    return torch.cat(collected)[:count]


def noise_images(count: int, size: int) -> Tensor:
    """(count, 3, size, size) of noise, the same every time."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def example_images(image_size: int) -> torch.Tensor:
    """Two images of noise, the same every time."""
    return torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def network_of(
    arch: str | None, checkpoint: Path | None, num_classes: int | None, image_size: int | None
) -> nn.Module:
    """The network by name, or from a checkpoint with its widths."""
    if checkpoint is None:
        check(arch is not None, "give the architecture's name")
        return create_model(str(arch), num_classes=num_classes or 1000, image_size=image_size)
    model = model_for_weights(arch, checkpoint, num_classes=num_classes, image_size=image_size)
    assert identity_of(model) is not None
    return model
