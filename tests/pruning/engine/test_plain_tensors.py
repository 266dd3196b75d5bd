"""Tensors in plain attributes, neither parameters nor buffers, are cut with their channels, and survive files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.equal_to_masked import cut_equals_zeroed, prepared
from torch import Tensor, nn

from image_classification.models import StructureError
from image_classification.models.plain_tensors import plain_tensors
from pruning import Pruner, load_pruned, prune_channels, save_pruned, trace_groups
from pruning.engine.channel_graph import ChannelGraph

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def sinusoids(tokens: int, width: int) -> Tensor:
    angles = torch.arange(tokens)[:, None] / 100 ** (torch.arange(width) // 2 * 2 / width)
    return torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos())[None]


class Held(nn.Module):
    """Two convolutions; what comes between them is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 10, 3, padding=1)
        self.head = nn.Linear(10, 4)

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.first(x)).relu()
        return self.head(self.second(x).relu().mean((2, 3)))


class Positions(Held):
    """A table over tokens, as video transformers add one."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = sinusoids(64, 12)

    def between(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) + self.positions
        return tokens.transpose(1, 2).reshape(x.shape)


class Scale(Held):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor([0.5 + 0.1 * i for i in range(12)])

    def between(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


class Nested(Held):
    """Within a list, a tuple and a dict; one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        shift = torch.arange(12.0)[:, None, None] / 7
        self.tables = [shift, {"a scale": torch.linspace(1, 2, 12)[:, None, None], "log.it": shift}]
        self.pair = (torch.arange(12.0).sin()[:, None, None], 3)

    def between(self, x: Tensor) -> Tensor:
        x = (x + self.tables[0]) * self.tables[1]["a scale"]  # type: ignore[index, call-overload]
        return x + self.tables[1]["log.it"] * self.pair[0]  # type: ignore[index, call-overload]


class Offset(nn.Module):
    def __init__(self, offset: Tensor) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


class Shared(Held):
    """One tensor, held by two modules."""

    def __init__(self) -> None:
        super().__init__()
        offset = torch.arange(12.0)[:, None, None] / 5
        self.one, self.two = Offset(offset), Offset(offset)

    def between(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).sin())


class Remembered(Held):
    """A running mean that every pass writes into and that it subtracts."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.arange(12.0) / 3

    def between(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x - self.mean[:, None, None]


class Switched(Held):
    """A boolean mask of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = torch.arange(12) % 3 > 0

    def between(self, x: Tensor) -> Tensor:
        return torch.where(self.odd[:, None, None], x, x.sin())


CUT: list[type[Held]] = [Positions, Scale, Nested, Shared, Remembered, Switched]


def double(model: nn.Module) -> nn.Module:
    """What `model.double()` does, for the plain tensors too."""
    for tensor in plain_tensors(model).values():
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            tensor.data = tensor.data.double()
    return model


