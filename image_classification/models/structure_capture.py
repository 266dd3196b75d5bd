"""Captures the structure of a network: its differences from a network freshly built by its function."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from image_classification.models.attention import CutAttention
from image_classification.models.factory import ModelIdentity, identity_of, input_of, unwrap
from image_classification.models.integer_attributes import (
    IntegerValue,
    as_list,
    integer_attributes,
    is_integer_value,
    is_within,
)
from image_classification.models.lazy_modules import settle
from image_classification.models.meta_device import Factory, on_meta
from image_classification.models.module_tree import tensors_by_all_names
from image_classification.models.plain_tensors import plain_tensors
from image_classification.models.structure import Structure, StructureError, called, is_plain
from image_classification.models.structure_checks import check_fits, check_known_modules, check_saved_tensors
from image_classification.models.whole_numbers import is_nested, numbers_in

log = logging.getLogger(__name__)

#: Types of attributes that say how a module works at present: a temperature, a flag that it has been initialised.
_SETTINGS = (type(None), bool, float, str)
#: Whose layers count nothing in plain attributes: a number that has grown there is an error.
_WITHOUT_COUNTERS = ("torch.nn.", "torchvision.", "timm.", "image_classification.")


def capture_structure(model: nn.Module, *, factory: Factory | None = None) -> Structure:
    """Capture the structure of a network, pruned or not.

    Args:
        model: A network of `create_model` in any state, bare or inside DDP, EMA or `torch.compile` wrappers.
        factory: Builds the fresh network, for a user-defined class.

    Raises:
        StructureError: The network cannot be rebuilt from such data; the message names the first problematic module.
    """
    model = unwrap(model)
    identity = identity_of(model)
    if factory is None and identity is None:
        raise StructureError(
            f"{type(model).__name__} was not built by create_model: give factory=, a function that builds it "
            "unpruned"
        )
    build = identity.build if factory is None and identity is not None else factory
    assert build is not None
    shapes = {name: list(tensor.shape) for name, tensor in tensors_by_all_names(model)}
    check_saved_tensors(model)
    fresh = settle(on_meta(build), shapes)
    _check_same_modules(model, fresh)
    head = ModelIdentity("") if factory is not None or identity is None else identity
    unsaved = _unsaved_tensors(model, fresh)
    uncut = _unregistered(fresh)
    shapes.update(
        {
            name: list(tensor.shape)
            for name, tensor in unsaved.items()
            if name in shapes or tensor.shape != uncut[name].shape
        }
    )
    kept = _kept_of_unsaved_tensors(unsaved, uncut, build, of_factory=factory is not None)
    structure = Structure(
        arch=head.arch or None,
        model_config=head.model_config,
        num_classes=head.num_classes if head.arch else None,
        image_size=head.image_size,
        attributes=_differing_attributes(model, fresh),
        shapes=shapes,
        options=_plain_options(head.options),
        input=input_of(model),
        kept=kept,
    )
    check_fits(structure, fresh)
    check_known_modules(model)
    return structure


def _differing_attributes(model: nn.Module, fresh: nn.Module) -> dict[str, dict[str, IntegerValue]]:
    modules = dict(model.named_modules())
    largest = max((tensor.numel() for _, tensor in tensors_by_all_names(fresh)), default=0)
    found = {}
    remembered: list[str] = []
    for name, fresh_module in fresh.named_modules():
        changed: dict[str, IntegerValue] = {}
        for attribute, before in integer_attributes(fresh_module).items():
            value = getattr(modules[name], attribute, None)
            if is_nested(getattr(fresh_module, attribute)):
                value = [number for _, number in numbers_in(value)]
                if not is_within(value, as_list(before)):  # a value remembered from a run
                    continue
            if _is_remembered(fresh_module, value, as_list(before), largest):
                remembered.append(f"{name}.{attribute}".lstrip("."))
            elif not is_integer_value(value):
                raise StructureError(
                    f"module {called(name)}: attribute {attribute!r} is {before} in a fresh network and "
                    f"{value!r} here"
                )
            elif as_list(value) != as_list(before):
                changed[attribute] = value if isinstance(value, int) else as_list(value)
        remembered += [
            f"{name}.{setting}".lstrip(".") for setting in _changed_settings(modules[name], fresh_module)
        ]
        if changed:
            found[name] = changed
    if remembered:
        log.warning(
            "counters, schedules and flags are no part of the structure: in a network that is built from it, %s are "
            "as in a new one. If its outputs depend on them, keep them in buffers, or set them again",
            ", ".join(remembered),
        )
    return found


def _changed_settings(module: nn.Module, fresh: nn.Module) -> list[str]:
    """Return the plain attributes, other than whole numbers, that are not as a class of one's own sets them."""
    if type(fresh).__module__.startswith(_WITHOUT_COUNTERS):
        return []
    now = vars(module)
    return [
        name
        for name, before in vars(fresh).items()
        if name != "training"
        and type(before) in _SETTINGS
        and type(now.get(name)) in _SETTINGS
        and now.get(name) != before
        and now.get(name) is not None
    ]


