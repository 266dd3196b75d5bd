"""Splits into sizes that are written in the code: what cannot follow stays, and the reason names the split."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from support.equal_to_masked import cut_equals_zeroed, prepared, some, tenth
from torch import Tensor, nn

from pruning import trace_groups

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 12, 1), nn.Conv2d(16, 12, 1)
        self.fc = nn.Linear(12, 5)

    def halves(self, y: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.halves(self.a(x).relu())
        left = self.left(left)
        return self.fc((left + self.right(right)).mean((2, 3)))


class Sizes(Halves):
    def halves(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.split(y, [16, 16], 1)


class Size(Halves):
    def halves(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.split(16, 1)


class Half(Halves):
    def halves(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.split(y.shape[1] // 2, 1)


class Chunks(Halves):
    def halves(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.chunk(2, 1)


@pytest.mark.parametrize("kind", [Sizes, Size])
def test_sizes_in_the_code_stay_and_are_named(kind: type[Halves]) -> None:
    torch.manual_seed(0)
    model, args = prepared(kind(), (IMAGES,))
    graph = trace_groups(model, args)
    assert "split" in graph.frozen["a"]
    assert "test_literal_splits.py:" in graph.frozen["a"]
    assert graph.group("left").prunable
    cut_equals_zeroed(model, args, graph=graph, rewrites=(some, tenth))


class Slices(Halves):
    def halves(self, y: Tensor) -> tuple[Tensor, ...]:
        return y[:, :16], y[:, 16:]


class Narrowed(Halves):
    def halves(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.narrow(1, 0, 16), y.narrow(1, 16, 16)


class Viewed(Halves):
    def halves(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.view(len(y), 2, 16, *y.shape[2:]).unbind(1)


def written(kind: type[nn.Module], number: str) -> str:
    """The line of a class in which a number stands."""
    lines, first = inspect.getsourcelines(kind)
    (place,) = [
        place for place, line in enumerate(lines) if re.search(rf"\b{number}\b", line) and "return" in line
    ]
    return f"test_literal_splits.py:{first + place}"


@pytest.mark.parametrize(
    ("kind", "operator"),
    [(Sizes, "split"), (Size, "split"), (Slices, "slice"), (Narrowed, "slice"), (Viewed, "view")],
)
def test_the_operator_and_the_line_with_the_number_are_named(kind: type[Halves], operator: str) -> None:
    """Wherever the cut network fails, and nothing but that layer stays."""
    torch.manual_seed(0)
    graph = trace_groups(kind(), IMAGES)
    assert set(graph.frozen) == {"a", "fc"}
    assert operator in graph.frozen["a"]
    assert written(kind, "16") in graph.frozen["a"]


class Rejoined(nn.Module):
    """The sides are joined again, so that nothing raises: the order is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 12, 3), nn.Linear(12, 5)

    def both(self, y: Tensor) -> Tensor:
        return torch.cat([y[:, :16].relu(), y[:, 16:].sigmoid()], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.both(self.a(x))).mean((2, 3)))


class Steps(nn.Module):
    """A recurrent layer whose state is divided, two lines further on, by numbers in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.mix, self.fc = nn.GRU(64, 16, batch_first=True), nn.Linear(16, 16), nn.Linear(16, 5)

    def heads(self, y: Tensor) -> Tensor:
        return y.view(len(y), -1, 4, 4).transpose(2, 3).reshape(len(y), -1, 16)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x.flatten(2))
        return self.fc(self.mix(self.heads(y)).relu().mean(1))


@pytest.mark.parametrize(
    ("build", "layer", "operator", "number"), [(Rejoined, "a", "slice", "16"), (Steps, "rnn", "view", "4")]
)
def test_also_where_nothing_raises(build: type[nn.Module], layer: str, operator: str, number: str) -> None:
    torch.manual_seed(0)
    graph = trace_groups(build(), IMAGES)
    assert f"{operator} in the network itself ({written(build, number)}) has {number}" in graph.frozen[layer]
    assert graph.prunable


@pytest.mark.parametrize("kind", [Half, Chunks])
def test_sizes_that_follow_the_width_are_cut(kind: type[Halves]) -> None:
    torch.manual_seed(0)
    model, args = prepared(kind(), (IMAGES,))
    graph = trace_groups(model, args)
    assert set(graph.frozen) == {"fc"}, graph.frozen
    cut_equals_zeroed(model, args, graph=graph, rewrites=(some, tenth))
