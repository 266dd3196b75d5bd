"""Pruned networks as files: architecture by name, widths as plain data, tensors. No pickled modules.

The structure itself (the differences from the architecture built by name) is handled by
`image_classification.models.structure`, so that a pruned network loads without this package. Differing attributes are
integers: `out_channels`, `groups`, `normalized_shape`, and the hidden widths found by the engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from image_classification.checkpoint import save_atomically
from image_classification.checkpoint_format import is_ours, sealed
from image_classification.config import SettingError
from image_classification.models.factory import (
    class_names_of,
    remember_class_names,
    remember_identity,
    unwrap,
)
from image_classification.models.fitting_weights import load_exactly
from image_classification.models.modes import modes_restored
from image_classification.models.recognising import identity_of_builder
from image_classification.models.structure_build import build_from_structure
from image_classification.models.structure_capture import capture_structure
from image_classification.models.weights import read_safely, structure_in, takes_average
from image_classification.plain_data import Plain, PlainValue


def pruned_state(
    model: nn.Module,
    *,
    factory: Callable[[], nn.Module] | None = None,
    builder: Callable[..., nn.Module] | None = None,
    **extra: PlainValue,
) -> Plain:
    """Return the content that `save_pruned` writes: only plain data and tensors.

    Args:
        model: The network, bare or wrapped.
        factory: Builds the unpruned network, for a user-defined class; it is also needed to load.
        builder: A function of torchvision or timm with its arguments, such as
            `functools.partial(torchvision.models.resnet50, num_classes=10)`: the file records it and needs no factory.
                Only for a network whose builder was not recognised.
        extra: Additional entries of plain data or tensors.

    Raises:
        SettingError: The builder is not one of torchvision's or timm's.
    """
    if builder is not None:
        identity = identity_of_builder(builder)
        if identity is None:
            raise SettingError(
                "builder",
                builder,
                "only functions of torchvision and timm are found again by name: give factory=",
            )
        remember_identity(unwrap(model), identity)
    structure = capture_structure(model, factory=factory)
    tensors = _tensors_in_training(unwrap(model))
    names = class_names_of(model)
    return sealed(
        {
            **({} if names is None else {"class_names": list(names)}),
            **extra,
            "arch": structure.arch,
            "structure": structure.to_plain(),
            "state_dict": tensors,
        }
    )


def _tensors_in_training(model: nn.Module) -> OrderedDict[str, torch.Tensor]:
    """Return the state dict of training mode, the mode that a loaded network is in when it receives the tensors.

    A layer that merges a low-rank update into its weight in evaluation mode would otherwise merge it a second time.
    """
    if all(type(module).train is nn.Module.train for module in model.modules()):
        saved = model.state_dict()
        tensors = OrderedDict((name, tensor.detach().cpu()) for name, tensor in saved.items())
    else:
        with modes_restored(model):
            model.train()
            saved = model.state_dict()
            tensors = OrderedDict((name, tensor.detach().cpu().clone()) for name, tensor in saved.items())
    tensors._metadata = getattr(saved, "_metadata", None)  # type: ignore[attr-defined]  # versions of modules
    return tensors


def save_pruned(
    path: str | Path,
    model: nn.Module,
    *,
    factory: Callable[[], nn.Module] | None = None,
    builder: Callable[..., nn.Module] | None = None,
    **extra: PlainValue,
) -> None:
    """Write a pruned network to a file, atomically.

    Args:
        path: The file.
        model: As `pruned_state`.
        factory: As `pruned_state`.
        builder: As `pruned_state`.
        extra: As `pruned_state`.

    Raises:
        StructureError: The network cannot be rebuilt from its architecture's name.
    """
    save_atomically(pruned_state(model, factory=factory, builder=builder, **extra), Path(path))


def load_pruned(
    path: str | Path,
    factory: Callable[[], nn.Module] | None = None,
    *,
    ema: bool | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Rebuild a pruned network from a file.

    Args:
        path: Written by `save_pruned`, or any LucidPrune checkpoint.
        factory: Builds the unpruned network, for a user-defined class.
        ema: Whether to load the averaged weights; None loads them if the file has them, since they were the ones
            evaluated.
        device: Device to load onto; the CPU by default.

    Returns:
        The network with its weights, in training mode, like any new network.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds no LucidPrune network, or one that does not fit the architecture or violates the
            schema.
    """
    path = Path(path)
    content = read_safely(path)
    if not is_ours(content) or content.get("structure") is None:
        raise ValueError(f"{path}: holds no LucidPrune network (no entry 'structure')")
    model = build_from_structure(structure_in(content, path), factory=factory, device=device)
    load_exactly(model, content["ema" if takes_average(content, ema) else "state_dict"], path)
    remember_class_names(model, content.get("class_names"))
    return model
