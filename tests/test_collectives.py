"""All ranks take part in the same collectives in the same order, whatever they see: counted, without processes.

What would hang under NCCL, or add up tensors that do not belong together, shows as two lists that differ. Ranks are
disturbed: one computes other last bits, has more or smaller batches than the others, a single image, or none at all.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, get_args
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.simulated_ranks import CollectiveMismatchError, SimulatedRanks, simulated_ranks
from torch import Tensor, nn

from explainers import create_method, method_names
from explainers.aem.mask_quality import judge_masks
from explainers.casm.validation import CasmValidation
from explainers.differentiable.gradcam_explanation import GradCamExplanation
from explainers.differentiable.remembered import OriginalExplanations
from explainers.measures.evaluate import METRICS, localize
from image_classification.callbacks import TrainState
from image_classification.config import ConfigError
from image_classification.data.loader import Batch
from image_classification.distributed import Distributed
from image_classification.evaluation import Evaluator
from image_classification.precision import Precision, PrecisionConfig
from image_classification.schedules import Schedule, ScheduleConfig
from image_classification.train_config import TrainConfig
from pruning.costs.budget import Budget
from pruning.costs.cost_model import CostModel
from pruning.criteria import create_criterion, criterion_names
from pruning.criteria.saliency import Saliency
from pruning.criteria.scoring import score_groups
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.pruner import Pruner
from pruning.repair.repairing import REPAIR_METHODS, RepairSettings, plan_repair
from pruning.rewrites.pruner_settings import PrunerSettings
from pruning.search import SearchSettings, build_search, search_names
from pruning.training.learned.gate_settings import Form, GateSettings
from pruning.training.learned.learner import GateLearner
from pruning.training.learned.widths import inner_groups
from pruning.training.unstructured import UnstructuredPruning
from pruning.training.unstructured_config import Scope, UnstructuredConfig

Batches = list[tuple[Tensor, Tensor]]
CLASSES = 4
#: Images in the batches of the two ranks.
SHARES: dict[str, tuple[list[int], list[int]]] = {
    "alike": ([8, 8], [8, 8]),
    "last bits": ([8, 8], [8, 8]),
    "uneven": ([8, 8, 8], [5]),
    "one image": ([8, 8], [1]),
    "empty batch": ([8, 8], [8, 0]),
    "no batches": ([8, 8], []),
}


class Twins(nn.Module):
    """Two branches that start equal, so that scores tie and a last bit decides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 6, 3, padding=1)
        self.right = copy.deepcopy(self.left)
        self.left_out = nn.Conv2d(6, 4, 1)
        self.right_out = copy.deepcopy(self.left_out)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.left_out(self.left(x).relu()) + self.right_out(self.right(x).relu())
        return self.fc(x.relu().mean((2, 3)))


def network(rank: int, disturbance: str) -> nn.Module:
    """The same on all ranks, except the last bits of one."""
    torch.manual_seed(0)
    model = Twins()
    if disturbance == "last bits" and rank:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data *= 1 + 1e-7 * torch.randn(parameter.shape, generator=generator)
    return model


def share(rank: int, disturbance: str) -> Batches:
    generator = torch.Generator().manual_seed(10 + rank)
    return [
        (
            torch.randn(count, 3, 8, 8, generator=generator),
            torch.randint(0, CLASSES, (count,), generator=generator),
        )
        for count in SHARES[disturbance][rank]
    ]


def nudged(rank: int, total: Tensor) -> Tensor:
    """A reduction in which ranks differ in the last bits."""
    return total * (1 + 2**-50 * rank) if total.is_floating_point() else total


