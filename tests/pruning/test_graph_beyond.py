"""What networks keep beside their parameters: caches, buffers they size themselves, gains that start at zero."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from image_classification.models.structure_build import build_from_structure
from image_classification.models.structure_capture import capture_structure
from pruning.engine.gates import Gates
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups

sys.path.insert(0, str(Path(__file__).parent))
import micro_foreign  # noqa: F401  enters its networks
from micro_networks import REGISTRY, Head, Wired, conv


def test_tracing_leaves_no_stale_cache_behind() -> None:
    """In the middle of training, with no `train()` before the next evaluation."""
    torch.manual_seed(0)
    model, images = REGISTRY["CachedBias"]().train(), torch.randn(2, 3, 8, 8)
    trace_groups(model, images)
    assert model.training
    with torch.no_grad():
        model.get_parameter("attn.biases").add_(torch.randn(4, 4))
        found = model.eval()(images)
        expected = model.train().eval()(images)
    assert torch.equal(found, expected)


def test_rewriting_an_evaluated_network_drops_its_caches() -> None:
    torch.manual_seed(0)
    model, images = REGISTRY["CachedBias"]().eval(), torch.randn(2, 3, 8, 8)
    average = REGISTRY["CachedBias"]().eval()
    with torch.no_grad():
        graph = trace_groups(model, images)
        model(images), average(images)
        heads = graph.group("attn.qkv")
        assert heads.width == 4
        prune_channels(model, graph, {heads: [0, 3]}, emas=[average])
        for network in (model, average):
            assert not network.training
            assert torch.equal(network(images), network.train().eval()(images))


def test_groups_do_not_depend_on_the_values_of_gains() -> None:
    images = torch.randn(2, 3, 8, 8)
    silent, loud = (REGISTRY["SilentBranch"]() for _ in range(2))
    nn.init.ones_(loud.get_parameter("gain"))
    assert trace_groups(silent, images).signature() == trace_groups(loud, images).signature()


def test_reasons_name_the_cause() -> None:
    images = torch.randn(2, 3, 8, 8)
    fused, plain = (trace_groups(REGISTRY[name](), images) for name in ("FusedOneHead", "PlainOneHead"))
    assert "scales by their number" in fused.frozen["attn.q"]
    assert re.search(r"computes something else on fewer channels \(\w+\.py:\d+\)", plain.frozen["attn.q"])


def test_gates_reach_channels_that_only_a_mean_reads() -> None:
    torch.manual_seed(0)
    model, images = REGISTRY["MeanOnly"]().eval(), torch.randn(2, 3, 8, 8)
    graph = trace_groups(model, images)
    with Gates(model, graph) as gates:
        gates.values.requires_grad_(True)
        model(images).square().sum().backward()
        assert gates.values.grad is not None
        assert (gates.values.grad[graph.group("a").units] != 0).all()


class GrownBuffer(Wired):
    """A table that no state dict keeps and that is made at the size of the first image (ConViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), Head(6)
        self.register_buffer("ramp", torch.zeros(1, 1), persistent=False)

    def features(self, x: Tensor) -> Tensor:
        if self.ramp.shape != x.shape[-2:]:
            self.ramp = torch.linspace(0, 1, x.shape[-1]).expand(x.shape[-2], -1).clone()
        return self.b(self.a(x) * self.ramp)


def test_buffers_that_grew_while_running_are_not_part_of_the_structure() -> None:
    model, images = GrownBuffer().eval(), torch.randn(2, 3, 8, 8)
    graph = trace_groups(model, images)
    prune_channels(model, graph, {"a": range(4)})
    structure = capture_structure(model, factory=GrownBuffer)
    assert structure.shapes["ramp"] == [1, 1]
    loaded = build_from_structure(structure, factory=GrownBuffer).eval()
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(images), model(images))


