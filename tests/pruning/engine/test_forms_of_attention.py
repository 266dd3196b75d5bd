"""Attention as people write it in one forward, and latents, `torch.func` and other forms: exact, and all free."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.equal_to_masked import cut_equals_zeroed, prepared
from torch import Tensor, nn

TOKENS = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(5))


class Attending(nn.Module):
    """Everything in one module: no class of its own tells where the attention begins."""

    def __init__(self, attend: Callable[[Attending, Tensor], Tensor], heads: int = 4) -> None:
        super().__init__()
        width = 24 // heads
        self.attend, self.heads, self.head_dim, self.scale = attend, heads, width, width**-0.5
        self.embed, self.qkv, self.out, self.head = (
            nn.Linear(6, 24),
            nn.Linear(24, 72),
            nn.Linear(24, 24),
            nn.Linear(24, 3),
        )
        self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.out(self.attend(self, x)))


def of_its_width(m: Attending, x: Tensor) -> Tensor:
    """As timm: the width of a head is the width of what comes in, divided by the number of heads."""
    n, length, width = x.shape
    q, k, v = m.qkv(x).reshape(n, length, 3, m.heads, width // m.heads).permute(2, 0, 3, 1, 4)
    return (((q @ k.mT) * m.scale).softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)


def talking(m: Attending, x: Tensor) -> Tensor:
    """Heads are mixed by a layer."""
    n, length, width = x.shape
    q, k, v = m.qkv(x).reshape(n, length, 3, m.heads, width // m.heads).permute(2, 0, 3, 1, 4)
    scores = m.mix((q @ k.mT * m.scale).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)


def einsums(m: Attending, x: Tensor) -> Tensor:
    """Three layers, heads by view, products by einsum."""
    q, k, v = (layer(x).view(*x.shape[:2], m.heads, m.head_dim) for layer in (m.q, m.k, m.v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / m.head_dim**0.5
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return mixed.contiguous().view(*x.shape[:2], m.heads * m.head_dim)


def unflattened(m: Attending, x: Tensor) -> Tensor:
    """Three layers, `unflatten` with the width of a head left open, and PyTorch's own product."""
    q, k, v = (layer(x).unflatten(-1, (m.heads, -1)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads_first(m: Attending, x: Tensor) -> Tensor:
    """Each head has its queries, keys and values side by side."""
    parts = m.qkv(x).view(*x.shape[:2], m.heads, 3 * m.head_dim).split(m.head_dim, -1)
    q, k, v = (part.permute(0, 2, 1, 3) for part in parts)
    return ((q @ k.transpose(2, 3) * m.scale).softmax(-1) @ v).permute(0, 2, 1, 3).reshape(*x.shape[:2], -1)


def innermost(m: Attending, x: Tensor) -> Tensor:
    """Queries, keys and values alternate."""
    q, k, v = m.qkv(x).unflatten(-1, (m.heads, -1, 3)).permute(4, 0, 2, 1, 3)
    return ((q @ k.mT * m.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads_in_the_batch(m: Attending, x: Tensor) -> Tensor:
    """Heads and images are one dimension."""
    n, length, _ = x.shape
    q, k, v = (
        t.reshape(n, length, m.heads, m.head_dim).transpose(1, 2).reshape(n * m.heads, length, m.head_dim)
        for t in m.qkv(x).chunk(3, -1)
    )
    mixed = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * m.scale).softmax(-1), v)
    return mixed.reshape(n, m.heads, length, -1).transpose(1, 2).flatten(2)


FORMS = (of_its_width, talking, einsums, unflattened, heads_first, innermost, heads_in_the_batch)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_attention_in_line(form: Callable[[Attending, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, args = prepared(Attending(form), (TOKENS,))
    _, graph, refused = cut_equals_zeroed(model, args, others=[(TOKENS[:, :7].double(),)])
    assert set(graph.frozen.values()) == {"the network's output"}
    assert refused == 0


@pytest.mark.parametrize("form", [of_its_width, heads_in_the_batch], ids=lambda form: form.__name__)
def test_as_many_heads_and_images_as_channels(form: Callable[[Attending, Tensor], Tensor]) -> None:
    """Twelve heads of two images make 24 rows of a product, which are no 24 channels."""
    torch.manual_seed(0)
    model, args = prepared(Attending(form, heads=12), (TOKENS,))
    _, graph, refused = cut_equals_zeroed(model, args)
    assert set(graph.frozen.values()) == {"the network's output"}
    assert refused == 0


class Latents(nn.Module):
    """Learned queries, repeated for every image: the repetitions are no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.q, self.kv = nn.Parameter(torch.randn(5, 16)), nn.Linear(16, 12), nn.Linear(6, 24)
        self.out, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents[None].repeat(len(x), 1, 1)
        k, v = self.kv(x).chunk(2, -1)
        return self.head(latents + self.out((self.q(latents) @ k.mT * 12**-0.5).softmax(-1) @ v))


class Mapped(nn.Module):
    """`torch.vmap` within a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: self.head(self.b(self.a(row).relu()).relu()))(x)


class Slope(nn.Module):
    """`torch.func.grad` within a forward: an energy's slope."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: self.b(self.a(y).tanh()).sum())(x)


@pytest.mark.parametrize(("kind", "widths"), [(Latents, {12, 16}), (Mapped, {12}), (Slope, {12})])
def test_other_forms(kind: type[nn.Module], widths: set[int]) -> None:
    torch.manual_seed(0)
    model, args = prepared(kind(), (TOKENS,))
    _, graph, refused = cut_equals_zeroed(model, args, others=[(torch.cat([TOKENS, TOKENS]).double(),)])
    assert {group.original_width for group in graph.prunable} == widths
    assert refused == 0
