"""The rewrite: remove units from a network, its gradients, its optimizers and its averages, in place.

Modules and `Parameter` objects stay the same objects; only their data gets smaller (`param.data = sliced`).
Memory format, dtype, device, `requires_grad`, hooks and Python attributes are kept. Everything is computed and
checked first and put in place afterwards, so an error leaves the network as it was.

Drop references to the loss and the autograd graph, and the DDP wrapper, before a rewrite: a live gradient
accumulator keeps the old shape and PyTorch says so in the next backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.channel_graph import ChannelGraph, Keep
from pruning.tracing import forget_cached, named_tensors

Cuts = dict[int, Tensor]


class RewriteError(ValueError):
    """A rewrite that cannot be done. Nothing has been changed."""


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """What a rewrite did.

    Attributes:
        widths: Group name to (width before, width after), changed groups only.
        kept: Group name to the positions that stayed, as before the rewrite.
        num_parameters: Parameters of the network before and after.
        macs: MACs per image before and after, by the graph.
        dropped_states: Parameters whose optimizer state has a form of its own and starts anew.
    """

    widths: dict[str, tuple[int, int]]
    kept: dict[str, tuple[int, ...]]
    num_parameters: tuple[int, int]
    macs: tuple[float, float]
    dropped_states: tuple[str, ...]


def prune_channels(
    model: nn.Module,
    graph: ChannelGraph,
    keep: Keep,
    *,
    optimizers: Iterable[Optimizer] = (),
    emas: Iterable[nn.Module | MutableMapping[str, Tensor]] = (),
) -> RewriteReport:
    """Remove units in place.

    Args:
        model: The bare network (no DDP or compile wrapper) that the graph belongs to.
        graph: Follows the rewrite; no new trace is needed.
        keep: Group (or its name or index) to the positions of the units that stay. Groups that are not
            mentioned stay whole.
        optimizers: Their state is sliced like the parameters it belongs to.
        emas: Averages of the network: copies of it, `AveragedModel`, or state dicts.

    Raises:
        ValueError: A frozen group, an index out of range, an empty layer.
        RewriteError: Network, optimizer or average do not belong to the graph. Nothing was changed.
    """
    mask = graph.keep_mask(keep)
    counts, macs = [_num_parameters(model)], [graph.macs]
    before = {group.index: group.width for group in graph.groups}
    removed = set(np.unique(graph.group_of_unit[~mask]).tolist())
    kept = {g.name: tuple(np.flatnonzero(mask[g.units]).tolist()) for g in graph.groups if g.index in removed}
    changes, emas = Changes(), tuple(emas)
    plan_network(model, graph, mask, changes)
    for ema in emas:
        _plan_average(model, ema, graph, mask, changes)
    for optimizer in optimizers:
        _plan_optimizer(optimizer, changes)
    changes.apply()
    for network in (model, *(ema for ema in emas if isinstance(ema, nn.Module))):
        forget_cached(network)
    graph.shrink(mask)
    counts.append(_num_parameters(model))
    macs.append(graph.macs)
    return RewriteReport(
        widths={g.name: (before[g.index], g.width) for g in graph.groups if g.index in removed},
        kept=kept,
        num_parameters=(counts[0], counts[1]),
        macs=(macs[0], macs[1]),
        dropped_states=tuple(changes.dropped),
    )


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Changes:
    """What a rewrite is going to do: a list of assignments with their undoing.

    `cuts` tells, by the tensor's identity, which indices stay along which dimension.
    """

    def __init__(self) -> None:
        self.cuts: dict[int, Cuts] = {}
        self.names: dict[int, str] = {}
        self.dropped: list[str] = []
        self._assignments: list[tuple[Callable[[], None], Callable[[], None]]] = []

    def cut(self, tensor: Tensor, cuts: Cuts, name: str, new: Tensor | None = None) -> None:
        """Plan smaller data for a parameter (and its gradient) or a buffer."""
        if id(tensor) in self.cuts:
            return
        self.cuts[id(tensor)] = cuts
        self.names[id(tensor)] = name
        data, sliced = tensor.data, sliced_like(tensor.data, cuts) if new is None else new
        grad = tensor.grad if tensor.is_leaf else None
        new_grad = None if grad is None else sliced_like(grad, cuts)

        def assign(values: Tensor, gradient: Tensor | None) -> None:
            if tensor.is_leaf:
                tensor.grad = None
            tensor.data = values
            if gradient is not None:
                tensor.grad = gradient

        self.add(lambda: assign(sliced, new_grad), lambda: assign(data, grad))

    def set_item(self, table: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Plan `table[key] = value`."""
        old = table[key]

        def assign(new: Any) -> None:
            table[key] = new

        self.add(lambda: assign(value), lambda: assign(old))

    def set_attribute(self, owner: Any, attribute: str, value: Any) -> None:
        """Plan `owner.attribute = value`."""
        old = getattr(owner, attribute)
        if old != value:
            self.add(lambda: setattr(owner, attribute, value), lambda: setattr(owner, attribute, old))

    def add(self, do: Callable[[], None], undo: Callable[[], None]) -> None:
        """Plan an assignment."""
        self._assignments.append((do, undo))

    def apply(self) -> None:
        """Do everything; if a step fails, undo what was done and raise."""
        done: list[Callable[[], None]] = []
        try:
            for do, undo in self._assignments:
                done.append(undo)
                do()
        except BaseException:
            for undo in reversed(done):
                undo()
            raise

    def revert(self) -> None:
        """Undo everything."""
        for _, undo in reversed(self._assignments):
            undo()


