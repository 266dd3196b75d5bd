"""Networks whose forward does what few do: each is cut exactly several times, saved, loaded, or keeps its channels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.equal_to_masked import cut_equals_zeroed, outputs, prepared
from torch import Tensor, nn

from pruning import ChannelGraph, load_pruned, save_pruned, trace_groups
from pruning.engine.gates import Gates
from pruning.engine.trace_groups import give_examples

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
OTHERS = (
    (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(6)).double(),),
    (torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(7)).double(),),
)
#: Network → names of its frozen groups, outputs aside.
NETWORKS: dict[type[nn.Module], set[str]] = {}


def keeps(*names: str) -> Any:
    """Enter a network whose groups of these names stay."""

    def enter(network: type[nn.Module]) -> type[nn.Module]:
        NETWORKS[network] = set(names)
        return network

    return enter


class Two(nn.Module):
    """Two convolutions and a classifier; what happens between them is the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.b(self.between(self.a(x))))

    def between(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def classify(self, y: Tensor) -> Tensor:
        return self.fc(y.mean((2, 3)))


# -- gradients of their own --------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        passed: Tensor = gradients[0] * (x.abs() < 1)
        return passed


@keeps()
class DomainAdversarial(Two):
    def __init__(self) -> None:
        super().__init__()
        self.domain = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Any:
        features = self.b(self.a(x).relu()).mean((2, 3))
        return self.fc(features), self.domain(Reversed.apply(features))


@keeps()
class Binarised(Two):
    def between(self, y: Tensor) -> Tensor:
        signs: Tensor = StraightThroughSign.apply(y)
        return signs


@keeps()
class FakeQuantisedByChannel(Two):
    def between(self, y: Tensor) -> Tensor:
        step = y.detach().abs().amax((0, 2, 3), keepdim=True) / 127 + 1e-8
        return y + ((y / step).round() * step - y).detach()


# -- writes and hooks --------------------------------------------------------------------------------------


@keeps()
class WritesThroughViews(Two):
    def between(self, y: Tensor) -> Tensor:
        flat = y.view(*y.shape[:2], -1)
        flat.mul_(2)
        flat[:, :, 0] = 0
        return y.relu()


@keeps("a")
class WritesLiteralHalf(Two):
    def between(self, y: Tensor) -> Tensor:
        y = y.clone()
        y[:, :6] *= 0.5
        return y


@keeps()
class HookReplacesOutput(Two):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(lambda module, given, y: y * 2 + y.mean(1, keepdim=True))

    def between(self, y: Tensor) -> Tensor:
        return y.relu()


@keeps()
class HookReversesInput(Two):
    def __init__(self) -> None:
        super().__init__()
        self.b.register_forward_pre_hook(lambda module, given: (given[0].flip(1),))

    def between(self, y: Tensor) -> Tensor:
        return y.relu()


@keeps("a")
class HookRollsInput(Two):
    def __init__(self) -> None:
        super().__init__()
        self.b.register_forward_pre_hook(lambda module, given: (torch.roll(given[0], 3, 1),))

    def between(self, y: Tensor) -> Tensor:
        return y.relu()


# -- one parameter in two roles, parameters that are computed ----------------------------------------------


@keeps()
class TiedAutoencoder(Two):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Any:
        features = self.b(self.a(x).relu()).mean((2, 3))
        code = self.encode(features).relu()
        return self.fc(features), F.linear(code, self.encode.weight.t()).square().mean()


@keeps()
class KroneckerWeight(Two):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(4, 4) * 0.4), nn.Parameter(torch.randn(3, 3) * 0.4)

    def between(self, y: Tensor) -> Tensor:
        return F.conv2d(y.relu(), torch.kron(self.u, self.v)[:, :, None, None])


