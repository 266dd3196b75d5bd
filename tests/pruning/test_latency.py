"""The latency table: its arithmetic against slow references, its file, and that it fits real networks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from image_classification.distributed import Distributed
from image_classification.models import inference
from pruning.costs import latency_measure
from pruning.costs.activations import trace_activations
from pruning.costs.cost_model import CostModel
from pruning.costs.counts import CountTable
from pruning.costs.kernels import KernelBench, grid_widths, kernel_shapes
from pruning.costs.latency import Latency, monotone
from pruning.costs.latency_measure import fit_parts
from pruning.costs.latency_table import Grid, LatencyError, LatencySettings, LatencyTable
from pruning.costs.timing import Stopwatch, interleaved_medians
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.constraints import Constraints
from pruning.engine.examples import Example
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.rewrites.resuming import shared_costs


class Mixed(nn.Module):
    """Plain, strided, depthwise, grouped and transposed convolutions, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 24, 1, groups=2)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.hidden = nn.Linear(12, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.up(self.grouped(self.depthwise(x)))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture
def mixed() -> tuple[Mixed, Tensor, ChannelGraph]:
    torch.manual_seed(0)
    model, images = Mixed(), torch.randn(2, 3, 16, 16)
    return model, images, trace_groups(model, images)


@pytest.fixture
def settings(tmp_path: Path) -> LatencySettings:
    return LatencySettings(seconds=0.5, points=3, repeats=3, cache_dir=tmp_path)


def synthetic_table(model: nn.Module, images: Tensor, graph: ChannelGraph, seed: int = 0) -> LatencyTable:
    """A table with made-up monotone seconds on uneven grids."""
    generator = np.random.default_rng(seed)
    grids, layers = {}, {}
    for kernel in trace_activations(model, Example((images,)), graph).kernels:
        outs, ins = (
            sorted({max(1, size // 4), max(1, size // 2), size})
            for size in (len(kernel.out_units), max(1, len(kernel.in_units)))
        )
        seconds = generator.random((len(outs), len(ins))).cumsum(0).cumsum(1)
        grids[kernel.name] = Grid(tuple(outs), tuple(ins), tuple(tuple(row) for row in seconds.tolist()))
        layers[kernel.name] = kernel.name
    return LatencyTable({"device": "made up"}, grids, layers, 0.5, 1.25, 1e-4, ((1.0, 2.0, 2.0),))


# -- arithmetic --------------------------------------------------------------------------------------------


def slow_interpolation(grid: Grid, out_width: float, in_width: float) -> float:
    """Bilinear, one way after the other, with NumPy."""
    rows = [np.interp(in_width, grid.in_widths, row) for row in monotone(np.array(grid.seconds))]
    return float(np.interp(out_width, grid.out_widths, rows))


def slow_latency(
    table: LatencyTable, model: nn.Module, images: Tensor, graph: ChannelGraph, mask: np.ndarray
) -> float:
    def count(units: np.ndarray) -> float:
        return float(sum(1 if unit < 0 else mask[unit] for unit in units)) if len(units) else 1.0

    activations = trace_activations(model, Example((images,)), graph)
    alone = sum(
        slow_interpolation(table.grids[table.layers[k.name]], count(k.out_units), count(k.in_units))
        for k in activations.kernels
    )
    moved = sum(e.factor * np.prod([count(units) for units in e.vectors]) for e in activations.traffic)
    return table.fixed + table.scale * alone + table.per_element * moved


def test_prediction_is_the_slow_bilinear_sum(mixed: tuple[Mixed, Tensor, ChannelGraph]) -> None:
    model, images, graph = mixed
    table = synthetic_table(model, images, graph)
    costs = CostModel(graph, model, images, ("latency",), latency_table=table)
    generator = np.random.default_rng(0)
    for _ in range(10):
        mask = np.ones(graph.num_units, dtype=bool)
        for group in graph.prunable:  # not below the grids, where they are continued as straight lines
            mask[group.units[generator.integers(-(-group.width // 4), group.width + 1) :]] = False
        slow = slow_latency(table, model, images, graph, mask)
        assert costs.cost("latency", mask) == pytest.approx(slow, rel=1e-12)
    for group in graph.prunable:
        curve = costs.cost_curve("latency", group)
        assert (np.diff(curve) >= -1e-12).all()
        for width in (1, group.width // 2, group.width):
            mask = np.ones(graph.num_units, dtype=bool)
            mask[group.units[width:]] = False
            assert curve[width] == pytest.approx(costs.cost("latency", mask), rel=1e-12)


def test_prediction_is_differentiable_in_gates(mixed: tuple[Mixed, Tensor, ChannelGraph]) -> None:
    model, images, graph = mixed
    table = synthetic_table(model, images, graph)
    costs = CostModel(graph, model, images, ("latency",), latency_table=table)
    gates = (0.5 + 0.4 * torch.rand(graph.num_units, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: costs.cost("latency", g), (gates,), eps=1e-7)


def test_monotone_tables_stay_and_noisy_ones_become_so() -> None:
    generator = np.random.default_rng(0)
    rising = generator.random((4, 5)).cumsum(0).cumsum(1)
    assert np.array_equal(monotone(rising), rising)
    noisy = rising + generator.normal(0, 1, rising.shape)
    assert (np.diff(noisy, axis=0) < 0).any()
    fixed = monotone(noisy)
    assert (np.diff(fixed, axis=0) >= 0).all()
    assert (np.diff(fixed, axis=1) >= 0).all()
    assert np.abs(fixed - noisy).max() <= np.ptp(noisy)


def test_fit_finds_the_parts() -> None:
    alone, moved = np.array([10.0, 6.0, 3.0, 1.0]), np.array([4e6, 3e6, 2.1e6, 1e6])
    measured = 0.5 + 1.2 * alone + 3e-7 * moved
    fixed, scale, per_element = fit_parts(measured, alone, moved)
    assert (fixed, scale, per_element) == pytest.approx(
        (0.5, 1.2, 3e-7), rel=0.15
    )  # the scale is pulled to 1
    assert fixed + scale * alone + per_element * moved == pytest.approx(measured, rel=2e-3)
    parts = fit_parts(np.full(4, 2.0), alone, moved)  # nothing depends on the widths: launching only
    assert parts[0] == pytest.approx(2.0, rel=0.05)
    falling = fit_parts(measured[::-1].copy(), alone, moved)
    assert min(falling) >= 0
    assert fit_parts(np.array([2.0]), np.array([1.5]), np.array([0.0]))[0] >= 0


def test_grid_widths() -> None:
    units = np.arange(64)
    assert grid_widths(units, 4, 8) == [8, 24, 48, 64]
    free = grid_widths(units, 4, 1)
    assert free[-1] == 64
    assert all(width % 2 == 1 for width in free[:-1])
    assert grid_widths(np.full(3, -1), 4, 1) == [3]
    assert grid_widths(np.array([0, 1]), 4, 1) == [1, 2]
    for points, step, size in itertools.product((2, 3, 5), (1, 4, 8), (1, 2, 7, 8, 33)):
        widths = grid_widths(np.arange(size), points, step)
        assert widths == sorted(set(widths))
        assert widths[-1] == size
        assert widths[0] >= 1


# -- kernels -----------------------------------------------------------------------------------------------


def test_kernels_are_called_as_the_network_calls_its_layers(
    mixed: tuple[Mixed, Tensor, ChannelGraph],
) -> None:
    model, images, graph = mixed
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            shapes[name] = (args[0].shape, output.shape)

        return hook

    kernels = {k.name: k for k in trace_activations(model, Example((images,)), graph).kernels}
    assert set(kernels) == {f"{n}:0" for n in ("stem", "depthwise", "grouped", "up", "hidden", "head")}
    keep = {g.index: np.arange(max(1, g.width // 2)) for g in graph.prunable}
    widths = {g.name: g.width for g in graph.groups}
    prune_channels(model, graph, keep)
    assert any(g.width < widths[g.name] for g in graph.groups)
    smaller = {k.name: k for k in trace_activations(model, Example((images,)), graph).kernels}
    for module in ("stem", "depthwise", "grouped", "up", "hidden", "head"):
        model.get_submodule(module).register_forward_hook(note(module))
    model(images)
    for channels_last in (False, True):
        bench = KernelBench(2, torch.device("cpu"), torch.float32, channels_last)
        for name, kernel in kernels.items():  # shapes of the wide network, at the widths of the smaller one
            num_out, num_in = len(smaller[name].out_units), len(smaller[name].in_units)
            module = model.get_submodule(name.partition(":")[0])
            x, weight, groups = kernel_shapes(kernel.geometry, 2, num_out, num_in)
            seen_in, seen_out = shapes[name.partition(":")[0]]
            assert x == tuple(seen_in)
            assert weight == tuple(module.weight.shape)
            assert groups == getattr(module, "groups", 1)
            (call,) = bench.prepare([(kernel, num_out, num_in)])
            assert call().shape == seen_out
            assert call().shape == seen_out  # the weight comes from elsewhere in the pool


def test_rounds_take_turns_and_medians_count() -> None:
    class Fake(Stopwatch):
        def __init__(self) -> None:
            self.readings = iter([1.0, 10.0, 100.0, 20.0, 2.0, 30.0])

        def read(self, call: Callable[[], object]) -> float:
            call()
            return next(self.readings)

    order: list[str] = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    assert interleaved_medians(calls, Fake(), repeats=3, seconds=60) == [2.0, 20.0]
    assert order == ["a", "b"] * 4  # one round to warm up


def test_inference_gives_modes_back() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    model[1].eval()
    with pytest.raises(RuntimeError, match="inside"), inference(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert model.training
    assert model[0].training
    assert not model[1].training


# -- measuring and keeping ---------------------------------------------------------------------------------


def test_a_measured_table_predicts_its_own_network(
    mixed: tuple[Mixed, Tensor, ChannelGraph], settings: LatencySettings
) -> None:
    model, images, graph = mixed
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines: list[str] = []
    costs = CostModel(graph, model, images, ("latency",), latency=settings, announce=lines.append)
    assert any("measuring" in line for line in lines)
    table = costs.latency_table
    assert table is not None
    assert table.identity["batch_size"] == 2
    assert min(table.fixed, table.scale, table.per_element) >= 0
    assert [anchor[0] for anchor in table.anchors] == [1.0, 0.75, 0.5]
    assert costs.current("latency") == pytest.approx(table.anchors[0][2], rel=1e-9)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert graph.group("stem").width == graph.group("stem").original_width


def test_tables_are_measured_once(
    mixed: tuple[Mixed, Tensor, ChannelGraph], settings: LatencySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, graph = mixed
    first = CostModel(graph, model, images, ("latency",), latency=settings)

    def no_measuring(*args: object, **kwargs: object) -> list[float]:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(latency_measure, "interleaved_medians", no_measuring)
        second = CostModel(graph, model, images, ("latency",), latency=settings)
        assert second.latency_table == first.latency_table
        with pytest.raises(AssertionError, match="measured again"):  # another batch size is another table
            CostModel(graph, model, images.repeat(2, 1, 1, 1), ("latency",), latency=settings)
        # A resumed run takes everything from its state, even for a network that was rewritten since.
        keep = {g.index: np.arange(max(1, g.width // 2)) for g in graph.prunable}
        prune_channels(model, graph, keep)
        first.refresh()
        state = json.loads(json.dumps(first.state_dict()))
        resumed = CostModel(trace_groups(model, images), model, images, ("latency",), state=state)
        assert resumed.baseline("latency") == first.baseline("latency")
        assert resumed.current("latency") == pytest.approx(first.current("latency"), rel=1e-12)
        assert resumed.current("latency") <= resumed.baseline(
            "latency"
        )  # of layers so small a busy machine may measure one time
    state["latency"]["fixed"] += 1.0
    with pytest.raises(LatencyError, match="latency table"):
        first.load_state_dict(state)


def test_a_job_under_autocast_measures_under_autocast(
    mixed: tuple[Mixed, Tensor, ChannelGraph], settings: LatencySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are timed in the type of the context, the network under it, and the table is one of its own."""
    model, images, graph = mixed
    types = dict[str, set[torch.dtype]]()
    real = latency_measure.interleaved_medians

    def watched(calls: Sequence[Any], *rest: object) -> list[float]:
        kind = "layers" if len(calls) > 3 else "network"
        types.setdefault(kind, set()).update(call().dtype for call in calls)
        return real(calls, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(latency_measure, "interleaved_medians", watched)
    monkeypatch.setattr("pruning.rewrites.resuming.LatencySettings", partial(replace, settings))
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    costs = shared_costs(graph, model, images, ("latency",), None, Distributed(), autocast)
    assert types == {"layers": {torch.bfloat16}, "network": {torch.bfloat16}}
    table = costs.latency_table
    assert table is not None
    assert table.identity["autocast"] == "bfloat16"


def test_a_damaged_file_is_measured_again(
    mixed: tuple[Mixed, Tensor, ChannelGraph], settings: LatencySettings, tmp_path: Path
) -> None:
    model, images, graph = mixed
    CostModel(graph, model, images, ("latency",), latency=settings)
    (path,) = (tmp_path / "latency").glob("*.json")
    whole = path.read_text()
    for damaged in (
        whole[: len(whole) // 2],
        "[]",
        json.dumps({"format": 1, "grids": {"a": 1}, "networks": {}}),
    ):
        path.write_text(damaged)
        lines: list[str] = []
        CostModel(graph, model, images, ("latency",), latency=settings, announce=lines.append)
        assert lines
        assert json.loads(path.read_text())["grids"].keys() == json.loads(whole)["grids"].keys()


def test_plain_tables_travel(mixed: tuple[Mixed, Tensor, ChannelGraph]) -> None:
    model, images, graph = mixed
    table = synthetic_table(model, images, graph)
    again = LatencyTable.from_plain(json.loads(json.dumps(table.to_plain())))
    assert again == table
    assert again.digest == table.digest != synthetic_table(model, images, graph, seed=1).digest
    with pytest.raises(LatencyError, match=r"\b99\b"):
        LatencyTable.from_plain({**table.to_plain(), "format": 99})
    with pytest.raises(LatencyError, match="'identity'"):
        LatencyTable.from_plain({"format": 1})


def test_a_table_of_another_network_is_refused(mixed: tuple[Mixed, Tensor, ChannelGraph]) -> None:
    model, images, graph = mixed
    table = synthetic_table(model, images, graph)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    other_graph = trace_groups(other, images)
    activations = trace_activations(other, Example((images,)), other_graph)
    with pytest.raises(LatencyError, match="layer '0'"):
        Latency(table, activations, CountTable())


def test_rounded_graphs_are_measured_at_rounded_widths(
    mixed: tuple[Mixed, Tensor, ChannelGraph], settings: LatencySettings
) -> None:
    model, images, _ = mixed
    graph = trace_groups(model, images, constraints=Constraints(round_to=4))
    costs = CostModel(graph, model, images, ("latency",), latency=settings)
    assert costs.latency_table is not None
    widths = [w for grid in costs.latency_table.grids.values() for w in grid.out_widths[:-1]]
    assert widths
    assert all(width % 4 == 0 for width in widths)


def test_networks_that_cannot_be_copied_are_refused(settings: LatencySettings) -> None:
    class Sticky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

        def __deepcopy__(self, memo: object) -> Sticky:
            raise TypeError("no copies")

    model, images = Sticky(), torch.randn(2, 3, 8, 8)
    with pytest.raises(LatencyError, match="Sticky"):
        CostModel(trace_groups(model, images), model, images, ("latency",), latency=settings)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="points=1"):
        LatencySettings(points=1)
    with pytest.raises(ValueError, match="batch_size=0"):
        LatencySettings(batch_size=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_table_on_the_gpu(settings: LatencySettings) -> None:
    model = Mixed().cuda().to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 64, 64, device="cuda")
    graph = trace_groups(model, images)
    costs = CostModel(graph, model, images, ("macs", "memory", "latency"), latency=settings)
    assert costs.latency_table is not None
    assert costs.latency_table.identity["memory_format"] == "channels_last"
    gates = torch.ones(graph.num_units, device="cuda", requires_grad=True)
    assert costs.cost("latency", gates).item() == pytest.approx(costs.current("latency"))
