"""Real pictures for verbs that look at finished networks: the validation split, as the networks get it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from image_classification.config import check
from image_classification.models import arch_info, identity_of
from pruning.report.measure import Pictures, open_pictures


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


def open_validation(data: str, model: nn.Module, image_size: int | None, device: torch.device) -> Pictures:
    """The validation split of a data set at the size that a network wants.

    Raises:
        ConfigError: The network tells another number of classes apart.
    """
    identity = identity_of(model)
    size = image_size or (identity.image_size if identity is not None else None)
    pictures = open_pictures({"image_size": size}, device, data)
    classes = None if identity is None else identity.num_classes
    check(
        classes in (None, pictures.dataset.num_classes),
        f"DATA {data} has {pictures.dataset.num_classes} classes, the network {classes}: give the data that it was "
        "trained on",
    )
    return pictures


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
