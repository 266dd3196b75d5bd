"""What pruning starts from: channel graph, costs and explanation, made anew or taken from an earlier run's state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from image_classification.config import ConfigError, check
from image_classification.distributed import Distributed
from pruning.budget import Budget
from pruning.channel_graph import ChannelGraph, Constraints
from pruning.cost import CostModel
from pruning.graph import trace_groups


def graph_of(
    model: nn.Module, example_images: Tensor, constraints: Constraints, state: Mapping[str, Any] | None
) -> ChannelGraph:
    """The network's channel graph: traced, or in a resumed run the one that the checkpoint holds.

    A trace of the narrower network might couple it otherwise; with the stored graph a resumed run has the choices of
    one that was never interrupted.

    Raises:
        ConfigError: Other modules were to be left alone when it was traced, or it is of another network.
    """
    if state is None:
        return trace_groups(model, example_images, constraints=constraints)
    ignored, now = (" ".join(words) or "none" for words in (state["graph"].get("ignored", constraints.ignored),
                                                            constraints.ignored))  # fmt: skip
    check(
        ignored == now,
        f"--prune-ignore {now}: the run to resume has its channel groups from --prune-ignore {ignored}: give the same, "
        "or start anew from its weights with --pretrained-weights",
    )
    graph = ChannelGraph.from_state(state["graph"], constraints)
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    for axis in graph.axes:
        size = tensors[axis.tensor].shape[axis.dim] if axis.tensor in tensors else None
        if size != len(axis.units):
            raise ConfigError(
                f"the pruning state is of another network: {axis.tensor!r} has {len(axis.units)} slices in dimension "
                f"{axis.dim} there and {size or 0} here"
            )
    return graph


def shared_costs(
    graph: ChannelGraph,
    model: nn.Module,
    example_images: Tensor,
    metrics: tuple[str, ...],
    state: Mapping[str, Any] | None,
    distributed: Distributed,
) -> CostModel:
    """The cost model; a latency table is measured on rank 0 and shared, so that all ranks decide alike. Collective.

    Args:
        graph, model, example_images, metrics: See `CostModel`.
        state: Of an earlier run, with the costs under "costs".
        distributed: The ranks.
    """
    known = None if state is None else state["costs"]
    if "latency" not in metrics or not distributed.is_distributed:
        return CostModel(graph, model, example_images, metrics, state=known)
    made: list[CostModel] = []
    distributed.check_on_main(
        lambda: made.append(CostModel(graph, model, example_images, metrics, state=known))
    )
    costs = made[0] if made else None
    shared = distributed.broadcast_object(None if costs is None else costs.state_dict())
    return costs or CostModel(graph, model, example_images, metrics, state=shared)


def check_course(state: Mapping[str, Any], budget: Budget, delta: float) -> None:
    """Rewrites are counted: with another step, or a looser budget, the count would mean another cost.

    Raises:
        ConfigError: Naming what differs.
    """
    anew = "or start anew from its weights with --pretrained-weights"
    before = state.get("delta", delta)
    check(
        before == delta,
        f"--pruning-delta {delta}: the run to resume has {before} (1: --one-shot-pruning); give that, {anew}",
    )
    for metric, share in state.get("budget", {}).items():
        now = budget.shares.get(metric, share)
        check(
            now <= share or math.isclose(now, share),
            f"--budget {metric}={now}: the run to resume has gone for {share:g}; give that or less, {anew}",
        )


def known_originals(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an earlier run knows of the original network's explanation.

    Raises:
        ConfigError: It followed none.
    """
    known: Mapping[str, Any] | None = state.get("originals")
    if known is None:
        raise ConfigError(
            "--selector, --casm, --saliency-explanation: the run to resume followed no explanation, and what it was in "
            "the original network is not known any more; leave the flag out, or start anew"
        )
    return known
