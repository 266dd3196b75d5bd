"""Tiny networks, one wiring each, that structural pruning tools are known to stumble over."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REGISTRY: dict[str, Callable[[], nn.Module]] = {}


def micro(cls: type[nn.Module]) -> type[nn.Module]:
    """Put a network on the list."""
    REGISTRY[cls.__name__] = cls
    return cls


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    """A convolution that keeps the map's size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Head(nn.Module):
    """Global pooling and a classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Wired(nn.Module):
    """Base: subclasses say what happens between the image and the head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@micro
class Chain(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(inplace=True)
        )
        self.head = Head(6)


@micro
class Residual(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 6), conv(6, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x).relu_()
        x += self.c(self.b(x).relu())
        return x


@micro
class ProjectedResidual(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.skip, self.head = conv(3, 6), conv(6, 10), conv(6, 10, 1), Head(10)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return torch.add(self.b(x), self.skip(x), alpha=0.5)


@micro
class InputResidual(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(6, 3), conv(3, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        return self.c(x + self.b(self.a(x)))


@micro
class Concat(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(3, 4), conv(10, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x).sigmoid()], 1))


@micro
class ConcatInput(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.head = conv(3, 6), conv(9, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([x, self.a(x)], 1))


@micro
class ConcatTwice(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.head = conv(3, 6), conv(12, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(torch.cat([x, -x], 1))


@micro
class ConcatAddConcat(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 4), conv(3, 6), conv(3, 6), conv(3, 4)
        self.out, self.head = conv(10, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.a(x), self.b(x)], 1) + torch.cat([self.c(x), self.d(x)], 1))


@micro
class DenseBlock(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), conv(n, 4)) for n in (6, 10, 14)
        )
        self.head = Head(18)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


@micro
class Depthwise(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), conv(8, 8, groups=8), nn.BatchNorm2d(8), conv(8, 6, 1))
        self.head = Head(6)


@micro
class DepthwiseMultiplier(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 6), conv(6, 12, groups=6), nn.ReLU(), conv(12, 8, 1))
        self.head = Head(8)


@micro
class Grouped(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 12), conv(12, 12, groups=4), nn.ReLU(), conv(12, 8))
        self.head = Head(8)


