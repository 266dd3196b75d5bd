"""Channels at the outputs of modules, followed through rewrites.

An explanation that reads feature maps (a selector's decoder, a CASM decoder) was trained on maps of the original
width. A rewrite makes the maps narrower; this says which channels stay, so that the explanation can put them back
where they were, with zeros between: "removed channel = zero".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pruning.engine.groups import FROZEN, Place


class HasPlaces(Protocol):
    """The part of `ChannelGraph` needed here."""

    places: list[Place]


def output_place(graph: HasPlaces, module: str) -> Place | None:
    """Return the place of a module's output in its last call, with the units of its channels.

    Args:
        graph: Channel graph of the network as it is now.
        module: Qualified name of a module whose output is a feature map (N, C, …).

    Returns:
        None where no channel of the output can ever go.

    Raises:
        ValueError: The output carries units along another dimension than its channels.
    """
    found = [place for place in graph.places if place.kind == "output" and place.module == module]
    if not found:
        return None
    place = max(found, key=lambda place: place.call)
    if place.dim != 1:
        raise ValueError(
            f"the output of {module!r} has its channels in dimension {place.dim}; an explanation that survives "
            "rewrites reads maps (N, C, H, W): train the selector on other taps"
        )
    return place


def staying_channels(
    graph: HasPlaces, mask: np.ndarray, modules: Iterable[str]
) -> dict[str, tuple[int, Tensor]]:
    """Find the channels of module outputs that a rewrite keeps.

    Args:
        graph: The channel graph before the rewrite.
        mask: (num_units,) bool, True for the units that stay.
        modules: Qualified names.

    Returns:
        Module → number of channels before the rewrite, and positions of those that stay, ascending; only outputs that
        get narrower.
    """
    positions = {}
    for module in modules:
        place = output_place(graph, module)
        if place is None:
            continue
        stays = (place.units == FROZEN) | mask[np.maximum(place.units, 0)]
        if not stays.all():
            positions[module] = (len(stays), torch.from_numpy(np.flatnonzero(stays)))
    return positions
