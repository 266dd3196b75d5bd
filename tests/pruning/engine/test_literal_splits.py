"""Splits into sizes that are written in the code: what cannot follow stays, and the reason names the split."""

from __future__ import annotations

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


@pytest.mark.parametrize("kind", [Half, Chunks])
def test_sizes_that_follow_the_width_are_cut(kind: type[Halves]) -> None:
    torch.manual_seed(0)
    model, args = prepared(kind(), (IMAGES,))
    graph = trace_groups(model, args)
    assert set(graph.frozen) == {"fc"}, graph.frozen
    cut_equals_zeroed(model, args, graph=graph, rewrites=(some, tenth))
