"""Gates on feature maps as an explanation reads them.

A decoder that reads a network's feature maps uses their channels just as the next layers do. Code that multiplies
channels by gates to measure their importance (derivatives at a gate of 1, removal at a gate of 0) must gate what the
decoder reads, too:

    with gated_features(lambda tap, feature: feature * gates[tap]):
        phi = explanation(model, images, classes)

`FeatureTaps` hands what it has caught through the gate of the surrounding block; the network itself goes on unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor

FeatureGate = Callable[[str, Tensor], Tensor]
"""(name of a tap, its feature map) → the map with its channels' gates."""

_GATE: ContextVar[FeatureGate | None] = ContextVar("feature_gate", default=None)


@contextlib.contextmanager
def gated_features(gate: FeatureGate) -> Iterator[None]:
    """Let explanations inside the block read feature maps through `gate`."""
    token = _GATE.set(gate)
    try:
        yield
    finally:
        _GATE.reset(token)


def through_gate(tap: str, feature: Tensor) -> Tensor:
    """A feature map through the gate of the surrounding block; unchanged without one."""
    gate = _GATE.get()
    return feature if gate is None else gate(tap, feature)
