"""Sequences of rewrites, unusual networks and unusual wishes: what is promised holds, what is recorded is true."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import ROOT
from torch import Tensor, nn

from image_classification.config import ConfigError
from image_classification.models import create_model
from pruning import Constraints, Pruner, load_pruned, prune
from pruning.costs.cost_model import CostModel
from pruning.criteria import Taylor
from pruning.criteria.by_name import make_criterion
from pruning.criteria.combine import normalise_scores
from pruning.criteria.discriminant import discriminant_scores
from pruning.criteria.sample_losses import multi_label_sample_losses
from pruning.criteria.scoring import score_groups
from pruning.engine.gates import Gates
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.files.saved_network import save_pruned
from pruning.repair.image_chunks import parted
from pruning.repair.repairing import Method, RepairSettings
from pruning.search.loss_change import LossChange
from pruning.task import on_targets


def chain(*widths: int, pool_after: int | None = None) -> nn.Sequential:
    """Convolutions of these widths on RGB, with batch norms and ReLUs, and a classifier of 4."""
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        if number == pool_after:
            layers.append(nn.MaxPool2d(4))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def calibration(size: int = 16, num_classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 3, size, size, generator=generator),
            torch.randint(num_classes, (8,), generator=generator),
        )
        for _ in range(3)
    ]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_a_greedy_rewrite_that_halves_a_layer_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = chain(64, 16, 16), calibration()
    pruner = Pruner(model, batches[0][0], search="greedy", budget=0.3, delta=0.7)
    record = pruner.step(batches)
    halved = {name: widths for name, widths in record.widths.items() if 2 * widths[1] < widths[0]}
    assert halved
    for name, (before, after) in halved.items():
        assert f"{name!r} from {before} to {after} channels" in caplog.text
    assert "`delta`" in caplog.text


def test_a_smaller_step_on_a_resume_spaces_the_rewrites_to_come() -> None:
    """They do not all follow at once, though by the new step they are overdue."""
    model, batches = chain(16, 16), calibration()
    how: dict[str, Any] = {"criterion": "magnitude", "budget": 0.6, "delta": 0.1}
    pruner = Pruner(model, batches[0][0], step=10, **how)
    for iteration in (10, 20):
        assert pruner.due(iteration)
        pruner.step(batches, iteration)
    resumed = Pruner(model, batches[0][0], step=2, state=pruner.state_dict(), **how)
    assert [iteration for iteration in (20, 21, 22) if resumed.due(iteration)] == [22]
    assert resumed.iterations_to_come(after=20) == [22, 24]


@pytest.mark.parametrize("search", ["uniform", "global", "greedy"])
def test_every_rewrite_ends_near_its_target(search: str) -> None:
    """Also where the one before went further than it had to."""
    model, batches = chain(16, 24, 32), calibration()
    pruner = Pruner(model, batches[0][0], budget={"macs": 0.7}, delta=0.02, search=search)
    while not pruner.done:
        record = pruner.step(batches)
        target = pruner.course.targets(pruner.completed)["macs"]
        _, after, baseline = record.costs["macs"]
        # One channel of every group is the coarsest step of the uniform search.
        assert target - 0.15 * baseline <= after <= target + 1e-6 * baseline


def test_memory_is_saved_where_the_peak_is() -> None:
    """Three equally large moments: no group alone makes the peak smaller, and the last layer has no part in it."""
    model = chain(16, 16, 16, 64, pool_after=2)
    images = torch.randn(2, 3, 32, 32)
    pruner = Pruner(model, images, budget={"memory": 0.9}, delta=0.05, criterion="magnitude")
    record = pruner.step(calibration(32))
    assert "10" not in record.widths
    assert all(after >= 14 for _, after in record.widths.values()), record.widths
    _, after, baseline = record.costs["memory"]
    assert after <= 0.95 * baseline


@pytest.mark.parametrize("repair", ["none", "least-squares"])
@pytest.mark.parametrize("shortlist", [1, 4])
@pytest.mark.parametrize("budget", [{"macs": 0.6}, {"macs": 0.6, "params": 0.55}])
def test_the_recorded_loss_is_that_of_the_rewritten_network(
    shortlist: int, budget: dict[str, float], repair: Method
) -> None:
    from pruning.search import GreedySearch

    model, batches = chain(16, 24), calibration()
    pruner = Pruner(
        model, batches[0][0], budget=budget, delta=1.0, search=GreedySearch(shortlist), repair=repair
    )
    record = pruner.step(batches)
    judging = batches[:2]
    if repair == "least-squares":  # what is fitted does not judge
        parts = parted(batches, RepairSettings.held_out, pruner.task)
        judging = [part.batch for part in parts if part.held_out]
    truth = LossChange(model, pruner.graph, judging).loss_as_it_is()
    assert record.loss[-1] == pytest.approx(truth, rel=1e-4)
    for row in record.candidates:
        assert row["measured"] is None or row["measured"] > 0.5, "a loss, not a change of one"


def test_criteria_by_the_loss_take_the_loss_of_the_job() -> None:
    """Of images without any label cross-entropy is 0 and says nothing."""
    model, images = chain(8, 8), calibration()[0][0]
    graph = trace_groups(model, images[:2])
    targets = torch.zeros(len(images), 4, dtype=torch.int64)
    criterion = make_criterion("taylor", loss=on_targets(multi_label_sample_losses))
    scores = score_groups(model, graph, [(images, targets)], criterion)
    assert all(bool((values > 0).any()) for values in scores.values())
    pruner = Pruner(model, images[:2], criterion="taylor", loss=on_targets(multi_label_sample_losses))
    for index, values in pruner.score([(images, targets)]).items():
        torch.testing.assert_close(values, scores[index])


def test_a_resumed_run_keeps_its_delta() -> None:
    model, batches = chain(16, 24), calibration()
    pruner = Pruner(model, batches[0][0], budget=0.5, delta=0.1)
    pruner.step(batches)
    state = pruner.state_dict()
    assert Pruner(model, batches[0][0], budget=0.5, delta=0.1, state=state).completed == 1
    with pytest.raises(ConfigError, match=r"delta=0.2: .* 0.1"):
        Pruner(model, batches[0][0], budget=0.5, delta=0.2, state=state)


def test_a_resumed_run_may_go_further_but_not_back() -> None:
    model, batches = chain(16, 24), calibration()
    pruner = Pruner(model, batches[0][0], budget=0.6, delta=0.2)
    while not pruner.done:
        pruner.step(batches)
    state = pruner.state_dict()
    further = Pruner(model, batches[0][0], budget=0.4, delta=0.2, state=state)
    assert (further.completed, further.num_rewrites) == (2, 3)
    further.step(batches)
    assert further.costs.current("macs") <= 0.4 * further.costs.baseline("macs")
    state = further.state_dict()
    with pytest.raises(ConfigError, match=r"budget='macs=0.8': .* 0.4"):
        Pruner(model, batches[0][0], budget=0.8, delta=0.2, state=state)
    with pytest.raises(ConfigError, match="budget='params'"):
        Pruner(model, batches[0][0], budget={"params": 0.5}, delta=0.2, state=state)


def test_limits_hold_for_every_module_they_name() -> None:
    model, images = create_model("resnet20", num_classes=10), torch.randn(2, 3, 16, 16)
    graph = trace_groups(model, images, constraints=Constraints(min_width=1, limits={"layer1.*": 0.5}))
    for name in ("conv1", "layer1.0.conv1", "layer1.1.conv1"):  # conv1's group holds all layer1.*.conv2
        assert graph.min_width_of(name) == graph.group(name).width / 2
    assert graph.min_width_of("layer2.0.conv1") == 1
    with pytest.raises(ValueError, match=r"nonsense\.\*=0.5"):
        trace_groups(model, images, constraints=Constraints(limits={"nonsense.*": 0.5}))


def test_units_that_save_nothing_are_never_cheap() -> None:
    scores = {0: torch.tensor([0.0, 1.0, -1.0]), 1: torch.tensor([2.0, 4.0])}
    found = normalise_scores(scores, "macs", {0: 0.0, 1: 2.0})
    assert found[0].tolist() == [torch.inf] * 3
    assert found[1].tolist() == [1.0, 2.0]


class Named(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=self.a(input=x)).mean((2, 3))


def test_gates_reach_layers_that_are_called_by_keyword() -> None:
    model, images = Named().eval(), torch.randn(2, 3, 12, 12)
    graph = trace_groups(model, images)
    with Gates(model, graph) as gates:
        gates.set_keep({"a": [0, 5]})
        expected = model(images)
    prune_channels(model, graph, {"a": [0, 5]})
    torch.testing.assert_close(model(images), expected)


class Summed(nn.Module):
    """Its classifier is a parameter of its own, read by an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.table = nn.Parameter(torch.randn(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nc,kc->nk", self.b(self.a(x).relu()).relu().mean((2, 3)), self.table)


def test_what_cannot_be_estimated_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = Summed(), calibration()
    graph = trace_groups(model, batches[0][0][:2])
    judge = LossChange(model, graph, batches)
    a, b = graph.group("a").units[:3], graph.group("b").units[:3]
    found = judge.estimate([a, b])
    assert np.isfinite(found[0])
    assert np.isnan(found[1])
    pruner = Pruner(model, batches[0][0][:2], criterion="magnitude", budget=0.8, delta=0.1)
    candidates = {row["group"]: row for row in pruner.step(batches).candidates}
    assert candidates["b"]["estimated"] is None
    assert candidates["b"]["measured"] > 0
    assert "criterion  has nothing" not in caplog.text


def test_an_average_of_a_network_with_a_child_called_module() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = chain(8, 8)

        def forward(self, x: Tensor) -> Any:
            return self.module(x)

    for wrap in (copy.deepcopy, torch.optim.swa_utils.AveragedModel):
        model, batches = Wrapped(), calibration()
        average = wrap(model)
        pruner = Pruner(model, batches[0][0], budget=0.5, delta=0.5, ema=average)
        pruner.step(batches)
        inner = average if isinstance(average, Wrapped) else average.module
        assert [p.shape for p in inner.parameters()] == [p.shape for p in model.parameters()]


def test_scores_do_not_mind_how_tf32_was_set() -> None:
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        discriminant_scores(torch.randn(6, 4, 5, 5), torch.arange(6) % 3)
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


class WritesHalf(nn.Module):
    """Writes through a view while another view of the same map is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        first = y[:, :4]
        y[:, 4:] *= 2
        return self.b(y + first.mean((1, 2, 3), keepdim=True)).mean((2, 3))


def test_memory_of_networks_that_write_through_views() -> None:
    model, images = WritesHalf(), torch.randn(2, 3, 8, 8)
    graph = trace_groups(model, images)
    costs = CostModel(graph, model, images, ("memory",))
    assert costs.baseline("memory") >= (8 + 3) * 8 * 8 * 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_lack_of_memory_is_no_reason_to_freeze(error: Exception) -> None:
    class Hungry(nn.ReLU):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Hungry.calls += 1
            if Hungry.calls > 1:  # the trace gets through, the trial does not
                raise error
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Hungry(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(4))
    images = torch.randn(2, 3, 8, 8)
    model(images)
    Hungry.calls = 0
    with pytest.raises(type(error), match="memory"):
        trace_groups(model.eval(), images)


def test_masks_of_another_length_are_refused() -> None:
    model, images = chain(8, 8), torch.randn(2, 3, 8, 8)
    graph = trace_groups(model, images)
    with pytest.raises(ValueError, match=r"\(3,\) for 8"):
        prune_channels(model, graph, {"0": [True, False, True]})


def test_normalisations_without_tensors_know_their_width(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.InstanceNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8, affine=False, track_running_stats=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )

    model = build()
    prune(model, torch.randn(2, 3, 16, 16), budget=0.5)
    save_pruned(tmp_path / "pruned.pth.tar", model, factory=build)
    for network in (model, load_pruned(tmp_path / "pruned.pth.tar", factory=build)):
        assert network[1].num_features == network[0].out_channels < 8
        assert network[4].num_features == network[3].out_channels < 8


def test_a_dry_run_says_what_pruning_then_does() -> None:
    """While nothing is trained, and the estimate decides, both are the same; nothing is rewritten by looking."""
    from pruning.search import GreedySearch

    model, batches = chain(16, 24), calibration()
    pruner = Pruner(model, batches[0][0], budget=0.5, delta=0.5, step=7, search=GreedySearch(1))
    before = copy.deepcopy(model.state_dict())
    (row,) = pruner.dry_run(batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (row["rewrite"], row["iteration"]) == (1, 7)
    record = pruner.step(batches)
    assert row["costs"]["macs"] == pytest.approx(record.costs["macs"][1] / record.costs["macs"][2])
    for name, (_, after) in record.widths.items():
        assert row["widths"][name] == after


class Tied(nn.Module):
    """Two layers and two normalisations that share their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.c.weight = self.b.weight
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x.flatten(1)).relu()
        x = self.first(x + self.b(x).relu())
        return self.head(self.second(x + self.c(x).relu()))


def test_all_modules_that_share_a_tensor_follow(tmp_path: Path) -> None:
    model, images = Tied(), torch.randn(4, 3, 2, 2)
    prune(model, images, budget={"params": 0.6})
    width = model.a.out_features
    assert width < 8
    assert (model.c.in_features, model.c.out_features) == (width, width)
    assert model.second.normalized_shape == (width,)
    save_pruned(tmp_path / "pruned.pth.tar", model, factory=Tied)
    again = load_pruned(tmp_path / "pruned.pth.tar", factory=Tied)
    torch.testing.assert_close(again(images), model(images))


def test_parametrised_layers_are_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = chain(8, 8)
        nn.utils.parametrizations.weight_norm(model[0])
        return model

    model, images = build().eval(), torch.randn(2, 3, 8, 8)
    prune(model, images, budget=0.5)
    save_pruned(tmp_path / "pruned.pth.tar", model, factory=build)
    again = load_pruned(tmp_path / "pruned.pth.tar", factory=build)
    torch.testing.assert_close(again.eval()(images), model(images))


class HardCoded(nn.Module):
    """Views by a number that stands in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1)
        self.c, self.head = nn.Conv2d(12, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3))
        return self.head(x.view(x.shape[0], 16))


def test_a_hard_coded_size_freezes_only_what_it_is_about() -> None:
    graph = trace_groups(HardCoded().eval(), torch.randn(2, 3, 8, 8))
    assert {group.name for group in graph.prunable} == {"a", "b"}
    assert "invalid for input of size" in graph.frozen["c"]


def test_criteria_by_the_loss_take_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aux = chain(8, 8), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Any:
            return [self.body(x), self.aux(x[:, :, :2, :2].flatten(1))]

    model, batches = Two(), calibration()
    Pruner(model, batches[0][0], criterion="taylor", budget=0.7, delta=0.3).step(batches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: {"model": nn.DataParallel(given["model"])}, "DataParallel"),
        (lambda given: {"model": torch.compile(given["model"])}, "OptimizedModule"),
        (lambda given: {"example": torch.zeros(0, 3, 8, 8)}, "example"),
        (lambda given: {"budget": None}, "budget=None"),
        (lambda given: {"criterion": Taylor}, "criterion"),
        (lambda given: {"optimizer": torch.optim.LBFGS(given["model"].parameters())}, "LBFGS"),
    ],
)
def test_unusable_arguments_are_refused_at_once(change: Any, message: str) -> None:
    given = {"model": chain(8, 8), "example": torch.randn(2, 3, 8, 8)}
    with pytest.raises(ConfigError, match=message):
        Pruner(**(given | change(given)))


def test_inference_mode_is_named() -> None:
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        prune(chain(8, 8), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "values", [{"ignored": "layer4.*"}, {"limits": "layer1.*=0.5"}, {"round_to": 2.5}, {"round_to": 0}]
)
def test_impossible_constraints(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give"):
        Constraints(**values)


RANKS = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from image_classification.models import create_model
from pruning import Pruner

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
torch.manual_seed(0)
model = create_model("resnet20", num_classes=4)
images, targets = torch.randn(8, 3, 16, 16)[dist.get_rank()::2], torch.arange(8)[dist.get_rank()::2] % 4
pruner = Pruner(model, images[:1], criterion="taylor", budget=0.6, delta=0.2, step=1)
for iteration in range(1, 4):
    wrapped = DistributedDataParallel(model)
    torch.nn.functional.cross_entropy(wrapped(images), targets).backward()
    if pruner.due(iteration):
        del wrapped
        pruner.step([(images, targets)])
print([group.width for group in pruner.graph.groups])
dist.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_ranks_of_ones_own_process_group_agree(tmp_path: Path) -> None:
    """Each has images of its own, and nobody tells the pruner that there are two."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (rank.communicate(timeout=300)[0].splitlines()[-1] for rank in ranks)
    assert first == second
    assert all(rank.returncode == 0 for rank in ranks)


def test_what_is_not_known_is_not_shown() -> None:
    """Without calibration data there is no loss, and outside training no iteration."""
    model = create_model("resnet20", num_classes=10)
    record = prune(model, torch.randn(2, 3, 32, 32), budget=0.7, criterion="magnitude")
    assert "nan" not in record.describe()
    assert "calibration loss" not in record.describe()
