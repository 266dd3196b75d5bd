"""A data set: its two splits and the settings that its kind of image is usually trained with."""

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
    """Settings that go with a kind of image, where no flag says otherwise.

    Attributes:
        image_size: Side of the square that the network sees, in pixels.
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
        """What a network that is trained on such images carries with it."""
        return NetworkInput(self.image_size, self.resize, self.mean, self.std, self.geometry)

    def for_network(self, images: NetworkInput | None) -> Preset:
        """The same with the images that a network was trained for, where that is known."""
        return self if images is None else dataclasses.replace(self, **vars(images))


SMALL_SIDE = 64  # pixels: sets of images up to this are trained at their own size
IMAGENET_NUM_TRAIN = 1_281_167
IMAGENET_NUM_VAL = 50_000
"""Lengths of an epoch and of a validation where there is no data set."""

IMAGENET_PRESET = Preset(224, 256, *IMAGENET, "imagenet")
CIFAR10_PRESET = Preset(32, 32, *CIFAR10, "cifar", batch_size=128)
CIFAR100_PRESET = Preset(32, 32, *CIFAR100, "cifar", batch_size=128)


def preset_for(train: Manifest) -> Preset:
    """Choose by the images: all 32 × 32 is CIFAR (by the number of classes which one), small ones keep their size.

    Small: at most a twentieth of the images has a side above 64 pixels.
    """
    if not len(train):
        return IMAGENET_PRESET
    if (train.heights == 32).all() and (train.widths == 32).all():
        return CIFAR100_PRESET if len(train.class_names) > 10 else CIFAR10_PRESET
    longer = np.maximum(train.heights, train.widths)
    shorter = np.minimum(train.heights, train.widths)
    if np.quantile(longer, 0.95) > SMALL_SIDE:
        return IMAGENET_PRESET
    # Networks halve their maps several times: a multiple of 4, and not below half of CIFAR's.
    size = max(16, 4 * math.ceil(float(np.median(shorter)) / 4))
    return Preset(size, size, *IMAGENET, "cifar", batch_size=128)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Train and validation split of one data set.

    Attributes:
        name: What the set is called in reports.
        train, val: The splits; `val` is empty where the caller did not require it and there is none.
        class_names: Names by class index, the same for both splits.
        multi_label: Whether several classes may be present at once, so that targets are multi-hot.
        preset: Settings for this kind of image.
        open_masked: Gives the images of a split ("train", "val") that have pixel masks, where the set has a list of
            them, and the list's name.
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
        """The same set with labels by the class indices of a network.

        Args:
            known: The network's classes by index; all of this set's are among them.
            source: Where they come from, for messages.
            remedy: How to go on where one is not, for messages.

        Raises:
            ValueError: A class is unknown there.
        """
        if tuple(known) == self.class_names:
            return self
        places = positions(self.class_names, known, data=self.name, source=source, remedy=remedy)
        train, val = (manifest.in_classes(known, places) for manifest in (self.train, self.val))
        return dataclasses.replace(self, class_names=tuple(known), train=train, val=val)

    def as_multi_label(self) -> Dataset:
        """The same set with multi-hot targets."""
        train, val = (
            dataclasses.replace(manifest, targets=manifest.targets.as_multi_label(self.num_classes))
            for manifest in (self.train, self.val)
        )
        return dataclasses.replace(self, multi_label=True, train=train, val=val)
