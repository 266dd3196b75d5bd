"""The register of our own architectures: a decorator, a table and the errors that go with names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


class ModelError(ValueError):
    """A network that cannot be built as asked. The message names the flag, the value and the way out."""


@dataclasses.dataclass(frozen=True)
class ArchInfo:
    """The pictures that an architecture expects.

    Attributes:
        image_size: Side of the square network input in pixels.
        resize: Length of the shorter side before the centre crop, in pixels.
        mean: Per-channel mean of RGB in [0, 1].
        std: Per-channel standard deviation of RGB in [0, 1].
        fixed_size: The network is built for one image size and takes no other afterwards.
    """

    image_size: int
    resize: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    fixed_size: bool = False


IMAGENET = ArchInfo(224, 256)
CIFAR = ArchInfo(32, 32, CIFAR_MEAN, CIFAR_STD)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One entry of the register: how to build it, and for which pictures.

    `build` takes `num_classes`, `model_config`, `widths` (module name to number of channels, or None) and the
    architecture's own keyword arguments, whose names `options` lists.
    """

    name: str
    build: Callable[..., nn.Module]
    info: ArchInfo
    options: tuple[str, ...]
    min_image_size: int


_ARCHITECTURES: dict[str, Architecture] = {}


def register(
    name: str, info: ArchInfo, *, options: tuple[str, ...] = (), min_image_size: int = 1
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Decorator that enters a building function into the register under `name`.

    Args:
        name: For `--arch`; lower case with underscores.
        info: The pictures that the architecture expects.
        options: Keyword arguments of the function besides `num_classes`, `model_config` and `widths`.
        min_image_size: Smallest side of the input in pixels.
    """

    def enter(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        assert name not in _ARCHITECTURES, f"{name} is registered twice"
        _ARCHITECTURES[name] = Architecture(name, build, info, ("widths", *options), min_image_size)
        return build

    return enter


def own_names() -> list[str]:
    """Names of our own architectures, sorted."""
    return sorted(_ARCHITECTURES)


def find_own(name: str) -> Architecture | None:
    """The entry called `name`, or None. A hyphen stands for an underscore (`resnext101-32x4d`)."""
    return _ARCHITECTURES.get(name.replace("-", "_"))


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`; did you mean X?` with the most similar candidates, or an empty string when none is close."""
    matches = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def check_options(architecture: Architecture, options: Mapping[str, Any]) -> None:
    """Raise `ModelError` for a keyword argument that `architecture` does not have."""
    for name in options:
        if name not in architecture.options:
            raise ModelError(
                f"--arch {architecture.name} has no option {name!r} (it has "
                f"{', '.join(architecture.options)})"
                f"{nearest(name, architecture.options)}"
            )