@pytest.fixture(params=SHARES)
def disturbance(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ranks() -> Iterator[SimulatedRanks]:
    with simulated_ranks(2) as made:
        yield made


def same_everywhere(ranks: SimulatedRanks, job: Any) -> list[Any]:
    """Run a job; the ranks' collectives are equal, and an error for people is the same one on all."""
    told: list[str] = []

    def told_by_all(distributed: Distributed) -> Any:
        try:
            return job(distributed)
        except ConfigError as error:
            told.append(str(error))
            return None

    results = ranks.run(told_by_all)
    assert ranks.calls[0] == ranks.calls[1]
    assert not told or (len(told) == 2 and len(set(told)) == 1), told
    return results


def rewrite(distributed: Distributed, disturbance: str, **settings: Any) -> dict[str, Any]:
    """What a rewrite of the small network decided."""
    pruner = Pruner(
        network(distributed.rank, disturbance),
        torch.randn(2, 3, 8, 8),
        budget=0.6,
        delta=0.4,
        settings=PrunerSettings(distributed=distributed),
        **settings,
    )
    record = pruner.step(share(distributed.rank, disturbance))
    return {"widths": record.widths, "loss": record.loss, "repair": record.repair}


def decided_alike(results: list[Any]) -> None:
    first, second = results
    if first is not None:
        assert second["widths"] == first["widths"]
        assert second["loss"] == pytest.approx(first["loss"], nan_ok=True)
        assert second["repair"] == first["repair"]


class TestMeeting:
    """The instrument itself."""

    def test_reductions_and_objects(self, ranks: SimulatedRanks) -> None:
        def job(distributed: Distributed) -> Any:
            (total,) = distributed.all_reduce_sum(torch.tensor([1, distributed.rank]))
            decided = distributed.decide_on_main(lambda: distributed.rank + 7)
            with distributed.main_process_first():
                pass
            return total.tolist(), distributed.gather_objects(distributed.rank), decided

        assert ranks.run(job) == [([2, 1], [0, 1], 7)] * 2
        assert ranks.calls[0][0] == "all_reduce float64 [4]"

    def test_what_hosts_know_travels_between_hosts(self, ranks: SimulatedRanks) -> None:
        def job(distributed: Distributed) -> int:
            beside_nccl: Any = "a group of Gloo"
            return dataclasses.replace(distributed, host_group=beside_nccl).sum_on_hosts(distributed.rank + 2)

        assert ranks.run(job) == [5, 5]
        assert ranks.calls[1] == ["all_reduce int64 [1] on hosts"]

    def test_other_shapes_are_a_mismatch(self, ranks: SimulatedRanks) -> None:
        with pytest.raises(CollectiveMismatchError, match=r"rank 0: all_reduce.*\[1\], rank 1: .*\[2\]"):
            ranks.run(lambda distributed: distributed.all_reduce_sum(torch.ones(1 + distributed.rank)))

    def test_a_rank_that_has_left_is_a_mismatch(self, ranks: SimulatedRanks) -> None:
        with pytest.raises(CollectiveMismatchError, match="rank 1 has ended while others wait: rank 0"):
            ranks.run(lambda distributed: distributed.rank or distributed.barrier())


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return trace_groups(Twins().eval(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("name", criterion_names())
def test_criteria(ranks: SimulatedRanks, graph: ChannelGraph, name: str, disturbance: str) -> None:
    def job(distributed: Distributed) -> Any:
        model, batches = network(distributed.rank, disturbance).eval(), share(distributed.rank, disturbance)
        criterion = create_criterion(name) if name != "saliency" else None
        if criterion is None:
            originals = OriginalExplanations(GradCamExplanation("right"))
            originals.remember(model, batches, distributed)
            criterion = Saliency(originals)
        return score_groups(model, graph, batches, criterion, distributed=distributed)

    first, second = same_everywhere(ranks, job)
    for index, scores in (first or {}).items():
        assert torch.equal(scores, second[index])


@pytest.mark.parametrize("repair", [None, "none"])
@pytest.mark.parametrize("name", [name for name in search_names() if name != "rates"])
def test_searches(
    ranks: SimulatedRanks, monkeypatch: pytest.MonkeyPatch, name: str, repair: Any, disturbance: str
) -> None:
    """Also where reductions give ranks other last bits, which no library promises not to."""
    monkeypatch.setattr("pruning.search.feasible.failure_of_cut", lambda *arguments: None)
    if disturbance == "last bits":
        ranks.altered = nudged

    def job(distributed: Distributed) -> Any:
        search = build_search(name, SearchSettings(instalments=2))
        return rewrite(distributed, disturbance, criterion="magnitude", search=search, repair=repair)

    decided_alike(same_everywhere(ranks, job))


@pytest.mark.parametrize(
    ("method", "in_flight"), [*((method, None) for method in REPAIR_METHODS), ("least-squares", 1)]
)
def test_repairs(
    ranks: SimulatedRanks,
    monkeypatch: pytest.MonkeyPatch,
    method: Any,
    in_flight: int | None,
    disturbance: str,
) -> None:
    monkeypatch.setattr("pruning.search.feasible.failure_of_cut", lambda *arguments: None)
    repair = RepairSettings(method=method, in_flight=in_flight)

    def job(distributed: Distributed) -> Any:
        return rewrite(distributed, disturbance, criterion="magnitude", search="global", repair=repair)

    decided_alike(same_everywhere(ranks, job))


@pytest.mark.parametrize("in_flight", [None, 1])
@pytest.mark.parametrize(("begins", "failing"), [(True, 1), (True, 2), (True, 4), (False, 1), (False, 2)])
def test_memory_that_runs_out_on_one_rank(
    ranks: SimulatedRanks, begins: bool, failing: int, in_flight: int | None
) -> None:
    """Both ranks leave the cut unrepaired, whichever pass of the repair it was."""

    def job(distributed: Distributed) -> Any:
        model, batches = network(distributed.rank, "alike"), share(distributed.rank, "alike")
        graph = trace_groups(model, torch.randn(2, 3, 8, 8))
        keep = {graph.group("left").index: np.arange(3)}
        settings = RepairSettings(in_flight=in_flight)
        plan = plan_repair(model, graph, graph.keep_mask(keep), settings)
        prune_channels(model, graph, keep)
        num_passes = 0

        def run_out(*_of_hook: object) -> None:
            nonlocal num_passes
            num_passes += 1
            if distributed.rank and num_passes == failing + 1:  # a pass says first what the cut has done
                raise torch.OutOfMemoryError("out of memory")

        hook = model.register_forward_pre_hook if begins else model.register_forward_hook
        hook(run_out)
        return plan.repair(model, batches, distributed=distributed)

    first, second = same_everywhere(ranks, job)
    assert second.problem == "out of memory"
    assert first.problem == "it failed on 1 of the other ranks"
    assert first.layers == second.layers == ()
    assert first.distance == second.distance


def soft(targets: Tensor) -> Tensor:
    """Targets as shares of classes."""
    return 0.9 * F.one_hot(targets, CLASSES).float() + 0.1 / CLASSES


#: What the task makes of (outputs, batch), and of class indices.
TASKS: dict[str, tuple[Any, Any]] = {
    "classes": (None, lambda targets: targets),
    "soft": (None, soft),
    "several labels": (
        lambda outputs, batch: F.binary_cross_entropy_with_logits(outputs, batch[1], reduction="none").mean(
            1
        ),
        lambda targets: F.one_hot(targets, CLASSES).float(),
    ),
    "mean": (lambda outputs, batch: F.cross_entropy(outputs, batch[1]), lambda targets: targets),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("disturbance", ["last bits", "uneven", "no batches"], indirect=True)
def test_losses(ranks: SimulatedRanks, monkeypatch: pytest.MonkeyPatch, task: str, disturbance: str) -> None:
    """Criterion and search are left open: what batches hold is agreed on too."""
    monkeypatch.setattr("pruning.search.feasible.failure_of_cut", lambda *arguments: None)
    loss, targets_of = TASKS[task]
    own_share = share
    monkeypatch.setitem(
        globals(), "share", lambda *of: [(images, targets_of(targets)) for images, targets in own_share(*of)]
    )
    decided_alike(same_everywhere(ranks, lambda d: rewrite(d, disturbance, loss=loss)))


class Loader:
    """Batches from memory; all ranks take as many steps, some of them without images."""

    def __init__(self, batches: Batches, num_steps: int, *, several_labels: bool = False) -> None:
        self.num_steps, self.num_samples = num_steps, sum(len(targets) for _, targets in batches)
        empty = torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)
        self.batches = [*batches, *[empty] * (num_steps - len(batches))]
        self.several_labels = several_labels

    def __len__(self) -> int:
        return self.num_steps

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[Batch]:
        for images, targets in self.batches:
            masks = (targets[:, None, None] + 1).expand(-1, 8, 8).to(torch.uint8).clone()
            masks[:, 4:] = 0
            labels = F.one_hot(targets, CLASSES).float() if self.several_labels else targets
            yield Batch(images, labels, torch.arange(len(targets)), masks=masks)


@pytest.mark.parametrize("several_labels", [False, True])
def test_validation(ranks: SimulatedRanks, several_labels: bool, disturbance: str) -> None:
    def job(distributed: Distributed) -> Any:
        loader: Any = Loader(share(distributed.rank, disturbance), 3, several_labels=several_labels)
        precision = Precision(PrecisionConfig(), torch.device("cpu"))
        evaluator = Evaluator(loader, precision, distributed, multi_label=several_labels)
        return evaluator(network(0, "alike"), MagicMock())["val.loss"]

    first, second = same_everywhere(ranks, job)
    assert first == second


@pytest.mark.parametrize("name", [name for name in method_names() if name not in ("casm", "selector")])
@pytest.mark.parametrize("disturbance", ["last bits", "uneven", "no batches"], indirect=True)
def test_explainers(ranks: SimulatedRanks, name: str, disturbance: str) -> None:
    def job(distributed: Distributed) -> Any:
        model = network(distributed.rank, disturbance).eval()
        prepared = create_method(name).prepare(model, torch.randn(1, 3, 8, 8))
        loader = Loader(share(distributed.rank, disturbance), 3)
        (row,) = localize(
            "net",
            {name: prepared},
            torch.no_grad()(model),
            loader,
            metrics=list(METRICS),
            multi_label=False,
            distributed=distributed,
            max_pairs=8,
        )
        return row.figures

    first, second = same_everywhere(ranks, job)
    assert first == pytest.approx(second, nan_ok=True)


class Mapping(nn.Module):
    """Classifier and mask in one, as a CASM gives them."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.classifier(images), images.mean(1, keepdim=True).sigmoid()


def test_trained_explainers_are_judged_together(ranks: SimulatedRanks, disturbance: str) -> None:
    """Validation of a CASM, and the figures by which predictors and selectors are kept."""

    def job(distributed: Distributed) -> Any:
        loader: Any = Loader(share(distributed.rank, disturbance), 3)
        precision = Precision(PrecisionConfig(), torch.device("cpu"))
        mapping: Any = Mapping(network(0, "alike"))
        figures = CasmValidation(loader, precision, distributed)(mapping, MagicMock(), 0)
        masker = lambda images, targets: mapping(images)  # noqa: E731
        judged = judge_masks(
            masker, network(0, "alike"), loader, precision=precision, distributed=distributed
        )
        return figures | judged

    first, second = same_everywhere(ranks, job)
    assert first == second
    assert first["samples"] == sum(map(sum, SHARES[disturbance]))


class WithoutLoop:
    """What pruning of single weights uses of a training."""

    def __init__(self, model: nn.Module, distributed: Distributed) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.distributed, self.logger, self.steps_per_epoch = distributed, MagicMock(), 3
        self.config = TrainConfig(epochs=2)
        schedule = Schedule(ScheduleConfig(lr=0.1), 3, 2)
        self.state = TrainState(model, optimizer, schedule)


@pytest.mark.parametrize("scope", get_args(Scope))
@pytest.mark.parametrize("repair", REPAIR_METHODS)
def test_rounds_of_single_weights(ranks: SimulatedRanks, repair: Any, scope: Any) -> None:
    def job(distributed: Distributed) -> Any:
        config = UnstructuredConfig(unstructured_pruning=0.5, rounds=2, unstructured_scope=scope)
        loader: Any = Loader(share(distributed.rank, "uneven"), 3)
        pruning = UnstructuredPruning(config, loader, repair=repair)
        loop: Any = WithoutLoop(network(distributed.rank, "alike"), distributed)
        pruning.on_fit_start(loop)
        pruning.on_epoch_start(loop)
        return {name: parameter.detach() for name, parameter in loop.state.model.named_parameters()}

    first, second = same_everywhere(ranks, job)
    for name, parameter in first.items():
        torch.testing.assert_close(second[name], parameter)


@pytest.mark.parametrize("form", get_args(Form))
def test_learned_gates(ranks: SimulatedRanks, graph: ChannelGraph, form: Any, disturbance: str) -> None:
    def job(distributed: Distributed) -> Any:
        model = network(distributed.rank, disturbance).eval()
        loader: Any = Loader(share(distributed.rank, disturbance), 3)
        originals = OriginalExplanations(GradCamExplanation("right"))
        originals.remember(model, share(distributed.rank, disturbance), distributed)
        settings = GateSettings(gates=form, gate_epochs=2, gate_task_weight=0.5, resource_growth=2.0)
        costs, budget = CostModel(graph, model, torch.randn(1, 3, 8, 8), ("macs",)), Budget({"macs": 0.5})
        groups = inner_groups(graph)
        learner = GateLearner(
            model, graph, groups, costs, budget, originals, loader, settings, distributed=distributed
        )
        with learner:
            list(learner.learn())
        return learner.logits(), originals.moved(model, share(distributed.rank, disturbance), distributed)

    (first, moved), (second, moved_there) = same_everywhere(ranks, job)
    assert moved == moved_there
    for index, logits in first.items():
        np.testing.assert_array_equal(logits, second[index])
