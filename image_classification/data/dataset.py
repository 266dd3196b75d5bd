"""A data set: its two splits and the settings that its kind of picture is usually trained with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from image_classification.data.manifest import Manifest

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preset:
    """Settings that go with a kind of picture, where no flag says otherwise.

    Attributes:
        image_size: Side of the square that the network sees, in pixels.
        resize: Short side that validation pictures are resized to before the centre crop.
        mean, std: Normalisation per colour channel, of values in [0, 1].
        augmentation: "imagenet" (random-resized crop and flip) or "cifar" (pad by 4, crop, flip).
        crop_scale: Share of the picture's area that a random-resized crop covers, lowest and highest.
        batch_size: Pictures per process and step.
    """

    image_size: int
    resize: int
    mean: Triple
    std: Triple
    augmentation: Literal["imagenet", "cifar"]
    crop_scale: tuple[float, float] = (0.08, 1.0)
    batch_size: int = 256


IMAGENET_PRESET = Preset(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "imagenet")
CIFAR10_PRESET = Preset(32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "cifar", batch_size=128)
CIFAR100_PRESET = Preset(32, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "cifar", batch_size=128)


def preset_for(train: Manifest) -> Preset:
    """Choose by the pictures: all 32 × 32 is CIFAR (by the number of classes which one), anything else ImageNet."""
    if len(train) and (train.heights == 32).all() and (train.widths == 32).all():
        return CIFAR100_PRESET if len(train.class_names) > 10 else CIFAR10_PRESET
    return IMAGENET_PRESET


@dataclass(frozen=True, eq=False)
class Dataset:
    """Train and validation split of one data set.

    Attributes:
        name: What the set is called in reports.
        train, val: The splits; `val` is empty where the caller did not require it and there is none.
        class_names: Names by class index, the same for both splits.
        multi_label: Whether several classes may be present at once, so that targets are multi-hot.
        preset: Settings for this kind of picture.
    """

    name: str
    train: Manifest
    val: Manifest
    class_names: tuple[str, ...]
    multi_label: bool
    preset: Preset

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def as_multi_label(self) -> Dataset:
        """The same set with multi-hot targets."""
        train, val = (
            dataclasses.replace(manifest, targets=manifest.targets.as_multi_label(self.num_classes))
            for manifest in (self.train, self.val)
        )
        return dataclasses.replace(self, multi_label=True, train=train, val=val)
