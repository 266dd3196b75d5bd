"""Builds the network of a structure, or cuts an existing network down to a structure."""

from __future__ import annotations

import torch
from torch import nn

from image_classification.models.attention import fit_attention
from image_classification.models.factory import remember_input
from image_classification.models.integer_attributes import (
    in_form_of,
)
from image_classification.models.lazy_modules import settle
from image_classification.models.meta_device import Factory, building_on, on_meta
from image_classification.models.modes import drop_graphs
from image_classification.models.module_tree import tensors_by_all_names
from image_classification.models.plain_tensors import cut_plain_tensors
from image_classification.models.structure import Structure
from image_classification.models.structure_checks import check_fits, check_known_modules


def build_from_structure(
    structure: Structure, *, factory: Factory | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """Build the network that a structure describes, with fresh weights.

    Args:
        structure: From `capture_structure` or `Structure.from_plain`.
        factory: Builds the fresh network if the structure has no architecture name.
        device: Device to build it on (default: PyTorch's default device).

    Returns:
        The network. Cut tensors keep the leading part of the fresh values (a tensor that no state dict holds: what was
            left of it), their `Parameter` object with its attributes, and their sharing.

    Raises:
        StructureError: The structure does not fit the architecture; the message names the first module that differs.
    """
    on_trial = settle(on_meta(lambda: structure.fresh(factory)), structure.shapes)
    check_fits(structure, on_trial)  # before anything large is allocated
    with building_on(device):
        model = settle(structure.fresh(factory), structure.shapes)
    _cut_down(model, structure)
    return model


def fit_structure(model: nn.Module, structure: Structure) -> None:
    """Cut an unpruned network down to a structure, in place, for training loops that keep a reference to their network.

    Args:
        model: The network as it was before pruning.
        structure: See `build_from_structure`.

    Raises:
        StructureError: The structure does not fit; nothing has been changed.
    """
    settle(model, structure.shapes)
    check_fits(structure, model)
    _cut_down(model, structure)


def _cut_down(model: nn.Module, structure: Structure) -> None:
    drop_graphs(model)
    modules = dict(model.named_modules())
    for name, attributes in structure.attributes.items():
        for attribute, value in attributes.items():
            before = getattr(modules[name], attribute)
            setattr(modules[name], attribute, in_form_of(before, value))
    held = cut_plain_tensors(model, structure.shapes)
    for name, tensor in (*tensors_by_all_names(model), *held.items()):
        for dim, positions in enumerate(structure.kept.get(name, ())):
            if positions and tensor.shape[dim] != len(positions):
                tensor.data = tensor.data.index_select(dim, torch.tensor(positions, device=tensor.device))
        shape = structure.shapes[name]
        if list(tensor.shape) != shape:
            tensor.data = tensor.data[tuple(slice(size) for size in shape)].clone()
    fit_attention(model)
    check_known_modules(model)
    remember_input(model, structure.input)
