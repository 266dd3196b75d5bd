"""Classifiers of torchvision (`torchvision/NAME`) and timm (`timm/NAME`), always without pretrained weights.

Nothing is downloaded: weights come from a file (`--pretrained-weights`). GoogLeNet and Inception keep their
auxiliary heads and torchvision's own input transform, which its published weights expect after the usual
normalisation.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torchvision
from torch import Tensor, nn

from image_classification.models.registry import IMAGENET_MEAN, IMAGENET_STD, ArchInfo, ModelError, nearest

LIBRARIES = ("torchvision", "timm")
# Options of the libraries' builders that would read files, reach for the network or build no classifier.
_REFUSED_OPTIONS = (
    *("weights", "weights_backbone", "pretrained", "progress", "checkpoint_path", "pretrained_cfg"),
    *(
        "pretrained_cfg_overlay",
        "pretrained_strict",
        "cache_dir",
        "features_only",
        "num_classes",
        "model_name",
    ),
    *("scriptable", "no_jit"),
)
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def main_and_auxiliary_logits(output: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Split what a classifier returns into its logits and those of its auxiliary heads.

    GoogLeNet and Inception return a named tuple while training (torchvision weights their auxiliary losses
    0.3 and 0.4); every other network, and these two in evaluation mode, returns one tensor.

    Args:
        output: A tensor (N, num_classes), or a tuple whose first member is the main one; members may be None.

    Returns:
        Main logits (N, num_classes), and a tuple of auxiliary logits, empty where there are none.
    """
    if isinstance(output, Tensor):
        return output, ()
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0], tuple(aux for aux in output[1:] if aux is not None)
    raise TypeError(f"a classifier returns logits or a tuple of logits, not {type(output).__name__}")


def split_name(arch: str) -> tuple[str, str] | None:
    """`("timm", "resnet50d")` of `timm/resnet50d`; None when there is no such prefix."""
    library, _, name = arch.partition("/")
    return (library, name) if library in LIBRARIES and name else None


def import_timm() -> ModuleType:
    """The timm package.

    Raises:
        ModelError: It is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            "--arch timm/… needs the timm package: pip install 'lucidprune[timm]' (or pip install timm)"
        ) from error
    return timm


def library_names(library: str) -> list[str]:
    """Names of all classifiers of a library, without prefix."""
    if library == "torchvision":
        return torchvision.models.list_models(module=torchvision.models)
    return list(import_timm().list_models())


def libraries_with(name: str) -> list[str]:
    """Prefixed names under which the installed libraries know `name`."""
    found = []
    for library in LIBRARIES:
        try:
            if name in library_names(library):
                found.append(f"{library}/{name}")
        except ModelError:  # timm is not installed: nothing to suggest from it
            continue
    return found


def _check_known(library: str, name: str) -> None:
    known = name in library_names(library) if library == "torchvision" else import_timm().is_model(name)
    if not known:
        raise ModelError(
            f"--arch {library}/{name}: {library} has no such network{nearest(name, library_names(library))}"
        )


def external_info(library: str, name: str) -> ArchInfo:
    """The pictures that a library's network expects, from its metadata; nothing is built or downloaded."""
    _check_known(library, name)
    if library == "timm":
        try:
            cfg = import_timm().get_pretrained_cfg(name)
        except RuntimeError as error:  # an unknown tag behind the dot
            raise ModelError(f"--arch timm/{name}: {error}") from error
        size = int(cfg.input_size[-1])
        return ArchInfo(
            size, int(size / (cfg.crop_pct or 0.875)), cfg.mean, cfg.std, bool(cfg.fixed_input_size)
        )
    fixed = _torchvision_size_option(name) is not None
    weights = list(torchvision.models.get_model_weights(name))
    if not weights:
        return ArchInfo(224, 256, fixed_size=fixed)
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    mean, std = tuple(preset.mean or IMAGENET_MEAN), tuple(preset.std or IMAGENET_STD)
    return ArchInfo(preset.crop_size[0], preset.resize_size[0], mean, std, fixed)


def _torchvision_size_option(name: str) -> str | None:
    """The keyword by which a torchvision network is told its image size; None for networks that take any."""
    if name.startswith("vit_"):
        return "image_size"
    return "input_size" if name.startswith("maxvit") else None


def build_external(
    library: str, name: str, num_classes: int, image_size: int | None, options: Mapping[str, Any]
) -> nn.Module:
    """Build a library's classifier with fresh weights.

    Raises:
        ModelError: Unknown name or option, or an image size that the network is not made for.
    """
    info = external_info(library, name)
    for option in options:
        if option in _REFUSED_OPTIONS:
            raise ModelError(
                f"--arch {library}/{name} does not take {option}={options[option]!r} here; weights come "
                "from a file (--pretrained-weights) and classes from the data (--num-classes)"
            )
        if option == "widths":
            raise ModelError(
                f"--arch {library}/{name} has no 'widths': only our own networks are built narrower; "
                "prune this one, or load its structure"
            )
    arguments = dict(options)
    try:
        if library == "timm":
            if image_size is not None and image_size != info.image_size and info.fixed_size:
                arguments.setdefault("img_size", image_size)
            return import_timm().create_model(name, pretrained=False, num_classes=num_classes, **arguments)
        if name in _WITH_AUXILIARY_HEADS:
            arguments = {"aux_logits": True, "init_weights": True, "transform_input": True, **arguments}
        size, keyword = image_size or info.image_size, _torchvision_size_option(name)
        if keyword is not None:
            arguments.setdefault(keyword, size if keyword == "image_size" else (size, size))
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        # The constructors say little and differently; name what was asked for beside their words.
        asked = f"num_classes={num_classes}, image_size={image_size}, options={dict(options)}"
        hint = (
            f"; it is made for --image-size {info.image_size}"
            if image_size not in (None, info.image_size)
            else ""
        )
        reason = str(error) or f"{type(error).__name__} in {_raised_in(error)}"
        raise ModelError(f"--arch {library}/{name} cannot be built with {asked}: {reason}{hint}") from error


def _raised_in(error: BaseException) -> str:
    """Name of the function that raised `error`."""
    return (
        inspect.getinnerframes(error.__traceback__)[-1].function if error.__traceback__ else "its constructor"
    )
