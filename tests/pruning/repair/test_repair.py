"""Repairs against slow float64 least squares, and what must hold whatever the network: equal and silent channels."""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classification.config import SettingError
from image_classification.distributed import Distributed
from pruning import prune_channels, trace_groups
from pruning.repair import repairing
from pruning.repair.flights import Flight
from pruning.repair.image_chunks import chunks_of
from pruning.repair.norm_statistics import remeasure
from pruning.repair.pass_memory import PassMemory
from pruning.repair.repairing import Method, RepairReport, RepairSettings, plan_repair
from pruning.repair.solution import solve
from pruning.repair.sums import Rows, Sums, evidence_for
from pruning.task import Task

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
FREE = RepairSettings(ridges=(1e-12,))


def small(consumer: nn.Module, *after: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), consumer, *after)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model.eval()


def cut_and_repaired(
    model: nn.Module, removed: int, settings: RepairSettings, images: Tensor = IMAGES
) -> tuple[nn.Module, nn.Module, RepairReport]:
    """The network after the cut, after the repair, and the report; the last channels of the first group go."""
    graph = trace_groups(model, images[:2])
    group = graph.prunable[0]
    keep = {group.index: np.arange(group.width - removed)}
    plan = plan_repair(model, graph, graph.keep_mask(keep), settings)
    cut = copy.deepcopy(model)
    prune_channels(cut, copy.deepcopy(graph), keep)
    repaired = copy.deepcopy(cut)
    report = plan.repair(repaired, [(images,)])
    return cut, repaired, report


