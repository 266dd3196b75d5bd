"""Builds the network that a weights file needs, by its architecture, number of classes and widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from image_classification.models.factory import create_model, remember_class_names
from image_classification.models.fitting_weights import apply_weights, head_tensors, without_wrapper
from image_classification.models.meta_device import Factory, building_on, on_meta
from image_classification.models.own_code import check_trusted
from image_classification.models.registry import IMAGENET_CLASSES
from image_classification.models.structure import Structure
from image_classification.models.structure_build import build_from_structure
from image_classification.models.weights import LoadedWeights, load_weights
from image_classification.models.weights_reading import NEW_HEAD, WeightsError
from image_classification.plain_data import PlainMapping, PlainValue


def model_for_weights(
    arch: str | None,
    path: str | Path,
    *,
    num_classes: int | None = None,
    model_config: str | None = None,
    image_size: int | None = None,
    ema: bool | None = None,
    new_head: bool = False,
    factory: Factory | None = None,
    device: torch.device | str | None = None,
    **kwargs: PlainValue,
) -> nn.Module:
    """Build the network that a weights file belongs to, pruned or not, and load it.

    Args:
        arch: Architecture; None for the one named in a LucidPrune checkpoint.
        path: Weights file, see `load_weights`.
        num_classes: Number of classes; None for the file's (ImageNet's if not recorded).
        model_config: As in `create_model`; by default a checkpoint's own.
        image_size: As in `create_model`; by default a checkpoint's own.
        kwargs: As in `create_model`; by default a checkpoint's own.
        ema: Whether to load the averaged weights; None to load them if a LucidPrune checkpoint has them.
        new_head: Create a new classifier, for other classes.
        factory: Builds the unpruned network of a user-defined class (with arch None).
        device: Device to build it on.

    Raises:
        FileNotFoundError, WeightsError, ModelError: The file is missing or unusable, or does not fit.
    """
    weights = load_weights(path, ema=ema)
    if weights.structure is None:
        with building_on(device):
            model = _built_unpruned(weights, arch, factory, num_classes, model_config, image_size, kwargs)
    else:
        structure = _asked_structure(weights.structure, weights.path, arch, num_classes, new_head, kwargs)
        if model_config is not None and structure.arch is not None:
            structure = dataclasses.replace(structure, model_config=model_config)
        if image_size is not None and structure.arch is not None:
            structure = dataclasses.replace(structure, image_size=image_size)
        _check_large_enough(weights.state, structure, weights.path, new_head)
        model = build_from_structure(structure, factory=factory, device=device)
    apply_weights(model, weights, new_head=new_head)
    if not new_head:
        remember_class_names(model, weights.class_names)
    return model


def _built_unpruned(
    weights: LoadedWeights,
    arch: str | None,
    factory: Factory | None,
    num_classes: int | None,
    model_config: str | None,
    image_size: int | None,
    options: PlainMapping,
) -> nn.Module:
    """Build the network of a file without a structure, by the architecture named by the caller or the file."""
    if factory is None and arch is None and weights.arch is None:
        raise WeightsError(f"{weights.path} does not say its architecture: give `arch`")
    if arch is None and weights.arch is not None:
        check_trusted(weights.arch)
    if factory is not None:
        return factory()
    if num_classes is None:
        num_classes = _held_classes(weights, arch, options)
    return create_model(
        arch or str(weights.arch),
        num_classes=num_classes,
        model_config=model_config,
        image_size=image_size,
        **options,
    )


def _held_classes(weights: LoadedWeights, arch: str | None, options: PlainMapping) -> int:
    """Return a plain state dict's number of classes, by the shapes of its classifier; ImageNet's if they do not
    tell.
    """
    model = on_meta(lambda: create_model(arch or str(weights.arch), num_classes=IMAGENET_CLASSES, **options))
    state = without_wrapper(weights.state, model.state_dict())
    sizes = {state[name].shape[0] for name in head_tensors(model) if name in state and state[name].dim()}
    return sizes.pop() if len(sizes) == 1 else IMAGENET_CLASSES


def _asked_structure(
    structure: Structure,
    path: Path,
    arch: str | None,
    num_classes: int | None,
    new_head: bool,
    options: PlainMapping,
) -> Structure:
    """Return the file's structure if it matches the request; with a new head, adapted to other classes."""
    if arch is not None and structure.arch != arch:
        held = structure.arch or "a class of your own (give its factory)"
        raise WeightsError(f"{path} holds {held}, not `arch` {arch}: give `arch` {structure.arch}")
    for name, value in options.items():
        if structure.options.get(name) != value:
            raise WeightsError(
                f"{path} was built with {name}={structure.options.get(name)!r}, not {value!r}: leave the "
                "option out"
            )
    if num_classes is None or structure.num_classes in (None, num_classes):
        return structure
    if not new_head:
        raise WeightsError(
            f"{path} was trained for {structure.num_classes} classes, not {num_classes}: give `num_classes` "
            f"{structure.num_classes} to keep its classifier{NEW_HEAD['new_head']}",
            NEW_HEAD,
        )
    return structure.with_num_classes(num_classes)


def _check_large_enough(
    state: Mapping[str, Tensor], structure: Structure, path: Path, new_head: bool
) -> None:
    """Check that structure and tensors of a file agree, before anything is allocated on the structure's authority."""
    for name, tensor in state.items():
        if not new_head and structure.shapes.get(name) != list(tensor.shape):
            raise WeightsError(
                f"{path} contradicts itself at module {name.rpartition('.')[0]!r}: its structure gives {name!r} "
                f"shape {structure.shapes.get(name)}, its tensors {list(tensor.shape)}"
            )
