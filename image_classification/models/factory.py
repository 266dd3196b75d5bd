"""Networks by name: `create_model`, `model_names`, `arch_info`, and the records attached to a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from image_classification.config import nearest
from image_classification.models import external, mobilenetv2, mobilenetv2_isp, resnet, resnet_cifar, vgg
from image_classification.models.batch_norms import architecture_options, set_batch_norms
from image_classification.models.own_code import build_own, check_trusted, own_info
from image_classification.models.registry import (
    IMAGENET_CLASSES,
    ArchInfo,
    ModelSettingError,
    check_options,
    find_own,
    own_names,
)
from image_classification.network_input import NetworkInput
from image_classification.plain_data import Plain, PlainValue
from image_classification.trusted_code import is_own_code, trust

_ATTRIBUTE = "lucidprune_identity"
_INPUT_ATTRIBUTE = "lucidprune_input"
_CLASS_NAMES = "lucidprune_class_names"
# The families of LucidPrune's own networks, which register their members on import.
FAMILIES = (resnet, resnet_cifar, vgg, mobilenetv2, mobilenetv2_isp)


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """The arguments of `create_model`: enough to build the same architecture again."""

    arch: str
    model_config: str | None = None
    num_classes: int = IMAGENET_CLASSES
    image_size: int | None = None
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def build(self) -> nn.Module:
        """Build the unpruned architecture with fresh weights. Unlike in `create_model`, it need not be a classifier."""
        check_trusted(self.arch)
        named = external.split_name(self.arch)
        if named is not None and external.is_no_classifier(*named):
            model = external.build_no_classifier(
                named[1], self.num_classes, architecture_options(self.options)
            )
            set_batch_norms(model, self.options)
            remember_identity(model, self)
            return model
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
    num_classes: int = IMAGENET_CLASSES,
    model_config: str | None = None,
    image_size: int | None = None,
    **kwargs: PlainValue,
) -> nn.Module:
    """Build a classifier with fresh weights.

    Args:
        arch: One of LucidPrune's own (`model_names()`), `torchvision/NAME`, `timm/NAME`, or `package.module:Callable`.
        num_classes: Number of logits.
        model_config: Initialisation of LucidPrune's own networks: classic (default), fanin, grp-fanin, grp-fanout.
        image_size: Side of the input in pixels; needed only by networks of a fixed size. None for the architecture's.
        kwargs: Options of the architecture. LucidPrune's own have `widths` (module name to number of output channels);
            CIFAR ResNets have `shortcut` ("A", "B" or "pooled"). Others go to the library's constructor. All networks
            with batch norms have `bn_momentum` and `bn_eps`.

    Returns:
        The network, in training mode. It records these arguments (`identity_of`), also in copies; the state dict is not
            affected.

    Raises:
        ModelError: The architecture or an option is unknown, or the combination cannot be built.
    """
    _check_count("num_classes", num_classes)
    if image_size is not None:
        _check_count("image_size", image_size)
    trust([arch])
    model = _build(arch, num_classes, model_config, image_size, architecture_options(kwargs))
    set_batch_norms(model, kwargs)
    identity = ModelIdentity(arch, model_config, num_classes, image_size, kwargs)
    remember_identity(model, identity)
    return model


def remember_identity(model: nn.Module, identity: ModelIdentity) -> None:
    """Record on a network how to build it; copies keep the record, and the state dict is not affected."""
    setattr(model, _ATTRIBUTE, identity)


def remember_class_names(model: nn.Module, names: Sequence[str] | None) -> None:
    """Record on a network the class names of its logits, by class index; copies and files keep the record."""
    setattr(unwrap(model), _CLASS_NAMES, None if names is None else tuple(names))


def class_names_of(model: nn.Module) -> tuple[str, ...] | None:
    """Return a network's class names by class index (through any wrapper); None if unknown."""
    return getattr(unwrap(model), _CLASS_NAMES, None)


def _check_count(setting: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelSettingError(setting, value, "give a whole number, at least 1")


def _build(
    arch: str, num_classes: int, model_config: str | None, image_size: int | None, options: Plain
) -> nn.Module:
    named = external.split_name(arch)
    if named is not None or is_own_code(arch):
        if model_config is not None:
            problem = f"it is for our own networks; {arch} has an initialisation of its own: leave it out"
            raise ModelSettingError("model_config", model_config, problem)
        if named is None:
            return build_own(arch, num_classes, image_size, options)
        return external.build_external(*named, num_classes, image_size, options)
    architecture = find_own(arch)
    if architecture is None:
        raise _unknown(arch)
    check_options(architecture, options)
    if image_size is not None and image_size < architecture.min_image_size:
        problem = f"too small for {arch}, which needs at least {architecture.min_image_size}"
        raise ModelSettingError("image_size", image_size, problem)
    return architecture.build(num_classes=num_classes, model_config=model_config, **options)


def _unknown(arch: str) -> ModelSettingError:
    elsewhere = external.libraries_with(arch)
    if elsewhere:
        return ModelSettingError("arch", arch, f"none of our own networks; write {' or '.join(elsewhere)}")
    hint = nearest(arch, own_names())
    if not hint:
        names = [name for name in own_names() if name[-3:-1] != "_x"]
        hint = f"; own networks: {', '.join(names)}"
    libraries = "any classifier of torchvision is torchvision/NAME, any of timm timm/NAME, your own package.module:Name"
    return ModelSettingError("arch", arch, f"unknown{hint} ({libraries})")


def model_names() -> list[str]:
    """Return the names of LucidPrune's own architectures, sorted. torchvision's and timm's are available by prefix."""
    return own_names()


def arch_info(arch: str) -> ArchInfo:
    """Return the image size, resize, mean and standard deviation that `arch` expects, without building anything.

    Raises:
        ModelError: The architecture is unknown.
    """
    named = external.split_name(arch)
    if named is not None:
        return external.external_info(*named)
    if is_own_code(arch):
        return own_info(arch)
    architecture = find_own(arch)
    if architecture is None:
        raise _unknown(arch)
    return architecture.info


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel, AveragedModel or `torch.compile`."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # compiled
            model = inner
        else:
            return model


def identity_of(model: nn.Module) -> ModelIdentity | None:
    """Return the record of how a network was built (through any wrapper); None if `create_model` did not build it."""
    return getattr(unwrap(model), _ATTRIBUTE, None)


def remember_input(model: nn.Module, images: NetworkInput | None) -> None:
    """Record on a network the images that it was trained for; copies and files keep the record."""
    setattr(unwrap(model), _INPUT_ATTRIBUTE, images)


def input_of(model: nn.Module) -> NetworkInput | None:
    """Return the images that a network was trained for (through any wrapper); None if unknown."""
    return getattr(unwrap(model), _INPUT_ATTRIBUTE, None)
