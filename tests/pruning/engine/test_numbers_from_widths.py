"""Numbers that follow from a width, where the values of a trial hide them: thresholds, factors of silent parts."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.equal_to_masked import close, cut_equals_zeroed, outputs, outputs_without, prepared
from torch import Tensor, nn

from pruning import RewriteError, prune, prune_channels, trace_groups

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
Between = Callable[[nn.Module, Tensor], Tensor]


class Network(nn.Module):
    """Two convolutions; what happens behind them is the test's own."""

    def __init__(self, between: Between, scale: float = 1.0) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)
        self.register_buffer("fade", torch.zeros(1))
        self.sign = nn.Parameter(torch.tensor(-1.0))
        self.between = between
        with torch.no_grad():
            self.a.weight *= scale
            self.b.weight *= scale

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self, self.b(self.a(x).relu())).mean((2, 3)))


def minus_width(_model: nn.Module, y: Tensor) -> Tensor:
    return (y - y.shape[1]).relu()


def cropped_by_width(_model: nn.Module, y: Tensor) -> Tensor:
    return y.clamp(-3.0 * y.shape[1], 3.0 * y.shape[1])


def nothing_above_width(_model: nn.Module, y: Tensor) -> Tensor:
    return torch.where(y > torch.tensor(y.shape[1]), 0.0, y)


def fading_in(model: nn.Module, y: Tensor) -> Tensor:
    return y + model.fade * (y / y.shape[1])


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("between", [minus_width, cropped_by_width, nothing_above_width])
def test_a_number_from_a_width_keeps_its_channels(between: Between, scale: float) -> None:
    """The values of a trial reach few of these bounds, those of the network may."""
    model, args = prepared(Network(between, scale), (IMAGES,))
    graph = trace_groups(model, args)
    assert "b" in graph.frozen
    assert "follows from a width" in graph.frozen["b"]
    assert "test_numbers_from_widths.py:" in graph.frozen["b"]
    cut, _, refused = cut_equals_zeroed(model, args, graph=graph)
    assert refused == 0
    assert cut.a.out_channels < 16


def in_thirds(y: Tensor) -> Tensor:
    """Count channels so that a cut, unless it is the same in all thirds, moves them to others."""
    return torch.cat([part * (number + 1) for number, part in enumerate(y.tensor_split(3, 1))], 1)


def fading_by_buffer(model: nn.Module, y: Tensor) -> Tensor:
    return y + model.fade * in_thirds(y)


def fading_by_number(model: nn.Module, y: Tensor) -> Tensor:
    return y + float(model.fade) * in_thirds(y)


@pytest.mark.parametrize("between", [fading_in, fading_by_buffer, fading_by_number])
def test_a_branch_that_fades_in_later_is_looked_at(between: Between) -> None:
    """What is multiplied by zero shows in no output; the branch has to be right when the factor has risen."""
    model, args = prepared(Network(between), (IMAGES,))
    graph = trace_groups(model, args)
    assert float(model.fade) == 0
    cut, followed = copy.deepcopy(model), copy.deepcopy(graph)
    keep = {group.name: np.arange(0, group.width, 2) for group in graph.prunable}
    prune_channels(cut, followed, keep)
    for network in (model, cut):
        network.fade.fill_(1.0)
    for training in (False, True):
        assert close(outputs_without(model, graph, keep, args, training), outputs(cut, args, training))
    assert [group.name for group in graph.prunable] == ["a"]


def test_numbers_that_differ_from_run_to_run_are_none_of_a_width() -> None:
    def by_the_clock(_model: nn.Module, y: Tensor) -> Tensor:
        return y + 1e-9 * (time.perf_counter() % 1)

    assert not {"a", "b"} & trace_groups(Network(by_the_clock), IMAGES).frozen.keys()


def test_numbers_of_the_images_are_none_of_a_width() -> None:
    def by_the_largest(_model: nn.Module, y: Tensor) -> Tensor:
        return y.clamp(max=0.5 * float(y.max()))

    model, args = prepared(Network(by_the_largest), (IMAGES,))
    cut, _, refused = cut_equals_zeroed(model, args)
    assert refused == 0
    assert cut.b.out_channels < 16


def louder_if_strong(_model: nn.Module, y: Tensor) -> Tensor:
    return y * 2 if y.abs().mean().item() > 100 / y.shape[1] else y


def other_path_below_zero(model: nn.Module, y: Tensor) -> Tensor:
    return y if model.sign.item() > 0 or y.shape[1] > 12 else y * 2


@pytest.mark.parametrize("between", [louder_if_strong, other_path_below_zero])
def test_a_decision_that_only_the_networks_own_weights_take_is_refused(between: Between) -> None:
    torch.manual_seed(0)
    model = Network(between, scale=8.0).eval()
    before = model(IMAGES)
    graph = trace_groups(model, IMAGES)
    with pytest.raises(RewriteError, match="Nothing was changed"):
        prune_channels(model, graph, {"b": range(5)})
    assert torch.equal(model(IMAGES), before)
    prune_channels(model, graph, {"a": range(5)})
    assert torch.isfinite(model(IMAGES)).all()


def test_a_network_that_has_diverged_can_be_cut() -> None:
    model = Network(lambda _model, y: y)
    with torch.no_grad():
        model.a.weight.fill_(torch.inf)
    prune(model, IMAGES, budget=0.5, criterion="random")
    assert model.a.out_channels < 16
