"""Real pictures for verbs that look at finished networks: the validation split, as the networks get it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from image_classification.config import check
from image_classification.models import arch_info, identity_of, read_safely
from pruning.report.measure import Pictures, open_pictures

_SETTINGS = ("image_size", "resize", "mean", "std")


def size_of(model: nn.Module, image_size: int | None) -> int:
    """Side of a network's pictures: what is asked for, else what it was built with, else its architecture's."""
    identity = identity_of(model)
    if image_size is not None or identity is None:
        check(
            image_size is not None, "--image-size is missing: the checkpoint does not name its architecture"
        )
        assert image_size is not None
        return image_size
    return identity.image_size or arch_info(identity.arch).image_size


def open_validation(
    data: str, model: nn.Module, checkpoint: Path, image_size: int | None, device: torch.device
) -> Pictures:
    """The validation split of a data set at the size and with the normalisation that a network wants.

    Args:
        data: The data set.
        model: The network.
        checkpoint: Where it was read: the run's configuration in it, if any, says what its pictures were like.
        image_size: What is asked for instead.
        device: Where pictures go.

    Raises:
        ConfigError: The network tells another number of classes apart.
    """
    identity = identity_of(model)
    settings = _settings_of(checkpoint)
    if image_size is not None:
        settings |= {"image_size": image_size, "resize": None}
    elif settings.get("image_size") is None and identity is not None:
        settings["image_size"] = identity.image_size
    pictures = open_pictures(settings, device, data)
    classes = None if identity is None else identity.num_classes
    check(
        classes in (None, pictures.dataset.num_classes),
        f"DATA {data} has {pictures.dataset.num_classes} classes, the network {classes}: give the data that it was "
        "trained on",
    )
    return pictures


def _settings_of(checkpoint: Path) -> dict[str, Any]:
    """What a run's own checkpoint says of its pictures; nothing for files of other origin."""
    content = read_safely(checkpoint)
    config = content.get("config") if isinstance(content, Mapping) else None
    return {key: config.get(key) for key in _SETTINGS} if isinstance(config, Mapping) else {}


def first_images(pictures: Pictures, count: int) -> Tensor:
    """(count, 3, H, W) normalised pictures of the split, on the CPU."""
    collected: list[Tensor] = []
    with pictures.loader(count) as loader:
        for batch in loader:
            collected.append(batch.images.float().cpu())
    return torch.cat(collected)[:count]


def noise_images(count: int, size: int) -> Tensor:
    """(count, 3, size, size) of noise, the same every time."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