@keeps()
class LowRankUpdate(Two):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Parameter(torch.randn(12, 2) * 0.1),
            nn.Parameter(torch.randn(2, 108) * 0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.b.weight + (self.left @ self.right).view_as(self.b.weight)
        return self.classify(F.conv2d(self.a(x).relu(), weight, self.b.bias, padding=1))


@keeps()
class PredictedKernels(Two):
    """One kernel for each channel of each image, as in dynamic filter networks."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = nn.Linear(12, 108)

    def between(self, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        kernels = self.predict(y.mean((2, 3))).view(n * c, 1, 3, 3)
        return F.conv2d(y.reshape(1, n * c, h, w), kernels, padding=1, groups=n * c).view(n, c, h, w)


@keeps()
class LiftedToRotations(Two):
    """Each filter in four orientations, of which the strongest goes on (group-equivariant)."""

    def __init__(self) -> None:
        super().__init__()
        self.lifted = nn.Parameter(torch.randn(12, 3, 3, 3) * 0.2)
        del self.a

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.stack([torch.rot90(self.lifted, k, (2, 3)) for k in range(4)], 1).flatten(0, 1)
        y = F.conv2d(x, turned, padding=1)
        n, c, h, w = y.shape
        return self.classify(self.b(y.view(n, c // 4, 4, h, w).amax(2)))


class Causal(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(12, 12, 3, padding=1)
        mask = torch.ones_like(self.weight)
        mask[:, :, 1, 1:] = 0
        mask[:, :, 2:] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


@keeps()
class MaskedKernels(Two):
    def __init__(self) -> None:
        super().__init__()
        self.causal = Causal()

    def between(self, y: Tensor) -> Tensor:
        return self.causal(y.relu()).relu()


# -- copies of one filter ----------------------------------------------------------------------------------


class Wavelet(Two):
    """Haar's four filters for every channel, followed by all that they make."""

    def __init__(self) -> None:
        super().__init__()
        filters = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
        self.register_buffer("filters", filters.view(4, 1, 2, 2))
        self.b, self.width = nn.Conv2d(48, 12, 3, padding=1), 12


@keeps()
class WaveletRepeated(Wavelet):
    def between(self, y: Tensor) -> Tensor:
        c = y.shape[1]
        return F.conv2d(y.relu(), self.filters.repeat(c, 1, 1, 1), stride=2, groups=c)


@keeps()
class WaveletRepeatedByNumber(Wavelet):
    def between(self, y: Tensor) -> Tensor:
        filters = self.filters.repeat(self.width, 1, 1, 1)
        return F.conv2d(y.relu(), filters, stride=2, groups=self.width)


@keeps()
class WaveletJoined(Wavelet):
    def between(self, y: Tensor) -> Tensor:
        c = y.shape[1]
        return F.conv2d(y.relu(), torch.cat([self.filters] * c), stride=2, groups=c)


@keeps()
class ScalesRepeated(Two):
    """The same scales for every third channel: there the positions go, not the copies."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.rand(4) + 0.5)

    def between(self, y: Tensor) -> Tensor:
        return y * self.scales.repeat(3)[:, None, None]


# -- loops and paths that depend on the images -------------------------------------------------------------


@keeps()
class Equilibrium(Two):
    """Runs until it moves no more: how often depends on the images and on what was cut."""

    def forward(self, x: Tensor) -> Tensor:
        shift = self.a(x)
        z = torch.zeros_like(shift)
        for _ in range(30):
            following = torch.tanh(0.1 * self.b(z) + shift)
            if (following - z).norm() < 1e-3 * following.norm():
                break
            z = following
        return self.classify(z)


@keeps()
class StatisticsInALoop(Two):
    """Means over channels as often as the images ask for, and one after the loop."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        for _ in range(1 + int(x.abs().mean() * 3) % 3):
            z = z + 0.1 * self.b(z)
            z = z / (z.abs().mean(1, keepdim=True) + 1e-3)
        return self.classify(z - z.mean(1, keepdim=True))


@keeps()
class StatisticsOnOnePath(Two):
    """A norm over channels on large images only, before one that all take."""

    def between(self, y: Tensor) -> Tensor:
        if y.shape[-1] > 10:
            y = y / (y.norm(dim=1, keepdim=True) + 0.1)
        return y / (y.abs().mean(1, keepdim=True) + 0.1)


@keeps()
class RungeKutta(Two):
    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        for step in range(4):
            slope = torch.tanh(self.b(z) + step / 4)
            z = z + torch.tanh(self.b(z + slope / 8) + step / 4 + 1 / 8) / 4
        return self.classify(z)


@keeps()
class ReversibleBlock(Two):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def between(self, y: Tensor) -> Tensor:
        left, right = y.chunk(2, 1)
        left = left + self.f(right).relu()
        return torch.cat([left, right + self.g(left).relu()], 1)


# -- statistics of the batch, state ------------------------------------------------------------------------


@keeps()
class MinibatchDeviation(Two):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(13, 12, 3, padding=1)

    def between(self, y: Tensor) -> Tensor:
        spread = y.std(0, unbiased=False).mean().expand(len(y), 1, *y.shape[2:])
        return torch.cat([y, spread], 1)


@keeps("bank")
class ReadsMemory(Two):
    """A bank of keys that training replaces: the keys' channels follow, their number stays."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.randn(20, 12))

    def classify(self, y: Tensor) -> Tensor:
        features = y.mean((2, 3))
        weights = (features @ self.bank.t()).softmax(1)
        read = features + weights @ self.bank
        if self.training:
            self.bank = torch.cat([features.detach(), self.bank])[:20]
        return self.fc(read)

    def between(self, y: Tensor) -> Tensor:
        return y.relu()


@keeps()
class MovingMean(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))

    def between(self, y: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.mean((0, 2, 3)).detach()
        return (y - self.mean[:, None, None]).relu()


# -- movements ---------------------------------------------------------------------------------------------


@keeps()
class SpectralMixing(Two):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(12, 12, 2) * 0.1)

    def between(self, y: Tensor) -> Tensor:
        mixed = torch.einsum("nchw,cd->ndhw", torch.fft.rfft2(y), torch.view_as_complex(self.mix))
        return torch.fft.irfft2(mixed, s=y.shape[-2:]).relu()


@keeps()
class SpaceToDepth(Two):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(48, 12, 3, padding=1)

    def between(self, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        y = y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return y.reshape(n, 4 * c, h // 2, w // 2).relu()


@keeps()
class PixelShuffleOfNine(Two):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(12, 108, 3, padding=1)

    def between(self, y: Tensor) -> Tensor:
        return F.pixel_shuffle(self.up(y.relu()), 3)


@keeps()
class AttendsToNeighbours(Two):
    def between(self, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        around = F.unfold(y, 3, padding=1).view(n, c, 9, h, w)
        weights = (y[:, :, None] * around).sum(1).softmax(1)
        return (weights[:, None] * around).sum(2)


@keeps()
class ScattersPositions(Two):
    def between(self, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        index = (torch.arange(h * w) % 4).expand(n, c, -1)
        sums = torch.zeros(n, c, 4, dtype=y.dtype).scatter_add(2, index, y.flatten(2))
        return sums[..., None]


@keeps("localise")
class WarpsImages(Two):
    """A spatial transformer: the numbers of an affine map are no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.localise = nn.Linear(12, 6)

    def between(self, y: Tensor) -> Tensor:
        maps = self.localise(y.mean((2, 3))).view(-1, 2, 3)
        grid = F.affine_grid(maps, list(y.shape), align_corners=False)
        return F.grid_sample(y, grid, align_corners=False)


@keeps()
class NormalisedByVmap(Two):
    def between(self, y: Tensor) -> Tensor:
        each: Tensor = torch.vmap(lambda one: one / (one.norm(dim=0, keepdim=True) + 1e-5))(y)
        return each


@keeps()
class CalledFunctionally(Two):
    def forward(self, x: Tensor) -> Tensor:
        halved = {name: parameter * 0.5 for name, parameter in self.b.named_parameters()}
        return self.classify(torch.func.functional_call(self.b, halved, (self.a(x).relu(),)))


@keeps("a")
class SortsChannels(Two):
    def between(self, y: Tensor) -> Tensor:
        return y.sort(1).values


@keeps("a")
class SumsUpChannels(Two):
    def between(self, y: Tensor) -> Tensor:
        return y.cumsum(1)


@keeps("a")
class SpectrumOfChannels(Two):
    def between(self, y: Tensor) -> Tensor:
        return torch.fft.fft(y, dim=1).real


@keeps("a")
class ScalesByWidth(Two):
    def between(self, y: Tensor) -> Tensor:
        return y * y.shape[1] ** -0.5


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_cut_twice_in_both_modes_and_on_other_images(network: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, args = prepared(network(), (IMAGES,))
    graph = trace_groups(model, args)
    frozen = {name for name, reason in graph.frozen.items() if reason != "the network's output"}
    assert frozen == NETWORKS[network], graph.frozen
    cut, _, refused = cut_equals_zeroed(model, args, others=OTHERS, graph=graph)
    assert refused == 0
    fresh = copy.deepcopy(model)
    save_pruned(tmp_path / "cut.pth.tar", cut, factory=lambda: copy.deepcopy(fresh))
    loaded = load_pruned(tmp_path / "cut.pth.tar", factory=lambda: copy.deepcopy(fresh))
    for expected, found in zip(outputs(cut, args, False), outputs(loaded, args, False), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("network", [SortsChannels, SumsUpChannels, SpectrumOfChannels, HookRollsInput])
def test_a_reason_names_operator_and_line(network: type[nn.Module]) -> None:
    reason = trace_groups(network(), IMAGES).frozen["a"]
    assert reason.split()[0] in ("sort", "cumsum", "_fft_r2c", "roll")
    assert "(test_unfamiliar_forwards.py:" in reason


class ShuffledThrice(nn.Module):
    """Channels are shuffled over three groups between two convolutions of three groups: all of them hang together."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        for _ in range(2):
            y = y.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
            y = self.b(y)
        return self.head(y.mean((2, 3)))


def test_what_ties_all_channels_is_named() -> None:
    graph = trace_groups(ShuffledThrice(), IMAGES)
    assert graph.group("a").width == 1
    reason = graph.frozen["a"]
    assert "tied together by convolution in 'b' (test_unfamiliar_forwards.py:" in reason


class NormalisedTwice(nn.Module):
    """A layer norm over channels at each of two lines."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(self.a(x).movedim(1, -1), (self.a.out_channels,)).movedim(-1, 1)
        y = self.b(y)
        y = F.layer_norm(y.movedim(1, -1), (self.b.out_channels,)).movedim(-1, 1)
        return self.head(y.mean((2, 3)))


def test_statistics_of_a_checkpoint_are_found_by_the_lines_that_the_code_has_now() -> None:
    """A resumed run may have another version of the network's library, in which every line is another."""
    torch.manual_seed(0)
    model = NormalisedTwice().eval()
    graph = trace_groups(model, IMAGES)
    state = graph.state_dict()
    assert "test_unfamiliar_forwards.py" not in repr(state["statistics"])
    resumed = ChannelGraph.from_state(state)
    give_examples(resumed, model, IMAGES)
    assert [vars(use) | {"units": None} for use in resumed.statistics] == [
        vars(use) | {"units": None} for use in graph.statistics
    ]
    assert all("test_unfamiliar_forwards.py" in use.line for use in resumed.statistics)
    mask = np.ones(graph.num_units, dtype=bool)
    mask[graph.group("a").units[:3]] = False
    outputs_by = []
    for one in (graph, resumed, ChannelGraph.from_state(state)):  # the last is looked up by position
        with torch.no_grad(), Gates(model, one) as gates:
            gates.set_mask(mask)
            outputs_by.append(model(IMAGES))
    assert torch.equal(outputs_by[0], outputs_by[1])
    assert torch.equal(outputs_by[0], outputs_by[2])
