"""Networks by name: `create_model`, `model_names`, `arch_info`, and what a network remembers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from image_classification.models import external, mobilenetv2, resnet, resnet_cifar, vgg
from image_classification.models.registry import (
    ArchInfo,
    ModelError,
    check_options,
    find_own,
    nearest,
    own_names,
)

_ATTRIBUTE = "lucidprune_identity"
# The families of our own networks; importing them entered their members into the register.
FAMILIES = (resnet, resnet_cifar, vgg, mobilenetv2)


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """What `create_model` was called with: enough to build the same architecture again."""

    arch: str
    model_config: str | None = None
    num_classes: int = 1000
    image_size: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> nn.Module:
        """The architecture, unpruned, with fresh weights."""
        return create_model(
            self.arch,
            num_classes=self.num_classes,
            model_config=self.model_config,
            image_size=self.image_size,
            **self.options,
        )


def create_model(
    arch: str,
    *,
    num_classes: int = 1000,
    model_config: str | None = None,
    image_size: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a classifier with fresh weights.

    Args:
        arch: One of our own (`model_names()`), `torchvision/NAME` or `timm/NAME`.
        num_classes: Number of logits.
        model_config: Initialisation of our own networks: classic (default), fanin, grp-fanin, grp-fanout.
        image_size: Side of the input in pixels; only networks of a fixed size need it. None: the
        architecture's. **kwargs: Options of the architecture. Our own have `widths` (module name to number
        of output channels);
            CIFAR ResNets have `shortcut` ("A" or "B"). Others go to the library's constructor.

    Returns:
        The network, in training mode. It remembers these arguments (`identity_of`), also in copies; the
        state dict does not change by it.

    Raises:
        ModelError: Unknown architecture or option, or a combination that cannot be built.
    """
    _check_count("--num-classes", num_classes)
    if image_size is not None:
        _check_count("--image-size", image_size)
    model = _build(arch, num_classes, model_config, image_size, kwargs)
    identity = ModelIdentity(arch, model_config, num_classes, image_size, kwargs)
    setattr(model, _ATTRIBUTE, identity)
    return model


def _check_count(flag: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{flag} needs a whole number ≥ 1, not {value!r}")


def _build(
    arch: str, num_classes: int, model_config: str | None, image_size: int | None, options: dict[str, Any]
) -> nn.Module:
    named = external.split_name(arch)
    if named is not None:
        if model_config is not None:
            raise ModelError(
                f"-c/--model-config {model_config} applies to our own networks; --arch {arch} has the "
                "initialisation of its library: leave -c out"
            )
        return external.build_external(*named, num_classes, image_size, options)
    architecture = find_own(arch)
    if architecture is None:
        raise _unknown(arch)
    check_options(architecture, options)
    if image_size is not None and image_size < architecture.min_image_size:
        raise ModelError(
            f"--image-size {image_size} is too small for --arch {arch}: it needs at least "
            f"{architecture.min_image_size}"
        )
    return architecture.build(num_classes=num_classes, model_config=model_config, **options)


def _unknown(arch: str) -> ModelError:
    elsewhere = external.libraries_with(arch)
    if elsewhere:
        return ModelError(
            f"--arch {arch} is none of our own networks; write --arch {' or --arch '.join(elsewhere)}"
        )
    similar = nearest(arch, own_names())
    names = ", ".join(name for name in own_names() if name[-3:-1] != "_x")
    return ModelError(
        f"--arch {arch} is unknown{similar or f'; own networks: {names}'} "
        "(any classifier of torchvision is torchvision/NAME, any of timm timm/NAME)"
    )


def model_names() -> list[str]:
    """Names of our own architectures, sorted. torchvision's and timm's are available by prefix besides."""
    return own_names()


def arch_info(arch: str) -> ArchInfo:
    """Image size, resize, mean and standard deviation that `arch` expects; builds and downloads nothing.

    Raises:
        ModelError: The architecture is unknown.
    """
    named = external.split_name(arch)
    if named is not None:
        return external.external_info(*named)
    architecture = find_own(arch)
    if architecture is None:
        raise _unknown(arch)
    return architecture.info


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel, AveragedModel, `torch.compile`."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # compiled
            model = inner
        else:
            return model


def identity_of(model: nn.Module) -> ModelIdentity | None:
    """What a network was built with (through any wrapper); None when `create_model` did not build it."""
    return getattr(unwrap(model), _ATTRIBUTE, None)