def _is_remembered(fresh: nn.Module, value: object, before: list[int], largest: int) -> bool:
    """Whether an attribute of a class of one's own is not what it was, and was no size or has grown: sizes shrink.

    Args:
        fresh: The module in a fresh network.
        value: The attribute now.
        before: The attribute there.
        largest: Number of elements of the network's largest tensor; no size is larger.
    """
    if type(fresh).__module__.startswith(_WITHOUT_COUNTERS):
        return False
    if not is_integer_value(value):
        return True
    now = as_list(value)
    return now != before and (max(before) > largest or not is_within(now, before))


def _check_same_modules(model: nn.Module, fresh: nn.Module) -> None:
    ours, theirs = dict(model.named_modules()), dict(fresh.named_modules())
    for name, module in theirs.items():
        # Parametrisations create a separate class for every module.
        if name not in ours or _class_of(ours[name]) is not _class_of(module):
            here = type(ours[name]).__name__ if name in ours else "missing"
            raise StructureError(
                f"module {called(name)} is {type(module).__name__} in a fresh network and {here} here: "
                "only widths may differ"
            )
    for name, module in ours.items():
        if name not in theirs:
            raise StructureError(f"module {called(name)} ({type(module).__name__}) is not in a fresh network")


def _class_of(module: nn.Module) -> type[nn.Module]:
    return nn.MultiheadAttention if isinstance(module, CutAttention) else type_before_parametrizations(module)


def _unregistered(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers, and the tensors in plain attributes, by all their names."""
    return {**dict(model.named_buffers(remove_duplicate=False)), **plain_tensors(model)}


def _unsaved_tensors(model: nn.Module, fresh: nn.Module) -> dict[str, Tensor]:
    """Return the buffers and plain tensors that no state dict holds, by all their names, as far as a fresh network's
    reach.

    Along a dimension that has grown (the network enlarges it on demand), that is the leading part.
    """
    saved = set(model.state_dict())
    originals = _unregistered(fresh)
    return {
        name: tensor.detach()[tuple(map(slice, originals[name].shape))]
        for name, tensor in _unregistered(model).items()
        if name not in saved
        and name in originals
        and tensor.dim() == originals[name].dim()
        and tensor.layout == torch.strided
    }


def _kept_of_unsaved_tensors(
    unsaved: Mapping[str, Tensor], uncut: Mapping[str, Tensor], build: Factory, of_factory: bool
) -> dict[str, list[list[int]]]:
    """Return what is left of the unsaved tensors that were cut, unless it is the leading part of fresh ones.

    Args:
        unsaved: From `_unsaved_tensors`.
        uncut: Those of a fresh network, on any device.
        build: Builds a fresh network.
        of_factory: It is the user's; those of architectures by name make the same tensors every time.

    Raises:
        StructureError: What is left of a tensor is not a part of a fresh one.
    """
    if not any(of_factory or tensor.shape != uncut[name].shape for name, tensor in unsaved.items()):
        return {}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        originals = _unregistered(build())
    kept = {}
    changed: list[str] = []
    for name, tensor in unsaved.items():
        tensor, original = tensor.cpu(), originals[name].detach().to("cpu", tensor.dtype)
        if _equal(original[tuple(map(slice, tensor.shape))], tensor):
            continue
        if tensor.shape == original.shape:
            changed.append(name)
            continue
        found = _positions_in(original, tensor)
        if found is None:
            raise StructureError(
                f"module {called(name.rpartition('.')[0])}: {name!r} was cut, is in no state dict, and is "
                "not a part of a fresh one: it could not be restored. Register it as a buffer with persistent=True, "
                "or leave the layer alone (`ignored`)"
            )
        kept[name] = found
    if changed:
        log.warning(
            "tensors that are in no state dict hold other values than the factory gives them: in a network that is "
            "loaded, %s are the factory's. If they matter, register them as buffers with persistent=True",
            ", ".join(changed),
        )
    return kept


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values; NaN is one."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _positions_in(original: Tensor, part: Tensor) -> list[list[int]] | None:
    """Return the positions along the dimension in which a part is smaller; None if it is no such part.

    The first match is taken: of equal slices, any is right.
    """
    smaller = [dim for dim in range(part.dim()) if part.shape[dim] < original.shape[dim]]
    if len(smaller) != 1:
        return None
    slices = iter(enumerate(original.unbind(smaller[0])))
    positions = [
        next((number for number, whole in slices if _equal(whole, wanted)), None)
        for wanted in part.unbind(smaller[0])
    ]
    found = [position for position in positions if position is not None]
    if len(found) < len(positions):
        return None
    return [found if dim == smaller[0] else [] for dim in range(part.dim())]


def _plain_options(options: Mapping[str, object]) -> dict[str, object]:
    for name, value in options.items():
        if not is_plain(value):
            raise StructureError(
                f"option {name}={value!r} cannot be saved as plain data: use numbers, strings, lists and dicts of "
                "them, or build the network by a factory"
            )
    return {name: _copied(value) for name, value in options.items()}


def _copied(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value