@micro
class GroupedWide(Wired):
    """Two groups of many channels: the same position of both goes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 16), conv(16, 8, groups=2), nn.ReLU(), conv(8, 6))
        self.head = Head(6)


@micro
class GroupedInARow(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 24), conv(24, 24, groups=4), conv(24, 24, groups=6), conv(24, 8)
        )
        self.head = Head(8)


@micro
class ConcatIntoGrouped(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), conv(3, 8), conv(16, 8, groups=4), conv(8, 6)
        self.head = Head(6)

    def features(self, x: Tensor) -> Tensor:
        return self.d(self.c(torch.cat([self.a(x), self.b(x)], 1)))


@micro
class SqueezeExcite(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up, self.b, self.head = (
            conv(3, 8),
            conv(8, 4, 1),
            conv(4, 8, 1),
            conv(8, 6),
            Head(6),
        )

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid())


@micro
class SqueezeExciteLinear(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up, self.b, self.head = (
            conv(3, 8),
            nn.Linear(8, 4),
            nn.Linear(4, 8),
            conv(8, 6),
            Head(6),
        )

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c = x.shape[:2]
        scale = self.up(self.down(x.mean((2, 3)).view(n, c)).relu()).sigmoid().view(n, c, 1, 1)
        return self.b(x * scale.expand_as(x))


@micro
class EfficientChannelAttention(Wired):
    """A convolution over the channel axis: it slides over those that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.eca, self.b, self.c, self.head = (
            conv(3, 8),
            nn.Conv1d(1, 1, 3, padding=1),
            conv(8, 6),
            conv(6, 6),
            Head(6),
        )

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.eca(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return self.c(self.b(x * y.transpose(1, 2).unsqueeze(-1)))


@micro
class SpatialAttention(Wired):
    """Mean and maximum over channels: they are taken over those that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b, self.c, self.head = conv(3, 8), conv(2, 1), conv(8, 6), conv(6, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.c(self.b(x * self.gate(y).sigmoid()))


@micro
class Deconvolution(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 6)
        )
        self.head = Head(6)


@micro
class GroupedDeconvolution(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 16), nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2), nn.ReLU(), conv(8, 6)
        )
        self.head = Head(6)


@micro
class DepthwiseDeconvolution(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), conv(8, 6))
        self.head = Head(6)


@micro
class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.out = conv(3, 6), nn.Linear(6 * 64, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.a(x).flatten(1)).relu())


@micro
class FlattenView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.out = conv(3, 6), nn.Linear(6 * 16, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.a(x), 2)
        return self.out(self.fc(x.view(x.size(0), -1)).relu())


@micro
class ConcatFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc, self.out = conv(3, 4), conv(3, 6), nn.Linear(640, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(torch.cat([self.a(x), self.b(x)], 1).flatten(1)))


@micro
class FlattenConcat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc, self.out = conv(3, 4), conv(3, 6), nn.Linear(640, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(torch.cat([self.a(x).flatten(1), self.b(x).flatten(1)], 1)))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """ShuffleNet's channel shuffle."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


@micro
class ChannelShuffle(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 12), conv(12, 12), conv(12, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        return self.c(shuffle(self.b(shuffle(self.a(x), 2)), 3))


@micro
class ShuffleUnit(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.dw, self.b = conv(3, 16), conv(8, 8, 1), conv(8, 8, groups=8), conv(8, 8, 1)
        self.out, self.head = conv(16, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        return self.out(shuffle(torch.cat([left, self.b(self.dw(self.a(right).relu()))], 1), 2))


@micro
class BuiltInShuffle(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 12), nn.ChannelShuffle(3), nn.ReLU(), conv(12, 8))
        self.head = Head(8)


@micro
class Chunk(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 12), conv(6, 8), conv(6, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        return self.b(left) + self.c(right)


@micro
class GatedLinearUnit(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 12), conv(6, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        return self.b(F.glu(self.a(x), dim=1))


@micro
class C2f(Wired):
    """YOLOv8's block: halves, a growing list, and everything joined."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.m1, self.m2, self.cv2, self.head = (
            conv(3, 12, 1),
            conv(6, 6),
            conv(6, 6),
            conv(24, 8, 1),
            Head(8),
        )

    def features(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for layer in (self.m1, self.m2):
            parts.append(parts[-1] + layer(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


@micro
class UnevenSplit(Wired):
    """Widths that only the module's own numbers know."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [4, 6, 2]
        self.a, self.b, self.c, self.d, self.head = conv(3, 12), conv(4, 8), conv(6, 8), conv(2, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        one, two, three = self.a(x).split(self.sizes, 1)
        return self.b(one) + self.c(two) + self.d(three)


@micro
class Slices(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.cut = 4
        self.a, self.b, self.c, self.head = conv(3, 10), conv(4, 8), conv(6, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x[:, : self.cut]) + self.c(x[:, self.cut :])


@micro
class HardCodedSlices(Wired):
    """Numbers in the code: these channels must stay, the others may go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.head = conv(3, 10), conv(4, 8), conv(6, 8), conv(8, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.d(self.b(x[:, :4]) + self.c(x[:, 4:10]))


@micro
class StridedSlices(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 12), conv(6, 8), conv(6, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x[:, ::2]) + self.c(x[:, 1::2])


@micro
class SliceWrites(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.head = conv(3, 8), conv(3, 8), conv(16, 8), conv(8, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        y = torch.zeros(a.shape[0], a.shape[1] + b.shape[1], *a.shape[2:], dtype=a.dtype)
        y[:, : a.shape[1]] = a
        y[:, a.shape[1] :] = b
        return self.d(self.c(y))


@micro
class SliceUpdates(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        half = x.shape[1] // 2
        y = self.b(x)
        y[:, :half] += x[:, half:]
        y[:, half:].mul_(2.0)
        return self.c(y)


class PaddedShortcut(nn.Module):
    """Option A of the CIFAR ResNets, its widths in attributes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


@micro
class ZeroPadded(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 16, stride=2), conv(16, 6), Head(6)
        self.shortcut = PaddedShortcut(3, 5)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.c(self.b(x) + self.shortcut(x))


@micro
class ZeroPaddedLambda(Wired):
    """The same with the numbers hidden in a closure, as published code has it: only the shared part may go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 16, stride=2), conv(16, 6), Head(6)
        planes = 16
        self.shortcut = lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4))

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.c(self.b(x) + self.shortcut(x))


@micro
class ConcatZeros(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 16), conv(16, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.c(self.b(x) + torch.cat([x, x.mul(0)], 1))


@micro
class PixelShuffle(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 16), nn.PixelShuffle(2), nn.ReLU(), conv(4, 8), conv(8, 6))
        self.head = Head(6)


@micro
class PixelUnshuffle(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 6), nn.PixelUnshuffle(2), conv(24, 8), conv(8, 6))
        self.head = Head(6)


@micro
class WeightNorm(Wired):
    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.features = nn.Sequential(norm(conv(3, 8)), nn.ReLU(), norm(conv(8, 6)), nn.ReLU(), conv(6, 6))
        self.head = Head(6)


@micro
class SharedConv(Wired):
    """One module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.b(self.a(x)).relu()))


@micro
class TiedWeights(Wired):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 6), Head(6)
        self.c.weight = self.b.weight

    def features(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x)).relu()))


@micro
class TransposedTie(nn.Module):
    """A weight that is used a second time transposed (an auto-encoder)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.out = (
            nn.Linear(3 * 64, 12),
            nn.Parameter(torch.randn(8, 12) / 4),
            nn.Linear(12, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(self.a(x.flatten(1)).relu(), self.w).relu()
        return self.out(hidden @ self.w)


@micro
class LayerScale(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gamma, self.c, self.head = (
            conv(3, 8),
            conv(8, 8),
            nn.Parameter(torch.rand(8, 1, 1)),
            conv(8, 6),
            Head(6),
        )

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x + self.gamma * self.b(x))


@micro
class Prelu(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 6), nn.PReLU(), conv(6, 6))
        self.head = Head(6)


@micro
class InstanceNorm(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), conv(8, 6))
        self.head = Head(6)


@micro
class GroupNormMany(Wired):
    """Many groups: whole groups go and nothing else changes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 16), nn.GroupNorm(8, 16), nn.ReLU(), conv(16, 6))
        self.head = Head(6)


