"""Pruned networks of every making survive save and load: of torchvision and timm without a factory, others with one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils import prune as torch_prune

from image_classification.config import ConfigError
from image_classification.models import StructureError
from pruning import Pruner, load_pruned, prune, prune_channels, save_pruned, trace_groups
from pruning.files.skeleton import skeleton_of

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
models = torchvision.models

X, Y = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4

BUILT: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: models.resnet18(num_classes=10),
    "googlenet without heads": lambda: models.googlenet(num_classes=5, aux_logits=False, init_weights=False),
    "mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=5),
    "vit_b_32": lambda: models.vit_b_32(num_classes=5, image_size=32),
    "timm resnet10t": lambda: timm.create_model("resnet10t", num_classes=7, in_chans=3),
    "timm convnext_atto": lambda: timm.create_model("convnext_atto", num_classes=7),
}


QUICK = ("resnet18", "timm resnet10t")
CASES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in BUILT]


@pytest.mark.parametrize("name", CASES)
def test_what_a_library_built_needs_no_factory(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BUILT[name]()
    pruner = Pruner(model, X[:2], criterion="magnitude", search="global", budget=0.5, delta=1.0)
    pruner.step([])
    pruner.save(tmp_path / "pruned.pth")
    loaded = load_pruned(tmp_path / "pruned.pth")
    torch.testing.assert_close(loaded.eval()(X), model.eval()(X), rtol=0, atol=0)


def test_segmentation_and_detection_networks_are_built_by_name(tmp_path: Path) -> None:
    model = models.segmentation.lraspp_mobilenet_v3_large(num_classes=3, weights_backbone=None)
    pruner = Pruner(model, X[:2], criterion="magnitude", search="global", budget=0.5, delta=1.0)
    pruner.step([])
    pruner.save(tmp_path / "pruned.pth")
    loaded = load_pruned(tmp_path / "pruned.pth")
    assert torch.equal(loaded.eval()(X)["out"], model.eval()(X)["out"])


def test_settings_that_a_builder_hides_are_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A drop-out rate shows in no shape: the network is another one than by default, and loads as it was."""
    caplog.set_level(logging.INFO)
    builder = functools.partial(models.mobilenet_v3_small, num_classes=5, dropout=0.4)
    model = builder()
    prune(model, X[:2], budget=0.5)
    assert "known to build MobileNetV3" in caplog.text
    with pytest.raises(StructureError, match=r"MobileNetV3.*factory="):
        save_pruned(tmp_path / "pruned.pth", model)
    save_pruned(tmp_path / "pruned.pth", model, builder=builder)
    loaded = load_pruned(tmp_path / "pruned.pth")
    assert torch.equal(loaded.eval()(X), model.eval()(X))
    assert loaded.classifier[2].p == 0.4


def test_only_functions_of_the_libraries_are_builders(tmp_path: Path) -> None:
    model = Normed("plain")
    with pytest.raises(ConfigError, match=r"builder=.*factory="):
        save_pruned(tmp_path / "pruned.pth", model, builder=functools.partial(Normed, "plain"))


# -- modules with weights of other makings -----------------------------------------------------------------


class Tanh(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


def with_own_parametrization(conv: nn.Conv2d) -> nn.Module:
    torch.nn.utils.parametrize.register_parametrization(conv, "weight", Tanh())
    return conv


DRESSED: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "plain": lambda conv: conv,
    "tied": lambda conv: conv,
    "weight norm, old": weight_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm, old": spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "own parametrization": with_own_parametrization,
    "torch's masks": lambda conv: torch_prune.l1_unstructured(conv, "weight", 0.3),
}


