"""Classifiers of torchvision (`torchvision/NAME`) and timm (`timm/NAME`), always without pretrained weights.

Nothing is downloaded here: `published_weights` handles the weights that the libraries publish. GoogLeNet and Inception
keep their auxiliary heads and torchvision's own input transform, which the published weights expect after the usual
normalisation.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType

from torch import Tensor, nn

from image_classification.channel_statistics import IMAGENET
from image_classification.config import nearest
from image_classification.extras import MissingPackageError, optional_import
from image_classification.models.registry import ArchInfo, ModelError, ModelSettingError
from image_classification.published_name import LIBRARIES

# Options of the libraries' builders that would read files, access the network or build no classifier.
_REFUSED_OPTIONS = (
    *("weights", "weights_backbone", "pretrained", "progress", "checkpoint_path", "pretrained_cfg"),
    *("pretrained_cfg_overlay", "pretrained_strict", "cache_dir", "features_only", "num_classes"),
    *("model_name", "scriptable", "no_jit"),
)
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def main_and_auxiliary_logits(output: object) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Split a classifier's output into its logits and those of its auxiliary heads.

    GoogLeNet and Inception return a named tuple while training (torchvision weights their auxiliary losses 0.3 and
    0.4); every other network, and these two in evaluation mode, returns one tensor.

    Args:
        output: A tensor (N, num_classes), or a tuple whose first member is the main one; members may be None.

    Returns:
        Main logits (N, num_classes), and a tuple of auxiliary logits, possibly empty.
    """
    if isinstance(output, Tensor):
        return output, ()
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0], tuple(aux for aux in output[1:] if aux is not None)
    raise TypeError(f"a classifier returns logits or a tuple of logits, not {type(output).__name__}")


def split_name(arch: str) -> tuple[str, str] | None:
    """Split `timm/resnet50d` into `("timm", "resnet50d")`; None if there is no such prefix."""
    library, _, name = arch.partition("/")
    return (library, name) if library in LIBRARIES and name else None


def import_library(library: str) -> ModuleType:
    """Import torchvision's `models` module or the timm package.

    Raises:
        ModelError: The library is not installed.
    """
    try:
        with optional_import():
            return importlib.import_module("torchvision.models" if library == "torchvision" else library)
    except MissingPackageError as error:
        raise ModelSettingError("arch", f"{library}/…", str(error)) from error


def library_names(library: str) -> list[str]:
    """Return the names of all classifiers of a library, without prefix."""
    models = import_library(library)
    return list(models.list_models(module=models) if library == "torchvision" else models.list_models())


def libraries_with(name: str) -> list[str]:
    """Return the prefixed names under which the installed libraries know `name`."""
    found = []
    for library in LIBRARIES:
        try:
            if name in library_names(library):
                found.append(f"{library}/{name}")
        except ModelError:  # the library is not installed, so it has no suggestions
            continue
    return found


def check_known(library: str, name: str) -> None:
    """Check that a library has a classifier of this name.

    Raises:
        ModelError: There is no such classifier; the most similar name is suggested.
    """
    known = (
        name in library_names(library) if library == "torchvision" else import_library("timm").is_model(name)
    )
    if not known:
        problem = f"{library} has no such network{nearest(name, library_names(library))}"
        raise ModelSettingError("arch", f"{library}/{name}", problem)


def is_no_classifier(library: str, name: str) -> bool:
    """Whether torchvision has a network of this name for another task: detection, segmentation, video."""
    if library != "torchvision" or name in library_names(library):
        return False
    return name in import_library(library).list_models()


def build_no_classifier(name: str, num_classes: int, options: Mapping[str, object]) -> nn.Module:
    """Build torchvision's network for detection, segmentation or video with fresh weights."""
    models = import_library("torchvision")
    arguments = {**options, "num_classes": num_classes}
    for setting in ("weights", "weights_backbone"):
        if setting in inspect.signature(models.get_model_builder(name)).parameters:
            arguments[setting] = None
    network: nn.Module = models.get_model(name, **arguments)
    return network


