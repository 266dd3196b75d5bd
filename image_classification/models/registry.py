"""Registry of LucidPrune's own architectures: a decorator, a table and the errors for names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from torch import nn

from image_classification import channel_statistics
from image_classification.channel_statistics import Triple
from image_classification.config import SettingError, nearest
from image_classification.network_input import EvaluationGeometry, NetworkInput

#: Default number of classes: ImageNet's.
IMAGENET_CLASSES = 1000
#: Function that builds a network.
Builder = Callable[..., nn.Module]


class ModelError(ValueError):
    """A network cannot be built as requested. The message says what is wrong and what to do."""


class ModelSettingError(SettingError, ModelError):
    """An argument with which no network can be built, such as an unknown `arch`."""


@dataclasses.dataclass(frozen=True)
class ArchInfo:
    """The images that an architecture expects.

    Attributes:
        image_size: Side of the square network input in pixels.
        resize: Length of the shorter side before the centre crop, in pixels.
        mean: Per-channel mean of RGB in [0, 1].
        std: Per-channel standard deviation of RGB in [0, 1].
        fixed_size: Whether the network is built for one image size and accepts no other afterwards.
        geometry: "crop", or "whole" if the whole image is stretched to the square.
    """

    image_size: int
    resize: int
    mean: Triple = channel_statistics.IMAGENET.mean
    std: Triple = channel_statistics.IMAGENET.std
    fixed_size: bool = False
    geometry: EvaluationGeometry = NetworkInput.geometry

    @property
    def network_input(self) -> NetworkInput:
        """The same as the input description carried by a network."""
        return NetworkInput(self.image_size, self.resize, self.mean, self.std, self.geometry)


IMAGENET = ArchInfo(224, 256)
CIFAR = ArchInfo(32, 32, *channel_statistics.CIFAR10)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One entry of the registry: how to build the architecture, and its images.

    `build` takes `num_classes`, `model_config`, `widths` (module name to number of channels, or None) and the
    architecture's own keyword arguments, whose names `options` lists.
    """

    name: str
    build: Builder
    info: ArchInfo
    options: tuple[str, ...]
    min_image_size: int


ARCHITECTURES: dict[str, Architecture] = {}


def register(
    name: str, info: ArchInfo, *, options: tuple[str, ...] = (), min_image_size: int = 1
) -> Callable[[Builder], Builder]:
    """Decorator that registers a building function under `name`.

    Args:
        name: Name for `create_model`, in lower case with underscores.
        info: The images that the architecture expects.
        options: Keyword arguments of the function besides `num_classes`, `model_config` and `widths`.
        min_image_size: Smallest side of the input in pixels.
    """

    def enter(build: Builder) -> Builder:
        assert name not in ARCHITECTURES, f"{name} is registered twice"
        ARCHITECTURES[name] = Architecture(name, build, info, ("widths", *options), min_image_size)
        return build

    return enter


def own_names() -> list[str]:
    """Return the names of LucidPrune's own architectures, sorted."""
    return sorted(ARCHITECTURES)


def find_own(name: str) -> Architecture | None:
    """Return the entry called `name`, or None. A hyphen is treated as an underscore (`resnext101-32x4d`)."""
    return ARCHITECTURES.get(name.replace("-", "_"))


def check_options(architecture: Architecture, options: Iterable[str]) -> None:
    """Raise `ModelSettingError` for a keyword argument that `architecture` does not have."""
    for name in options:
        if name not in architecture.options:
            raise ModelSettingError(
                "arch",
                architecture.name,
                f"it has no option {name!r} but {', '.join(architecture.options)}"
                f"{nearest(name, architecture.options)}",
            )
