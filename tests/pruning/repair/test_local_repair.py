"""A repair of a cut that is not made: the same weights as the repair of the cut, and none of it is left."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from pruning import prune_channels, trace_groups
from pruning.engine.gates import Gates
from pruning.repair.local_repair import LocalRepair
from pruning.repair.repairing import RepairSettings, plan_repair
from pruning.search.loss_change import LossChange
from pruning.task import Task

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip


def test_it_does_what_the_repair_of_the_cut_would_do() -> None:
    model = network()
    graph = trace_groups(model, IMAGES[:2])
    group = graph.prunable[0]
    keep = {group.index: np.array([0, 1, 3])}
    mask = graph.keep_mask(keep)
    state = copy.deepcopy(model.state_dict())
    local = LocalRepair(model, graph, [(IMAGES,)], ridge=1e-9)
    local.prepare([mask])
    with torch.no_grad(), Gates(model, graph) as gates, local.applied(mask):
        gates.set_mask(mask)
        found = model(IMAGES)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])

    settings = RepairSettings(ridges=(1e-9,), scope="cut")
    plan = plan_repair(model, graph, mask, settings)
    prune_channels(model, graph, keep)
    assert plan.repair(model, [(IMAGES,)]).kept
    torch.testing.assert_close(found, model(IMAGES), atol=2e-3, rtol=1e-2)


def test_candidates_are_judged_as_repaired() -> None:
    """Of two equal channels one can go for nothing, if the repair is counted."""
    model = network()
    with torch.no_grad():
        for gone, twin_of in ((1, 0), (5, 4)):  # one channel of each group of the second layer
            model[0].weight[gone], model[0].bias[gone] = model[0].weight[twin_of], model[0].bias[twin_of]
    graph = trace_groups(model, IMAGES[:2])
    units = graph.prunable[0]
    twin = {units.index: np.delete(np.arange(units.width), 1)}
    wanted = model(IMAGES).detach()
    task = Task(loss=lambda outputs, batch: (outputs - batch[1]).square().mean(1))
    batches = [(IMAGES, wanted)]
    judge = LossChange(
        model, graph, batches, task=task, repair=LocalRepair(model, graph, batches, task=task, ridge=1e-9)
    )
    assert judge.measure([twin])[0] < 1e-6 < judge.measure([twin], repaired=False)[0]


def test_what_was_solved_before_changes_nothing() -> None:
    """Candidates after one another, some of them twice, do as each would alone."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    graph = trace_groups(model, IMAGES[:2])
    first, second = graph.prunable
    one, other = {first.index: np.array([0, 2, 3])}, {second.index: np.array([1, 2])}
    cuts = [one, other, one | other, {first.index: np.array([0, 3])}, one, one | other]
    task = Task(loss=lambda outputs, batch: outputs.square().mean(1))

    def losses(several: list[dict[int, np.ndarray]]) -> list[float]:
        repair = LocalRepair(model, graph, [(IMAGES,)], task=task)
        return LossChange(model, graph, [(IMAGES,)], task=task, repair=repair).measure(several).tolist()

    np.testing.assert_allclose(losses(cuts), [losses([cut])[0] for cut in cuts], rtol=1e-6)
