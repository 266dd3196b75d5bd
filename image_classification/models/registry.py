"""The register of our own architectures: a decorator, a table and the errors that go with names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from torch import nn

from image_classification import channel_statistics
from image_classification.channel_statistics import Triple
from image_classification.config import SettingError, nearest
from image_classification.network_input import EvaluationGeometry, NetworkInput

#: Classes of ImageNet: those of a network where nothing else is said.
IMAGENET_CLASSES = 1000
#: What makes a network.
Builder = Callable[..., nn.Module]


class ModelError(ValueError):
    """A network that cannot be built as asked. The message says what is wrong and what to do."""


class ModelSettingError(SettingError, ModelError):
    """An argument that no network can be built with, such as an unknown `arch`."""


@dataclasses.dataclass(frozen=True)
class ArchInfo:
    """The images that an architecture expects.

    Attributes:
        image_size: Side of the square network input in pixels.
        resize: Length of the shorter side before the centre crop, in pixels.
        mean: Per-channel mean of RGB in [0, 1].
        std: Per-channel standard deviation of RGB in [0, 1].
        fixed_size: The network is built for one image size and takes no other afterwards.
        geometry: "crop", or "whole" where the whole image is stretched to the square.
    """

    image_size: int
    resize: int
    mean: Triple = channel_statistics.IMAGENET.mean
    std: Triple = channel_statistics.IMAGENET.std
    fixed_size: bool = False
    geometry: EvaluationGeometry = NetworkInput.geometry

    @property
    def network_input(self) -> NetworkInput:
        """The same as a network carries it with it."""
        return NetworkInput(self.image_size, self.resize, self.mean, self.std, self.geometry)


IMAGENET = ArchInfo(224, 256)
CIFAR = ArchInfo(32, 32, *channel_statistics.CIFAR10)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One entry of the register: how to build it, and for which images.

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
        name: For `create_model`; lower case with underscores.
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
    """Names of our own architectures, sorted."""
    return sorted(ARCHITECTURES)


def find_own(name: str) -> Architecture | None:
    """The entry called `name`, or None. A hyphen stands for an underscore (`resnext101-32x4d`)."""
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
