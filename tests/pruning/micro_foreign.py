"""More tiny networks, after what detectors, transformers, recurrent and spectral networks of other libraries do."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from micro_networks import Head, Tokens, Wired, conv, micro
from torch import Tensor, nn


@micro
class BuiltInTransformer(nn.Module):
    """`nn.Transformer` checks its width against numbers; heads and embedding are cut nevertheless."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 5)
        self.both = nn.Transformer(12, 3, 1, 1, 20, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.out(self.both(x, x[:, :3]).mean(1))


@micro
class CrossAttention(nn.Module):
    """Keys and values of another width, with biases of their own, and attention weights that are used."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.other, self.out = nn.Conv2d(3, 12, 4, 4), nn.Conv2d(3, 10, 4, 4), nn.Linear(12, 5)
        self.attn = nn.MultiheadAttention(12, 3, kdim=10, vdim=10, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens, others = (f(x).flatten(2).permute(2, 0, 1) for f in (self.patch, self.other))
        mixed, weights = self.attn(tokens, others, others)
        return self.out((tokens + mixed * weights.amax().sigmoid()).mean(0))


class ByEmbedding(nn.Module):
    """The width of a head is computed from that of the embedding, as most hand-written attention has it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, c))


@micro
class HeadsByEmbedding(Tokens):
    def __init__(self) -> None:
        super().__init__(ByEmbedding(12, 3))


