"""The planned changes of a rewrite to the tensors and attributes of one network, with rollback.

Modules and `Parameter` objects stay the same objects; only their data gets smaller (`param.data = sliced`). Memory
format, dtype, device, `requires_grad`, hooks and Python attributes are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.models.attention import fit_attention, restore
from image_classification.models.module_tree import named_modules
from image_classification.models.whole_numbers import replaced
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.computed_weights import parametrised_originals, parametrizations, renormalised
from pruning.engine.named_tensors import is_in_attribute, named_tensors
from pruning.engine.native_layers import known_attributes
from pruning.engine.slices import Cuts, sliced_like

K = TypeVar("K")
V = TypeVar("V")


class RewriteError(ValueError):
    """A rewrite that cannot be done. Nothing has been changed."""


class Changes:
    """The planned assignments of a rewrite, with their rollback.

    `cuts` maps a tensor's `id` to the indices that stay along each dimension.
    """

    def __init__(self) -> None:
        self.cuts: dict[int, Cuts] = {}
        self.names: dict[int, str] = {}
        self.dropped: list[str] = []
        self._assignments: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self._leaves: list[Tensor] = []

    def cut(self, tensor: Tensor, cuts: Cuts, name: str, new: Tensor | None = None) -> None:
        """Plan smaller data for a parameter (and its gradient), a buffer or a plain tensor."""
        if id(tensor) in self.cuts:
            return
        self.cuts[id(tensor)] = cuts
        self.names[id(tensor)] = name
        self._leaves += [tensor] if tensor.is_leaf and tensor.requires_grad else []
        data = tensor.data
        sliced = sliced_like(tensor.data, cuts) if new is None else new
        grad = tensor.grad if tensor.is_leaf else None
        new_grad = None if grad is None else sliced_like(grad, cuts)

        def assign(values: Tensor, gradient: Tensor | None) -> None:
            if tensor.is_leaf:
                tensor.grad = None
            tensor.data = values
            if gradient is not None:
                tensor.grad = gradient

        self.add(lambda: assign(sliced, new_grad), lambda: assign(data, grad))

    def set_item(self, table: MutableMapping[K, V], key: K, value: V) -> None:
        """Plan `table[key] = value`."""
        old = table[key]

        def assign(new: V) -> None:
            table[key] = new

        self.add(lambda: assign(value), lambda: assign(old))

    def set_attribute(self, owner: object, attribute: str, value: object) -> None:
        """Plan `owner.attribute = value`."""
        old = getattr(owner, attribute)
        if old != value:
            self.add(lambda: setattr(owner, attribute, value), lambda: setattr(owner, attribute, old))

    def add(self, do: Callable[[], None], undo: Callable[[], None]) -> None:
        """Plan an assignment."""
        self._assignments.append((do, undo))

    def apply(self) -> None:
        """Apply all changes; if a step fails, roll back and raise."""
        done: list[Callable[[], None]] = []
        try:
            for do, undo in self._assignments:
                done.append(undo)
                do()
        except BaseException:
            for undo in reversed(done):
                undo()
            raise

    def leave_graphs(self) -> None:
        """Renew autograd's gradient accumulators of the parameters: a graph that is still alive holds those of the old
        shape.

        This suffices for a loop that keeps a reference to its loss. PyTorch renews an accumulator when the dtype of the
        data changes. It is not done under `torch.distributed`, where a wrapper that still hooks the old accumulators
        would silently miss gradients.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return
        for tensor in self._leaves:
            data = tensor.data
            other = torch.float32 if data.dtype == torch.float64 else torch.float64
            tensor.data = torch.empty(0, dtype=other, device=data.device)
            tensor.data = data

    def revert(self) -> None:
        """Roll back all changes."""
        for _, undo in reversed(self._assignments):
            undo()


def plan_network(model: nn.Module, graph: ChannelGraph, mask: np.ndarray, changes: Changes) -> None:
    """Plan the cuts of all tensors of a network and the attributes that follow. What it has dropped needs none."""
    cuts = tensor_cuts(graph, mask)
    tensors = named_tensors(model)
    dropped = {name for name in cuts if name not in tensors and is_in_attribute(model, name)}
    cuts = {name: per_dim for name, per_dim in cuts.items() if name not in dropped}
    for axis in graph.axes:
        if axis.tensor in dropped:
            continue
        if axis.tensor not in tensors or tensors[axis.tensor].shape[axis.dim] != len(axis.units):
            shape = tuple(tensors[axis.tensor].shape) if axis.tensor in tensors else "missing"
            raise RewriteError(
                f"{axis.tensor!r} should have {len(axis.units)} slices in dimension {axis.dim} but is {shape}: "
                "this graph does not belong to this network; trace it again"
            )
    computed = renormalised(model, tensors, cuts)
    for name in (*cuts, *(name for name in computed if name not in cuts)):
        changes.cut(tensors[name], cuts.get(name, {}), name, computed.get(name))
    _plan_attributes(model, graph, mask, cuts, changes)