@micro
class GroupNormOne(Wired):
    """One group: its statistics change."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 12), nn.GroupNorm(1, 12), nn.ReLU(), conv(12, 6))
        self.head = Head(6)


@micro
class ChannelsLastNorm(Wired):
    """ConvNeXt's block: LayerNorm and linear layers on (N, H, W, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw, self.norm = conv(3, 8), conv(8, 8, groups=8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(self.dw(x).permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


@micro
class StandardisedWeights(Wired):
    """Weight standardisation: its statistics run over the input channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.b.weight.reshape(1, self.b.out_channels, -1), None, None, training=True)
        x = F.conv2d(self.a(x), weight.reshape_as(self.b.weight), self.b.bias, padding=1)
        return self.c(x.relu())


class Attention(nn.Module):
    """Multi-head self-attention with its numbers in attributes."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv, self.proj = nn.Linear(dim, 3 * heads * head_dim), nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, t, self.heads * self.head_dim))


@micro
class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls, self.pos = (
            nn.Conv2d(3, 12, 4, 4),
            nn.Parameter(torch.randn(1, 1, 12)),
            nn.Parameter(torch.randn(1, 5, 12)),
        )
        self.n1, self.attn, self.n2 = nn.LayerNorm(12), Attention(12, 6, 4), nn.LayerNorm(12)
        self.up, self.down, self.out = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        x = x + self.attn(self.n1(x))
        x = x + self.down(F.gelu(self.up(self.n2(x))))
        return self.out(x[:, 0])


