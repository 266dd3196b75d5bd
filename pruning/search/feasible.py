"""Trial of a chosen cut: groups whose cut would make the network compute something else than a gated network are cut
less.

A network whose code depends on a width (`if x.shape[1] == 7`) may work at almost all widths. So the exact cut is tried
before it is made; a group that breaks it keeps a few more channels, or all of them this time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from torch import nn

from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.proof.trial import failure_of_cut

log = logging.getLogger(__name__)


def feasible(
    model: nn.Module, graph: ChannelGraph, keep: Mapping[int, np.ndarray], scores: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """Return the cut, or the closest one that leaves the network's function intact.

    Args:
        model: The network.
        graph: Its channel graph.
        keep: Group index → positions that stay.
        scores: Group index → (width,) scores: the best of the channels to remove are kept first.
    """
    failure = failure_of_cut(model, graph, graph.keep_mask(keep))
    if failure is None:
        return dict(keep)
    accepted: dict[int, np.ndarray] = {}
    changed = []
    for index, kept in keep.items():
        for positions in (kept, _wider(graph, index, kept, scores[index])):
            tried = {**accepted, index: positions}
            if failure_of_cut(model, graph, graph.keep_mask(tried)) is None:
                accepted = tried
                break
        width = len(accepted.get(index, scores[index]))
        if width != len(kept):
            changed.append(f"{graph.groups[index].name} keeps {width} instead of {len(kept)}")
    log.warning(
        "at the chosen widths the network would not compute what it does without the channels (%s): %s",
        failure.message,
        ", ".join(changed),
    )
    return accepted


def _wider(graph: ChannelGraph, index: int, kept: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the positions to keep at the next larger allowed width."""
    width = min(width for width in graph.allowed_widths(index) if width > len(kept))
    gone = np.setdiff1d(np.arange(len(scores)), kept)
    best = gone[np.argsort(-scores[gone], kind="stable")[: width - len(kept)]]
    return np.sort(np.concatenate([kept, best]))