def external_info(library: str, name: str) -> ArchInfo:
    """Return the images that a library's network expects, from its metadata, without building or downloading
    anything.
    """
    check_known(library, name)
    if library == "timm":
        try:
            cfg = import_library("timm").get_pretrained_cfg(name)
        except RuntimeError as error:  # an unknown tag after the dot
            raise ModelSettingError("arch", f"timm/{name}", str(error)) from error
        size = int(cfg.input_size[-1])
        return ArchInfo(
            size, int(size / (cfg.crop_pct or 0.875)), cfg.mean, cfg.std, bool(cfg.fixed_input_size)
        )
    fixed = _torchvision_size_option(name) is not None
    weights = import_library("torchvision").get_model_weights(name)
    if not list(weights):
        return ArchInfo(224, 256, fixed_size=fixed)
    preset = weights.DEFAULT.transforms()
    mean = tuple(preset.mean or IMAGENET.mean)
    std = tuple(preset.std or IMAGENET.std)
    return ArchInfo(preset.crop_size[0], preset.resize_size[0], mean, std, fixed)


def _torchvision_size_option(name: str) -> str | None:
    """Return the keyword for the image size of a torchvision network; None for networks that accept any size."""
    if name.startswith("vit_"):
        return "image_size"
    return "input_size" if name.startswith("maxvit") else None


def build_external(
    library: str, name: str, num_classes: int, image_size: int | None, options: Mapping[str, object]
) -> nn.Module:
    """Build a library's classifier with fresh weights.

    Raises:
        ModelError: The name or an option is unknown, or the network is not made for this image size.
    """
    info = external_info(library, name)
    for option in options:
        if option in _REFUSED_OPTIONS:
            problem = (
                f"it does not take {option}={options[option]!r} here; weights come from a file and classes from the "
                "data"
            )
            raise ModelSettingError("arch", f"{library}/{name}", problem)
        if option == "widths":
            problem = "only our own networks have 'widths': prune this one, or load its structure"
            raise ModelSettingError("arch", f"{library}/{name}", problem)
    arguments = dict(options)
    try:
        if library == "timm":
            if image_size is not None and image_size != info.image_size and info.fixed_size:
                arguments.setdefault("img_size", image_size)
            timm_network: nn.Module = import_library("timm").create_model(
                name, pretrained=False, num_classes=num_classes, **arguments
            )
            return timm_network
        if name in _WITH_AUXILIARY_HEADS:
            arguments = {"aux_logits": True, "init_weights": True, "transform_input": True, **arguments}
        size = image_size or info.image_size
        keyword = _torchvision_size_option(name)
        if keyword is not None:
            arguments.setdefault(keyword, size if keyword == "image_size" else (size, size))
        models = import_library("torchvision")
        network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **arguments)
        return network
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        # The constructors' messages are terse and inconsistent, so the requested arguments are added.
        asked = f"num_classes={num_classes}, image_size={image_size}, options={dict(options)}"
        hint = ""
        if image_size not in (None, info.image_size):
            hint = f"; it is made for images of {info.image_size} pixels"
        reason = str(error) or f"{type(error).__name__} in {_raised_in(error)}"
        problem = f"cannot be built with {asked}: {reason}{hint}"
        raise ModelSettingError("arch", f"{library}/{name}", problem) from error


def build_pretrained(library: str, name: str, weights: object = None) -> nn.Module:
    """Build a library's classifier as `build_external` does, with weights published by the library.

    Args:
        library, name: Library and name of the network; timm's names include the weights.
        weights: torchvision's weights object.
    """
    if library == "timm":
        timm_network: nn.Module = import_library("timm").create_model(name, pretrained=True)
        return timm_network
    heads = {"aux_logits": True} if name in _WITH_AUXILIARY_HEADS else {}
    network: nn.Module = import_library("torchvision").get_model(name, weights=weights, **heads)
    return network


def _raised_in(error: BaseException) -> str:
    """Return the name of the function that raised `error`."""
    return (
        inspect.getinnerframes(error.__traceback__)[-1].function if error.__traceback__ else "its constructor"
    )
