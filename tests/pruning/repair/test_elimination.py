"""The order of elimination against sums of squares that NumPy's lstsq leaves, column set by column set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pruning import trace_groups
from pruning.repair.elimination import elimination, loaded_inverse, loaded_inverses
from pruning.repair.unit_inputs import reading_units, unit_inputs

IMAGES = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def network(kernel: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, kernel), nn.Flatten()
    ).eval()  # fmt: skip


def rows_of(model: nn.Sequential, kernel: int) -> np.ndarray:
    with torch.no_grad():
        unfolded: Tensor = nn.functional.unfold(model[:2](IMAGES), kernel)
    return unfolded.transpose(1, 2).reshape(-1, 5 * kernel**2).double().numpy()


def lost(rows: np.ndarray, weights: np.ndarray, gone: list[int], taps: int) -> float:
    """Share of the outputs' variance that the best weights of the other columns, and a constant, leave."""
    outputs = rows @ weights
    outputs = outputs - outputs.mean(0)
    stays = [column for column in range(rows.shape[1]) if column // taps not in gone]
    centred = rows[:, stays] - rows[:, stays].mean(0)
    found = np.linalg.lstsq(centred, outputs, rcond=None)[0]
    return float(np.square(outputs - centred @ found).sum() / np.square(outputs).sum())


@pytest.mark.parametrize("kernel", [1, 2])
def test_each_unit_that_goes_is_the_cheapest_after_least_squares(kernel: int) -> None:
    model = network(kernel)
    graph = trace_groups(model, IMAGES[:2])
    (group,) = graph.prunable
    inputs = unit_inputs(model, graph, [IMAGES], reading_units(graph))
    order, losses = elimination(inputs, torch.from_numpy(group.units), ridge=1e-12)
    assert sorted(order.tolist()) == list(range(5))

    rows, taps = rows_of(model, kernel), kernel**2
    weights = model[2].weight.detach().double().flatten(1).T.numpy()
    gone: list[int] = []
    for unit, loss in zip(order.tolist()[:-1], losses.tolist(), strict=False):
        costs = {one: lost(rows, weights, [*gone, one], taps) for one in range(5) if one not in gone}
        assert min(costs, key=lambda one: costs[one]) == unit
        assert loss == pytest.approx(costs[unit], rel=1e-3)
        gone.append(unit)


def test_units_of_unlike_numbers_of_columns() -> None:
    """A linear layer behind a flattened map and a convolution read the same units."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1), nn.Linear(4 * 16, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x)
            return self.conv(x), self.head(x.flatten(1))

    model = Both().eval()
    with torch.no_grad():  # a twin costs nothing
        model.first.weight[3], model.first.bias[3] = model.first.weight[1], model.first.bias[1]
    graph = trace_groups(model, IMAGES[:2])
    (group,) = graph.prunable
    inputs = unit_inputs(model, graph, list(itertools.repeat(IMAGES, 2)), reading_units(graph))
    order, losses = elimination(inputs, torch.from_numpy(group.units), ridge=1e-9)
    assert order.tolist()[0] in (1, 3)
    assert losses[0] < 1e-3 < losses[1]


def test_inverses_of_several_are_those_of_each() -> None:
    """λ is raised, tenfold each time, only where roundings have swallowed it."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(50, width, generator=generator, dtype=torch.float64) for width in (4, 7)]
    sound = [one.mT @ one for one in rows]
    negative = torch.diag(torch.tensor([1.0, 1.0, -1e-3], dtype=torch.float64))  # as roundings may leave it
    grams = [sound[0], negative, sound[1]]
    found = loaded_inverses(grams, 1e-3)
    for gram, inverse in zip(grams, found, strict=True):
        assert torch.equal(inverse, loaded_inverse(gram, 1e-3))
    load = 1e-3 * negative.diagonal().mean()
    assert load < 1e-3  # not enough: 10 times as much is
    torch.testing.assert_close(found[1], torch.linalg.inv(negative + 10 * load * torch.eye(3)))
    load = 1e-3 * sound[1].diagonal().mean()
    torch.testing.assert_close(found[2], torch.linalg.inv(sound[1] + load * torch.eye(7)))