def sliced_like(tensor: Tensor, cuts: Cuts) -> Tensor:
    """A smaller copy with the given indices kept along each dimension, in the same memory format."""
    result = tensor.detach()
    for dim, index in cuts.items():
        result = result.index_select(dim, index.to(result.device))
    memory_format = _memory_format(tensor)
    if memory_format != torch.contiguous_format:
        result = torch.empty_like(result, memory_format=memory_format).copy_(result)
    return result


def _memory_format(tensor: Tensor) -> torch.memory_format:
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if (
            tensor.dim() == rank
            and not tensor.is_contiguous()
            and tensor.is_contiguous(memory_format=memory_format)
        ):
            return memory_format
    if tensor.dim() == 4 and tensor.is_contiguous() and tensor.stride() != _row_major(tensor.shape):
        return torch.channels_last  # 1×1 kernels are contiguous both ways; their strides tell
    return torch.contiguous_format


def _row_major(shape: Iterable[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(tuple(shape)):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def plan_network(model: nn.Module, graph: ChannelGraph, mask: np.ndarray, changes: Changes) -> None:
    """Plan the cuts of all tensors of a network and the attributes that follow."""
    cuts = tensor_cuts(graph, mask)
    tensors = named_tensors(model)
    for axis in graph.axes:
        if axis.tensor not in tensors or tensors[axis.tensor].shape[axis.dim] != len(axis.units):
            shape = tuple(tensors[axis.tensor].shape) if axis.tensor in tensors else "missing"
            raise RewriteError(
                f"{axis.tensor!r} should have {len(axis.units)} slices in dimension {axis.dim} but is {shape}: "
                "this graph does not belong to this network; trace it again"
            )
    renormalised = weight_norm_gains(model, tensors, cuts)
    for name in (*cuts, *(name for name in renormalised if name not in cuts)):
        changes.cut(tensors[name], cuts.get(name, {}), name, renormalised.get(name))
    _plan_attributes(model, graph, mask, cuts, changes)


def tensor_cuts(graph: ChannelGraph, mask: np.ndarray) -> dict[str, Cuts]:
    """Tensor name to dimension to the indices that stay; tensors that stay whole are left out."""
    cuts: dict[str, Cuts] = {}
    for axis in graph.axes:
        stays = (axis.units < 0) | mask[np.maximum(axis.units, 0)]
        if not stays.all():
            cuts.setdefault(axis.tensor, {})[axis.dim] = torch.from_numpy(np.flatnonzero(stays))
    return cuts


def weight_norm_gains(
    model: nn.Module, tensors: Mapping[str, Tensor], cuts: Mapping[str, Cuts]
) -> dict[str, Tensor]:
    """New gains for weight-normalised layers, so that the weights that stay keep their values.

    w = g·v/‖v‖ has ‖w‖ = |g|. With fewer columns ‖v‖ shrinks, and g must become the norm of the kept part of w.
    """
    found = {}
    for g_name, v_name, dim in weight_norm_pairs(model):
        if v_name not in cuts:
            continue
        g, v = tensors[g_name].detach(), tensors[v_name].detach()
        over = tuple(d for d in range(v.dim()) if d != dim)
        shrunk = torch.linalg.vector_norm(sliced_like(v, cuts[v_name]), dim=over, keepdim=True)
        whole = torch.linalg.vector_norm(v, dim=over, keepdim=True)
        ratio = shrunk / sliced_like(whole, {d: i for d, i in cuts[v_name].items() if d == dim})
        kept_gains = sliced_like(g, cuts.get(g_name, {}))
        found[g_name] = kept_gains * ratio.reshape_as(kept_gains)
    return found


def weight_norm_pairs(model: nn.Module) -> list[tuple[str, str, int | None]]:
    """(gain, direction, dimension that is not normalised) of every weight normalisation, by qualified names."""
    pairs = []
    for name, module in model.named_modules():
        for gain, direction, dim in _weight_norms(module):
            prefix = f"{name}." if name else ""
            rank = module.get_parameter(direction).dim()
            pairs.append((prefix + gain, prefix + direction, None if dim in (None, -1) else dim % rank))
    return pairs


def _weight_norms(module: nn.Module) -> list[tuple[str, str, Any]]:
    """(gain, direction, dimension) of the weight normalisations of one module, either generation."""
    found: list[tuple[str, str, Any]] = []
    for tensor, chain in getattr(module, "parametrizations", {}).items():
        for parametrization in chain:
            if type(parametrization).__name__ == "_WeightNorm":
                prefix = f"parametrizations.{tensor}.original"
                found.append((f"{prefix}0", f"{prefix}1", parametrization.dim))
    for hook in module._forward_pre_hooks.values():
        if type(hook).__name__ == "WeightNorm" and hasattr(hook, "dim"):
            name = str(getattr(hook, "name", "weight"))
            found.append((f"{name}_g", f"{name}_v", hook.dim))
    return found


def _plan_attributes(
    model: nn.Module, graph: ChannelGraph, mask: np.ndarray, cuts: Mapping[str, Cuts], changes: Changes
) -> None:
    modules = dict(model.named_modules())
    counted: dict[tuple[str, str], Any] = {}
    for attribute in graph.attributes:
        units = attribute.units
        count = int(((units < 0) | mask[np.maximum(units, 0)]).sum())
        key = (attribute.module, attribute.attribute)
        value = counted.get(key, getattr(modules[attribute.module], attribute.attribute))
        if attribute.item is None:
            counted[key] = count
        else:
            items = list(value)
            items[attribute.item] = count
            counted[key] = type(value)(items)
    for (owner, attribute_name), value in counted.items():
        changes.set_attribute(modules[owner], attribute_name, value)
    # A tensor that several modules share was cut under one of its names; all of them follow.
    cuts = {
        alias: cuts[axis.tensor] for axis in graph.axes for alias in axis.aliases if axis.tensor in cuts
    } | dict(cuts)
    for name, module in model.named_modules():
        shapes = {
            own: _cut_shape(tensor, cuts.get(f"{name}.{own}" if name else own, {}))
            for own, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        shapes.update(_parametrized_shapes(name, module, cuts))
        groups = counted.get((name, "groups"), getattr(module, "groups", 1))
        for attribute_name, value in known_attributes(module, shapes, groups).items():
            changes.set_attribute(module, attribute_name, value)


def _cut_shape(tensor: Tensor, cuts: Cuts) -> tuple[int, ...]:
    return tuple(len(cuts[d]) if d in cuts else size for d, size in enumerate(tensor.shape))


def _parametrized_shapes(
    name: str, module: nn.Module, cuts: Mapping[str, Cuts]
) -> dict[str, tuple[int, ...]]:
    """Shapes of weights that are computed from others by weight normalisation."""
    shapes = {}
    for _, direction, _ in _weight_norms(module):
        tensor = module.get_parameter(direction)
        key = direction.removesuffix("_v").removeprefix("parametrizations.").removesuffix(".original1")
        shapes[key] = _cut_shape(tensor, cuts.get(f"{name}.{direction}" if name else direction, {}))
    return shapes


def known_attributes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: Any) -> dict[str, Any]:
    """Attributes of PyTorch's own layers that follow from the shapes of their tensors."""
    vector = shapes.get("weight", shapes.get("running_mean"))
    if vector is None:
        return {}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": vector[0], "out_channels": vector[1] * groups, "groups": groups}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"in_channels": vector[1] * groups, "out_channels": vector[0], "groups": groups}
    if isinstance(module, nn.Linear):
        return {"in_features": vector[1], "out_features": vector[0]}
    if isinstance(module, (nn.modules.batchnorm._NormBase)):
        return {"num_features": vector[0]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": vector[0]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": tuple(vector)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": vector[0]}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": vector[0], "embedding_dim": vector[1]}
    return {}


# -- averages and optimizers -------------------------------------------------------------------------------


def _plan_average(
    model: nn.Module,
    average: nn.Module | MutableMapping[str, Tensor],
    graph: ChannelGraph,
    mask: np.ndarray,
    changes: Changes,
) -> None:
    if isinstance(average, nn.Module):
        wrapped = not {axis.tensor for axis in graph.axes} <= named_tensors(average).keys()
        inner = getattr(average, "module", None) if wrapped else average  # as AveragedModel holds its network
        plan_network(inner if isinstance(inner, nn.Module) else average, graph, mask, changes)
        return
    aliases = {axis.tensor: axis.aliases for axis in graph.axes}
    tensors = named_tensors(model)
    cuts = tensor_cuts(graph, mask)
    seen: dict[int, Tensor] = {}
    averaged = {name: value for name, value in average.items() if isinstance(value, Tensor)}
    gains = weight_norm_gains(model, {**tensors, **averaged}, cuts)
    for name, per_dim in cuts.items():
        for alias in aliases[name]:
            if alias not in average:
                continue
            old = average[alias]
            if old.shape != tensors[name].shape:
                raise RewriteError(
                    f"the average's {alias!r} is {tuple(old.shape)} and the network's {tuple(tensors[name].shape)}"
                )
            gain = gains.get(name)
            new = seen.setdefault(id(old), sliced_like(old, per_dim) if gain is None else gain)
            changes.set_item(average, alias, new)
    for name, gain in gains.items():
        if name not in cuts and name in average:
            changes.set_item(average, name, gain)


def _plan_optimizer(optimizer: Optimizer, changes: Changes) -> None:
    """Slice every state tensor that has its parameter's shape; a parameter whose state fits no form starts anew."""
    for parameter, state in optimizer.state.items():
        cuts = changes.cuts.get(id(parameter))
        if cuts is None or not state:
            continue
        sliced: dict[str, Tensor] = {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() > 1:
                own_cuts = _state_cuts(value, parameter, cuts)
                if own_cuts is None:
                    _plan_restart(state, changes.names[id(parameter)], changes)
                    break
                sliced[key] = sliced_like(value, own_cuts)
        else:
            for key, value in sliced.items():
                changes.set_item(state, key, value)


def _state_cuts(value: Tensor, parameter: Tensor, cuts: Cuts) -> Cuts | None:
    """Cuts of a state of the parameter's shape, or with some dimensions reduced to 1 (factored moments)."""
    if value.dim() != parameter.dim():
        return None
    if any(a not in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True)):
        return None
    return {dim: index for dim, index in cuts.items() if value.shape[dim] == parameter.shape[dim]}


def _plan_restart(state: MutableMapping[str, Any], name: str, changes: Changes) -> None:
    values = dict(state)
    changes.add(state.clear, lambda: state.update(values))
    changes.dropped.append(name)
