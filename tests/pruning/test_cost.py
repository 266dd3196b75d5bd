"""Costs against PyTorch's flop counter, real parameter counts and real rewrites, and against slow references."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from image_classification.models import create_model
from pruning.costs.cost_model import CostModel
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.constraints import Constraints
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups

ANALYTIC = ("macs", "params", "memory")

NETWORKS = [
    ("resnet20", 32),
    ("mobilenet_v2_cifar", 32),
    ("mobilenet_v2_cifar_isp", 32),
    ("resnet20_isp", 32),
    ("vgg11_bn_cifar_x4", 32),
    ("torchvision/resnet18", 64),
    ("torchvision/squeezenet1_1", 64),
    ("torchvision/shufflenet_v2_x0_5", 64),
    ("torchvision/mnasnet0_5", 64),
    ("torchvision/regnet_y_400mf", 64),
    ("torchvision/mobilenet_v3_small", 64),
    ("torchvision/efficientnet_b0", 64),
    pytest.param("torchvision/googlenet", 64, marks=pytest.mark.slow),
    pytest.param("torchvision/densenet121", 64, marks=pytest.mark.slow),
    pytest.param("torchvision/resnext50_32x4d", 64, marks=pytest.mark.slow),
    pytest.param("torchvision/convnext_tiny", 64, marks=pytest.mark.slow),
    pytest.param("torchvision/swin_t", 64, marks=pytest.mark.slow),
]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if not name.startswith("torchvision/"):
        return create_model(name, num_classes=10)
    name = name.removeprefix("torchvision/")
    extra = {"init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **extra)


def counted_macs(model: nn.Module, images: Tensor) -> float:
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2 / len(images)


def random_mask(graph: ChannelGraph, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mask = np.ones(graph.num_units, dtype=bool)
    for group in graph.prunable:
        widths = graph.allowed_widths(group)
        width = widths[generator.integers(len(widths))]
        mask[generator.permutation(group.units)[width:]] = False
    return mask


def rewrite(model: nn.Module, graph: ChannelGraph, mask: np.ndarray) -> None:
    prune_channels(model, graph, {g.index: np.flatnonzero(mask[g.units]) for g in graph.prunable})


class Residual(nn.Module):
    """3 → 8, two blocks, a pooled linear layer; small enough to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.outer = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.depthwise(torch.relu(self.inner(x)))
        x = x + self.outer(inner)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def small() -> tuple[Residual, Tensor]:
    torch.manual_seed(0)
    return Residual(), torch.randn(2, 3, 8, 8)


# -- against the real thing --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_costs_are_real_before_and_after_pruning(name: str, size: int) -> None:
    model, images = build(name), torch.randn(2, 3, size, size)
    graph = trace_groups(model, images)
    costs = CostModel(graph, model, images, ANALYTIC)
    assert costs.current("macs") == counted_macs(model, images)
    assert costs.current("params") == sum(p.numel() for p in model.parameters())
    mask = random_mask(graph)
    predicted = {metric: costs.cost(metric, mask) for metric in ANALYTIC}
    before = costs.report()
    rewrite(model, graph, mask)
    costs.refresh()
    assert costs.report() == predicted
    assert predicted["macs"] == counted_macs(model, images)
    assert predicted["params"] == sum(p.numel() for p in model.parameters())
    again = CostModel(graph, model, images, ANALYTIC)  # a new trace of the smaller network
    assert again.report() == predicted
    assert predicted["macs"] < before["macs"]
    assert {metric: costs.baseline(metric) for metric in ANALYTIC} == before


def test_peak_memory_counted_by_hand(small: tuple[Residual, Tensor]) -> None:
    model, images = small
    graph = trace_groups(model, images)
    costs = CostModel(graph, model, images, ("memory",))
    plane = 8 * 8 * 4  # bytes of a channel
    # At the depthwise layer's input: images (3), x (8), the convolution's 16 and relu's 16; the next moment has
    # relu's 16 and the depthwise 16 beside them: the same.
    assert costs.current("memory") == plane * (3 + 8 + 16 + 16)
    mask = np.ones(graph.num_units, dtype=bool)
    mask[graph.group("inner").units[:12]] = False
    # With 4 inner channels the sum is the peak: images, x, the depthwise 4, the outer 8 and the sum's 8.
    assert costs.cost("memory", mask) == plane * (3 + 8 + 4 + 8 + 8)