def halved(graph: ChannelGraph) -> dict[str, range]:
    return {group.name: range(1, 1 + (group.width + 1) // 2) for group in graph.prunable}


@pytest.mark.parametrize("build", CUT)
def test_they_are_cut_with_their_channels(build: type[Held]) -> None:
    model, args = prepared(build(), (X,))
    model, graph, _ = cut_equals_zeroed(double(model), args)
    assert {group.name for group in graph.prunable} == {"first", "second"}, graph.frozen


@pytest.mark.parametrize("build", CUT)
def test_the_objects_stay_and_another_cut_follows(build: type[Held]) -> None:
    model = build().eval()
    before = plain_tensors(model)
    graph = trace_groups(model, X)
    for _ in range(2):
        prune_channels(model, graph, halved(graph))
    after = plain_tensors(model)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert {size for tensor in after.values() for size in tensor.shape if size > 1} <= {3, 64}
    assert not {"first", "second"} & trace_groups(model, X).frozen.keys()


@pytest.mark.parametrize("build", [*CUT[:4], Switched])
def test_a_file_and_its_factory_give_the_same_network(
    build: type[Held], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build().eval()
    average = torch.optim.swa_utils.AveragedModel(model)
    pruner = Pruner(model, X, criterion="magnitude", search="global", budget=0.5, delta=0.25, ema=average)
    pruner.step([])
    pruner.step([])
    torch.testing.assert_close(average.eval()(X), model(X))
    pruner.save(tmp_path / "pruned.pth")
    loaded = load_pruned(tmp_path / "pruned.pth", factory=build)
    assert torch.equal(loaded.eval()(X), model(X))
    assert not caplog.records
    save_pruned(tmp_path / "again.pth", loaded, factory=build)
    again = load_pruned(tmp_path / "again.pth", factory=build)
    assert torch.equal(again.eval()(X), model(X))
    exported = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(exported(X), model(X))


class Random(Held):
    """A table that every new network draws for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(12, 1, 1, generator=torch.Generator().manual_seed(torch.seed() % 1000))

    def between(self, x: Tensor) -> Tensor:
        return x + self.table


def test_what_the_factory_does_not_give_again_is_refused_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Random().eval()
    save_pruned(tmp_path / "whole.pth", model, factory=Random)
    assert "table" in caplog.text
    graph = trace_groups(model, X)
    prune_channels(model, graph, halved(graph))
    with pytest.raises(StructureError, match=r"'table' was cut.*persistent=True"):
        save_pruned(tmp_path / "pruned.pth", model, factory=Random)


class OnDemand(Held):
    """Makes its table when it is missing: in a network that is loaded, for the width it has then."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.tables: dict[str, Tensor] = {}
        if how != "attribute":
            self.table: Tensor | None = None
        self.how = how

    def between(self, x: Tensor) -> Tensor:
        if self.how == "dict":
            table = self.tables.setdefault("it", sinusoids(1, x.shape[1]))
        elif self.how == "attribute":
            if not hasattr(self, "table"):
                self.table = sinusoids(1, x.shape[1])
            table = self.table  # type: ignore[assignment]
        else:
            self.table = sinusoids(1, x.shape[1]) if self.table is None else self.table
            table = self.table
        return x + table.mT[..., None]


@pytest.mark.parametrize("how", ["none", "attribute", "dict"])
def test_a_table_made_on_demand_is_a_constant(how: str) -> None:
    model = OnDemand(how).eval()
    model(X)
    graph = trace_groups(model, X)
    assert "add in the network itself (test_plain_tensors.py" in graph.frozen["first"]
    assert graph.group("second").prunable


class Viewing(Held):
    """Holds a view of a weight, which follows it only as long as they share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.biases = self.first.bias.data

    def between(self, x: Tensor) -> Tensor:
        return x * self.biases[:, None, None]


class InNumpy(Held):
    def __init__(self) -> None:
        super().__init__()
        self.array = np.linspace(1, 2, 12, dtype=np.float32)

    def between(self, x: Tensor) -> Tensor:
        return x * torch.as_tensor(self.array)[:, None, None]


@pytest.mark.parametrize("build", [Viewing, InNumpy])
def test_what_is_held_otherwise_stays_with_a_reason(build: Callable[[], Held]) -> None:
    graph = trace_groups(build(), X)
    assert "first" in graph.frozen
    assert "test_plain_tensors.py" in graph.frozen["first"]
    assert graph.group("second").prunable


class Listed(Held):
    """Parameters in a plain list, which the network does not know as such, but the optimizer was given."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = [nn.Parameter(torch.linspace(1, 2, 12)[:, None, None])]

    def between(self, x: Tensor) -> Tensor:
        return x * self.gains[0]


def test_parameters_in_a_list_train_on() -> None:
    model = Listed()
    optimizer = torch.optim.SGD([*model.parameters(), *model.gains], 0.01, momentum=0.9)
    graph = trace_groups(model, X)
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
        expected = copy.deepcopy(model)
        prune_channels(model, graph, halved(graph), optimizers=[optimizer])
        momentum = optimizer.state[model.gains[0]]["momentum_buffer"]
        assert (
            momentum.shape
            == model.gains[0].shape
            == model.gains[0].grad.shape
            == (model.first.out_channels, 1, 1)
        )
        assert torch.equal(model.gains[0], expected.gains[0][1 : 1 + len(momentum)])


def test_a_pass_that_only_looks_leaves_them_alone() -> None:
    model = Remembered()
    kept = model.mean.clone()
    assert trace_groups(model, X).group("first").prunable
    assert torch.equal(model.mean, kept)


def test_a_graph_that_is_alive_can_still_be_followed_back() -> None:
    model = Scale()
    loss = model(X).sum()
    trace_groups(model, X)
    loss.backward()
    assert model.first.weight.grad is not None
