"""Structure of a network as plain data, to save and rebuild pruned networks without pickled modules.

A rewritten network differs from the one built by its architecture's name only in integer attributes of modules
(`out_channels`, `groups`, `normalized_shape`, a width used in a forward pass) and in the shapes of tensors. A
`Structure` holds exactly these. Building from it creates the fresh network, sets the attributes and cuts the tensors
down. Nothing may grow beyond the fresh network, unknown names are refused, and the first module that does not fit is
named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeGuard

from torch import nn

from image_classification.models.factory import ModelIdentity
from image_classification.models.integer_attributes import (
    IntegerValue,
    integer_attributes,
    is_integer,
    is_integer_value,
)
from image_classification.models.meta_device import Factory, on_meta
from image_classification.models.module_tree import tensors_by_all_names
from image_classification.models.registry import IMAGENET_CLASSES, ModelError
from image_classification.network_input import NetworkInput
from image_classification.plain_data import Plain

# Keys that files lack: from before the input was recorded, or of networks that have no such buffers.
_OPTIONAL = frozenset({"input", "kept"})
# Limit for integers in a structure's head and options, so that a forged file cannot request absurd networks.
_LARGEST_INTEGER = 1 << 20


class StructureError(ModelError):
    """A structure cannot be captured or rebuilt. The message names the first module that does not fit."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """A network's architecture as JSON-able data.

    Attributes:
        arch: Name for `create_model`; None for a user-defined class, which a factory builds.
        model_config, num_classes, image_size, options: The other arguments of `create_model`.
        attributes: Module name to attribute to value, if it differs from the fresh network's.
        shapes: Name to shape of every parameter and buffer, and of the tensors in plain attributes that were cut.
        input: The images that the network was trained for, if known.
        kept: Name of a buffer or plain tensor that no state dict holds → what stayed of it along every dimension, as
            positions in a fresh one (none: the leading part).
    """

    arch: str | None
    model_config: str | None
    num_classes: int | None
    image_size: int | None
    attributes: dict[str, dict[str, IntegerValue]]
    shapes: dict[str, list[int]]
    options: Plain = dataclasses.field(default_factory=dict)
    input: NetworkInput | None = None
    kept: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict)

    def to_plain(self) -> Plain:
        """Return the structure as dicts, lists, strings and numbers, for JSON or `torch.save`."""
        plain = dataclasses.asdict(self)
        if self.input is None:
            del plain["input"]
        else:
            plain["input"] = self.input.to_plain()
        if not self.kept:
            del plain["kept"]
        return plain

    @classmethod
    def from_plain(cls, plain: object) -> Structure:
        """Build a structure from the output of `to_plain`.

        Raises:
            StructureError: `plain` does not have that form.
        """
        values = dict(_check_plain(plain))
        if "input" in values:
            try:
                values["input"] = NetworkInput.from_plain(values["input"])
            except ValueError as error:
                raise StructureError(f"not a structure: {error}") from error
        return cls(**values)

    def fresh(self, factory: Factory | None = None) -> nn.Module:
        """Build the unpruned architecture by name (or by the factory)."""
        if (self.arch is None) != (factory is not None):
            if self.arch is None:
                raise StructureError(
                    "this structure belongs to a class of your own: give the factory that builds it"
                )
            raise StructureError(f"this structure is of {self.arch}, which needs no factory: leave it out")
        if factory is not None:
            return factory()
        assert self.arch is not None
        try:
            num_classes = IMAGENET_CLASSES if self.num_classes is None else self.num_classes
            identity = ModelIdentity(self.arch, self.model_config, num_classes, self.image_size, self.options)
            return identity.build()
        except TypeError as error:  # options of the wrong type reach the constructors
            raise StructureError(f"options {self.options} do not fit {self.arch}: {error}") from error

    def with_num_classes(self, num_classes: int) -> Structure:
        """Return the same structure with another number of classes: layers with one row per class change."""
        if num_classes == self.num_classes:
            return self
        changed = dataclasses.replace(self, num_classes=num_classes)
        before, after = on_meta(self.fresh), on_meta(changed.fresh)
        shapes = dict(self.shapes)
        for (name, old), (_, new) in zip(
            tensors_by_all_names(before), tensors_by_all_names(after), strict=True
        ):
            pairs = zip(old.shape, new.shape, self.shapes.get(name, old.shape), strict=True)
            shapes[name] = [kept if size == other else other for size, other, kept in pairs]
        attributes = {name: dict(values) for name, values in self.attributes.items()}
        new_modules = dict(after.named_modules())
        for name, module in before.named_modules():
            now = integer_attributes(new_modules[name])
            for attribute, value in integer_attributes(module).items():
                if value != now[attribute]:
                    attributes.get(name, {}).pop(attribute, None)
        return dataclasses.replace(changed, shapes=shapes, attributes=attributes)


def called(module_name: str) -> str:
    return repr(module_name) if module_name else "the network itself"


def is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    if is_integer(value):
        return abs(value) <= _LARGEST_INTEGER
    return value is None or isinstance(value, (bool, float, str))


def _check_plain(plain: object) -> Plain:
    """Return the argument if it has the form of `to_plain`'s output; else raise `StructureError`."""
    names = {field.name for field in dataclasses.fields(Structure)}
    names -= _OPTIONAL
    if not isinstance(plain, dict) or set(plain) - _OPTIONAL != names:
        raise StructureError(f"not a structure: expected the keys {', '.join(sorted(names))}")
    head_checks: dict[str, Callable[[object], bool]] = {
        "arch": lambda value: value is None or isinstance(value, str),
        "model_config": lambda value: value is None or isinstance(value, str),
        "num_classes": lambda value: value is None or (is_integer(value) and 0 < value <= _LARGEST_INTEGER),
        "image_size": lambda value: value is None or (is_integer(value) and 0 < value <= _LARGEST_INTEGER),
        "options": lambda value: isinstance(value, dict) and is_plain(value),
        "attributes": lambda value: isinstance(value, dict),
        "shapes": lambda value: isinstance(value, dict),
    }
    for name, holds in head_checks.items():
        if not holds(plain[name]):
            raise StructureError(f"not a structure: {name} is {str(plain[name])[:80]!r}")
    for module, attributes in plain["attributes"].items():
        if not isinstance(module, str) or not isinstance(attributes, dict):
            raise StructureError(f"not a structure: attributes of {module!r} are not a table")
        for attribute, value in attributes.items():
            if not isinstance(attribute, str) or not (is_integer(value) or _is_integer_list(value)):
                raise StructureError(
                    f"not a structure: attribute {attribute!r} of module {module!r} is {value!r}"
                )
    for tensor, shape in plain["shapes"].items():
        if not isinstance(tensor, str) or not (shape == [] or _is_integer_list(shape)):
            raise StructureError(f"not a structure: the shape of tensor {tensor!r} is {shape!r}")
    _check_kept(plain.get("kept", {}))
    return plain


def _check_kept(kept: object) -> None:
    entries = kept.items() if isinstance(kept, dict) else [(kept, None)]
    for tensor, dimensions in entries:
        lists = isinstance(dimensions, list) and all(
            positions == [] or _is_integer_list(positions) for positions in dimensions
        )
        if not isinstance(tensor, str) or not lists:
            raise StructureError(
                f"not a structure: what is kept of {str(tensor)[:80]!r} is no list of positions"
            )


def _is_integer_list(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and is_integer_value(value)
