"""Structure of a network as plain data, to save and rebuild pruned networks without pickled modules.

A rewritten network differs from the one built by its architecture's name only in integer attributes of modules
(`out_channels`, `groups`, `normalized_shape`, a width used in a forward pass) and in the shapes of tensors. A
`Structure` holds exactly these. Building from it creates the fresh network, sets the attributes and cuts the tensors
down. Nothing may grow beyond the fresh network, unknown names are refused, and the first module that does not fit is
named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from image_classification.models.attention import CutAttention, fit_attention
from image_classification.models.factory import ModelIdentity, identity_of, input_of, remember_input, unwrap
from image_classification.models.lazy_modules import settle
from image_classification.models.modes import drop_graphs
from image_classification.models.registry import IMAGENET_CLASSES, ModelError
from image_classification.models.whole_numbers import is_nested, numbers_in, replaced
from image_classification.network_input import NetworkInput
from image_classification.plain_data import Plain, PlainValue

IntegerValue = int | list[int]
Factory = Callable[[], nn.Module]
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
        shapes: Name to shape of every parameter and buffer.
        input: The images that the network was trained for, if known.
    """

    arch: str | None
    model_config: str | None
    num_classes: int | None
    image_size: int | None
    attributes: dict[str, dict[str, IntegerValue]]
    shapes: dict[str, list[int]]
    options: Plain = dataclasses.field(default_factory=dict)
    input: NetworkInput | None = None

    def to_plain(self) -> Plain:
        """Return the structure as dicts, lists, strings and numbers, for JSON or `torch.save`."""
        plain = dataclasses.asdict(self)
        if self.input is None:
            del plain["input"]
        else:
            plain["input"] = self.input.to_plain()
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
        for (name, old), (_, new) in zip(named_tensors(before), named_tensors(after), strict=True):
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
    shapes = {name: list(tensor.shape) for name, tensor in named_tensors(model)}
    fresh = settle(on_meta(build), shapes)
    _check_same_modules(model, fresh)
    head = ModelIdentity("") if factory is not None or identity is None else identity
    shapes.update(_sized_while_running(model, fresh))
    structure = Structure(
        arch=head.arch or None,
        model_config=head.model_config,
        num_classes=head.num_classes if head.arch else None,
        image_size=head.image_size,
        attributes=_differing_attributes(model, fresh),
        shapes=shapes,
        options=_plain_options(head.options),
        input=input_of(model),
    )
    _check_fits(structure, fresh)
    _check_known_modules(model)
    _check_unsaved_buffers(model, fresh, build)
    return structure


