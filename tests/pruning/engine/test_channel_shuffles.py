"""Channel shuffles between grouped convolutions: cut in step where the sizes allow it, named elsewhere."""

from __future__ import annotations

import pytest
import torch
from support.equal_to_masked import cut_equals_zeroed, prepared
from torch import Tensor, nn

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Shuffled(nn.Module):
    """A unit of ShuffleNet: grouped, shuffled, depthwise, grouped."""

    def __init__(self, groups: int, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.groups, width = groups, groups * size
        self.stem, self.squeeze = nn.Conv2d(3, 24, 3), nn.Conv2d(24, width, 1, groups=groups)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand, self.norm = nn.Conv2d(width, 24, 1, groups=groups), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 4)

    def shuffle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.shuffle(self.squeeze(x).relu()))
        return self.fc((x + self.norm(self.expand(y))).relu().mean((2, 3)))


@pytest.mark.parametrize(("groups", "size"), [(2, 6), (3, 6), (3, 12), (4, 8)])
def test_groups_of_a_multiple_of_their_number_lose_channels_in_step(groups: int, size: int) -> None:
    model, args = prepared(Shuffled(groups, size), (IMAGES,))
    model, graph, refused = cut_equals_zeroed(model, args)
    assert set(graph.frozen) == {"fc"}, graph.frozen
    assert refused == 0


@pytest.mark.parametrize("size", [4, 5, 8])
def test_groups_of_another_size_stay_and_only_they(size: int) -> None:
    """What one group loses at its first position, others would lose at their second."""
    model, args = prepared(Shuffled(3, size), (IMAGES,))
    model, graph, _ = cut_equals_zeroed(model, args)
    assert set(graph.frozen) == {"squeeze", "fc"}
    assert "test_channel_shuffles.py" in graph.frozen["squeeze"]
    assert "convolution in 'expand'" in graph.frozen["squeeze"]
    assert "3 groups must lose the same positions each" in graph.frozen["squeeze"]
    assert graph.group("stem").original_width == 8