class Normed(nn.Module):
    """Three convolutions whose weights are dressed alike."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (
            DRESSED[how](nn.Conv2d(before, 16, 3, padding=1)) for before in (3, 16, 16)
        )
        if how == "tied":
            self.third.weight = self.second.weight
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        return self.head(torch.relu(self.third(x)).mean((2, 3)))


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LazyConv2d(16, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConvTranspose2d(8, 3), nn.ReLU()
        )
        self.head = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def made(how: str) -> nn.Module:
    return Lazy() if how == "lazy" else Normed(how)


@pytest.mark.parametrize("how", [*DRESSED, "lazy"])
def test_weights_of_every_making_survive_two_rewrites_and_a_file(how: str, tmp_path: Path) -> None:
    """They were run before with gradients, train between the rewrites, and go on after loading."""
    model = made(how)
    model(X)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pruner = Pruner(
        model, X[:2], optimizer=optimizer, criterion="magnitude", search="global", budget=0.5, delta=0.25
    )
    while not pruner.done:
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step([])
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    pruner.save(tmp_path / "pruned.pth", factory=lambda: made(how))
    loaded: Any = load_pruned(tmp_path / "pruned.pth", factory=lambda: made(how))
    assert torch.equal(loaded.eval()(X), model.eval()(X))
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    if how == "tied":
        assert loaded.second.weight is loaded.third.weight
    pruner.save(tmp_path / "without.pth")  # what it was is known to the pruner
    again = load_pruned(tmp_path / "without.pth", factory=lambda: made(how))
    assert torch.equal(again.eval()(X), model.eval()(X))
    loaded.train()
    F.cross_entropy(loaded(X), Y).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


class Orthogonal(nn.Module):
    """The rows of a weight are made by a parametrization, and cut in a buffer that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixed = nn.Conv2d(3, 16, 3), nn.Linear(16, 16)
        self.last, self.head = nn.Linear(16, 8), nn.Linear(8, 4)
        parametrizations.orthogonal(self.mixed)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mixed(torch.relu(self.first(x)).mean((2, 3))))
        return self.head(torch.relu(self.last(x)))


def test_a_layer_knows_the_width_of_what_its_parametrization_computes(tmp_path: Path) -> None:
    model: Any = Orthogonal()
    graph = trace_groups(model, X[:2])
    keep = [0, 3, 4, 9, 11]
    expected = model.mixed.weight.detach()[keep]
    prune_channels(model, graph, {"mixed": keep})
    assert torch.equal(model.mixed.weight, expected)
    assert (model.mixed.in_features, model.mixed.out_features) == (16, 5)
    prune_channels(model, graph, {"last": range(3)})  # which leaves that layer as it is
    assert (model.mixed.in_features, model.mixed.out_features) == (16, 5)
    save_pruned(tmp_path / "pruned.pth", model, factory=Orthogonal)
    loaded = load_pruned(tmp_path / "pruned.pth", factory=Orthogonal)
    assert torch.equal(loaded.eval()(X), model.eval()(X))


class Positions(nn.Module):
    """A buffer that no state dict keeps, as wide as what it is added to, and a list of widths."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = [16, 16]
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.register_buffer("offset", torch.arange(16.0)[:, None, None] / 8, persistent=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x) + self.offset))).mean((2, 3)))


def test_a_network_of_ones_own_is_saved_without_a_factory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Positions()
    pruner = Pruner(model, X[:2], criterion="magnitude", search="global", budget=0.5, delta=0.25)
    pruner.step([])
    pruner.save(tmp_path / "half.pth")
    assert not caplog.records, "nothing is in the way"
    resumed = load_pruned(tmp_path / "half.pth", factory=Positions)
    assert torch.equal(resumed.eval()(X), model.eval()(X))

    # What it was is not known any more: said at the start, not at the end.
    settings: dict[str, Any] = {"criterion": "magnitude", "search": "global", "budget": 0.5, "delta": 0.25}
    other = Pruner(resumed, X[:2], **settings, state=pruner.state_dict())
    assert "factory" in caplog.text
    other.step([])
    with pytest.raises(StructureError, match="factory="):
        other.save(tmp_path / "pruned.pth")
    other.save(tmp_path / "pruned.pth", factory=Positions)
    assert torch.equal(load_pruned(tmp_path / "pruned.pth", factory=Positions).eval()(X), resumed.eval()(X))


class Counting(Positions):
    """Numbers that are no sizes: they count, identify, or remember."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.seed, self.latest = 0, torch.seed() % 2**40 + 2**41, 0
        self.second = torch.compile(self.second, backend="eager")
        self.temperature, self.rate, self.is_ready, self.scale = 1.0, 0.5, False, None

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.temperature, self.is_ready, self.scale = 0.9, True, self.scale or 1 / 16
        self.latest = [*x.shape]
        return super().forward(x)