class CrossCovariance(nn.Module):
    """Attention between channels instead of tokens (XCiT): whole heads may go."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.proj((weights.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(n, t, c))


@micro
class ChannelAttention(Tokens):
    def __init__(self) -> None:
        super().__init__(CrossCovariance(12, 3))


class MapAttention(nn.Module):
    """Attention on maps with narrow keys and a depthwise position embedding (YOLO11)."""

    def __init__(self, dim: int, heads: int, narrow: int) -> None:
        super().__init__()
        self.heads, self.wide, self.narrow, self.scale = heads, dim // heads, narrow, narrow**-0.5
        self.qkv, self.proj = conv(dim, dim + 2 * heads * narrow, 1), conv(dim, dim, 1)
        self.position = conv(dim, dim, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(x).view(n, self.heads, 2 * self.narrow + self.wide, h * w)
        q, k, v = qkv.split([self.narrow, self.narrow, self.wide], dim=2)
        weights = (q.transpose(-2, -1) @ k * self.scale).softmax(-1)
        mixed = (v @ weights.transpose(-2, -1)).view(n, c, h, w)
        return self.proj(mixed + self.position(v.reshape(n, c, h, w)))


@micro
class HalfAttended(Wired):
    """One half of the channels goes through a residual attention."""

    def __init__(self) -> None:
        super().__init__()
        self.half = 20
        self.a, self.attn, self.b, self.head = conv(3, 40), MapAttention(20, 2, 6), conv(40, 8), Head(8)

    def features(self, x: Tensor) -> Tensor:
        first, second = self.a(x).split((self.half, self.half), 1)
        return self.b(torch.cat([first, second + self.attn(second)], 1))


class NonLocalBlock(nn.Module):
    """Its inner width is half of whatever comes in, by a number in the code."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (conv(dim, dim // 2, 1) for _ in range(3))
        self.out = conv(dim // 2, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        theta, phi, g = (f(x).reshape(n, c // 2, -1) for f in (self.theta, self.phi, self.g))
        weights = torch.einsum("ncp,ncq->npq", theta, phi).softmax(-1)
        return x + self.out(torch.einsum("npq,ncq->ncp", weights, g).reshape(n, c // 2, h, w))


@micro
class NonLocal(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.block, self.b, self.head = conv(3, 12), NonLocalBlock(12), conv(12, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.block(self.a(x)))


class Recurrent(nn.Module):
    """Rows of the map as a sequence, through a recurrent layer of several levels."""

    def __init__(self, layer: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.a, self.layer = conv(3, 8), layer(8, 6, 2, batch_first=True, bidirectional=True, **options)
        width = options.get("proj_size", 6)
        self.b, self.fc = nn.Linear(2 * width, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.layer(self.a(x).mean(3).transpose(1, 2))
        return self.fc(self.b(x).relu().mean(1))


@micro
class LongShortTerm(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.LSTM)


@micro
class Projected(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.LSTM, proj_size=4)


@micro
class GatedRecurrent(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.GRU)


@micro
class RecurrentCell(nn.Module):
    """A cell that is called step by step and begins with zeros that it makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.fc = conv(3, 8), nn.LSTMCell(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for row in self.a(x).mean(3).unbind(2):
            state = self.cell(row, state)
        return self.fc(state[0])


@micro
class StrongestTokens(nn.Module):
    """The tokens of the highest scores are taken out, worked on and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.score, self.work = nn.Conv2d(3, 12, 2, 2), nn.Linear(12, 1), nn.Linear(12, 12)
        self.b, self.out = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        index = self.score(x)[..., 0].topk(5, 1).indices
        wide = index[..., None].expand(-1, -1, x.shape[2])
        x = x.scatter(1, wide, self.work(x.gather(1, wide)))
        return self.out(self.b(x).relu()[torch.arange(len(x))[:, None], index].mean(1))


@micro
class SparseExperts(nn.Module):
    """Each token goes to two of three experts (a mixture of experts)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.gate, self.out = nn.Conv2d(3, 12, 2, 2), nn.Linear(12, 3), nn.Linear(12, 5)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 12)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        tokens = x.reshape(-1, x.shape[2])
        weights, chosen = self.gate(tokens).softmax(-1).topk(2, -1)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if len(token):
                mixed[token] += expert(tokens[token]) * weights[token, place, None]
        return self.out((x + mixed.view_as(x)).mean(1))


@micro
class LocalResponse(Wired):
    """A normalisation over neighbouring channels: what stays gets new neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.head = conv(3, 8), nn.LocalResponseNorm(4, 0.5), conv(8, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


@micro
class Spectral(Wired):
    """A convolution of frequencies, the lowest of which are kept (fast Fourier convolution, neural operators)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.b, self.head = conv(3, 8), conv(16, 12, 1), conv(6, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        x = torch.fft.rfft2(self.a(x), norm="ortho")
        real, imaginary = self.mix(torch.cat([x.real, x.imag], 1)).relu().chunk(2, 1)
        low = torch.zeros_like(real[:, :, :1, :1]).expand(-1, -1, 8, 5).contiguous()
        low[:, :, :3, :4] = real[:, :, :3, :4]
        return self.b(torch.fft.irfft2(torch.complex(low, imaginary), s=(8, 8), norm="ortho"))


@micro
class Framed(Wired):
    """Padding by hand: a map written into the middle of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        frame = torch.zeros(len(x), self.width, 10, 10, dtype=x.dtype)
        frame[:, :, 1:-1, 1:-1] = self.a(x)
        return self.b(frame)


@micro
class LogarithmicScale(Wired):
    """Channels are multiplied by a logarithm and divided by a parameter: neither may be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), Head(6)
        self.gain, self.divisor = (nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5) for _ in range(2))

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.gain.log() / self.divisor)


@micro
class TwoByTwo(nn.Module):
    """A bilinear layer, and distances from learned prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both = conv(3, 8), conv(3, 6), nn.Bilinear(8, 6, 7)
        self.prototypes, self.fc = nn.Parameter(torch.randn(4, 7)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.both(self.a(x).mean((2, 3)), self.b(x).mean((2, 3)))
        return self.fc(torch.cdist(mixed[:, None], self.prototypes[None])[:, 0])


@micro
class Deformed(Wired):
    """A deformable convolution of two groups, and boxes cut out of its maps: where they look stays."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import DeformConv2d

        self.a, self.points, self.masks = conv(3, 8), conv(8, 36), conv(8, 18)
        self.deform, self.b, self.head = DeformConv2d(8, 12, 3, padding=1), conv(12, 8), Head(2)

    def features(self, x: Tensor) -> Tensor:
        from torchvision.ops import ps_roi_align, roi_align

        x = self.a(x)
        x = self.deform(x, self.points(x), self.masks(x).sigmoid())
        boxes = torch.tensor([[0, 0.0, 0, 5, 5], [1, 1.0, 1, 7, 7]], dtype=x.dtype)
        return ps_roi_align(self.b(roi_align(x, boxes, 6)), boxes, 2)


@micro
class ZeroState(nn.Module):
    """A convolutional LSTM whose state begins with zeros of a width that it reads from its own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gates, self.fc = conv(3, 6), conv(14, 32), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        state = memory = x.new_zeros(len(x), self.gates.out_channels // 4, *x.shape[2:])
        for _ in range(2):
            i, f, o, g = self.gates(torch.cat([x, state], 1)).chunk(4, 1)
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
            state = o.sigmoid() * memory.tanh()
        return self.fc(state.mean((2, 3)) / math.e)