def tensor_cuts(graph: ChannelGraph, mask: np.ndarray) -> dict[str, Cuts]:
    """Map tensor name to dimension to the indices that stay; tensors that stay whole are left out."""
    cuts: dict[str, Cuts] = {}
    for axis in graph.axes:
        stays = (axis.units < 0) | mask[np.maximum(axis.units, 0)]
        if not stays.all():
            cuts.setdefault(axis.tensor, {})[axis.dim] = torch.from_numpy(np.flatnonzero(stays))
    return cuts


def _plan_attributes(
    model: nn.Module, graph: ChannelGraph, mask: np.ndarray, cuts: Mapping[str, Cuts], changes: Changes
) -> None:
    modules = dict(named_modules(model))
    counted: dict[tuple[str, str], Any] = {}
    for attribute in graph.attributes:
        units = attribute.units
        count = int(((units < 0) | mask[np.maximum(units, 0)]).sum())
        key = (attribute.module, attribute.attribute)
        value = counted.get(key, getattr(modules[attribute.module], attribute.attribute))
        if attribute.item is None:
            counted[key] = count
        else:
            path = attribute.item if isinstance(attribute.item, tuple) else (attribute.item,)
            counted[key] = replaced(value, {path: count})
    for (owner, attribute_name), value in counted.items():
        changes.set_attribute(modules[owner], attribute_name, value)
    # A tensor that several modules share was cut under one of its names; all of them follow.
    cuts = {
        alias: cuts[axis.tensor] for axis in graph.axes for alias in axis.aliases if axis.tensor in cuts
    } | dict(cuts)
    for name, module in named_modules(model):
        shapes = {
            own: _cut_shape(tensor, cuts.get(f"{name}.{own}" if name else own, {}))
            for own, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        shapes.update(_computed_shapes(name, module, cuts))
        _plan_computed(name, module, cuts, changes)
        groups = counted.get((name, "groups"), getattr(module, "groups", 1))
        for attribute_name, value in known_attributes(module, shapes, groups).items():
            changes.set_attribute(module, attribute_name, value)
    _plan_computed_attributes(modules, changes)
    fitted: list[Any] = []
    changes.add(lambda: fitted.extend(fit_attention(model)), lambda: restore(fitted))


def _cut_shape(tensor: Tensor, cuts: Cuts) -> tuple[int, ...]:
    return tuple(len(cuts[d]) if d in cuts else size for d, size in enumerate(tensor.shape))


def _computed_shapes(name: str, module: nn.Module, cuts: Mapping[str, Cuts]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of weights that are computed from others (weight and spectral norms, parametrizations)."""
    shapes = {}
    for key, original in parametrised_originals(module).items():
        tensor = module.get_parameter(original)
        shapes[key] = _cut_shape(tensor, cuts.get(f"{name}.{original}" if name else original, {}))
    return shapes


def _plan_computed_attributes(modules: Mapping[str, nn.Module], changes: Changes) -> None:
    """Plan the attributes of layers whose parametrization holds tensors besides its original (an orthogonal one).

    The shape of what it computes need not be that of the original then; it is known after the cut.
    """
    for module in modules.values():
        for key, chain in parametrizations(module).items():
            beside = any(True for part in chain for _ in (*part.parameters(), *part.buffers()))
            if not beside or any(type(part).__name__ in ("_SpectralNorm", "_WeightNorm") for part in chain):
                continue
            before = {attribute: value for attribute, value in vars(module).items() if isinstance(value, int)}
            changes.add(
                functools.partial(_fit_to_computed, module, key),
                functools.partial(vars(module).update, before),
            )


def _fit_to_computed(module: nn.Module, key: str) -> None:
    with torch.no_grad():
        shapes = {key: tuple(getattr(module, key).shape)}
    for attribute, value in known_attributes(module, shapes, getattr(module, "groups", 1)).items():
        setattr(module, attribute, value)


def _plan_computed(name: str, module: nn.Module, cuts: Mapping[str, Cuts], changes: Changes) -> None:
    """Cut the weight that an old-style norm left in the module when it last ran."""
    for key, original in parametrised_originals(module).items():
        weight = vars(module).get(key)
        own_cuts = cuts.get(f"{name}.{original}" if name else original, {})
        if isinstance(weight, Tensor) and own_cuts:
            changes.set_item(vars(module), key, sliced_like(weight, own_cuts))
