"""Tensors that are filled part by part, statistics within groups, and other kinds that froze their channels once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.equal_to_masked import cut_equals_zeroed, prepared, some, tenth
from torch import Tensor, nn

from pruning import trace_groups

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
VOLUMES = torch.randn(2, 3, 5, 6, 7, generator=torch.Generator().manual_seed(7))
LARGER = torch.randn(3, 3, 10, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)


class Volumes(nn.Module):
    """Borders, pools and enlargements of volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(3, 12, 3, padding=1), nn.Conv3d(12, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.a(x).relu(), [1] * 6, mode="replicate")
        y = F.pad(self.b(y).relu(), [2] * 6, mode="reflect")
        y = F.interpolate(F.adaptive_max_pool3d(y, 3), scale_factor=2, mode="nearest-exact")
        return self.fc(y.mean((2, 3, 4)))


class Residuals(Stem):
    """NetVLAD as it is usually written: one cluster's row after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.assign, self.centres = nn.Conv2d(12, 4, 1), nn.Parameter(torch.randn(4, 12))
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.normalize(self.a(x).relu(), dim=1)
        shares, y = self.assign(y).flatten(2).softmax(1), y.flatten(2)
        found = torch.zeros(len(x), 4, y.shape[1], dtype=y.dtype)
        for k in range(4):
            found[:, k] = ((y - self.centres[k, :, None]) * shares[:, k, None]).sum(-1)
        return self.fc(F.normalize(F.normalize(found, dim=2).flatten(1)))


class CostVolume(Stem):
    """Left and right features side by side, one disparity after the other (GC-Net, PSMNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.Conv3d(24, 6, 3, padding=1), nn.Conv3d(6, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x), self.a(x.flip(3))
        n, c, h, w = left.shape
        volume = left.new_zeros(n, 2 * c, 3, h, w)
        for shift in range(3):
            volume[:, :c, shift, :, shift:] = left[..., shift:]
            volume[:, c:, shift, :, shift:] = right[..., : w - shift]
        return self.c(self.b(volume).relu())


class Queue(Stem):
    """Keys of earlier batches, (entries, channels), written a few at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(12, 8)
        self.register_buffer("queue", torch.randn(16, 8))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        keys = F.normalize(self.project(self.a(x).relu().mean((2, 3))))
        logits = keys @ self.queue.clone().T
        if self.training:
            start = int(self.pointer)
            self.queue[start : start + len(keys)] = keys
            self.pointer[0] = (start + len(keys)) % 12
        return logits


class GroupDeviations(Stem):
    """EvoNorm: deviations within groups of channels, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        groups = y.view(n, 4, c // 4, h, w)
        deviation = (groups.var((2, 3, 4), keepdim=True) + 1e-5).sqrt().expand_as(groups)
        return self.fc((y * y.sigmoid() / deviation.reshape(n, c, h, w)).mean((2, 3)))


class Quantised(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.fc = nn.Conv2d(12, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fake_quantize_per_tensor_affine(self.a(x).float(), 0.01, 0, -128, 127)
        return self.fc(self.b(y.to(x.dtype)).mean((2, 3)))


class Graph(nn.Module):
    """Messages along a sparse adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, self.b(torch.sparse.mm(adjacency, self.a(x)).relu()))


NODES = torch.randn(10, 6, generator=torch.Generator().manual_seed(2))
EDGES = (torch.rand(10, 10, generator=torch.Generator().manual_seed(1)) > 0.6).float().to_sparse()


@pytest.mark.parametrize(
    ("kind", "args", "others", "frozen"),
    [
        (Residuals, (IMAGES,), [(LARGER,)], {"assign", "fc"}),
        (CostVolume, (IMAGES,), [(LARGER,)], set()),
        (Queue, (IMAGES,), [(LARGER,)], {"queue"}),
        (GroupDeviations, (IMAGES,), [(LARGER,)], {"fc"}),
        (Quantised, (IMAGES,), [(LARGER,)], {"fc"}),
        (Graph, (NODES, EDGES), [], {"b"}),
        (Volumes, (VOLUMES,), [], {"fc"}),
    ],
)
def test_channels_go_exactly(
    kind: type[nn.Module], args: tuple[Any, ...], others: list[tuple[Any, ...]], frozen: set[str]
) -> None:
    torch.manual_seed(0)
    model, args = prepared(kind(), args)
    graph = trace_groups(model, args)
    assert set(graph.frozen) == frozen, graph.frozen
    cut_equals_zeroed(model, args, others=others, graph=graph, rewrites=(some, tenth))


class Points(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.matrix, self.fc = nn.Conv2d(12, 6, 1), nn.Linear(6, 6), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        points = F.affine_grid(self.matrix(self.b(y).mean((2, 3))).view(-1, 2, 3), list(y.shape), False)
        return self.fc(F.grid_sample(y, points, align_corners=False).mean((2, 3)))


class Literal(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).split(6, 1)
        return self.fc(torch.maximum(left, right).mean((2, 3)))


def line_of(kind: type[nn.Module], text: str) -> str:
    """The place in this file of the first line of a class that holds a text."""
    with open(__file__, encoding="utf-8") as file:
        lines = file.read().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"class {kind.__name__}"))
    number = next(number for number in range(start, len(lines)) if text in lines[number])
    return f"test_filled_tensors.py:{number + 1}"


def test_what_stays_names_operator_and_line() -> None:
    frozen = trace_groups(Points(), IMAGES).frozen
    assert set(frozen) == {"matrix", "fc"}
    assert "affine_grid_generator in the network itself" in frozen["matrix"]
    assert f"({line_of(Points, 'F.affine_grid')})" in frozen["matrix"]
    raised = trace_groups(Literal(), IMAGES).frozen["a"]
    assert f"ValueError ({line_of(Literal, 'split(6')})" in raised, raised
