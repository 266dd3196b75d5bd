"""Starting point of pruning: channel graph, costs and explanation, new or restored from an earlier run's state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn

from image_classification.config import ConfigError, SettingError, check_setting
from image_classification.distributed import Distributed
from image_classification.plain_data import Plain
from pruning.costs.budget import Budget
from pruning.costs.cost_model import CostModel, CostState
from pruning.costs.latency_measure import autocast_type
from pruning.costs.latency_table import LatencySettings
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.constraints import Constraints
from pruning.engine.examples import Example as Call
from pruning.engine.examples import Examples
from pruning.engine.trace_groups import give_examples, trace_groups

_OR_START_OVER = "or start over from its weights"


class ResumedState(TypedDict):
    """State that every pruning run keeps of its start: the channel graph, and costs with their baseline."""

    graph: Plain
    costs: CostState


class PrunerState(ResumedState):
    """State of a `Pruner`. States of older versions lack some entries.

    Attributes:
        completed: Number of rewrites done.
        delta, budget: The course of the budget.
        history: Fields of the `RewriteRecord` of every rewrite.
        originals: Values of the original network's explanation; None if none is followed.
    """

    completed: int
    delta: NotRequired[float]
    budget: NotRequired[dict[str, float]]
    history: list[Plain]
    originals: NotRequired[Plain | None]


def graph_of(
    model: nn.Module,
    example: Examples,
    constraints: Constraints,
    state: ResumedState | None,
    *,
    training_example: Examples | None = None,
) -> ChannelGraph:
    """Return the network's channel graph: traced, or in a resumed run the one in the checkpoint.

    A trace of the narrower network might couple channels differently; with the stored graph, a resumed run makes the
    same choices as an uninterrupted one.

    Raises:
        ConfigError: The stored graph was traced with other modules left alone, or belongs to another network.
    """
    if state is None:
        return trace_groups(model, example, training_example=training_example, constraints=constraints)
    before = " ".join(state["graph"].get("ignored", constraints.ignored)) or "none"
    now = " ".join(constraints.ignored) or "none"
    check_setting(
        before == now,
        "ignored",
        now,
        f"the run to resume left {before} alone when its channel groups were found: give the same, {_OR_START_OVER}",
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
    give_examples(graph, model, example, training_example)
    return graph


def shared_costs(
    graph: ChannelGraph,
    model: nn.Module,
    example: Tensor | Call,
    metrics: tuple[str, ...],
    state: ResumedState | None,
    distributed: Distributed,
    autocast: Callable[[], AbstractContextManager[object]],
) -> CostModel:
    """Build the cost model; rank 0 measures the latency table and shares it, so that all ranks decide alike.
    Collective.

    Args:
        graph, model, example, metrics: See `CostModel`.
        state: State of an earlier run, with the costs under "costs".
        distributed: The ranks.
        autocast: Context of the job's forward passes, under which latency is measured.
    """
    known = None if state is None else state["costs"]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    settings = LatencySettings(autocast=autocast_type(autocast, device))

    def make(state: CostState | None) -> CostModel:
        return CostModel(graph, model, example, metrics, state=state, latency=settings)

    if "latency" not in metrics or not distributed.is_distributed:
        return make(known)
    made: list[CostModel] = []
    distributed.check_on_main(lambda: made.append(make(known)))
    costs = made[0] if made else None
    shared = distributed.broadcast_object(None if costs is None else costs.state_dict())
    return costs or make(shared)


def check_course(state: PrunerState, budget: Budget, delta: float) -> None:
    """Check that the course is unchanged: with another delta or a looser budget, the count of rewrites would mean
    another cost.

    Raises:
        SettingError: The course differs; the message says how.
    """
    before = state.get("delta", delta)
    check_setting(
        before == delta,
        "delta",
        delta,
        f"the run to resume has {before} (1: everything at once); give that, {_OR_START_OVER}",
    )
    for metric, share in state.get("budget", {}).items():
        now = budget.shares.get(metric, share)
        check_setting(
            now <= share or math.isclose(now, share),
            "budget",
            f"{metric}={now}",
            f"the run to resume has gone for {share:g}; give that or less, {_OR_START_OVER}",
        )


def known_originals(state: PrunerState) -> Mapping[str, object]:
    """Return an earlier run's values of the original network's explanation.

    Raises:
        SettingError: The earlier run followed no explanation.
    """
    known = state.get("originals")
    if known is None:
        raise SettingError(
            "originals",
            "given",
            "the run to resume followed no explanation, and what it was in the original network is not known any "
            f"more; follow none, {_OR_START_OVER}",
        )
    return known