@micro
class BuiltInAttention(nn.Module):
    """`nn.MultiheadAttention` ties heads to the embedding; cut, it becomes a class that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.attn = nn.Conv2d(3, 12, 4, 4), nn.MultiheadAttention(12, 3, batch_first=True)
        self.up, self.down, self.out = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(x)))
        return self.out(x.mean(1))


@micro
class SelectiveKernel(Wired):
    """Two branches, stacked, weighted by a softmax over branches, and summed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 8), conv(8, 8, 1)
        self.down, self.up, self.out, self.head = conv(8, 4, 1), conv(4, 16, 1), conv(8, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        paths = torch.stack([self.a(x), self.b(x)], 1)
        weights = self.up(self.down(paths.sum(1).mean((2, 3), keepdim=True)).relu())
        weights = weights.view(x.shape[0], 2, -1, 1, 1).softmax(1)
        return self.out((paths * weights).sum(1))


@micro
class AuxiliaryHead(nn.Module):
    """A second classifier that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux, self.head = (
            conv(3, 8),
            conv(8, 6),
            nn.Sequential(conv(8, 4), Head(4)),
            Head(6),
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.a(x).relu()
        output = self.head(self.b(x))
        return (output, self.aux(x)) if self.training else output


@micro
class Involution(Wired):
    """Unfold, then a product with weights made from the features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(54, 8, 1), conv(8, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.b(F.unfold(x, 3, padding=1).view(x.shape[0], -1, *x.shape[2:])).relu())


@micro
class Einsum(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.c, self.head = (
            conv(3, 8),
            nn.Parameter(torch.randn(6, 8) / 3),
            conv(6, 6),
            Head(6),
        )

    def features(self, x: Tensor) -> Tensor:
        return self.c(torch.einsum("nchw,dc->ndhw", self.a(x), self.w).relu())


@micro
class Upsampling(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(6, 8), conv(14, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = F.interpolate(self.b(F.avg_pool2d(x, 2)), size=x.shape[2:], mode="bilinear")
        return self.c(torch.cat([x, y], 1))


@micro
class ResponseNorm(Wired):
    """ConvNeXt V2's normalisation: channel norms divided by their mean over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), Head(6)
        self.scale, self.shift = nn.Parameter(torch.rand(8)), nn.Parameter(torch.randn(8) / 4)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        norm = x.norm(dim=(2, 3), keepdim=True)
        norm = norm / (norm.mean(1, keepdim=True) + 1e-6)
        return self.b(x + self.scale.view(1, -1, 1, 1) * x * norm + self.shift.view(1, -1, 1, 1))


@micro
class MeanOnly(Wired):
    """Channels of which only the mean is read, by no layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(1, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().mean(1, keepdim=True))


@micro
class UnitChannels(Wired):
    """Every pixel divided by the norm and the spread of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        x = self.b(F.normalize(self.a(x), dim=1)).relu()
        spread, mean = torch.var_mean(x, dim=1, keepdim=True)
        return self.c((x - mean) * torch.rsqrt(spread + 1e-3))


class CachedBiasAttention(nn.Module):
    """Biases are looked up once and kept for evaluation; training mode forgets them (LeViT, TinyViT)."""

    def __init__(self, dim: int, heads: int, head_dim: int, tokens: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.kept = heads, head_dim, {}
        self.qkv, self.proj = nn.Linear(dim, 3 * heads * head_dim), nn.Linear(heads * head_dim, dim)
        self.biases = nn.Parameter(torch.randn(heads, tokens))
        grid = (torch.arange(tokens)[:, None] - torch.arange(tokens)[None]).abs()
        self.register_buffer("grid", grid)

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            self.kept = {}
        return super().train(mode)

    def bias(self) -> Tensor:
        if self.training:
            return self.biases[:, self.grid]
        if "bias" not in self.kept:
            self.kept["bias"] = self.biases[:, self.grid]
        return self.kept["bias"]

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.head_dim**-0.5 + self.bias()).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, self.heads * self.head_dim))


class Tokens(nn.Module):
    """Patches, an attention of the subclass, a classifier."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.patch, self.attn, self.out = nn.Conv2d(3, 12, 4, 4), attention, nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.out((x + self.attn(x)).mean(1))


@micro
class CachedBias(Tokens):
    def __init__(self) -> None:
        super().__init__(CachedBiasAttention(12, 4, 3, 4))


class OneHead(nn.Module):
    """Attention with a single head, whose scale follows from its width."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v = (nn.Linear(12, 8) for _ in range(3))
        self.proj = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = 4 * self.q(x), self.k(x), self.v(x)
        if self.fused:
            return self.proj(F.scaled_dot_product_attention(q, k, v))
        return self.proj((q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v)


@micro
class FusedOneHead(Tokens):
    """PyTorch's own product scales by the width: queries and keys must stay, which needs no trial."""

    def __init__(self) -> None:
        super().__init__(OneHead(fused=True))


@micro
class PlainOneHead(Tokens):
    """The same by hand: a trial shows that queries and keys must stay, and nothing else."""

    def __init__(self) -> None:
        super().__init__(OneHead(fused=False))


class PartialAttention(nn.Module):
    """A part of the channels goes through an attention; one number counts that part before and after it."""

    def __init__(self, dim: int, part: int, narrow: int) -> None:
        super().__init__()
        self.dim, self.part, self.narrow, self.scale = dim, part, narrow, narrow**-0.5
        self.qkv, self.proj = nn.Conv2d(part, 2 * narrow + part, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(x, [self.part, self.dim - self.part], dim=1)
        q, k, v = self.qkv(first).split([self.narrow, self.narrow, self.part], dim=1)
        q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
        weights = (q.transpose(1, 2) @ k * self.scale).softmax(-1)
        mixed = (v @ weights.transpose(1, 2)).reshape_as(first)
        return self.proj(torch.cat([mixed, second], 1))


@micro
class SharedNumber(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.part, self.b, self.head = conv(3, 12), PartialAttention(12, 5, 4), conv(12, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x + self.part(x))


@micro
class SplitList(Wired):
    """The sizes of a split in a list, in which two kinds of channels happen to be as wide (FocalNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.sizes = 8, [8, 8, 3]
        self.a, self.f, self.mix = conv(3, 6), conv(6, 19, 1), conv(8, 8, groups=8)
        self.h, self.b, self.head = conv(8, 8, 1), conv(11, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        q, context, gates = torch.split(self.f(self.a(x)), self.sizes, 1)
        return self.b(torch.cat([q * self.h(self.mix(context).relu()), gates], 1))


@micro
class HeadsInBatch(Wired):
    """Heads lie in the batch dimension, and all share one position embedding (BoTNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 2, 6
        self.a, self.qkv, self.position = conv(3, 8), conv(8, 36, 1), nn.Parameter(torch.randn(64, 6) / 2)
        self.b, self.head = conv(12, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        q, k, v = self.qkv(self.a(x)).chunk(3, dim=1)
        q, k, v = (t.reshape(n * self.heads, self.width, -1).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(1, 2) + q @ self.position.t()) * 0.4
        x = (weights.softmax(-1) @ v).transpose(1, 2)
        return self.b(x.reshape(n, self.heads * self.width, 8, 8))


@micro
class SilentBranch(Wired):
    """A gain of zero hides a branch that scales by its own width, which therefore must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 8), Head(8)
        self.gain = nn.Parameter(torch.zeros(()))

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        hidden = self.b(x)
        return x + self.gain * self.c(hidden * hidden.shape[1] ** -0.5)


@micro
class FlatWeight(Wired):
    """A weight that lies flat, mixed from two: too long to be channels, so the layer stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.experts = conv(3, 96), nn.Parameter(torch.randn(2, 80 * 96 * 9) / 30)
        self.mix, self.b, self.head = nn.Linear(96, 2), conv(80, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        x = self.a(x)
        weight = self.mix(x.mean((0, 2, 3))).sigmoid() @ self.experts
        return self.b(F.conv2d(x, weight.view(80, 96, 3, 3), padding=1).relu())
