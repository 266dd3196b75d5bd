"""What raises in the middle of a rewrite leaves network, graph, optimizer and record telling the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from image_classification.config import ConfigError
from pruning import Pruner, prune_channels, trace_groups
from pruning.task import on_targets

BATCHES = [
    (torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(n)), torch.arange(8) % 4)
    for n in range(3)
]
IMAGES = BATCHES[0][0]


class UsersError(Exception):
    """What code of a user raises."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convs = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU())
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))


def pruner_of(model: nn.Module, delta: float = 0.25, **settings: Any) -> Pruner:
    return Pruner(
        model, IMAGES[:2], budget=0.5, delta=delta, criterion="magnitude", search="global", **settings
    )


def widths(pruner: Pruner) -> dict[str, int]:
    return {group.name: group.width for group in pruner.graph.groups}


class Refusing(nn.Sequential):
    """UsersError when its mode is set once its first layer has become narrower, unless it is told to bear it."""

    bears = False

    def train(self, mode: bool = True) -> Refusing:
        if len(self) and self[0].out_channels < 16 and not self.bears:
            raise UsersError("too narrow")
        return super().train(mode)


@pytest.mark.parametrize("error", [UsersError("of a hook"), KeyboardInterrupt()])
def test_a_cut_whose_repair_raises_is_recorded(error: BaseException) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pruner = pruner_of(model, 0.15, optimizer=optimizer, repair="least-squares")
    chosen = pruner.step(BATCHES)  # chosen and repaired as usual
    assert not chosen.unfinished
    narrow = model[0].out_channels

    def hook(module: nn.Module, *_: Any) -> None:
        if isinstance(module, nn.Conv2d) and module.weight.shape[0] < narrow and pruner.completed == 2:
            raise error

    handle = model[0].register_forward_hook(hook)
    with pytest.raises(type(error)):
        pruner.step(BATCHES)
    handle.remove()
    record = pruner.history[-1]
    assert pruner.completed == len(pruner.history) == record.rewrite == 2
    assert type(error).__name__ in record.unfinished
    assert type(error).__name__ in record.describe()
    assert record.widths["0"] == [narrow, model[0].out_channels]
    assert record.costs["macs"][1] == pruner.costs.current("macs")
    assert widths(pruner)["0"] == model[0].out_channels
    state = copy.deepcopy(pruner.state_dict())
    resumed = pruner_of(copy.deepcopy(model), 0.15, state=state, repair="least-squares")
    for going_on in (pruner, resumed):
        going_on.model(IMAGES)
        assert not going_on.step(BATCHES).unfinished
        assert [row.rewrite for row in going_on.history] == [1, 2, 3]


def test_a_loss_that_raises_after_the_cut_is_recorded() -> None:
    model = network()
    calls = {"raise": False}

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if calls["raise"] and model[0].out_channels < 16:
            raise UsersError("of a loss")
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    pruner = pruner_of(model, loss=on_targets(loss), repair="statistics")
    calls["raise"] = True
    with pytest.raises(UsersError):
        pruner.step(BATCHES)
    (record,) = pruner.history
    assert record.unfinished == "UsersError: of a loss"
    assert record.widths["0"][1] == model[0].out_channels == widths(pruner)["0"]


def test_costs_that_cannot_be_counted_after_the_cut_are_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    pruner = pruner_of(model, repair="none")

    def refresh() -> None:
        raise UsersError("of a cost")

    monkeypatch.setattr(pruner.course.costs, "refresh", refresh)
    with pytest.raises(UsersError):
        pruner.step(BATCHES)
    (record,) = pruner.history
    assert record.costs["macs"][1] != record.costs["macs"][1]
    assert "nan" in record.describe()
    assert widths(pruner)["0"] == model[0].out_channels


def test_before_the_cut_nothing_has_changed() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise UsersError

    pruner = pruner_of(model, loss=on_targets(loss))
    with pytest.raises(ConfigError, match="UsersError"):
        pruner.step(BATCHES)
    assert not pruner.history
    assert pruner.completed == 0
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_an_error_while_a_cut_is_put_in_place_takes_it_back() -> None:
    """Modules are put into training mode and back after a cut; the methods for that may be the network's own."""
    model = Refusing(*network())
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    model.bears = True
    graph = trace_groups(model, IMAGES[:2])
    model.bears = False
    expected = model(IMAGES)
    before = copy.deepcopy(model.state_dict())
    signature = graph.signature()
    with pytest.raises(UsersError):
        prune_channels(model, graph, {"0": range(8)}, optimizers=[optimizer], check=False)
    assert graph.signature() == signature
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    torch.testing.assert_close(model(IMAGES), expected)
    assert model[0].out_channels == 16
    model(IMAGES).sum().backward()
    optimizer.step()
    model.bears = True
    prune_channels(model, graph, {"0": range(8)}, optimizers=[optimizer])
    model(IMAGES).sum().backward()
    optimizer.step()
