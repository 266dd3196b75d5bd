"""A data set: its two splits and the usual training settings for its kind of image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from image_classification.channel_statistics import CIFAR10, CIFAR100, IMAGENET, Triple
from image_classification.data.class_names import positions
from image_classification.data.manifest import Manifest
from image_classification.network_input import EvaluationGeometry, NetworkInput

Augmentation = Literal["default", "imagenet", "cifar", "none"]


@dataclass(frozen=True)
class Preset:
    """Default settings for a kind of image.

    Attributes:
        image_size: Side of the network's square input, in pixels.
        resize: Short side that validation images are resized to before the centre crop.
        mean, std: Normalisation per colour channel, of values in [0, 1].
        augmentation: "imagenet" (random-resized crop and flip) or "cifar" (pad by 4, crop, flip).
        crop_scale: Share of the image's area that a random-resized crop covers, lowest and highest.
        batch_size: Images per process and step.
        geometry: "crop" (resize and centre crop) or "whole" (stretched to the square).
    """

    image_size: int
    resize: int
    mean: Triple
    std: Triple
    augmentation: Literal["imagenet", "cifar"]
    crop_scale: tuple[float, float] = (0.08, 1.0)
    batch_size: int = 256
    geometry: EvaluationGeometry = NetworkInput.geometry

    @property
    def network_input(self) -> NetworkInput:
        """The input description stored with a network trained on such images."""
        return NetworkInput(self.image_size, self.resize, self.mean, self.std, self.geometry)

    def for_network(self, images: NetworkInput | None) -> Preset:
        """Return the preset adapted to the images that a network was trained for, if known."""
        return self if images is None else dataclasses.replace(self, **vars(images))


SMALL_SIDE = 64  # pixels: sets of images up to this size are trained at their own size
IMAGENET_NUM_TRAIN = 1_281_167
IMAGENET_NUM_VAL = 50_000
"""Lengths of an epoch and of a validation if there is no data set."""

IMAGENET_PRESET = Preset(224, 256, *IMAGENET, "imagenet")
CIFAR10_PRESET = Preset(32, 32, *CIFAR10, "cifar", batch_size=128)
CIFAR100_PRESET = Preset(32, 32, *CIFAR100, "cifar", batch_size=128)


def preset_for(train: Manifest) -> Preset:
    """Choose the preset by the images: all 32 × 32 is CIFAR (which one, by the number of classes), small ones keep
    their size.

    A set is small if at most a twentieth of its images has a side above 64 pixels.
    """
    if not len(train):
        return IMAGENET_PRESET
    if (train.heights == 32).all() and (train.widths == 32).all():
        return CIFAR100_PRESET if len(train.class_names) > 10 else CIFAR10_PRESET
    longer = np.maximum(train.heights, train.widths)
    shorter = np.minimum(train.heights, train.widths)
    if np.quantile(longer, 0.95) > SMALL_SIDE:
        return IMAGENET_PRESET
    # Networks halve their maps several times, so take a multiple of 4, and at least half of CIFAR's size.
    size = max(16, 4 * math.ceil(float(np.median(shorter)) / 4))
    return Preset(size, size, *IMAGENET, "cifar", batch_size=128)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Train and validation split of one data set.

    Attributes:
        name: Name of the set in reports.
        train, val: The splits; `val` is empty if it does not exist and the caller did not require it.
        class_names: Names by class index, the same for both splits.
        multi_label: Whether several classes may be present at once, so that targets are multi-hot.
        preset: Settings for this kind of image.
        open_masked: Returns the images of a split ("train", "val") that have pixel masks, and the name of the list that
            says so, if the set has such a list.
    """

    name: str
    train: Manifest
    val: Manifest
    class_names: tuple[str, ...]
    multi_label: bool
    preset: Preset
    open_masked: Callable[[str], tuple[Manifest, str]] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def in_classes(self, known: Sequence[str], source: str, remedy: str) -> Dataset:
        """Return the same set, labelled with the class indices of a network.

        Args:
            known: The network's classes by index; they include all classes of this set.
            source: Their origin, for messages.
            remedy: What to do if one is missing, for messages.

        Raises:
            ValueError: A class is not among `known`.
        """
        if tuple(known) == self.class_names:
            return self
        places = positions(self.class_names, known, data=self.name, source=source, remedy=remedy)
        train, val = (manifest.in_classes(known, places) for manifest in (self.train, self.val))
        return dataclasses.replace(self, class_names=tuple(known), train=train, val=val)

    def as_multi_label(self) -> Dataset:
        """Return the same set with multi-hot targets."""
        train, val = (
            dataclasses.replace(manifest, targets=manifest.targets.as_multi_label(self.num_classes))
            for manifest in (self.train, self.val)
        )
        return dataclasses.replace(self, multi_label=True, train=train, val=val)
