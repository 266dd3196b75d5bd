"""The module inputs and outputs at which the units of channel groups can be observed in a forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from image_classification.config import SettingError
from pruning.engine.groups import Group, Member, Place
from pruning.engine.tap_channels import output_place


class Graph(Protocol):
    """The part of `ChannelGraph` that scoring needs."""

    num_units: int
    places: list[Place]
    ungated: np.ndarray  # units that are also read outside modules, where no gate can be put

    @property
    def prunable(self) -> list[Group]:
        """The groups to score."""

    def members(self, group: Group) -> list[Member]:
        """Return the tensor slices of a group."""

    def places_of(self, group: Group, kind: str | None = None, consumer: bool | None = None) -> list[Place]:
        """Return the module inputs and outputs that carry a group's units."""


@dataclasses.dataclass(eq=False)
class Site:
    """A tensor in the forward pass and the unit of each of its channels (the last index collects the rest)."""

    place: Place
    units: Tensor

    def channels_first(self, tensor: Tensor, num_samples: int) -> Tensor:
        """Return the tensor as (N, C, …), wherever its channels are; windows of a sample become positions."""
        if tensor.shape[0] == num_samples:
            return tensor.movedim(self.place.dim, 1)
        if tensor.shape[0] % num_samples or self.place.dim == 0:
            raise SettingError(
                "ignored",
                self.place.module,
                f"give this: the {self.place.kind} of the module has shape {tuple(tensor.shape)}, whose first "
                f"dimension is not the {num_samples} samples of the batch, so it cannot be scored",
            )
        windows: Tensor = tensor.unflatten(0, (num_samples, -1))
        return windows.movedim(self.place.dim + 1, 1)


class Sites:
    """The tensors in a forward pass that show the units of channel groups.

    Args:
        graph: The channel graph.
        groups: The groups to score.
        device: Device of the network.
    """

    def __init__(self, graph: Graph, groups: Sequence[Group], device: torch.device) -> None:
        self._graph = graph
        self._groups = groups
        self._device = device

    def showing(self, kind: str, fall_back: bool = True) -> list[Site]:
        """Return the tensors that carry the groups' units, each once, with all groups of a tensor together."""
        places: dict[int, Place] = {}
        for group in self._groups:
            chosen = self._producers(group) if kind == "pre" else self._consumers(group)
            if not chosen and fall_back:
                chosen = self._consumers(group) or self._graph.places_of(group, kind="output")[:1]
            places.update((id(place), place) for place in chosen)
        return [self._site(place) for place in places.values()]

    def watched(self, modules: Iterable[str]) -> dict[str, Site]:
        """Return the outputs of modules that carry units of the groups, by module."""
        sites = {}
        for module in modules:
            place = output_place(self._graph, module)
            if place is not None:
                sites[module] = self._site(place)
        return sites

    def _site(self, place: Place) -> Site:
        """Return a place with the units of the groups that are scored."""
        wanted = (
            np.concatenate([group.units for group in self._groups]) if self._groups else np.empty(0, np.int64)
        )
        units = np.where(np.isin(place.units, wanted), place.units, self._graph.num_units)
        return Site(place, torch.from_numpy(units.astype(np.int64)).to(self._device))

    def _producers(self, group: Group) -> list[Place]:
        """Return the outputs of the layers that produce the group's units."""
        makers = {
            alias.rpartition(".")[0]
            for m in self._graph.members(group)
            if m.role == "out"
            for alias in m.aliases
        }
        return [place for place in self._graph.places_of(group, kind="output") if place.module in makers]

    def _consumers(self, group: Group) -> list[Place]:
        """Return the inputs of the layers that read the group's units."""
        return self._graph.places_of(group, kind="input", consumer=True)
