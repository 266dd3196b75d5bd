"""Whole numbers that modules hold within dicts and tuples follow widths, in memory and through files."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.equal_to_masked import cut_equals_zeroed, prepared
from torch import Tensor, nn

from image_classification.models.structure_build import build_from_structure
from image_classification.models.structure_capture import capture_structure
from image_classification.models.whole_numbers import is_nested, numbers_in, replaced

TOKENS = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Heads(nn.Module):
    """Keeps its sizes as einops' `Rearrange` does: a dict, a private tuple of pairs, and only the dict is copied."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.sizes = sizes
        self._sizes = tuple(sizes.items())

    def __getstate__(self) -> dict[str, int]:
        return self.sizes

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        sizes = dict(self._sizes)
        return x.reshape(*x.shape[:2], sizes["qkv"], sizes["heads"], -1).permute(2, 0, 3, 1, 4)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.split, self.scale = Heads(qkv=3, heads=heads), (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(x)).unbind(0)
        weights = (torch.einsum("blxd,blyd->blxy", q, k) * self.scale).softmax(-1)
        return self.out(torch.einsum("bhxy,bhyd->bxhd", weights, v).flatten(2))


class Configured(nn.Module):
    """Reads a width from its options."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"width": width, "heads": [4, 2], "act": "relu", "bias": True}
        self.up, self.down = nn.Linear(24, width), nn.Linear(width, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).view(-1, self.options["width"]).relu()).view(x.shape)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 24), nn.Linear(24, 3)
        self.blocks = nn.ModuleList([Attention(24, 4), Configured(18), Attention(24, 6)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def cut() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, args = prepared(Net(), (TOKENS.float(),))
    model, graph, _ = cut_equals_zeroed(model, args)
    return model, graph


def test_numbers_within_containers_follow(cut: tuple[nn.Module, Any]) -> None:
    """Heads of both attentions and the width in a dict can go; the number of parts, 3, stays."""
    model, graph = cut
    assert set(graph.frozen.values()) == {"the network's output"}
    first, options = model.blocks[0].split, model.blocks[1].options
    assert first.sizes["qkv"] == 3
    assert first.sizes["heads"] * 6 * 3 == len(model.blocks[0].qkv.weight) < 72
    assert options == {
        "width": len(model.blocks[1].up.weight),
        "heads": [4, 2],
        "act": "relu",
        "bias": True,
    }
    assert options["width"] < 18


def test_a_number_and_its_private_copy_go_together(cut: tuple[nn.Module, Any]) -> None:
    """Only one of the two is read, but a copy of the module is made from the other."""
    model, _ = cut
    assert model.blocks[0].split._sizes == tuple(model.blocks[0].split.sizes.items())
    assert torch.equal(copy.deepcopy(model)(TOKENS), model(TOKENS))


def test_they_are_saved(cut: tuple[nn.Module, Any]) -> None:
    model, _ = cut
    structure = capture_structure(model, factory=Net)
    assert structure.attributes["blocks.1"]["options"] == [len(model.blocks[1].up.weight), 4, 2]
    loaded = build_from_structure(type(structure).from_plain(structure.to_plain()), factory=Net).double()
    loaded.load_state_dict(model.state_dict())
    assert loaded.blocks[1].options == model.blocks[1].options
    assert torch.equal(loaded.eval()(TOKENS), model.eval()(TOKENS))


def test_paths() -> None:
    value = {"a": 3, "b": [1, ("c", 2)], "d": True}
    assert is_nested(value)
    assert list(numbers_in(value)) == [(("a",), 3), (("b", 0), 1), (("b", 1, 1), 2)]
    assert replaced(value, {("b", 1, 1): 7}) == {"a": 3, "b": [1, ("c", 7)], "d": True}
    assert not any(map(is_nested, ([1, 2], (3,), {}, {"a": "b"}, {"a": object(), "b": 1}, 5)))