def build_from_structure(
    structure: Structure, *, factory: Factory | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """Build the network that a structure describes, with fresh weights.

    Args:
        structure: From `capture_structure` or `Structure.from_plain`.
        factory: Builds the fresh network if the structure has no architecture name.
        device: Device to build it on (default: PyTorch's default device).

    Returns:
        The network. Cut tensors keep the leading part of the fresh values, their `Parameter` object with its
            attributes, and their sharing.

    Raises:
        StructureError: The structure does not fit the architecture; the message names the first module that differs.
    """
    on_trial = settle(on_meta(lambda: structure.fresh(factory)), structure.shapes)
    _check_fits(structure, on_trial)  # before anything large is allocated
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
    _check_fits(structure, model)
    _cut_down(model, structure)


def _cut_down(model: nn.Module, structure: Structure) -> None:
    drop_graphs(model)
    modules = dict(model.named_modules())
    for name, attributes in structure.attributes.items():
        for attribute, value in attributes.items():
            before = getattr(modules[name], attribute)
            setattr(modules[name], attribute, _like(before, value))
    for name, tensor in named_tensors(model):
        shape = structure.shapes[name]
        if list(tensor.shape) != shape:
            tensor.data = tensor.data[tuple(slice(size) for size in shape)].clone()
    fit_attention(model)
    _check_known_modules(model)
    remember_input(model, structure.input)


def building_on(device: torch.device | str | None) -> AbstractContextManager[object]:
    """Return a context in which new tensors are created on `device`; None keeps PyTorch's default."""
    return nullcontext() if device is None else torch.device(device)


def on_meta(build: Factory) -> nn.Module:
    """Run `build` without allocating memory for its tensors and without affecting the random state.

    A builder that depends on values (such as torchvision's RegNet) cannot run on PyTorch's meta device; it then runs on
    the CPU, where real errors show.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except (NotImplementedError, RuntimeError, ModelError):
            with torch.device("cpu"):
                return build()


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers under each of their names; shared ones occur repeatedly."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def integer_attributes(module: nn.Module) -> dict[str, int | list[int] | tuple[int, ...]]:
    """Return attributes that are integers, or lists or tuples of integers; booleans do not count.

    For other containers of plain values, the integers in them are returned as a list.
    """
    found = {}
    for name, value in vars(module).items():
        if _is_integer_value(value):
            found[name] = value
        elif is_nested(value):
            found[name] = [number for _, number in numbers_in(value)]
    return found


def _like(before: object, value: IntegerValue) -> object:
    """Convert saved integers to the form of the attribute that they belong to."""
    if not isinstance(value, list):
        return value
    if is_nested(before):
        paths = [path for path, _ in numbers_in(before)]
        return replaced(before, dict(zip(paths, value, strict=True)))
    return type(before)(value)  # type: ignore[call-arg]


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_integer_value(value: object) -> bool:
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple, torch.Size):
        return len(value) > 0 and all(_is_integer(item) for item in value)
    return _is_integer(value)


def _as_list(value: PlainValue) -> list[int]:
    return [value] if _is_integer(value) else list(value)


def _called(module_name: str) -> str:
    return repr(module_name) if module_name else "the network itself"


def _differing_attributes(model: nn.Module, fresh: nn.Module) -> dict[str, dict[str, IntegerValue]]:
    modules = dict(model.named_modules())
    found = {}
    for name, fresh_module in fresh.named_modules():
        changed: dict[str, IntegerValue] = {}
        for attribute, before in integer_attributes(fresh_module).items():
            value = getattr(modules[name], attribute, None)
            if is_nested(getattr(fresh_module, attribute)):
                value = [number for _, number in numbers_in(value)]
                if not _is_within(value, _as_list(before)):  # a value remembered from a run
                    continue
            if not _is_integer_value(value):
                raise StructureError(
                    f"module {_called(name)}: attribute {attribute!r} is {before} in a fresh network and "
                    f"{value!r} here"
                )
            if _as_list(value) != _as_list(before):
                changed[attribute] = value if isinstance(value, int) else _as_list(value)
        if changed:
            found[name] = changed
    return found


def _check_same_modules(model: nn.Module, fresh: nn.Module) -> None:
    ours, theirs = dict(model.named_modules()), dict(fresh.named_modules())
    for name, module in theirs.items():
        # Parametrisations create a separate class for every module.
        if name not in ours or _class_of(ours[name]) is not _class_of(module):
            here = type(ours[name]).__name__ if name in ours else "missing"
            raise StructureError(
                f"module {_called(name)} is {type(module).__name__} in a fresh network and {here} here: "
                "only widths may differ"
            )
    for name, module in ours.items():
        if name not in theirs:
            raise StructureError(
                f"module {_called(name)} ({type(module).__name__}) is not in a fresh network"
            )


def _class_of(module: nn.Module) -> type[nn.Module]:
    return nn.MultiheadAttention if isinstance(module, CutAttention) else type_before_parametrizations(module)


def _check_fits(structure: Structure, fresh: nn.Module) -> None:
    """Check that all names are the fresh network's, and that nothing is larger than there."""
    modules = dict(fresh.named_modules())
    for name, attributes in structure.attributes.items():
        if name not in modules:
            raise StructureError(
                f"the structure has a module {_called(name)}, which the architecture does not have"
            )
        for attribute, value in attributes.items():
            _check_attribute(name, attribute, value, integer_attributes(modules[name]))
    tensors: dict[str, Tensor] = dict(named_tensors(fresh))
    for name, tensor in tensors.items():
        shape = structure.shapes.get(name)
        if shape is None:
            raise StructureError(
                f"module {_called(name.rpartition('.')[0])}: the structure lacks its tensor {name!r}"
            )
        within = len(shape) == tensor.dim() and all(
            0 < size <= most or size == most for size, most in zip(shape, tensor.shape, strict=True)
        )
        if not within:
            raise StructureError(
                f"module {_called(name.rpartition('.')[0])}: tensor {name!r} would have shape {shape}, which does "
                f"not fit into the architecture's {list(tensor.shape)}"
            )
    for name in structure.shapes:
        if name not in tensors:
            raise StructureError(
                f"module {_called(name.rpartition('.')[0])}: the architecture has no tensor {name!r}, the "
                "structure has"
            )
    _check_shared(structure, fresh)


def _check_attribute(
    module: str, attribute: str, value: IntegerValue, fresh: Mapping[str, IntegerValue | tuple[int, ...]]
) -> None:
    if attribute not in fresh:
        raise StructureError(f"module {_called(module)} has no whole-number attribute {attribute!r}")
    before = fresh[attribute]
    if _is_integer(value) != _is_integer(before) or not _is_within(_as_list(value), _as_list(before)):
        raise StructureError(
            f"module {_called(module)}: attribute {attribute!r} would be {value}, which does not fit into the "
            f"architecture's {before}"
        )


def _is_within(numbers: list[int], before: list[int]) -> bool:
    """Whether there are as many numbers as before, and none has grown."""
    return len(numbers) == len(before) and all(
        0 <= new <= old or new == old for new, old in zip(numbers, before, strict=True)
    )


def _check_shared(structure: Structure, fresh: nn.Module) -> None:
    """Check that a tensor with several names has one shape."""
    first_name: dict[int, str] = {}
    for name, tensor in named_tensors(fresh):
        first = first_name.setdefault(id(tensor), name)
        if structure.shapes[name] != structure.shapes[first]:
            raise StructureError(
                f"module {_called(name.rpartition('.')[0])}: tensor {name!r} is shared with {first!r}, "
                f"but their shapes are {structure.shapes[name]} and {structure.shapes[first]}"
            )


def _check_known_modules(model: nn.Module) -> None:
    """Check that the attributes of common layers agree with their tensors."""
    for name, module in model.named_modules():
        expected: list[int] | None = None
        # A weight computed by a hook (the old weight norm) is recomputed in every forward pass.
        weight = getattr(module, "weight", None) if _is_held(module, "weight") else None
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            groups = module.groups
            if groups < 1 or module.in_channels % groups or module.out_channels % groups:
                raise StructureError(
                    f"module {_called(name)}: {module.in_channels} input and {module.out_channels} output channels "
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
                f"module {_called(name)} ({type(module).__name__}): its attributes ask for a tensor of shape "
                f"{expected}, but it has {list(weight.shape)}"
            )


def _is_held(module: nn.Module, name: str) -> bool:
    """Whether a tensor is a parameter or buffer of a module, or is computed by a parametrisation."""
    return name in module._parameters or name in module._buffers or is_parametrized(module, name)


def _sized_while_running(model: nn.Module, fresh: nn.Module) -> dict[str, list[int]]:
    """Return the fresh shapes of non-persistent buffers that have grown: the network enlarges them on demand."""
    saved = set(model.state_dict())
    originals = dict(fresh.named_buffers(remove_duplicate=False))
    return {
        name: list(originals[name].shape)
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in saved and name in originals and _has_grown(buffer, originals[name])
    }


def _has_grown(buffer: Tensor, original: Tensor) -> bool:
    return buffer.dim() == original.dim() and any(
        size > before for size, before in zip(buffer.shape, original.shape, strict=True)
    )


def _check_unsaved_buffers(model: nn.Module, fresh: nn.Module, build: Factory) -> None:
    """Check that a non-persistent buffer follows from the fresh network, as its leading part."""
    saved = set(model.state_dict())
    uncut = dict(fresh.named_buffers(remove_duplicate=False))
    cut = {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in saved and buffer.shape != uncut[name].shape and not _has_grown(buffer, uncut[name])
    }
    if not cut:
        return
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        originals = dict(build().named_buffers(remove_duplicate=False))
    for name, buffer in cut.items():
        leading = originals[name][tuple(slice(size) for size in buffer.shape)]
        if not torch.equal(leading.to(buffer.dtype), buffer.cpu()):
            raise StructureError(
                f"module {_called(name.rpartition('.')[0])}: buffer {name!r} was cut, is in no state dict, and is "
                "not the leading part of a fresh one: it could not be restored"
            )


def _plain_options(options: Mapping[str, object]) -> dict[str, object]:
    for name, value in options.items():
        if not _is_plain(value):
            raise StructureError(
                f"option {name}={value!r} cannot be saved as plain data: use numbers, strings, lists and dicts of "
                "them, or build the network by a factory"
            )
    return {name: _copied(value) for name, value in options.items()}


def _copied(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if _is_integer(value):
        return abs(value) <= _LARGEST_INTEGER
    return value is None or isinstance(value, (bool, float, str))


def _check_plain(plain: object) -> Plain:
    """Return the argument if it has the form of `to_plain`'s output; else raise `StructureError`."""
    names = {field.name for field in dataclasses.fields(Structure)}
    names -= {"input"}  # missing in files from before it was recorded
    if not isinstance(plain, dict) or set(plain) - {"input"} != names:
        raise StructureError(f"not a structure: expected the keys {', '.join(sorted(names))}")
    head_checks: dict[str, Callable[[object], bool]] = {
        "arch": lambda value: value is None or isinstance(value, str),
        "model_config": lambda value: value is None or isinstance(value, str),
        "num_classes": lambda value: value is None or (_is_integer(value) and 0 < value <= _LARGEST_INTEGER),
        "image_size": lambda value: value is None or (_is_integer(value) and 0 < value <= _LARGEST_INTEGER),
        "options": lambda value: isinstance(value, dict) and _is_plain(value),
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
            if not isinstance(attribute, str) or not (_is_integer(value) or _is_integer_list(value)):
                raise StructureError(
                    f"not a structure: attribute {attribute!r} of module {module!r} is {value!r}"
                )
    for tensor, shape in plain["shapes"].items():
        if not isinstance(tensor, str) or not (shape == [] or _is_integer_list(shape)):
            raise StructureError(f"not a structure: the shape of tensor {tensor!r} is {shape!r}")
    return plain


def _is_integer_list(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and _is_integer_value(value)
