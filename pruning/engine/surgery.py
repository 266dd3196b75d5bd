"""The rewrite: remove units from a network, its gradients, its optimizers and its averages, in place.

Everything is planned first and put in place afterwards (`cutting.py`), so an error leaves the network as it was. Before
that, the cut is tried on the network's examples: it must compute what the masked network does (`proof/`).

Drop the DDP wrapper before a rewrite, and then references to the loss too: a live gradient accumulator keeps the old
shape there, and PyTorch says so in the next backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from image_classification.observe.html_table import html_table
from pruning.engine.channel_graph import ChannelGraph, Keep
from pruning.engine.computed_weights import renormalised
from pruning.engine.cutting import Changes, RewriteError, plan_network, tensor_cuts
from pruning.engine.named_tensors import named_tensors
from pruning.engine.proof.trial import failure_of_cut
from pruning.engine.slices import Cuts, sliced_like
from pruning.engine.undisturbed import forget_cached


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """The result of a rewrite.

    Attributes:
        widths: Group name to (width before, width after), changed groups only.
        kept: Group name to the positions that stayed, as before the rewrite.
        num_parameters: Parameters of the network before and after.
        macs: MACs per image before and after, by the graph.
        dropped_states: Parameters whose optimizer state has a form of its own and starts over.
    """

    widths: dict[str, tuple[int, int]]
    kept: dict[str, tuple[int, ...]]
    num_parameters: tuple[int, int]
    macs: tuple[float, float]
    dropped_states: tuple[str, ...]

    def _repr_html_(self) -> str:
        """The HTML view in a notebook: the widths before and after, and the parameters and MACs."""
        rows = [(name, before, after) for name, (before, after) in self.widths.items()]
        (before, after), (macs_before, macs_after) = self.num_parameters, self.macs
        note = f"{before:,} → {after:,} parameters; {macs_before:,.0f} → {macs_after:,.0f} MACs"
        return html_table("Channels cut away", ("group", "before", "after"), rows, [note])


def prune_channels(
    model: nn.Module,
    graph: ChannelGraph,
    keep: Keep,
    *,
    optimizers: Iterable[Optimizer] = (),
    emas: Iterable[nn.Module | MutableMapping[str, Tensor]] = (),
    check: bool = True,
) -> RewriteReport:
    """Remove units in place.

    Args:
        model: The bare network (no DDP or compile wrapper) that the graph belongs to.
        graph: Follows the rewrite; no new trace is needed.
        keep: Group (or its name or index) to the positions of the units that stay. Groups that are not
            mentioned stay whole.
        optimizers: Their state is sliced like the parameters it belongs to.
        emas: Averages of the network: copies of it, `AveragedModel`, or state dicts.
        check: Try this very cut on the examples that the graph was traced with, in both modes, before it is made.

    Raises:
        ValueError: A frozen group, an index out of range, an empty layer.
        RewriteError: Network, optimizer or average do not belong to the graph, or the cut network would compute
            something else than the masked one. Nothing was changed.
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
    failure = failure_of_cut(model, graph, mask) if check else None
    if failure is not None:
        raise RewriteError(
            f"at these widths the network would not compute what it does without the channels: {failure.message}. "
            "Nothing was changed; choose other widths, or leave the module alone (`ignored`)"
        )
    _put_in_place(changes, [model, *(ema for ema in emas if isinstance(ema, nn.Module))], graph, mask)
    counts.append(_num_parameters(model))
    macs.append(graph.macs)
    return RewriteReport(
        widths={g.name: (before[g.index], g.width) for g in graph.groups if g.index in removed},
        kept=kept,
        num_parameters=(counts[0], counts[1]),
        macs=(macs[0], macs[1]),
        dropped_states=tuple(changes.dropped),
    )


def _put_in_place(
    changes: Changes, networks: Iterable[nn.Module], graph: ChannelGraph, mask: np.ndarray
) -> None:
    """Make the planned changes, in the graph too; an error takes them back."""
    changes.apply()
    try:
        torch.clear_autocast_cache()  # it may hold casts of the old weights
        changes.leave_graphs()
        for network in networks:
            forget_cached(network)  # runs the `train` methods of the network's own classes
        graph.shrink(mask)
    except BaseException:
        changes.revert()
        raise


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
    computed = renormalised(model, {**tensors, **averaged}, cuts)
    for name, per_dim in cuts.items():
        for alias in aliases[name]:
            if alias not in average:
                continue
            old = average[alias]
            if old.shape != tensors[name].shape:
                raise RewriteError(
                    f"the average's {alias!r} is {tuple(old.shape)} and the network's {tuple(tensors[name].shape)}"
                )
            values = computed.get(name)
            new = seen.setdefault(id(old), sliced_like(old, per_dim) if values is None else values)
            changes.set_item(average, alias, new)
    for name, values in computed.items():
        if name not in cuts and name in average:
            changes.set_item(average, name, values)


class _OtherFormError(Exception):
    """Optimizer state that is not of its parameter's form."""


def _plan_optimizer(optimizer: Optimizer, changes: Changes) -> None:
    """Slice every state tensor that has its parameter's shape, also within lists and mappings.

    A parameter whose state fits no form starts over.
    """
    for parameter, state in optimizer.state.items():
        cuts = changes.cuts.get(id(parameter))
        if cuts is None or not state:
            continue
        try:
            sliced = {key: _cut_state(value, parameter, cuts) for key, value in state.items()}
        except _OtherFormError:
            _plan_restart(state, changes.names[id(parameter)], changes)
            continue
        for key, value in sliced.items():
            if value is not state[key]:
                changes.set_item(state, key, value)


def _cut_state(value: Any, parameter: Tensor, cuts: Cuts) -> Any:
    """Return an entry of a parameter's state, cut like the parameter; the same object if it holds nothing to cut.

    Raises:
        _OtherFormError: A tensor in it has another form, or it is an object that may hold tensors.
    """

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            if hasattr(leaf, "__dict__") and not callable(leaf):
                raise _OtherFormError
            return leaf
        if leaf.dim() == 0 or leaf.numel() <= 1:
            return leaf
        own_cuts = _state_cuts(leaf, parameter, cuts)
        if own_cuts is None:
            raise _OtherFormError
        return sliced_like(leaf, own_cuts)

    before, form = tree_flatten(value)
    after = [cut(leaf) for leaf in before]
    changed = any(one is not other for one, other in zip(before, after, strict=True))
    return tree_unflatten(after, form) if changed else value


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
