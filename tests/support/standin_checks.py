"""Checks on a stand-in accelerator: nothing is mixed with the CPU or left there, and the number of host reads is known.

The figures are those of the table in docs/howto/benchmark-machine.md, which must be updated by a change that reads
more.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.standin import StandIn
from support.training import MemoryLoader, build_trainer, toy_data
from torch import Tensor, nn

from explainers import create_method, method_names
from explainers.aem.masks import MASK_PRESETS
from explainers.aem.saved_selector import SelectorExplanation, save_selector
from explainers.aem.selector import Selector, design_selector
from explainers.casm.casm_explanation import CasmExplanation
from explainers.casm.model import Casm, save_casm
from explainers.differentiable.gradcam_explanation import GradCamExplanation
from explainers.differentiable.matching import MATCHES, AttributionMatcher
from explainers.differentiable.remembered import OriginalExplanations
from image_classification.data.loader import Batch
from image_classification.distributed import Distributed
from image_classification.losses import LossConfig, build_loss
from image_classification.models import create_model
from pruning.criteria import create_criterion, criterion_names
from pruning.criteria.saliency import Saliency
from pruning.criteria.scoring import score_groups
from pruning.engine.trace_groups import trace_groups
from pruning.pruner import Pruner
from pruning.repair.repairing import REPAIR_METHODS
from pruning.search import Search, SearchSettings, build_search, search_names

CLASSES = 5
#: Reads of a scoring pass: (per batch, once in addition).
SCORING = {
    "bn-scale": (0, 1),
    "discriminant": (1, 4),  # each batch: whether the sums of the classes are nearly dependent
    "fisher": (0, 5),
    "fpgm": (0, 1),
    "hrank": (0, 4),
    "magnitude": (0, 1),
    "magnitude-l2": (0, 1),
    "random": (0, 0),
    "saliency": (4, 5),  # each piece of a batch, of two: its images twice, to look up their remembered values
    "taylor": (0, 5),
    "taylor-2019": (0, 5),
}
#: Total reads of a rewrite with four batches; a greedy one in a single instalment.
REWRITES = {
    ("discriminant", "greedy"): 18,
    ("discriminant", "uniform"): 11,
    ("discriminant", "global"): 11,
    ("discriminant", "sensitivity"): 17,
    ("taylor", "greedy"): 15,
    ("magnitude", "uniform"): 4,
    ("magnitude", "global"): 4,
    ("magnitude", "sensitivity"): 10,
}
#: One more at the first rewrite: whether the first batch's class numbers fit the outputs.
CLASSES_FIT = 1
#: Additional reads if the cut is repaired, however many layers are solved for.
REPAIR = 7
#: Combinations that are also repaired by least squares, which takes long: one search of each kind.
SOLVED = [
    ("taylor", "greedy", "least-squares"),
    ("magnitude", "uniform", "least-squares"),
    ("magnitude", "sensitivity", "least-squares"),
]
#: Additional reads if candidates are compared as repaired, however many layers that takes.
JUDGED_REPAIRED = 4
#: Additional reads for each further instalment of the greedy search, which compares candidates' costs.
INSTALMENT = 1


@pytest.fixture
def standin() -> Iterator[StandIn]:
    torch.manual_seed(0)
    with StandIn() as device:
        yield device


def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet20", num_classes=CLASSES, widths={"layer1.0.conv1": 4})


def calibration(num_batches: int) -> list[tuple[Tensor, Tensor]]:
    """Return calibration batches on the CPU, where users leave them."""
    return [(torch.randn(8, 3, 16, 16), torch.randint(0, CLASSES, (8,))) for _ in range(num_batches)]


def devices(*tensors: Tensor) -> set[str]:
    return {tensor.device.type for tensor in tensors if tensor.dim()}


def test_the_stand_in_refuses_mixing_and_sees_reads(standin: StandIn) -> None:
    there = torch.randn(4, 3, device=standin.device)
    assert there.device.type == "standin"
    with pytest.raises(RuntimeError, match="one device"):
        there + torch.randn(4, 3)
    with standin.reads() as reads:
        there.sum().item()
        there.cpu()
        there[there > 0]
        there.mul(2).add_(1)
    assert [read.split(" at ")[0] for read in reads] == [
        "aten._local_scalar_dense.default",
        "aten._to_copy.default",
        "aten.index.Tensor",
    ]
    assert all("standin_checks.py" in read for read in reads)


@pytest.mark.parametrize("loss", [{}, {"label_smoothing": 0.1}, {"multi_label": True}])
@pytest.mark.parametrize("train", [{}, {"ema": 0.9}, {"clip_norm": 1.0}, {"optimizer_batch_size": 8}])
def test_a_training_step_reads_nothing(
    tmp_path: Any, standin: StandIn, loss: dict[str, Any], train: dict[str, Any]
) -> None:
    images, targets = toy_data(16)
    if loss.get("multi_label"):
        targets = F.one_hot(targets, 10).float()
    distributed = Distributed(device=standin.device)
    trainer = build_trainer(workspace=tmp_path, distributed=distributed, data=(images, targets), **train)
    trainer.objective.loss = build_loss(LossConfig(**loss))  # type: ignore[attr-defined]
    moved = (
        Batch(batch.images.to(standin.device), batch.targets.to(standin.device), batch.sample_ids)
        for batch in MemoryLoader(images, targets, 4, True)
    )
    trainer.train_step(moved)
    with standin.reads() as reads:
        trainer.train_step(moved)
    assert reads == []
    assert devices(*trainer.state.model.state_dict().values()) == {"standin"}


@pytest.mark.parametrize("name", criterion_names())
def test_scoring(standin: StandIn, name: str) -> None:
    model = network().eval()
    graph = trace_groups(model, torch.randn(2, 3, 16, 16))
    model.to(standin.device)
    originals = OriginalExplanations(GradCamExplanation("layer3"))
    counts = []
    for num_batches in (1, 3):
        batches = calibration(num_batches)
        moved = [(images.to(standin.device), targets.to(standin.device)) for images, targets in batches]
        originals.remember(model, moved)
        criterion = Saliency(originals) if name == "saliency" else create_criterion(name)
        with standin.reads() as reads:
            score_groups(model, graph, batches, criterion)
        counts.append(len(reads))
    each = (counts[1] - counts[0]) / 2
    if name == "reconstruction":  # eliminates on the host, layer by layer
        assert each == 0
    else:
        assert (each, counts[0] - each) == SCORING[name]


@pytest.mark.parametrize(
    ("criterion", "search", "repair"),
    [(*kind, repair) for kind in REWRITES for repair in ("none", "statistics")] + SOLVED,
)
def test_rewrites(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch, criterion: str, search: str, repair: str
) -> None:
    """Network, momenta and everything after it are on the device; the number of reads does not grow with layers."""
    allowed = CLASSES_FIT + REWRITES[criterion, search] + (0 if repair == "none" else REPAIR)
    if repair == "least-squares" and search in ("greedy", "sensitivity"):
        allowed += JUDGED_REPAIRED
    for instalments in (1, 3) if search == "greedy" else (1,):
        settings = SearchSettings(instalments=instalments)
        reads = reads_of_rewrite(standin, monkeypatch, criterion, build_search(search, settings), repair)
        assert len(reads) <= allowed + (instalments - 1) * INSTALMENT, reads


def reads_of_rewrite(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch, criterion: str, search: Search, repair: Any
) -> list[str]:
    """Return the host reads in a rewrite; devices are checked."""
    # Recordings of the trial have their own dispatch mode.
    monkeypatch.setattr("pruning.search.feasible.failure_of_cut", lambda *arguments: None)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = Pruner(
        model,
        torch.randn(2, 3, 16, 16),
        budget=0.7,
        delta=0.3,
        criterion=criterion,
        search=search,
        optimizer=optimizer,
        repair=repair,
    )
    model.to(standin.device)
    images, targets = torch.randn(4, 3, 16, 16).to(standin.device), torch.arange(4).to(standin.device)

    def step() -> None:
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with standin.reads() as reads:
        pruner.step(calibration(4))
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert devices(*model.state_dict().values(), *momenta) == {"standin"}
    step()
    return reads


def casm_of(model: nn.Module) -> Casm:
    """An untrained mapping of the network."""
    torch.manual_seed(1)
    return Casm.for_classifier(copy.deepcopy(model), 16, width=4).eval()


def selector_of(model: nn.Module) -> Selector:
    """An untrained selector of the network."""
    torch.manual_seed(1)
    geometry = dataclasses.replace(MASK_PRESETS["cifar"], image_size=16, travel=7)
    example = torch.zeros(1, 3, 16, 16)
    design = design_selector(model, example, kind="rbf", geometry=geometry, num_classes=CLASSES)
    return Selector(design).eval().requires_grad_(False)


def settings_of(name: str, model: nn.Module, folder: Path) -> dict[str, str]:
    """The file of a method that reads one."""
    if name == "casm":
        save_casm(folder / "casm.pth.tar", casm_of(model))
        return {"path": str(folder / "casm.pth.tar")}
    if name == "selector":
        save_selector(folder / "selector.pth.tar", selector_of(model), model)
        return {"selector": str(folder / "selector.pth.tar")}
    return {}


@pytest.mark.parametrize("name", method_names())
def test_attribution_methods(tmp_path: Path, standin: StandIn, name: str) -> None:
    """The maps equal the CPU's, and the host waits once per batch, to check that all classes exist."""
    model = network().eval()
    settings = settings_of(name, model, tmp_path)
    images, targets = torch.randn(3, 3, 16, 16), torch.arange(3)
    expected = create_method(name, **settings).prepare(model, images[:1])(images, targets)
    model.to(standin.device)
    images, targets = images.to(standin.device), targets.to(standin.device)
    prepared = create_method(name, **settings).prepare(model, images[:1])
    with standin.reads() as reads:
        found = prepared(images, targets)
    assert len(reads) == 1, reads
    assert devices(found.map, found.started, found.arrived, found.logits) == {"standin"}
    torch.testing.assert_close(found.map.cpu(), expected.map, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.arrived.cpu(), expected.arrived, equal_nan=True)