def test_memory_follows_python_lifetimes() -> None:
    class Keeps(nn.Module):
        """Holds the first layer's output in a local variable to the end, or not."""

        def __init__(self, hold: bool) -> None:
            super().__init__()
            self.hold = hold
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.third = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            second = self.second(first)
            if not self.hold:
                del first
            return self.third(second)

    images, peaks = torch.randn(1, 3, 4, 4), []
    for hold in (True, False):
        model = Keeps(hold)
        peaks.append(CostModel(trace_groups(model, images), model, images, ("memory",)).current("memory"))
    plane = 4 * 4 * 4
    assert peaks == [plane * (3 + 8 + 4 + 4), plane * (3 + 8 + 4)]


# -- against slow references -------------------------------------------------------------------------------


def slow_macs(graph: ChannelGraph, mask: np.ndarray) -> float:
    total = 0.0
    for layer in graph.layers:
        product = layer.constant
        for axis in layer.axes:
            product *= sum(1.0 if unit < 0 else float(mask[unit]) for unit in axis)
        total += product
    return total


def test_gates_match_the_slow_sum_and_its_derivative(small: tuple[Residual, Tensor]) -> None:
    model, images = small
    graph = trace_groups(model, images)
    costs = CostModel(graph, model, images, ("macs", "params", "memory"))
    gates = torch.rand(graph.num_units, dtype=torch.float64, requires_grad=True)
    cost = costs.cost("macs", gates)
    assert cost.item() == pytest.approx(slow_macs(graph, gates.detach().numpy()), rel=1e-12)
    assert costs.cost("macs", gates.detach().numpy()) == pytest.approx(cost.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(cost, gates)
    for unit in range(graph.num_units):
        step = torch.zeros_like(gates)
        step[unit] = 1e-3
        with torch.no_grad():
            slope = (costs.cost("macs", gates + step) - costs.cost("macs", gates - step)) / 2e-3
        assert float(gradient[unit]) == pytest.approx(float(slope), rel=1e-6)
    for metric in ("params", "memory"):
        assert torch.autograd.gradcheck(lambda g, metric=metric: costs.cost(metric, g), (gates,))


def test_single_precision_gates_get_gradients(small: tuple[Residual, Tensor]) -> None:
    model, images = small
    graph = trace_groups(model, images)
    costs = CostModel(graph, model, images)
    gates = torch.ones(graph.num_units, requires_grad=True)
    (costs.cost("macs", gates) / costs.baseline("macs")).backward()
    assert gates.grad is not None
    assert gates.grad.dtype == torch.float32
    assert (gates.grad[graph.group("inner").units] > 0).all()


@pytest.mark.parametrize("metric", ANALYTIC)
def test_curve_is_the_cost_at_every_width(small: tuple[Residual, Tensor], metric: str) -> None:
    model, images = small
    graph = trace_groups(model, images)
    costs = CostModel(graph, model, images, ANALYTIC)
    present = np.ones(graph.num_units, dtype=bool)
    present[graph.group("stem").units[[1, 4]]] = False
    for group in graph.prunable:
        kept = np.flatnonzero(present[group.units])
        curve = costs.cost_curve(metric, group, present)
        assert len(curve) == len(kept) + 1
        for width in range(1, len(kept) + 1):
            mask = present.copy()
            mask[group.units[kept[width:]]] = False
            assert curve[width] == pytest.approx(costs.cost(metric, mask), rel=1e-12)


def test_units_that_differ_are_not_taken_for_equal(small: tuple[Residual, Tensor]) -> None:
    model, images = small
    graph = trace_groups(model, images)
    inner = graph.group("inner")
    layer = next(layer for layer in graph.layers if layer.module == "outer")
    layer.axes = (layer.axes[0], np.concatenate([layer.axes[1], inner.units[:4], inner.units[:4]]))
    costs = CostModel(graph, model, images)
    for seed in range(5):
        mask = random_mask(graph, seed)
        assert costs.cost("macs", mask) == pytest.approx(slow_macs(graph, mask), rel=1e-12)
    order = np.random.default_rng(0).permutation(inner.width)
    curve = costs.cost_curve("macs", inner, order=order)
    pessimistic = costs.cost_curve("macs", inner)
    for width in range(inner.width + 1):
        mask = np.ones(graph.num_units, dtype=bool)
        mask[inner.units[order[: inner.width - width]]] = False
        assert curve[width] == pytest.approx(slow_macs(graph, mask), rel=1e-12)
    assert (pessimistic >= curve - 1e-9).all()
    assert pessimistic[8] > curve[8]
    with pytest.raises(ValueError, match="order"):
        costs.cost_curve("macs", inner, order=[0, 0, 1])


def test_differing_units_survive_a_rewrite(small: tuple[Residual, Tensor]) -> None:
    model, images = small
    graph = trace_groups(model, images)
    inner = graph.group("inner")
    layer = next(layer for layer in graph.layers if layer.module == "outer")
    layer.axes = (layer.axes[0], np.concatenate([layer.axes[1], inner.units[:4]]))
    costs = CostModel(graph, model, images)
    mask = random_mask(graph, 3)
    expected = slow_macs(graph, mask)
    rewrite(model, graph, mask)
    costs.refresh()
    assert costs.current("macs") == pytest.approx(expected, rel=1e-12)


# -- state and mistakes ------------------------------------------------------------------------------------


def test_baseline_outlives_rewrites_and_resumes(small: tuple[Residual, Tensor]) -> None:
    model, images = small
    graph = trace_groups(model, images)
    costs = CostModel(graph, model, images, ANALYTIC)
    baseline = costs.report()
    for seed in range(2):
        rewrite(model, graph, random_mask(graph, seed))
        costs.refresh()
    state = json.loads(json.dumps(costs.state_dict()))
    resumed = CostModel(trace_groups(model, images), model, images, ANALYTIC, state=state)
    assert {metric: resumed.baseline(metric) for metric in ANALYTIC} == baseline
    assert resumed.report() == costs.report() != baseline
    with pytest.raises(ValueError, match="budget='params'"):
        CostModel(
            graph, model, images, ("macs", "params"), state={"baseline": {"macs": 1.0}, "latency": None}
        )


def test_the_network_is_left_as_it_was(small: tuple[Residual, Tensor]) -> None:
    model, images = small
    model.train()
    model.head.eval()
    graph = trace_groups(model, images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    CostModel(graph, model, images, ANALYTIC)
    assert model.training
    assert not model.head.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mistakes_are_named(small: tuple[Residual, Tensor]) -> None:
    model, images = small
    graph = trace_groups(model, images)
    with pytest.raises(ValueError, match=r"metrics='mac'.* macs\?"):
        CostModel(graph, model, images, ("mac",))
    costs = CostModel(graph, model, images)
    with pytest.raises(ValueError, match=r"metric='param'.* params\?"):
        costs.cost("param")
    with pytest.raises(ValueError, match="'memory'"):
        costs.baseline("memory")
    with pytest.raises(ValueError, match=r"\(3,\)"):
        costs.cost("macs", np.ones(3))


def test_budgets_that_cannot_be_met(small: tuple[Residual, Tensor]) -> None:
    model, images = small
    graph = trace_groups(model, images, constraints=Constraints(min_width=0.75))
    costs = CostModel(graph, model, images)
    costs.check_budget("macs", 0.7)
    with pytest.raises(ValueError, match=r"budget='macs=0\.5': .* 0\.6\d+ "):
        costs.check_budget("macs", 0.5)
    graph.freeze(graph.prunable, "ignored")
    with pytest.raises(ValueError, match="macs"):
        CostModel(graph, model, images).check_budget("macs", 0.5)
