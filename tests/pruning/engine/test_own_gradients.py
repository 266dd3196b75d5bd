"""What no forward pass shows: hooks on gradients and hand-written backward passes that hold an old width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruning import prune_channels, trace_groups
from pruning.engine.own_gradients import has_gradient_hooks

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def levels(rank: int) -> Tensor:
    return torch.linspace(0, 1, 12).reshape(-1, *[1] * rank)


class Square(torch.autograd.Function):
    """Its backward pass scales the gradient of each of 12 channels by a number of its own."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return 2 * x * gradient * levels(2)


class Mean(torch.autograd.Function):
    """Its backward pass divides by the width."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient / gradient.shape[1]


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(self.b(self.a(x).relu())).mean((2, 3)))


class Squared(Network):
    def middle(self, x: Tensor) -> Tensor:
        return Square.apply(x)


class Averaged(Network):
    def middle(self, x: Tensor) -> Tensor:
        return Mean.apply(x)


class Adversarial(Network):
    def middle(self, x: Tensor) -> Tensor:
        return Reversed.apply(x)


class HookedInForward(Network):
    def middle(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * levels(2))
        return x


class Watched(Network):
    """As tutorials on Grad-CAM have it: without asking whether there will be a gradient."""

    def middle(self, x: Tensor) -> Tensor:
        x.register_hook(lambda gradient: None)
        x.retain_grad()
        return x


class HookedWeight(Network):
    """A mask says which rows of a weight learn."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight.register_hook(lambda gradient: gradient * levels(3))


@pytest.mark.parametrize("kind", [Squared, HookedInForward, HookedWeight])
def test_what_holds_an_old_width_stays(kind: type[Network]) -> None:
    graph = trace_groups(kind(), IMAGES)
    assert "the backward pass raises RuntimeError" in graph.frozen["b"]
    assert [group.name for group in graph.prunable] == ["a"]


def test_gradients_that_a_width_decides_on_are_a_difference() -> None:
    graph = trace_groups(Averaged(), IMAGES)
    assert "the gradient of" in graph.frozen["b"]
    assert [group.name for group in graph.prunable] == ["a"]


@pytest.mark.parametrize("kind", [Network, Adversarial, Watched])
def test_what_holds_for_any_width_is_cut_and_learns_on(kind: type[Network]) -> None:
    torch.manual_seed(0)
    model = kind()
    graph = trace_groups(model, IMAGES)
    assert [group.name for group in graph.prunable] == ["a", "b"]
    prune_channels(model, graph, {"a": [0, 3], "b": [1, 2, 5]})
    model(IMAGES).sum().backward()
    assert model.b.weight.grad is not None
    assert model.b.weight.grad.shape == (3, 2, 3, 3)


def test_hooks_and_gradients_are_as_before_the_analysis() -> None:
    model = HookedWeight()
    model(IMAGES).sum().backward()
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    hooks, apply = len(model.b.weight._backward_hooks), torch.autograd.Function.__dict__["apply"]
    trace_groups(model, IMAGES)
    assert all(parameter.grad is before[name] for name, parameter in model.named_parameters())
    assert len(model.b.weight._backward_hooks) == hooks
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_only_networks_with_hooks_pay_for_a_backward_pass() -> None:
    assert not has_gradient_hooks(Network())
    assert not has_gradient_hooks(Squared())  # the recording sees its function run
    assert has_gradient_hooks(HookedInForward())
    assert has_gradient_hooks(HookedWeight())
