"""Finds provably dead channels: those whose removal leaves the outputs of all their consumers unchanged.

A consumer is unaffected by a channel that is zero for every image (proved by `constants.py`), a channel that it
multiplies by zero weights (in all rows that matter themselves), or a constant whose contribution can be moved elsewhere
exactly (`folding.py`). A unit, that is, a coupled group's channel, is dead if this holds for all its consumers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.models.running import Args
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Place
from pruning.engine.named_tensors import named_tensors
from pruning.engine.operators.unknowns import NotFollowedError
from pruning.masked.constants import observed_constants
from pruning.masked.folding import Folding, is_plain, offset_of


@dataclasses.dataclass
class _Reading:
    """The input of one consumer, at one call in a forward pass.

    Attributes:
        place: The consumer's input.
        constants: (positions,) the constant at every position, NaN if it depends on the image.
        used: (positions, outputs) whether a weight is not zero; None if the weights are unknown.
        outputs: (outputs,) unit of every output, -1 for outputs without a unit.
    """

    place: Place
    constants: np.ndarray
    used: np.ndarray | None
    outputs: np.ndarray

    def noticed(self, dead: np.ndarray) -> np.ndarray:
        """Return which positions have a non-zero weight to an output that matters, (positions,) bool."""
        if self.used is None:
            return np.ones(len(self.constants), dtype=bool)
        matters = (self.outputs < 0) | ~dead[np.maximum(self.outputs, 0)]
        return np.asarray(self.used[:, matters].any(axis=1))


@dataclasses.dataclass(frozen=True)
class KeptChannels:
    """Masked channels that could not be removed.

    Attributes:
        group: Name of the channel group.
        layers: Layers that produce its units and whose weights for them are all zero.
        count: Number of these units.
        reason: Why they are kept.
    """

    group: str
    layers: tuple[str, ...]
    count: int
    reason: str

    @property
    def masked_layers(self) -> str:
        """Return the layers in words, at most three of them."""
        more = f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else ""
        return ", ".join(self.layers[:3]) + more


@dataclasses.dataclass
class Verdict:
    """The result of the search for dead units.

    Attributes:
        dead: (num_units,) bool.
        offsets: Layer to what the removal of dead constants takes from its outputs: (outputs,) float64.
        reasons: Unit to why it is kept, for units with an objection against removal.
    """

    dead: np.ndarray
    offsets: dict[str, Tensor]
    reasons: dict[int, str]


def find_dead(
    model: nn.Module,
    graph: ChannelGraph,
    images: Args,
    folding: Folding,
    vetoed: Mapping[int, str] | None = None,
) -> Verdict:
    """Decide for every unit of a network whether it is dead.

    Args:
        model: The network; it is not modified.
        graph: Its channel graph.
        images: Its positional arguments, for their shapes.
        folding: Folding of this network in its current state.
        vetoed: Indices of groups that must not shrink, with the reason.
    """
    readings = _readings(model, graph, images)
    reasons = _untouchable(graph, readings, vetoed or {})
    dead = np.zeros(graph.num_units, dtype=bool)
    while True:  # every dead output makes fewer weights matter
        blocked = dict(reasons)
        for reading in readings:
            _object(reading, dead, graph, folding, blocked)
        found = np.array([unit not in blocked for unit in range(graph.num_units)])
        found = _spare_last(graph, found, dead, blocked)
        if np.array_equal(found, dead):
            return Verdict(dead, _offsets(model, readings, dead), blocked)
        dead = found


def _readings(model: nn.Module, graph: ChannelGraph, images: Args) -> list[_Reading]:
    places = [place for place in graph.places if place.kind == "input" and place.consumer]
    try:
        constants = observed_constants(model, images, places)
    except NotFollowedError:
        constants = {n: np.full(len(place.units), np.nan) for n, place in enumerate(places)}
    rows = {
        alias: axis.units
        for axis in graph.axes
        if axis.dim == 0 and axis.role == "out"
        for alias in axis.aliases
    }
    modules = dict(model.named_modules())
    readings = []
    for number, values in constants.items():
        place = places[number]
        used, outputs = _used_weights(modules[place.module], place)
        units = rows.get(f"{place.module}.weight")
        if units is not None and len(units) == len(outputs):
            outputs = units
        readings.append(_Reading(place, values, used, outputs))
    return readings


def _used_weights(module: nn.Module, place: Place) -> tuple[np.ndarray | None, np.ndarray]:
    """Return which weights are not zero, (positions, outputs) bool, and -1 for every output, (outputs,)."""
    if not is_plain(module):
        return None, np.empty(0, dtype=np.int64)
    weight = module.get_parameter("weight").detach()
    nonzero = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
    groups, (rows, columns) = getattr(module, "groups", 1), nonzero.shape
    if columns * groups != len(place.units):
        return None, np.empty(0, dtype=np.int64)
    used = torch.zeros(columns * groups, rows, dtype=torch.bool)
    step = rows // groups
    for g in range(groups):
        block = nonzero[g * step : (g + 1) * step].T.cpu()
        used[g * columns : (g + 1) * columns, g * step : (g + 1) * step] = block
    return used.numpy(), np.full(rows, -1)


def _untouchable(graph: ChannelGraph, readings: list[_Reading], vetoed: Mapping[int, str]) -> dict[int, str]:
    """Return the units that must stay whatever their values are, with the reason."""
    reasons: dict[int, str] = {}
    for group in graph.groups:
        if not group.prunable or group.index in vetoed:
            why = vetoed.get(group.index, group.reason)
            reasons.update(dict.fromkeys(group.units.tolist(), why))
    for statistics in graph.statistics:
        why = f"the statistics of {statistics.module} are taken over it, and would change"
        reasons.update(dict.fromkeys(statistics.units[statistics.units >= 0].tolist(), why))
    reasons.update(dict.fromkeys(graph.ungated.tolist(), "an operator outside any layer reads it"))
    seen = {int(unit) for reading in readings for unit in reading.place.units}
    training = {int(unit) for place in graph.places if place.consumer for unit in place.units} - seen
    for unit in range(graph.num_units):
        if unit in training:
            reasons.setdefault(unit, "it belongs to a part that runs in training only")
        elif unit not in seen:
            reasons.setdefault(unit, "no layer that reads it was found")
    return reasons


def _object(
    reading: _Reading, dead: np.ndarray, graph: ChannelGraph, folding: Folding, blocked: dict[int, str]
) -> None:
    """Record objections against units whose removal this consumer would notice."""
    constants = reading.constants
    layer = reading.place.module
    noticed = reading.noticed(dead) & (reading.place.units >= 0) & (constants != 0)
    for position in np.flatnonzero(noticed):
        unit = int(reading.place.units[position])
        if np.isnan(constants[position]):
            blocked.setdefault(unit, f"what {layer} reads of it still depends on the image")
        elif isinstance(why := folding.sinks(layer), str):
            blocked.setdefault(unit, f"it is a constant other than zero, and {why}")


def _spare_last(
    graph: ChannelGraph, found: np.ndarray, dead: np.ndarray, blocked: dict[int, str]
) -> np.ndarray:
    """Keep one unit of every group, chosen among those alive so far, so that no layer becomes empty.

    Reviving an already dead unit could revive the units that died because of it, round after round.
    """
    for group in graph.groups:
        if group.width and found[group.units].all():
            unit = int(group.units[~dead[group.units]][0])
            found[unit] = False
            blocked[unit] = "it is the last channel, and a layer needs one"
    return found


def _offsets(model: nn.Module, readings: list[_Reading], dead: np.ndarray) -> dict[str, Tensor]:
    modules = dict(model.named_modules())
    offsets = dict[str, Tensor]()
    for reading in readings:
        units = reading.place.units
        going = (units >= 0) & dead[np.maximum(units, 0)]
        going &= ~np.isnan(reading.constants) & (reading.constants != 0)
        if going.any() and (going & reading.noticed(dead)).any():
            positions = torch.from_numpy(np.flatnonzero(going))
            values = torch.from_numpy(reading.constants[going])
            offsets[reading.place.module] = offset_of(modules[reading.place.module], positions, values)
    return offsets


def masked_units(model: nn.Module, graph: ChannelGraph) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the units with some producing layer whose weights are all zero: these layers, and the layers with non-zero
    ones.
    """
    tensors = named_tensors(model)
    zero: dict[int, list[str]] = {}
    live: dict[int, list[str]] = {}
    for axis in graph.axes:
        if axis.role != "out":
            continue
        values = tensors[axis.tensor].detach().movedim(axis.dim, 0).flatten(1)
        owner, _, name = axis.tensor.rpartition(".")
        if name == "bias":
            continue
        empty = (values == 0).all(dim=1).cpu().numpy()
        for unit, is_empty in zip(axis.units.tolist(), empty.tolist(), strict=True):
            if unit >= 0:
                (zero if is_empty else live).setdefault(unit, []).append(owner)
    return {
        unit: (tuple(dict.fromkeys(layers)), tuple(dict.fromkeys(live.get(unit, ()))))
        for unit, layers in zero.items()
    }


def kept_channels(model: nn.Module, graph: ChannelGraph, verdict: Verdict) -> tuple[KeptChannels, ...]:
    """Return the masked channels that are kept, and why: one entry per group, masked layers and reason."""
    counts: dict[tuple[str, tuple[str, ...], str], int] = {}
    for unit, (masked, others) in masked_units(model, graph).items():
        if verdict.dead[unit]:
            continue
        group = graph.groups[int(graph.group_of_unit[unit])]
        reason = verdict.reasons.get(unit, "")
        if others and "depends on the image" in reason:
            more = f" and {len(others) - 2} more" if len(others) > 2 else ""
            reason = f"it is coupled with channels of {', '.join(others[:2])}{more} that are not zero"
        key = (group.name, masked, reason)
        counts[key] = counts.get(key, 0) + 1
    return tuple(
        KeptChannels(group, masked, count, reason) for (group, masked, reason), count in counts.items()
    )