def test_numbers_that_are_no_sizes_are_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Counting()
    pruner = Pruner(model, X[:2], criterion="magnitude", search="global", budget=0.5, delta=0.5)
    model(X)
    pruner.step([])
    pruner.save(tmp_path / "half.pth", factory=Counting)
    told = caplog.text
    assert all(name in told for name in ("passes", "temperature", "is_ready", "scale"))
    assert "rate" not in told.replace("temperature", "")
    loaded: Any = load_pruned(tmp_path / "half.pth", factory=Counting)
    assert loaded.passes == 0
    assert torch.equal(loaded.eval()(X), model.eval()(X))


class WithState(nn.Module):
    """Two layers, with something else in its state dict."""

    def __init__(self, adjacency: bool = False, persistent: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 5)
        if adjacency:
            self.register_buffer("adjacency", torch.eye(8).to_sparse(), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class WithExtraState(WithState):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class WithExtraTensor(WithExtraState):
    def get_extra_state(self) -> Tensor:  # type: ignore[override]
        return torch.tensor([3])


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (WithExtraState, "_extra_state"),
        (WithExtraTensor, "_extra_state"),
        (functools.partial(WithState, adjacency=True), "'adjacency' is sparse.*persistent=False"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_when_it_is_written(
    build: Callable[[], nn.Module], named: str, tmp_path: Path
) -> None:
    model = build()
    prune(model, X[:2, 0, 0, :4], budget=0.5)
    with pytest.raises(StructureError, match=named):
        save_pruned(tmp_path / "pruned.pth", model, factory=build)
    assert not (tmp_path / "pruned.pth").exists()


def test_a_sparse_buffer_that_no_file_holds_is_the_factorys(tmp_path: Path) -> None:
    build = functools.partial(WithState, adjacency=True, persistent=False)
    model = build()
    prune(model, X[:2, 0, 0, :4], budget=0.5)
    save_pruned(tmp_path / "pruned.pth", model, factory=build)
    loaded = load_pruned(tmp_path / "pruned.pth", factory=build)
    assert torch.equal(loaded.adjacency.to_dense(), torch.eye(8))
    assert torch.equal(loaded(X[:2, 0, 0, :4]), model(X[:2, 0, 0, :4]))


def test_a_skeleton_takes_no_memory_and_leaves_its_network_alone() -> None:
    model = Normed("tied")
    skeleton: Any = skeleton_of(model)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert skeleton.second.weight is skeleton.third.weight
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert [name for name, _ in skeleton.named_modules()] == [name for name, _ in model.named_modules()]
    assert not {id(module) for module in skeleton.modules()} & {id(module) for module in model.modules()}


class Merging(nn.Linear):
    """A low-rank update that is merged into the weight for evaluation, and taken out again for training."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            with torch.no_grad():
                self.weight += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + F.linear(F.linear(x, self.down), self.up)


class Merged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), Merging(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_what_is_merged_for_evaluation_is_merged_once(training: bool, tmp_path: Path) -> None:
    model = Merged()
    prune(model, X[:2], budget=0.6)
    model.train(training)
    expected = model(X)
    save_pruned(tmp_path / "pruned.pth", model, factory=Merged)
    assert model.training == training
    loaded = load_pruned(tmp_path / "pruned.pth", factory=Merged)
    for mode in (True, False):
        torch.testing.assert_close(loaded.train(mode)(X), expected, rtol=1e-4, atol=1e-5)
