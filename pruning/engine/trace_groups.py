"""The coupled channel groups of any network: which channels can be removed, together with which others, and which must
stay and why.

    graph = trace_groups(model, example_images)
    for group in graph.groups:
        print(group.name, group.width, group.prunable, group.reason)

The network is run once in either mode (`tracing.py`), the runs are repeated on channel labels (`labeller.py`,
`operators/`), united labels become groups (`coupling.py`), and every group is tried against the masked network before
it is called prunable (`proof/`). `surgery.py` removes units; the graph then follows without a new trace.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from pruning.engine.building import build_graph, label_case, located
from pruning.engine.case import open_case, refuse_unready, untouched_tensors, warn_of_untouched
from pruning.engine.channel_graph import ChannelGraph, GroupKey
from pruning.engine.constraints import UNCONSTRAINED, Constraints
from pruning.engine.examples import Examples, as_examples
from pruning.engine.groups import Group, Layer, Member, Place
from pruning.engine.pairs import all_pairs
from pruning.engine.proof.verification import verified_graph
from pruning.engine.undisturbed import undisturbed

__all__ = [
    "ChannelGraph",
    "Constraints",
    "Group",
    "GroupKey",
    "Layer",
    "Member",
    "Place",
    "give_examples",
    "trace_groups",
]


def trace_groups(
    model: nn.Module,
    example: Examples,
    *,
    training_example: Examples | None = None,
    constraints: Constraints | None = None,
    verify: bool = True,
    choices: Mapping[str, str] | None = None,
) -> ChannelGraph:
    """Find the coupled channel groups of a network.

    Args:
        model: Any network; its mode, buffers, gradients and the random state are left as they are.
        example: What the network takes: (N, 3, H, W) float images, a tuple of positional or a dict of keyword
            arguments, or a list of such, which together should take every path of the network (image sizes, entry
            points). At most two images of a batch are used; the result holds for any number, and for other sizes where
            the network allows them.
        training_example: What it takes in training mode (targets included), in the same form; by default `example`.
        constraints: Rounding, smallest widths, ignored layers, submodules that are cut alike.
        verify: Try every group against the masked network and freeze those that cannot be cut safely.
        choices: `ChannelGraph.choices` of another graph of the same architecture: couple the same way where
            there is a choice. (A resumed run takes the graph itself, `ChannelGraph.from_state`.)

    Returns:
        The graph. Groups that cannot be pruned are listed with the reason.

    Raises:
        SettingError: The network has no parameters or a lazy module, does not run on an example, or returns something
            in which tensors cannot be looked for.
    """
    refuse_unready(model)
    examples = as_examples(example)
    for_training = [] if training_example is None else as_examples(training_example, "training_example")
    constraints = constraints or UNCONSTRAINED
    tied = all_pairs(model, constraints.pairs)
    with undisturbed(model):
        case = open_case(model, examples, for_training, constraints, tied)
        if verify:
            graph = verified_graph(case, choices)
        else:
            graph = build_graph(case, label_case(case, dict(choices or {})))
            graph.passes = ()
        graph.untouched = untouched_tensors(case, _widths_that_shrink(graph))
    warn_of_untouched(graph.untouched)
    return graph


def _widths_that_shrink(graph: ChannelGraph) -> set[int]:
    """Return how many slices the dimensions have from which some may go."""
    shrinking = np.array([group.prunable for group in graph.groups])[graph.group_of_unit]
    return {len(axis.units) for axis in graph.axes if shrinking[axis.units[axis.units >= 0]].any()}


def give_examples(
    graph: ChannelGraph,
    model: nn.Module,
    example: Examples,
    training_example: Examples | None = None,
) -> None:
    """Let a graph from a checkpoint try every cut before it is made, as a traced graph does.

    Args:
        graph: From `ChannelGraph.from_state`.
        model: The network that the graph belongs to, at its current widths.
        example: See `trace_groups`.
        training_example: See `trace_groups`.

    Raises:
        SettingError: As `trace_groups`.
    """
    for_training = [] if training_example is None else as_examples(training_example, "training_example")
    with undisturbed(model):
        case = open_case(model, as_examples(example), for_training, graph.constraints)
    graph.passes = tuple(case.passes)
    graph.statistics = located(graph.statistics, case.traces)
