"""Gates on feature maps as an explanation reads them.

A decoder that reads a network's feature maps uses their channels just as the next layers do. Code that multiplies
channels by gates to measure their importance (derivatives at a gate of 1, removal at a gate of 0) must also gate what
the decoder reads:

    with gated_features(lambda tap, feature: feature * gates[tap]):
        phi = explanation(model, images, classes)

`FeatureTaps` passes captured maps through the gate of the surrounding block; the network itself is unaffected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor

FeatureGate = Callable[[str, Tensor], Tensor]
"""Maps (name of a tap, its feature map) to the feature map with its channels gated."""

_GATE: ContextVar[FeatureGate | None] = ContextVar("feature_gate", default=None)


@contextlib.contextmanager
def gated_features(gate: FeatureGate) -> Iterator[None]:
    """Make explanations inside the block read feature maps through `gate`."""
    token = _GATE.set(gate)
    try:
        yield
    finally:
        _GATE.reset(token)


def through_gate(tap: str, feature: Tensor) -> Tensor:
    """Pass a feature map through the gate of the surrounding block; unchanged if there is none."""
    gate = _GATE.get()
    return feature if gate is None else gate(tap, feature)
