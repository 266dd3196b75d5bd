"""Checks that a structure belongs to a network: sizes, attributes, shared tensors and known kinds of module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from image_classification.models.integer_attributes import (
    IntegerValue,
    as_list,
    integer_attributes,
    is_integer,
    is_within,
)
from image_classification.models.module_tree import tensors_by_all_names
from image_classification.models.plain_tensors import cut_plain_tensors
from image_classification.models.structure import Structure, StructureError, called


def check_fits(structure: Structure, fresh: nn.Module) -> None:
    """Check that all names are the fresh network's, and that nothing is larger than there."""
    modules = dict(fresh.named_modules())
    for name, attributes in structure.attributes.items():
        if name not in modules:
            raise StructureError(
                f"the structure has a module {called(name)}, which the architecture does not have"
            )
        for attribute, value in attributes.items():
            _check_attribute(name, attribute, value, integer_attributes(modules[name]))
    tensors: dict[str, Tensor] = dict(tensors_by_all_names(fresh))
    tensors |= cut_plain_tensors(fresh, structure.shapes)
    for name, tensor in tensors.items():
        shape = structure.shapes.get(name)
        if shape is None:
            raise StructureError(
                f"module {called(name.rpartition('.')[0])}: the structure lacks its tensor {name!r}"
            )
        within = len(shape) == tensor.dim() and all(
            0 < size <= most or size == most for size, most in zip(shape, tensor.shape, strict=True)
        )
        if not within:
            raise StructureError(
                f"module {called(name.rpartition('.')[0])}: tensor {name!r} would have shape {shape}, which does "
                f"not fit into the architecture's {list(tensor.shape)}"
            )
    for name in structure.shapes:
        if name not in tensors:
            raise StructureError(
                f"module {called(name.rpartition('.')[0])}: the architecture has no tensor {name!r}, the "
                "structure has"
            )
    _check_kept(structure, tensors)
    _check_shared(structure, fresh)


def check_saved_tensors(model: nn.Module) -> None:
    """Check that the state dict holds the network's tensors and nothing else, all of them dense, as files do.

    Raises:
        StructureError: It does not; the message names the entry and what to do.
    """
    names = {name for name, _ in tensors_by_all_names(model)}
    for name, value in model.state_dict().items():
        if name not in names:
            raise StructureError(
                f"module {called(name.rpartition('.')[0])}: its state dict holds {name!r}, which is no parameter or "
                "buffer (extra state, or what a hook adds), and which files do not hold: keep it in a buffer"
            )
        if value.layout != torch.strided:
            raise StructureError(
                f"module {called(name.rpartition('.')[0])}: {name!r} is sparse, and files hold dense tensors: register "
                "it with persistent=False, so that the factory restores it"
            )


def _check_kept(structure: Structure, tensors: Mapping[str, Tensor]) -> None:
    """Check that kept positions ascend within the fresh tensor and are as many as the shape says."""
    for name, dimensions in structure.kept.items():
        sizes = tensors[name].shape if name in tensors else ()
        fits = len(dimensions) == len(sizes) and all(
            not positions
            or (
                len(positions) == structure.shapes[name][dim]
                and positions == sorted(set(positions))
                and 0 <= positions[0] <= positions[-1] < size
            )
            for dim, (positions, size) in enumerate(zip(dimensions, sizes, strict=True))
        )
        if not fits:
            raise StructureError(
                f"module {called(name.rpartition('.')[0])}: what is kept of {name!r} does not fit the architecture"
            )


def _check_attribute(
    module: str, attribute: str, value: IntegerValue, fresh: Mapping[str, IntegerValue | tuple[int, ...]]
) -> None:
    if attribute not in fresh:
        raise StructureError(f"module {called(module)} has no whole-number attribute {attribute!r}")
    before = fresh[attribute]
    if is_integer(value) != is_integer(before) or not is_within(as_list(value), as_list(before)):
        raise StructureError(
            f"module {called(module)}: attribute {attribute!r} would be {value}, which does not fit into the "
            f"architecture's {before}"
        )


def _check_shared(structure: Structure, fresh: nn.Module) -> None:
    """Check that a tensor with several names has one shape."""
    first_name: dict[int, str] = {}
    held = cut_plain_tensors(fresh, structure.shapes)
    for name, tensor in (*tensors_by_all_names(fresh), *held.items()):
        first = first_name.setdefault(id(tensor), name)
        if structure.shapes[name] != structure.shapes[first]:
            raise StructureError(
                f"module {called(name.rpartition('.')[0])}: tensor {name!r} is shared with {first!r}, "
                f"but their shapes are {structure.shapes[name]} and {structure.shapes[first]}"
            )


def check_known_modules(model: nn.Module) -> None:
    """Check that the attributes of common layers agree with their tensors."""
    for name, module in model.named_modules():
        expected: list[int] | None = None
        # A weight computed by a hook (the old weight norm) is recomputed in every forward pass.
        weight = getattr(module, "weight", None) if _is_held(module, "weight") else None
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            groups = module.groups
            if groups < 1 or module.in_channels % groups or module.out_channels % groups:
                raise StructureError(
                    f"module {called(name)}: {module.in_channels} input and {module.out_channels} output channels "
                    f"cannot be divided into {groups} groups"
                )
            expected = [module.out_channels, module.in_channels // groups, *module.kernel_size]
        elif isinstance(module, nn.Linear):
            expected = [module.out_features, module.in_features]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            expected, weight = [module.num_features], weight if weight is not None else module.running_mean
        elif isinstance(module, nn.GroupNorm):
            expected = [module.num_channels]
        elif isinstance(module, nn.LayerNorm):
            expected = list(module.normalized_shape)
        if expected is not None and isinstance(weight, Tensor) and list(weight.shape) != expected:
            raise StructureError(
                f"module {called(name)} ({type(module).__name__}): its attributes ask for a tensor of shape "
                f"{expected}, but it has {list(weight.shape)}"
            )


def _is_held(module: nn.Module, name: str) -> bool:
    """Whether a tensor is a parameter or buffer of a module, or is computed by a parametrisation."""
    return name in module._parameters or name in module._buffers or is_parametrized(module, name)