CONSUMERS: dict[str, tuple[nn.Module, ...]] = {
    "conv": (nn.Conv2d(8, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "conv without bias before a batch norm": (
        nn.Conv2d(8, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ),
    "conv without bias": (nn.Conv2d(8, 5, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "transposed": (nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1), nn.Flatten()),
    "grouped": (nn.Conv2d(8, 6, 3, groups=2), nn.Flatten()),
    "linear on channels": (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_repair_is_never_worse_and_gains_where_inputs_are_related(name: str) -> None:
    model = small(*CONSUMERS[name])
    weight, bias = model[0].weight, model[0].bias
    with torch.no_grad():  # what is removed is made of others, nearly
        for gone, kin in ((7, 4), (3, 0)):  # a grouped layer loses one channel of each group
            weight[gone] = 0.6 * weight[kin] + 0.05 * weight[gone]
            bias[gone] = 0.6 * bias[kin]
    cut, repaired, report = cut_and_repaired(model, 1, RepairSettings())
    fresh = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before, after = ((net(fresh) - model(fresh)).square().mean() for net in (cut, repaired))
    assert report.distance[1] <= report.distance[0]
    assert after < 0.5 * before


def test_weights_are_those_of_lstsq() -> None:
    """Free fit of a 1 × 1 convolution with a bias: NumPy's float64 solution of the same rows."""
    model = small(nn.Conv2d(8, 5, 1), nn.Flatten())
    settings = RepairSettings(ridges=(1e-12,), held_out=0.25)
    _, repaired, report = cut_and_repaired(model, 3, settings)
    assert report.kept
    with torch.no_grad():
        features = model[1](model[0](IMAGES)).double()
        wanted = model[2].double()(features)
        rows = features[:, :5].permute(0, 2, 3, 1).reshape(-1, 5).numpy()
        targets = wanted.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    solution, *_ = np.linalg.lstsq(np.hstack([rows, np.ones((len(rows), 1))]), targets, rcond=None)
    np.testing.assert_allclose(repaired[2].weight.detach()[:, :, 0, 0].T.numpy(), solution[:-1], atol=1e-4)
    np.testing.assert_allclose(repaired[2].bias.detach().numpy(), solution[-1], atol=1e-4)


@pytest.mark.parametrize("name", CONSUMERS)
def test_equal_channels_are_merged(name: str) -> None:
    model = small(*CONSUMERS[name])
    with torch.no_grad():
        for gone, twin in ((7, 4), (3, 0)):
            model[0].weight[gone], model[0].bias[gone] = model[0].weight[twin], model[0].bias[twin]
    cut, repaired, _ = cut_and_repaired(model, 1, RepairSettings())
    with torch.no_grad():
        difference = (repaired(IMAGES) - model(IMAGES)).abs().max()
        assert (cut(IMAGES) - model(IMAGES)).abs().max() > 1e-3
    assert difference < 1e-5 * model(IMAGES).abs().max().clamp(min=1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CONSUMERS)
def test_silent_channels_leave_without_a_change(name: str, seed: int) -> None:
    model = small(*CONSUMERS[name], seed=seed)
    with torch.no_grad():
        for gone in (3, 7):
            model[0].weight[gone], model[0].bias[gone] = 0, 0
    cut, repaired, _ = cut_and_repaired(model, 1, RepairSettings())
    for one, two in zip(cut.state_dict().values(), repaired.state_dict().values(), strict=True):
        assert torch.equal(one, two)


class Twice(nn.Module):
    """A layer that is called twice, between two that are called once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 6, 1)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last((self.shared(x) + self.shared(x.flip(3) * 0.5)).mean((2, 3)))


def test_a_shared_layer_has_one_solution_for_all_its_calls() -> None:
    model = Twice().eval()
    with torch.no_grad():
        model.first.weight[7] = 0.5 * model.first.weight[6]
        model.first.bias[7] = 0.5 * model.first.bias[6]
    settings = RepairSettings(ridges=(1e-12,), scope="cut")
    _, repaired, report = cut_and_repaired(model, 1, settings)
    assert [layer.parameter for layer in report.layers] == ["shared.weight"]
    with torch.no_grad():  # x₇ = ½ x₆ at every call, so one weight takes it up
        wanted = model.shared.weight[:, 6] + 0.5 * model.shared.weight[:, 7]
        torch.testing.assert_close(repaired.shared.weight[:, 6], wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(repaired(IMAGES), model(IMAGES), atol=1e-4, rtol=1e-4)


def test_passes_that_are_run_again_for_every_layer_find_the_same() -> None:
    """Where the images do not fit into memory together."""
    networks, reports = [], []
    for in_flight in (None, 8):
        settings = RepairSettings(chunk=4, in_flight=in_flight)
        _, repaired, report = cut_and_repaired(Twice().eval(), 3, settings)
        networks.append(repaired)
        reports.append(report)
    assert [len(report.layers) for report in reports] == [2, 2]
    assert reports[0].distance == pytest.approx(reports[1].distance, rel=1e-5)
    for one, two in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_memory_of_a_pass() -> None:
    """Three maps of 4,000 bytes are made; two of them live at a time. Views and what is given do not count."""
    x = torch.randn(1000)
    with PassMemory() as memory:
        y = x.view(10, 100).relu()
        z = y + 1
        (z * 2).add_(1)
    assert (memory.total, memory.peak) == (12000, 8000)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_makes_no_difference(memory_format: torch.memory_format) -> None:
    plain = small(nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 3))
    model = copy.deepcopy(plain).to(memory_format=memory_format)
    _, repaired, report = cut_and_repaired(model, 3, RepairSettings())
    _, wanted, _ = cut_and_repaired(plain, 3, RepairSettings())
    assert report.kept
    for one, two in zip(repaired.state_dict().values(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_layers_behind_the_cut_are_solved_too_and_bring_more() -> None:
    model = small(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )
    reports = {
        scope: cut_and_repaired(model, 4, RepairSettings(scope=scope))[2] for scope in ("cut", "behind")
    }  # fmt: skip
    assert [layer.parameter for layer in reports["cut"].layers] == ["2.weight"]
    assert [layer.parameter for layer in reports["behind"].layers] == ["2.weight", "4.weight", "6.weight"]
    assert reports["behind"].distance[1] < reports["cut"].distance[1] < reports["cut"].distance[0]


def test_the_rounding_of_dependent_inputs_spoils_nothing() -> None:
    """Inputs behind a layer norm add up to nothing: the last bits of UᵀU say whether it has an inverse."""
    random = torch.Generator().manual_seed(0)
    present, wanted = torch.randn(2, 1, 6, 3, generator=random, dtype=torch.float64)
    evidence = []
    for rounding in (1e-7, -3e-7):
        inputs = torch.randn(1, 200, 6, generator=random, dtype=torch.float64)
        inputs -= inputs.mean(2, keepdim=True)
        sums = Sums.zeros(1, 6, 3, torch.device("cpu"))
        sums.add(inputs, inputs @ wanted)
        sums.gram += rounding * sums.gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(6)
        evidence.append(sums)
    fit, held_out = evidence
    solution = solve(fit, held_out, present, has_bias=False, ridges=(1e-9,))
    before, after, ridge = solution.figures.tolist()
    assert ridge == pytest.approx(1e-9)
    assert after < 1e-5 < before
    probe = torch.randn(1, 50, 6, generator=random, dtype=torch.float64)
    probe -= probe.mean(2, keepdim=True)
    torch.testing.assert_close(probe @ solution.weights, probe @ wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inputs", [5, 515])
def test_sums_of_rows_are_their_products(inputs: int) -> None:
    """Narrow, and so wide that the Gram matrix is computed in blocks, the last of which is smaller."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 40, inputs, generator=random)
    targets = torch.randn(2, 40, 3, generator=random)
    sums = Sums.zeros(2, inputs, 3, torch.device("cpu"))
    sums.add(rows[:, :30], targets[:, :30])
    sums.add(rows[:, 30:], targets[:, 30:])
    u, y = rows.double().numpy(), targets.double().numpy()
    np.testing.assert_allclose(sums.gram, np.einsum("gri,grj->gij", u, u), atol=1e-4)
    np.testing.assert_allclose(sums.cross, np.einsum("gri,grm->gim", u, y), atol=1e-4)


def test_images_held_out_of_several_batches_are_judged_together() -> None:
    """Up to the size of a chunk, with their own targets; batches that differ in anything else stay apart."""
    images = torch.arange(24.0).reshape(24, 1, 1, 1)
    batches = [(images[:8], torch.arange(8)), (images[8:16], torch.arange(8, 16))]
    chunks = chunks_of(batches, 0.25, 8, Task(), Distributed())
    assert [(chunk.num_images, chunk.held_out) for chunk in chunks] == [(6, False), (4, True), (6, False)]
    together, targets = chunks[1].batch
    assert together.flatten().tolist() == targets.tolist() == [0, 1, 8, 9]
    other = (torch.zeros(8, 1, 2, 2), torch.arange(8))
    apart = chunks_of([batches[0], other], 0.25, 8, Task(), Distributed())
    assert [chunk.num_images for chunk in apart if chunk.held_out] == [2, 2]


def test_the_kernel_form_has_the_same_solution() -> None:
    """Few rows and many inputs: the rows themselves, instead of their products."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(2, 30, 12, generator=generator, dtype=torch.float64) + 1
    targets = torch.randn(2, 30, 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 12, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    sums, kept = Sums.zeros(2, 12, 3, torch.device("cpu")), Rows.empty(2, 12, 3, torch.device("cpu"))
    for evidence in (sums, kept):
        evidence.add(rows[:, :20], targets[:, :20])
        evidence.add(rows[:, 20:], targets[:, 20:])
    for has_bias in (True, False):
        solutions = (list(evidence.ridge(weights, [0.1, 2.0], has_bias)) for evidence in (sums, kept))
        torch.testing.assert_close(*solutions)
    torch.testing.assert_close(sums.error(weights, bias), kept.error(weights, bias))
    torch.testing.assert_close(sums.best_bias(weights), kept.best_bias(weights))
    torch.testing.assert_close(sums.variance(), kept.variance())
    wide = evidence_for(1, 10_000, 3, 20_000, torch.device("cpu"))
    assert isinstance(wide, Rows)
    assert wide.thinned == 3  # 20,000 rows are more than are kept


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ([], r"images\b.*repair='none'"),
        ([torch.zeros(8, 3, 8, 8)], r"\b8\b.*equal.*repair='none'"),
        ([torch.full((8, 3, 8, 8), float("nan"))], "outputs.*NaN"),
    ],
)
def test_images_that_cannot_repair_are_refused(images: list[Tensor], told: str) -> None:
    model = small(nn.Conv2d(8, 5, 1), nn.Flatten())
    graph = trace_groups(model, IMAGES[:2])
    keep = {0: np.arange(5)}
    plan = plan_repair(model, graph, graph.keep_mask(keep), RepairSettings())
    prune_channels(model, graph, keep)
    with pytest.raises(SettingError, match=f"^calibration=None: .*{told}"):
        plan.repair(model, images)


@dataclasses.dataclass
class Answer:
    logits: Tensor
    more: list[Tensor]


class InAnObject(nn.Module):
    """A network whose outputs are inside an object, one of them what a layer without a bias gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.side, self.norm = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Answer:
        x = self.first(x).relu()
        side = self.side(x)
        return Answer(self.head(x), [side, self.norm(side)])


def test_outputs_in_objects_are_judged() -> None:
    _, _, report = cut_and_repaired(InAnObject().eval(), 3, RepairSettings())
    assert report.distance[0] > 0.01
    assert report.kept
    assert report.distance[1] < report.distance[0]


def test_a_loss_that_rises_undoes_the_repair() -> None:
    model = small(nn.Conv2d(8, 5, 1), nn.Flatten())
    graph = trace_groups(model, IMAGES[:2])
    keep = {0: np.arange(5)}
    plan = plan_repair(model, graph, graph.keep_mask(keep), RepairSettings())
    prune_channels(model, graph, keep)
    cut = copy.deepcopy(model)
    targets = cut(IMAGES).detach()  # nothing but the cut network is right

    def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (outputs - batch[1]).square().mean(1)

    report = plan.repair(model, [(IMAGES, targets)], task=Task(loss=loss), judged=True)
    assert not report.kept
    assert report.undone in report.describe()
    assert "loss" in report.undone
    before, after = (float(number) for number in re.findall(r"from (\S+) to (\S+)", report.undone)[0])
    assert before < 1e-9 < after
    for one, two in zip(cut.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("removed", [1, 6])
def test_statistics_are_tried_only_where_much_is_left_to_mend(
    monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """After least squares nothing is left of an equal channel's loss, and much of that of most channels."""
    tried = []
    monkeypatch.setattr(repairing, "remeasure", lambda *arguments, **_: tried.append(arguments))
    model = small(nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight[7], model[0].bias[7] = model[0].weight[4], model[0].bias[4]
    _, _, report = cut_and_repaired(model, removed, RepairSettings())
    assert (report.distance[1] < 0.1 and bool(report.layers)) != bool(tried)
    assert bool(tried) == (removed == 6)


def test_statistics_are_those_of_training_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
    )
    trained = copy.deepcopy(model).train()
    for norm in (trained[1], trained[4]):
        norm.momentum = None  # averages over all batches
    for batch in IMAGES.split(8):
        trained(batch)
    remeasure(model.eval(), [lambda batch=batch: model(batch) for batch in IMAGES.split(8)])
    for index in (1, 4):
        torch.testing.assert_close(model[index].running_mean, trained[index].running_mean)
        torch.testing.assert_close(model[index].running_var, trained[index].running_var)
        assert model[index].num_batches_tracked == 0
    assert not model.training


@pytest.mark.parametrize("method", ["least-squares", "statistics"])
def test_the_mode_that_batches_run_in_makes_no_difference(method: Method) -> None:
    """Constants go into running means, which are buffers; a task puts back what its passes write into those."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    for _ in range(30):
        model(IMAGES + 1)
    graph = trace_groups(model.eval(), IMAGES[:2])
    keep = {0: np.arange(3)}
    found = []
    for mode in ("eval", "train"):
        cut, followed = copy.deepcopy(model), copy.deepcopy(graph)
        plan = plan_repair(cut, followed, followed.keep_mask(keep), RepairSettings(method=method))
        prune_channels(cut, followed, keep)
        means = cut[3].running_mean.clone()
        report = plan.repair(cut, [IMAGES + 1], task=Task(mode=mode))
        assert report.kept
        assert not torch.equal(cut[3].running_mean, means)
        found.append(cut.state_dict())
    for name, values in found[0].items():
        torch.testing.assert_close(found[1][name], values)


class Fragile(nn.Module):
    """A network that can fail in its last layer, when those before it have been solved for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 3)
        self.num_passes, self.last = 0, 1000

    def forward(self, x: Tensor) -> Tensor:
        self.num_passes += 1
        number = self.num_passes
        x = self.b(self.a(x).relu()).relu()
        if number >= self.last:
            raise KeyError("an image without a label")
        return self.c(x)


def test_a_network_that_fails_meanwhile_is_left_as_the_cut_left_it() -> None:
    torch.manual_seed(0)
    model = Fragile().eval()
    graph = trace_groups(model, IMAGES[:2])
    keep = {0: np.arange(5)}
    plan = plan_repair(model, graph, graph.keep_mask(keep), RepairSettings())
    prune_channels(model, graph, keep)
    before = copy.deepcopy(model.state_dict())
    model.num_passes, model.last = 0, 5
    with pytest.raises(KeyError):
        plan.repair(model, IMAGES.split(4))
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name])


class FixedFilter(nn.Module):
    """What reads the channels is a filter in a buffer; behind it are layers that can be solved for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)
        self.register_buffer("mixed", torch.randn(6, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.conv2d(self.a(x).relu(), self.mixed)).relu())


def test_layers_behind_a_fixed_filter_are_solved_for() -> None:
    model = FixedFilter().eval()
    cut, repaired, report = cut_and_repaired(model, 3, RepairSettings())
    assert [layer.parameter for layer in report.layers] == ["b.weight", "c.weight"]
    assert torch.equal(cut.mixed, repaired.mixed)
    with torch.no_grad():
        before, after = ((net(IMAGES) - model(IMAGES)).square().mean() for net in (cut, repaired))
    assert after < 0.7 * before


def test_nothing_to_solve_for_is_said() -> None:
    _, _, report = cut_and_repaired(FixedFilter().eval(), 3, RepairSettings(scope="cut"))
    assert not report.kept
    assert report.problem in report.describe()
    assert "weights" in report.problem


def test_what_is_frozen_and_lost_nothing_stays() -> None:
    """A frozen judge of the outputs, say: it must not be bent to what a cut network gives it."""
    model = FixedFilter().eval()
    model.c.requires_grad_(False)
    _, repaired, report = cut_and_repaired(model, 3, RepairSettings())
    assert [layer.parameter for layer in report.layers] == ["b.weight"]
    assert torch.equal(repaired.c.weight, model.c.weight)
    model.requires_grad_(False)  # a network for inference, of which all is frozen
    _, _, report = cut_and_repaired(model, 3, RepairSettings())
    assert [layer.parameter for layer in report.layers] == ["b.weight", "c.weight"]


def test_passes_in_flight_see_the_callers_defaults() -> None:
    """PyTorch's default device and context variables are a thread's own."""
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("the caller's")
    with torch.device("meta"):
        flight = Flight(nn.Linear(2, 2), lambda: (torch.zeros(2).device.type, variable.get()), ())
    with flight:
        assert flight.finish() == ("meta", "the caller's")


class Routed(nn.Module):
    """Some rows go through a layer of their own, and after a cut these are others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.expert, self.head = (
            nn.Linear(6, 12),
            nn.Linear(12, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        chosen = x[:, 0] > 0
        x = x.clone()
        x[chosen] = self.expert(x[chosen])
        return self.head(x)


class UsedBothWays(nn.Module):
    """A square weight, and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 4)
        self.mixed = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        return self.head((x @ self.mixed).relu() @ self.mixed.T)


@pytest.mark.parametrize(("network", "left"), [(Routed, "expert.weight"), (UsedBothWays, "mixed")])
def test_layers_whose_rows_do_not_correspond_are_left_and_the_others_solved(
    network: type[nn.Module], left: str
) -> None:
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(4))
    model = network().eval()
    graph = trace_groups(model, rows[:2])
    keep = {"a": np.arange(7)}
    plan = plan_repair(model, graph, graph.keep_mask(keep), RepairSettings())
    prune_channels(model, graph, keep)
    before = model.get_parameter(left).clone()
    report = plan.repair(model, [rows])
    assert report.kept
    assert not report.problem
    assert {"b.weight", "head.weight"} == {layer.parameter for layer in report.layers}
    assert torch.equal(model.get_parameter(left), before)
    assert report.distance[1] < 0.7 * report.distance[0]
