"""What trials are made of: cuts, decisions that are taken over, zeros that are left out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pruning.engine.kept_statistics import Statistics, StatisticsOverKept
from pruning.engine.proof.decisions import Decisions
from pruning.engine.proof.skipped_zeros import SkippedZeros
from pruning.engine.proof.trial_masks import random_few, random_halves
from pruning.engine.trace_groups import trace_groups


class Wide(nn.Module):
    """Several layers of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.rest = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for layer in self.rest:
            x = layer(x).relu()
        return self.head(x)


def test_groups_of_one_width_lose_different_numbers() -> None:
    """Else a number that counts two kinds of channels could pass for the number of either."""
    graph = trace_groups(Wide(), torch.randn(2, 6))
    halves, few = (
        [int(mask[group.units].sum()) for group in graph.prunable]
        for mask in (random_halves(graph), random_few(graph))
    )
    assert len(set(halves)) == len(halves) == 5
    assert min(halves) >= 16 * 0.3
    assert max(halves) <= 16 * 0.7 + 1
    assert len(set(few)) > 1
    assert all(math.gcd(count, 16) == 1 for count in few)
    assert max(few) <= 16 * 0.35


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with a third of its rows and columns left."""
    with torch.no_grad():
        layer.weight[torch.arange(layer.weight.shape[0]) % 3 > 0] = 0
        layer.weight[:, torch.arange(layer.weight.shape[1]) % 3 > 0] = 0
    return layer.double()


LAYERS = {
    "convolution": (nn.Conv2d(48, 96, 3, padding=1, stride=2), (2, 48, 20, 20)),
    "without bias": (nn.Conv2d(48, 96, 3, padding=1, bias=False), (2, 48, 20, 20)),
    "volume": (nn.Conv3d(24, 48, 3, padding=1), (2, 24, 8, 12, 12)),
    "linear": (nn.Linear(900, 300), (128, 900)),
    "tokens": (nn.Linear(900, 300, bias=False), (4, 32, 900)),
    "narrow": (nn.Linear(200, 500), (128, 200)),
    "narrow tokens": (nn.Linear(200, 500, bias=False), (4, 32, 200)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_zeros_are_left_out(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    layer, x = zeroed(layer), torch.randn(shape, dtype=torch.float64)
    flops = []
    with torch.no_grad():
        for mode in (torch.no_grad(), SkippedZeros()):
            counter = FlopCounterMode(display=False)
            with counter, mode:
                found = layer(x)
            flops.append(counter.get_total_flops())
        expected = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.stride() == expected.stride()
    # Columns of zeros in short sums are computed, which takes less time than putting the others in their places.
    assert flops[1] < (0.35 if name.startswith("narrow") else 0.15) * flops[0]


def test_the_layout_of_images_stays() -> None:
    layer = zeroed(nn.Conv2d(48, 96, 3, padding=1)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 48, 20, 20, dtype=torch.float64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = layer(x)
        with SkippedZeros():
            found = layer(x)
    assert found.stride() == expected.stride()


def chosen(scores: Tensor, values: Tensor) -> Tensor:
    """The values of the three best scores that are positive."""
    best = scores.topk(3).indices
    return torch.where(scores[best] > 0, values[best], 0)


def test_decisions_are_taken_over() -> None:
    """Scores that are equal but for rounding are taken in the noted order; other scores are noticed."""
    scores = np.array([3.0, 1.0, 1.0 + 1e-9, 1.0 + 2e-9, -1.0])
    first, values = torch.tensor(scores), torch.arange(5.0)
    with Decisions() as own:
        expected = chosen(first, values)
    rounded = torch.tensor(scores + np.array([0, 3e-9, 0, 0, 0]))
    assert not torch.equal(chosen(rounded, values), expected)
    with Decisions(own.taken) as others:
        found = chosen(rounded, values)
    assert torch.equal(found, expected)
    assert others.followed
    with Decisions(own.taken) as others:
        chosen(first.flip(0), values)
    assert not others.followed


def test_decisions_on_other_channels_are_not_taken_over() -> None:
    """Of fewer channels the cut network has to decide by itself."""
    with Decisions() as own:
        _ = torch.ones(4) > 0
    with Decisions(own.taken) as others:
        assert (torch.ones(3) > 0).shape == (3,)
    assert others.followed


class Seen(TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_noting_and_following_decisions_is_no_step_of_the_network() -> None:
    """Whoever looks at the operators of a trial sees those of the network alone."""
    scores, values = torch.tensor([3.0, 1.0, 2.0, -1.0]), torch.arange(4.0)
    with Seen() as alone:
        chosen(scores, values)
    with Seen() as noting, Decisions() as own:
        chosen(scores, values)
    with Seen() as following, Decisions(own.taken):
        chosen(scores + 1e-6, values)
    assert alone.names == noting.names
    assert alone.names == [name for name in following.names if name != "aten.add.Tensor"]


@pytest.mark.parametrize(
    ("shape", "normalised", "dim"),
    [((2, 5, 12), 1, 2), ((2, 12, 3, 4), 3, 1), ((2, 5, 12), 2, 2), ((2, 5, 12), 1, 1)],
)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norms_over_kept_channels(
    shape: tuple[int, ...], normalised: int, dim: int, affine: bool
) -> None:
    """Mean and variance are those of the kept positions, and the others are zero; where no statistics run over the
    dimension, nothing else changes.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    layer = nn.LayerNorm(shape[-normalised:], elementwise_affine=affine).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    kept = np.arange(shape[dim]) % 3 > 0
    units = np.arange(shape[dim])
    use = Statistics(0, 0, "", "native_layer_norm", dim, len(shape), units)
    with torch.no_grad():
        with StatisticsOverKept([use], kept):
            found = layer(x)
        weights = torch.from_numpy(kept).double().reshape([-1 if d == dim else 1 for d in range(len(shape))])
        weights = weights.expand(shape)
        over = tuple(range(len(shape) - normalised, len(shape)))
        count = weights.sum(over, keepdim=True).clamp(min=1)
        mean = (x * weights).sum(over, keepdim=True) / count
        variance = ((x - mean).square() * weights).sum(over, keepdim=True) / count
        expected = (x - mean) / (variance + layer.eps).sqrt()
        if affine:
            expected = expected * layer.weight + layer.bias
    stays = weights > 0
    torch.testing.assert_close(found[stays], expected[stays], rtol=1e-12, atol=1e-12)
    if dim >= len(shape) - normalised:
        assert not found[~stays].any()