@pytest.mark.parametrize("name", ["gradcam", "casm", "selector"])
def test_explanations_as_a_criterion(standin: StandIn, name: str) -> None:
    """Attribution as a pruning criterion: the same scores as on the CPU, by as few reads with every method."""
    model = network().eval()
    made: dict[str, Any] = {
        "gradcam": lambda: GradCamExplanation("layer3"),
        "casm": lambda: CasmExplanation(casm_of(model)),
        "selector": lambda: SelectorExplanation(selector_of(model)),
    }
    explanation = made[name]()
    graph = trace_groups(model, torch.randn(2, 3, 16, 16))
    (batch,) = calibration(1)

    def scored() -> dict[int, Tensor]:
        there = next(model.parameters()).device
        originals = OriginalExplanations(explanation)
        originals.remember(model, [tuple(tensor.to(there) for tensor in batch)])
        with standin.reads() as reads:
            found = score_groups(model, graph, [batch], Saliency(originals))
        each, once = SCORING["saliency"]
        assert len(reads) <= each + once, reads
        return found

    expected = scored()
    for part in (model, getattr(explanation, "selector", model)):
        part.to(standin.device)
    for index, scores in scored().items():
        torch.testing.assert_close(scores.cpu(), expected[index], rtol=1e-3, atol=1e-7)


def test_nothing_that_is_registered_is_left_out() -> None:
    """A new criterion, search or repair has to be looked at here."""
    assert set(SCORING) | {"reconstruction"} == set(criterion_names())
    assert {search for _, search in REWRITES} == set(search_names())
    assert {"none", "statistics", *(repair for *_, repair in SOLVED)} == set(REPAIR_METHODS)


@pytest.mark.parametrize("kind", MATCHES)
def test_a_matched_step_reads_nothing(standin: StandIn, kind: str) -> None:
    model = network().to(standin.device)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    matcher = AttributionMatcher(kind, (("layer1", "layer1"), ("layer3", "layer3")))
    images = torch.randn(3, 3, 16, 16).to(standin.device)
    with standin.reads() as reads:
        view = matcher.look(teacher, images)
        with matcher.watch(model) as features:
            logits = model(images)
        matcher.loss(features, logits, view).backward()
    assert reads == []
