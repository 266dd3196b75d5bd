"""Submodules that train together, such as a network and its momentum teacher: they are cut alike.

    for a, b in zip(self.q.parameters(), self.k.parameters()): b.data.lerp_(a.data, 0.01)

No pass shows this where it stands outside `forward`. Cut apart, two layers of equal widths would go on quietly, each
channel of one averaged with another channel of the other. So the labels of the two submodules are united, parameter by
parameter, whether or not a pass runs the second one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence, Set

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from image_classification.config import SettingError
from image_classification.models.plain_tensors import plain_tensors
from pruning.engine.groups import AttributeAxis
from pruning.engine.labeller import Labeller

_LEAST_LAYERS = 2


def all_pairs(model: nn.Module, given: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs that the user names, and those that are recognised.

    A pair is recognised where two parts of one module have parameters of equal names and shapes and the second takes no
    gradients while the first does, holds the same values (a copy), or is in PyTorch's `AveragedModel`. Two such parts
    that both train and differ, as in two-stream networks, are cut independently.

    Raises:
        SettingError: The two submodules of a given pair do not exist or do not have equal names and shapes.
    """
    pairs = []
    for first, second in given:
        _check_pair(model, first, second)
        pairs.append((first, second))
    taken = {name for pair in pairs for name in pair}
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            continue
        children = [
            _without_average(f"{prefix}.{name}".lstrip("."), child) for name, child in module.named_children()
        ]
        for number, (name, child) in enumerate(children):
            for other_name, other in children[number + 1 :]:
                if taken & {name, other_name} or not _alike(child, other):
                    continue
                averages = [one for one in (name, other_name) if _is_average(model, one)]
                pair = _teacher_last(name, child, other_name, other)
                if len(averages) == 1:
                    pair = (other_name, name) if averages == [name] else (name, other_name)
                if pair is not None:
                    pairs.append(pair)
                    taken |= set(pair)
    return pairs


def _check_pair(model: nn.Module, first: str, second: str) -> None:
    modules = dict(model.named_modules())
    for name in (first, second):
        if name not in modules:
            raise SettingError("pairs", (first, second), f"the network has no module {name!r}")
    if _shapes(modules[first]) != _shapes(modules[second]):
        raise SettingError(
            "pairs", (first, second), "the two do not have parameters of equal names and shapes"
        )


def _without_average(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """Return the network that PyTorch's average holds in place of the average."""
    return (f"{name}.module", module.module) if isinstance(module, AveragedModel) else (name, module)


def _is_average(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), AveragedModel)


def _alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules have parameters of equal names and shapes, and more than those of a single layer."""
    if type(first) is not type(second):
        return False
    shapes = _shapes(first)
    layers = {name.rpartition(".")[0] for name in shapes}
    return len(layers) >= _LEAST_LAYERS and shapes == _shapes(second)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _teacher_last(first: str, student: nn.Module, second: str, teacher: nn.Module) -> tuple[str, str] | None:
    """The two names, the one that follows last; None where nothing tells that one follows the other."""
    trained = [any(p.requires_grad for p in module.parameters()) for module in (student, teacher)]
    if trained[0] != trained[1]:
        return (first, second) if trained[0] else (second, first)
    same = all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    shared = next(student.parameters()) is next(teacher.parameters())
    return (first, second) if trained[0] and same and not shared else None


def untouched_twins(model: nn.Module, used: Set[str]) -> list[tuple[str, str]]:
    """Pair entries of a module list that no pass has run with equal entries of the list that ran completely.

    An expert that received no token is cut like another one, since its input and output may become narrower.

    Args:
        model: The network.
        used: Names of the parameters that some pass has touched.
    """
    pairs = []
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        ran: list[tuple[str, nn.Module]] = []
        idle: list[tuple[str, nn.Module]] = []
        for number, entry in module.named_children():
            name = f"{prefix}.{number}".lstrip(".")
            touched = {f"{name}.{own}" in used for own, _ in entry.named_parameters()}
            for known, kind in ((ran, {True}), (idle, {False})):
                if touched == kind:
                    known.append((name, entry))
        for name, entry in idle:
            alike = [
                other for other, twin in ran if type(twin) is type(entry) and _shapes(twin) == _shapes(entry)
            ]
            pairs += [(alike[0], name)] if alike else []
    return pairs


def tie_pairs(model: nn.Module, labeller: Labeller, pairs: Sequence[tuple[str, str]]) -> None:
    """Unite the labels of every two parameters, buffers and plain tensors of equal name."""
    for first, second in pairs:
        whole, other = _tensors(model, first), _tensors(model, second)
        for name in whole.keys() & other.keys():
            keys = [
                key for key in labeller.parameter_atoms if key[0] in (f"{first}.{name}", f"{second}.{name}")
            ]
            for dim in sorted({dim for _, dim in keys}):
                extent = whole[name].shape[dim]
                if other[name].shape[dim] == extent:
                    left = labeller.atoms_of(f"{first}.{name}", dim, extent)
                    right = labeller.atoms_of(f"{second}.{name}", dim, extent)
                    labeller.table.unite(left, right, "its twin has channels that cannot be removed")


def paired_attributes(
    attributes: Sequence[AttributeAxis], pairs: Sequence[tuple[str, str]]
) -> list[AttributeAxis]:
    """Return attributes of first modules for second modules that lack them: no pass may have run the latter."""
    known = {(axis.module, axis.attribute, axis.item) for axis in attributes}
    found = []
    for first, second in pairs:
        for axis in attributes:
            if axis.module != first and not axis.module.startswith(f"{first}."):
                continue
            twin = second + axis.module.removeprefix(first)
            if (twin, axis.attribute, axis.item) not in known:
                found.append(dataclasses.replace(axis, module=twin))
    return found


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    module = model.get_submodule(name)
    return {**dict(module.named_parameters()), **dict(module.named_buffers()), **plain_tensors(module)}
