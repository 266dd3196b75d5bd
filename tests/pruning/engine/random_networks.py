"""Small networks put together at random from parts that channel pruners stumble over.

`RandomNetwork(seed)` is the same network for every equal seed: a stem, parts drawn from `PARTS`, and a head that
returns its outputs in one of several forms. Every part takes and gives maps (N, C, H, W).
"""

from __future__ import annotations

import dataclasses
import random
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS: dict[str, type[Part]] = {}


class Part(nn.Module):
    """Takes maps of `width` channels; `out` is how many it gives."""

    def __init_subclass__(cls) -> None:
        PARTS[cls.__name__] = cls

    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        self.out = width
        self.build(width, draw)

    def build(self, width: int, draw: random.Random) -> None:
        """Make the layers."""


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


# -- layers and norms --------------------------------------------------------------------------------------


class ConvNormAct(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.out = draw.choice([6, 8, 10, 12])
        norm = draw.choice(
            [
                nn.BatchNorm2d,
                lambda c: nn.GroupNorm(1, c),
                lambda c: nn.GroupNorm(2, c),
                lambda c: nn.GroupNorm(c, c),
            ]
        )
        self.conv, self.norm = conv(width, self.out), norm(self.out)
        self.act = draw.choice([F.relu, F.gelu, torch.tanh, F.silu])

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class InstanceNormed(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.conv, self.norm = conv(width, width), nn.InstanceNorm2d(width, affine=draw.random() < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class NormedWeights(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.out = draw.choice([6, 8, 10])
        norm = draw.choice(
            [
                nn.utils.parametrizations.weight_norm,
                nn.utils.weight_norm,
                nn.utils.parametrizations.spectral_norm,
                nn.utils.spectral_norm,
            ]
        )
        self.conv = norm(conv(width, self.out))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class StandardisedWeight(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.conv = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        w = w - w.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.conv.bias, padding=1)


class LastDimNorm(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Normalised(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.by = draw.choice(["normalize", "rms", "mean", "max", "softmax", "cumsum"])
        self.conv = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.by == "normalize":
            return F.normalize(y, dim=1)
        if self.by == "rms":
            return y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-3)
        if self.by == "mean":
            return y * y.mean(1, keepdim=True).sigmoid()
        if self.by == "max":
            return y * y.amax(1, keepdim=True).sigmoid()
        return y.softmax(1) if self.by == "softmax" else y.cumsum(1) * 0.1


class Grouped(Part):
    def build(self, width: int, draw: random.Random) -> None:
        groups = draw.choice([g for g in (1, 2, 3, 4, width) if width % g == 0])
        self.conv = conv(width, width, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class Deconvolved(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.out = draw.choice([6, 8])
        self.conv = nn.ConvTranspose2d(width, self.out, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv(x), 2)


# -- branches ----------------------------------------------------------------------------------------------


class Residual(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.a, self.b = conv(width, 8), conv(8, width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.5)) if draw.random() < 0.5 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return x + (y if self.scale is None else y * self.scale)


class Concatenated(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.more = draw.choice([4, 6])
        self.conv, self.out = conv(width, self.more, 1), width + self.more
        self.first = draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        return torch.cat([x, y] if self.first else [y, x], 1)


class Gated(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


class Combined(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.a, self.b = conv(width, width), conv(width, width, 1)
        self.how = draw.choice(["max", "where", "stack", "lerp", "mul"])

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if self.how == "max":
            return torch.maximum(a, b)
        if self.how == "where":
            return torch.where(a > 0, a, b)
        if self.how == "stack":
            return torch.stack([a, b], 1).sum(1)
        return a.lerp(b, 0.3) if self.how == "lerp" else a * b.tanh()


class Twice(Part):
    """One layer, called twice."""

    def build(self, width: int, draw: random.Random) -> None:
        self.conv = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu())


class ResidualIfEqual(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.out = draw.choice([width, 8, 10])
        self.conv = conv(width, self.out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if x.shape == y.shape else y


class HalvedIfWide(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.threshold, self.conv = draw.randint(1, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * 0.5 if y.shape[1] > self.threshold else y


# -- data movement -----------------------------------------------------------------------------------------


class Shuffled(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.groups = draw.choice([g for g in (1, 2, 3) if width % g == 0])
        self.conv = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.conv(x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w))


class Moved(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.how = draw.choice(
            ["flip", "roll", "permute", "flatten", "einsum", "expand", "pad", "contiguous"]
        )
        self.conv = conv(width, width)
        self.mix = nn.Parameter(torch.randn(width, width) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "flip":
            return y.flip(1)
        if self.how == "roll":
            return y.roll(1, 2).roll(1, 1)
        if self.how == "permute":
            return y.permute(2, 3, 0, 1).relu().permute(2, 3, 0, 1)
        if self.how == "flatten":
            return y.flatten(2).transpose(1, 2).tanh().transpose(1, 2).reshape(y.shape)
        if self.how == "einsum":
            return torch.einsum("nchw,cd->ndhw", y, self.mix)
        if self.how == "expand":
            return y + y.mean((2, 3), keepdim=True).expand_as(y)
        if self.how == "pad":
            return F.pad(y, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]
        return y.to(memory_format=torch.channels_last).relu().contiguous()


class Sliced(Part):
    """The first, last, or every second channel, by literal numbers."""

    def build(self, width: int, draw: random.Random) -> None:
        self.pre = conv(width, 12)
        self.how = draw.choice(["first", "last", "second", "middle", "own", "index"])
        self.k = draw.choice([5, 6, 8])
        width = {"first": 7, "last": 6, "second": 6, "middle": 5, "own": self.k, "index": 4}[self.how]
        self.post, self.out = conv(width, 8), 8

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre(x)
        if self.how == "first":
            y = y[:, :7]
        elif self.how == "last":
            y = y[:, -6:]
        elif self.how == "second":
            y = y[:, ::2]
        elif self.how == "middle":
            y = y.narrow(1, 3, 5)
        elif self.how == "own":
            y = y[:, : self.k]
        else:
            y = y[:, [0, 3, 4, 9]]
        return self.post(y.relu())


class Split(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.how = draw.choice(["chunk", "sizes", "glu", "shape", "swap"])
        self.pre, self.sizes = conv(width, 12), [8, 4]
        self.a, self.b, self.out = conv(6, 6), conv(8, 4), 6 if self.how in ("chunk", "glu", "shape") else 12

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre(x)
        if self.how == "chunk":
            left, right = y.chunk(2, 1)
            return self.a(left) * right.sigmoid()
        if self.how == "glu":
            return F.glu(y, 1)
        if self.how == "shape":
            half = y.shape[1] // 2
            return self.a(y[:, :half]) + y[:, half:]
        if self.how == "swap":
            left, right = y.chunk(2, 1)
            return torch.cat([right, left], 1)
        left, right = y.split(self.sizes, 1)
        return torch.cat([right, left.relu()], 1)


class Written(Part):
    """Parts of a tensor are written in place."""

    def build(self, width: int, draw: random.Random) -> None:
        self.conv, self.how = conv(width, width), draw.choice(["pixels", "channels", "zeros"])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "pixels":
            y[:, :, ::2] *= 0.5
        elif self.how == "channels":
            half = y.shape[1] // 2
            y[:, :half] = y[:, :half].relu()
        else:
            z = torch.zeros_like(y)
            z[:, :, 1:] = y[:, :, :-1]
            y = z
        return y


class PixelShuffled(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.conv, self.out = conv(width, 4 * 6), 6

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pixel_shuffle(self.conv(x), 2), 2)


class Numbered(Part):
    """Views, pads and zeros by a number of its own, beside others of the same value."""

    def build(self, width: int, draw: random.Random) -> None:
        self.conv, self.how = conv(width, width), draw.choice(["view", "zeros", "pad"])
        self.num_classes = self.width = width
        self.pad, self.down = (2, 3), conv(width + 5, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "view":
            return y.view(len(y), self.width, -1).relu().view(len(y), self.width, *y.shape[2:])
        if self.how == "zeros":
            return y + torch.zeros(len(y), self.width, 1, 1, dtype=y.dtype)
        return self.down(F.pad(y, (0, 0, 0, 0, *self.pad)))


class Attention(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.heads = draw.choice([1, 2, 4])
        self.width = 8
        self.qkv, self.proj = nn.Linear(width, 24), nn.Linear(8, width)
        self.fused = draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = (
            self.qkv(x.flatten(2).transpose(1, 2)).reshape(n, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        q, k, v = qkv.unbind(0)
        plain = (q @ k.transpose(-2, -1) * 0.35).softmax(-1) @ v
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else plain
        y = self.proj(y.transpose(1, 2).reshape(n, h * w, -1))
        return x + y.transpose(1, 2).reshape(n, c, h, w)


class NonLocal(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.q, self.v, self.proj = conv(width, 6, 1), conv(width, 6, 1), conv(6, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, v = self.q(x).flatten(2), self.v(x).flatten(2)
        y = v @ (q.transpose(1, 2) @ q).softmax(-1)
        return x + self.proj(y.view(n, -1, h, w))


# -- training and chance -----------------------------------------------------------------------------------


class Noisy(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.conv, self.how = conv(width, width), draw.choice(["like", "sized", "dropout", "path", "always"])
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if not self.training:
            return y
        if self.how == "like":
            return y + torch.randn_like(y)
        if self.how == "sized":
            return y * torch.rand(1, self.width, 1, 1, dtype=y.dtype)
        if self.how == "dropout":
            return F.dropout(y, 0.3)
        return y * y.new_empty(len(y), 1, 1, 1).bernoulli_(0.5)


class TrainedOtherwise(Part):
    def build(self, width: int, draw: random.Random) -> None:
        self.conv = conv(width, width)
        self.how = draw.choice(["vector", "scaled", "threshold", "running", "residual"])
        self.register_buffer("vector", torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if not self.training:
            return y
        if self.how == "vector":
            return y * self.vector[:, None, None]
        if self.how == "scaled":
            return y / y.shape[1] ** 0.5
        if self.how == "threshold":
            return y * 0.5 if y.shape[1] < 6 else y
        if self.how == "residual":
            return x + y
        self.vector = 0.9 * self.vector + 0.1 * y.mean((0, 2, 3))
        return y - self.vector[:, None, None]


# -- heads -------------------------------------------------------------------------------------------------


class Result:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


@dataclasses.dataclass
class Record:
    logits: Tensor
    extra: Any = None


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda y, m: y,
    "tuple": lambda y, m: (y, m.mean()),
    "dict": lambda y, m: {"logits": y, "name": "x"},
    "object": lambda y, m: Result(logits=y, shape=tuple(y.shape)),
    "records": lambda y, m: [Record(y, Record(y * 2))],
    "namespace": lambda y, m: (types.SimpleNamespace(y=y), None),
    "features": lambda y, m: (y, Result(map=m)),
}


class RandomNetwork(nn.Module):
    """Between two and four parts behind a stem.

    Attributes:
        names: The parts.
        noisy: Whether it draws random numbers in training.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.stem, width = conv(3, 12), 12
        self.parts, self.names = nn.ModuleList(), []
        for _ in range(draw.randint(2, 4)):
            name = draw.choice(sorted(PARTS))
            self.parts.append(PARTS[name](width, draw))
            self.names.append(name)
            width = self.parts[-1].out
        self.form = draw.choice(sorted(FORMS))
        self.aux = nn.Linear(12, 3) if draw.random() < 0.3 else None
        self.fc = nn.Linear(width, 5)
        self.noisy = any(isinstance(part, Noisy) for part in self.parts)

    def forward(self, x: Tensor) -> Any:
        stem = x = self.stem(x)
        for part in self.parts:
            x = part(x)
        result = FORMS[self.form](self.fc(x.mean((2, 3))), x)
        if self.aux is not None and self.training:
            return result, self.aux(stem.mean((2, 3)))
        return result