class ByList(nn.Module):
    """A split by a list that a module holds."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.sizes, dim=1)


@pytest.mark.parametrize("sizes", [[6, 6, 4], [6, 4, 6]])
def test_each_entry_of_a_split_list_follows_its_own_part(sizes: list[int]) -> None:
    class Three(Wired):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.parts, self.head = conv(3, 16), ByList(list(sizes)), Head(6)
            self.convs = nn.ModuleList(conv(size, 6) for size in sizes)

        def features(self, x: Tensor) -> Tensor:
            return sum(layer(part) for layer, part in zip(self.convs, self.parts(self.a(x)), strict=True))

    torch.manual_seed(0)
    model, images = Three().eval(), torch.randn(2, 3, 8, 8)
    graph = trace_groups(model, images)
    parts = [group for group in graph.prunable if group.name.startswith("a")]
    assert [group.width for group in parts] == sizes
    prune_channels(model, graph, {group: range(count) for group, count in zip(parts, (5, 2, 3), strict=True)})
    assert model.parts.sizes == [5, 2, 3]
    assert model(images).shape == (2, 5)


class Sized(nn.Module):
    """Scales by a number that depends on the channels: on fewer it computes something else, without an error."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up, self.norm, self.down = conv(8, channels), nn.BatchNorm2d(channels), conv(channels, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(self.norm(y * y.shape[1] ** -0.5))


@pytest.mark.parametrize("widths", [(12, 6), (6, 12)])
def test_what_fails_in_one_module_is_frozen_in_those_of_another_width(widths: tuple[int, int]) -> None:
    class Both(Wired):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.one, self.other = conv(3, 8), Sized(widths[0]), Sized(widths[1])
            self.head = Head(8)

        def features(self, x: Tensor) -> Tensor:
            return self.other(self.one(self.a(x)))

    torch.manual_seed(0)
    graph = trace_groups(Both().eval(), torch.randn(2, 3, 8, 8))
    frozen = {group.name: group.reason for group in graph.groups if not group.prunable}
    assert set(frozen) == {"one.up", "other.up", "head.fc"}
    assert "computes something else on fewer channels" in frozen["one.up"] + frozen["other.up"]
    assert {group.name for group in graph.prunable} == {"a", "one.down", "other.down"}


class CountsByHand(nn.Module):
    """Views by a number that it holds, beside another number of the same value that has nothing to do with it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.width = 16, 16

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.width, x.shape[2] * x.shape[3]).relu().view_as(x)


class WithNumClasses(Wired):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.counts, self.b, self.head = conv(3, 16), CountsByHand(), conv(16, 6), Head(6)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.counts(self.a(x)))


def test_a_number_that_merely_equals_a_width_stays() -> None:
    torch.manual_seed(0)
    model, images = WithNumClasses().eval(), torch.randn(2, 3, 8, 8)
    graph = trace_groups(model, images)
    prune_channels(model, graph, {"a": range(5)})
    assert (model.counts.width, model.counts.num_classes) == (5, 16)
    assert model(images).shape == (2, 5)


class ReadsTwo(nn.Module):
    """Takes two maps; the width of the second is written out in its code."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.view(len(x), x.shape[1], -1)
        return torch.cat([x, y.view(len(y), 12, -1)], 1).mean(2)


class OneToBlame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.both = conv(3, 8), conv(3, 12), conv(12, 4), ReadsTwo()
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        b = self.b(x)
        return self.fc(torch.cat([self.both(self.a(x), b), self.c(b).mean((2, 3))], 1))


def test_a_group_that_was_suspected_first_is_free_in_the_end() -> None:
    """`a` touches fewer tensors than `b` and is frozen before it, in vain."""
    torch.manual_seed(0)
    graph = trace_groups(OneToBlame().eval(), torch.randn(2, 3, 8, 8))
    frozen = {group.name for group in graph.groups if not group.prunable}
    assert frozen == {"b", "fc"}


def test_an_expert_without_tokens_is_cut_like_its_twins() -> None:
    """On other images it may get some."""
    torch.manual_seed(0)
    model, images = REGISTRY["SparseExperts"]().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.gate.bias[2] = -1e3
        graph = trace_groups(model, images)
        assert not graph.untouched
        prune_channels(model, graph, {"patch": range(5), "experts.0.0": range(4)})
        assert [tuple(expert[0].weight.shape) for expert in model.experts] == [(4, 5), (9, 5), (4, 5)]
        model.gate.bias[2] = 1e3
        assert model(images).shape == (2, 5)
