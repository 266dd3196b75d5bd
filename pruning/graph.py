"""The coupled channel groups of any network: what can be removed, what leaves with it, what must stay and why.

    graph = trace_groups(model, example_images)
    for group in graph.groups:
        print(group.name, group.width, group.prunable, group.reason)

The network is run once (`tracing.py`), the run is repeated on channel labels (`labelling.py`, `operators/`),
united labels become groups (`groups.py`), and every group is tried against the masked network before it is
called prunable (`verify.py`). `surgery.py` removes units; the graph then follows without a new trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pruning.building import build_graph, label, record_all
from pruning.channel_graph import ChannelGraph, Constraints, GroupKey
from pruning.groups import Group, Layer, Member, Place
from pruning.tracing import undisturbed
from pruning.verify import verified_graph

__all__ = ["ChannelGraph", "Constraints", "Group", "GroupKey", "Layer", "Member", "Place", "trace_groups"]


def trace_groups(
    model: nn.Module,
    example_images: Tensor | tuple[Any, ...],
    *,
    constraints: Constraints | None = None,
    verify: bool = True,
    choices: Mapping[str, str] | None = None,
) -> ChannelGraph:
    """Find the coupled channel groups of a network.

    Args:
        model: Any network; its mode, buffers, gradients and the random state are left as they are.
        example_images: (N, 3, H, W) float, or a tuple of the network's arguments. At most two images are
            used; the result holds for any number, and for other sizes where the network allows them.
        constraints: Rounding, smallest widths, ignored layers.
        verify: Try every group against the masked network and freeze those that cannot be cut safely.

        choices: `ChannelGraph.choices` of another graph of the same architecture: couple the same way where
            there is a choice. (A resumed run takes the graph itself, `ChannelGraph.from_state`.)

    Returns:
        The graph. Groups that cannot be pruned are listed with the reason.

    Raises:
        ValueError: The network has no parameters, or does not run on the images.
    """
    images = _two_images(model, example_images)
    with undisturbed(model):
        traces = record_all(model, images)
        constraints = constraints or Constraints()
        policy = dict(choices or {})
        if verify:
            graph = verified_graph(model, images, traces, constraints, policy)
        else:
            graph = build_graph(model, traces, constraints, label(traces, policy))
    return graph


def _two_images(model: nn.Module, images: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    first = next(iter(model.parameters()), None)
    if first is None:
        raise ValueError("the network has no parameters: nothing to prune")
    arguments = images if isinstance(images, tuple) else (images,)
    return tuple(
        arg[:2].to(first.device) if isinstance(arg, Tensor) and arg.dim() > 1 else arg for arg in arguments
    )
