"""Random small networks: whatever the engine cuts equals the gated network."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pruning.engine.gates import Gates
from pruning.engine.proof.rehearsal import condition
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups

BLOCKS = (
    "conv",
    "residual",
    "concat",
    "chunk",
    "shuffle",
    "grouped",
    "depthwise",
    "padded",
    "pixel_shuffle",
    "squeeze_excite",
    "inplace",
    "deconvolution",
    "slices",
    "glu",
    "group_norm",
    "channels_last",
)


class Block(nn.Module):
    """One wiring of `width` input channels; `out` says how many come out."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.out, self.pad = kind, width, (2, 4)
        groups = {"grouped": next(g for g in (4, 3, 2, 1) if width % g == 0), "depthwise": width}.get(kind, 1)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        half = width // 2
        if kind == "conv":
            self.conv, self.out = (
                nn.Sequential(nn.Conv2d(width, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU()),
                10,
            )
        elif kind == "residual":
            self.other = nn.Sequential(nn.Conv2d(width, 6, 1), nn.ReLU(), nn.Conv2d(6, width, 3, padding=1))
        elif kind == "concat":
            self.conv, self.out = nn.Conv2d(width, 6, 1), width + 6
        elif kind in ("chunk", "slices"):
            self.conv = nn.Conv2d(half, half, 3, padding=1)
        elif kind == "padded":
            self.out = width + 6
            self.conv = nn.Conv2d(width, width + 6, 3, padding=1)
        elif kind == "pixel_shuffle":
            self.conv, self.out = nn.Conv2d(width, 4 * width, 1), width
        elif kind == "squeeze_excite":
            self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        elif kind == "deconvolution":
            self.conv, self.out = nn.ConvTranspose2d(width, 8, 2, stride=2), 8
        elif kind == "glu":
            self.conv = nn.Conv2d(width, 2 * width, 1)
        elif kind == "group_norm":
            self.norm = nn.GroupNorm(next(g for g in (width, width // 2, 1) if width % g == 0), width)
        elif kind == "channels_last":
            self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, f"_{self.kind}")(x)

    def _conv(self, x: Tensor) -> Tensor:
        return self.conv(x)

    _grouped = _depthwise = _conv

    def _residual(self, x: Tensor) -> Tensor:
        return x + self.other(x)

    def _concat(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x).relu(), x], 1)

    def _chunk(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([left, self.conv(right)], 1)

    def _slices(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return torch.cat([self.conv(x[:, :half]), x[:, half:]], 1)

    def _shuffle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.conv(x.reshape(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2))

    def _padded(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.pad(x, (0, 0, 0, 0, *self.pad))

    def _pixel_shuffle(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pixel_shuffle(self.conv(x), 2), 2)

    def _squeeze_excite(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    def _inplace(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :, ::2] *= 0.5
        y += x
        return y.relu_()

    def _deconvolution(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv(x), 2)

    def _glu(self, x: Tensor) -> Tensor:
        return F.glu(self.conv(x), 1)

    def _group_norm(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()

    def _channels_last(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Random(nn.Module):
    """A stem, blocks, and a classifier that either pools or flattens."""

    def __init__(self, kinds: list[str], flatten: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList()
        width = 12
        for kind in kinds:
            if width % 2:
                kind = "conv"
            self.blocks.append(Block(kind, width))
            width = self.blocks[-1].out
        self.flatten = flatten
        self.fc = nn.Linear(width * (36 if flatten else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.flatten(1) if self.flatten else x.mean((2, 3)))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5), st.booleans(), st.integers(0, 1 << 20))
def test_random_networks(kinds: list[str], flatten: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = Random(kinds, flatten).eval()
    images = torch.randn(2, 3, 6, 6)
    condition(model, (images,))
    model, images = model.double(), images.double()
    graph = trace_groups(model, images)
    generator = np.random.default_rng(seed)
    for _ in range(2):
        keep = {}
        for group in graph.prunable:
            count = int(generator.integers(1, group.width + 1))
            keep[group.name] = np.sort(generator.choice(group.width, count, replace=False))
        with torch.no_grad(), Gates(model, graph) as gates:
            gates.set_keep(keep)
            expected = model(images)
        model = copy.deepcopy(model)
        prune_channels(model, graph, keep)
        with torch.no_grad():
            found = model(images)
        assert (expected - found).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1)
