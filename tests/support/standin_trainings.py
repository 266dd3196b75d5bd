"""Checks on a stand-in accelerator: the steps of every optimizer, gate, explainer and objective, and their state there.

This complements standin_checks.py, which covers criteria, rewrites and attribution methods and has the instrument. The
figures are those of the table in docs/howto/benchmark-machine.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.standin import StandIn
from support.training import MemoryLoader, build_trainer, toy_data
from torch import Tensor, nn

from explainers.aem.masks import MASK_PRESETS
from explainers.aem.objectives import PredictorObjective, RandomMasks, SelectorObjective, SelectorWeights
from explainers.aem.predictor import new_predictor
from explainers.aem.selector import Selector, design_selector
from explainers.casm.casm_trainer import CasmTrainer
from explainers.casm.model import Casm
from explainers.casm.presets import PRESETS, CasmConfig
from explainers.differentiable.gradcam_explanation import GradCamExplanation
from explainers.differentiable.matching import AttributionMatcher
from explainers.differentiable.remembered import OriginalExplanations
from image_classification.data.loader import Batch
from image_classification.distributed import Distributed
from image_classification.losses import LossConfig, build_loss
from image_classification.models import create_model
from image_classification.objective import TaskObjective
from image_classification.optim import OptimConfig, OptimizerName, build_optimizer
from image_classification.schedules import Schedule, ScheduleConfig
from pruning.costs.budget import Budget
from pruning.costs.cost_model import CostModel
from pruning.engine.trace_groups import trace_groups
from pruning.training.distill import DistillationObjective, DistillConfig
from pruning.training.learned.gate_settings import Form, GateSettings, Sampling
from pruning.training.learned.learner import GateLearner
from pruning.training.learned.widths import inner_groups
from pruning.training.unstructured import UnstructuredConfig, UnstructuredPruning

CLASSES = 10
#: Reads when a past classifier is stored: one per dtype that it has.
STORED = 2
#: Reads of a round of single weights, for any layers: the selection, the masks' digests, the report.
ROUND = 5


@pytest.fixture
def standin() -> Iterator[StandIn]:
    torch.manual_seed(0)
    with StandIn() as device:
        yield device


def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet20", num_classes=CLASSES, widths={"layer1.0.conv1": 4})


def moved(standin: StandIn, num_steps: int = 6, size: int = 16) -> Iterator[Batch]:
    """Yield batches of four images on the device."""
    for step in range(num_steps):
        images, targets = torch.randn(4, 3, size, size), torch.randint(0, CLASSES, (4,))
        yield Batch(images.to(standin.device), targets.to(standin.device), torch.arange(4) + 4 * step)


def devices(*tensors: Tensor) -> set[str]:
    return {tensor.device.type for tensor in tensors if tensor.dim()}


def remembered(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state."""
    return [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_optimizers(tmp_path: Path, standin: StandIn, name: Any) -> None:
    trainer = build_trainer(workspace=tmp_path, distributed=Distributed(device=standin.device))
    trainer.state.optimizer = build_optimizer(OptimConfig(optimizer=name), trainer.state.model, 0.01)
    batches = moved(standin, size=8)
    trainer.train_step(batches)
    with standin.reads() as reads:
        trainer.train_step(batches)
    assert reads == []
    assert devices(*remembered(trainer.state.optimizer)) == {"standin"}


def test_leaving_updates_out_reads_once(tmp_path: Path, standin: StandIn) -> None:
    """`--on-nan skip` has to decide before the update."""
    distributed = Distributed(device=standin.device)
    trainer = build_trainer(workspace=tmp_path, distributed=distributed, on_nan="skip", nan_budget=2)
    batches = moved(standin, size=8)
    trainer.train_step(batches)
    with standin.reads() as reads:
        trainer.train_step(batches)
    assert len(reads) == 1


@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize("sampling", get_args(Sampling))
def test_gates(standin: StandIn, form: Any, sampling: Any) -> None:
    """A step reads nothing once the images' explanations are cached; at the end of an epoch the budget is read."""
    model = network().eval()
    example = torch.randn(2, 3, 16, 16)
    graph = trace_groups(model, example)
    costs = CostModel(graph, model, example, ("macs",))
    model.to(standin.device)
    batches = list(moved(standin, 2))
    originals = OriginalExplanations(GradCamExplanation("layer3"))
    originals.remember(model, [(batch.images, batch.targets) for batch in batches])
    settings = GateSettings(gates=form, gate_epochs=2, gate_task_weight=0.5, gate_sampling=sampling)
    loader: Any = batches
    learner = GateLearner(
        model, graph, inner_groups(graph), costs, Budget({"macs": 0.6}), originals, loader, settings
    )
    counts = []
    with learner:
        steps = learner.learn()
        for _ in range(4):
            with standin.reads() as reads:
                next(steps)
            counts.append(len(reads))
    assert counts == [1, 2, 0, 1]
    assert devices(*learner.parametrisation.state_dict().values(), *remembered(learner.optimizer)) == {
        "standin"
    }


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_casm(tmp_path: Path, standin: StandIn, preset: str, adversarial: bool) -> None:
    """A step of classifier and decoder reads nothing, except where the classifier is stored."""
    trainer = casm_trainer(tmp_path, standin, preset, adversarial)
    batches = moved(standin)
    counts = []
    for _ in range(4):
        with standin.reads() as reads:
            trainer.train_step(batches)
        counts.append(len(reads))
    assert counts[0] == (STORED if trainer.thinning.past else 0)
    assert counts[1:] == [0, 0, 0], "stored for every 100 batches at most"
    learned = [tensor for _, tensor in trainer.learned()]
    assert devices(*learned, trainer.mask_sums) == {"standin"}
    assert devices(*(tensor for state in trainer.past.states for tensor in state.values())) <= {"cpu"}


def casm_trainer(folder: Path, standin: StandIn, preset: str, adversarial: bool) -> CasmTrainer:
    common = build_trainer(
        workspace=folder, distributed=Distributed(device=standin.device), model=network(), training_only=True
    )
    casm = Casm.for_classifier(common.state.model, 16, width=4)
    casm.to(standin.device)
    return CasmTrainer(
        casm,
        CasmConfig(reproduce=preset, adversarial=adversarial),
        validation=None,
        decoder_schedule=Schedule(ScheduleConfig(lr=1e-3), 4, 2),
        config=common.config,
        state=common.state,
        objective=TaskObjective(build_loss(LossConfig())),
        precision=common.precision,
        distributed=common.distributed,
        logger=common.logger,
        checkpointer=common.checkpointer,
        train_loader=MemoryLoader(*toy_data(), 4, True),
        callbacks=(),
    )


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", ["rbf", "real-x"])
@pytest.mark.parametrize("trained", ["predictor", "selector"])
def test_predictors_and_selectors(standin: StandIn, trained: str, kind: str, multi_label: bool) -> None:
    black_box = network().eval().requires_grad_(False)
    geometry = MASK_PRESETS["cifar"]
    size = geometry.image_size
    selector = Selector(
        design_selector(
            black_box, torch.zeros(1, 3, size, size), kind=kind, geometry=geometry, num_classes=CLASSES
        )
    )
    predictor = new_predictor(black_box, fresh=False).eval()
    for module in (black_box, selector, predictor):
        module.to(standin.device)
    objective: Any
    if trained == "predictor":
        masks = RandomMasks(kind, geometry, (8, 8), 0.1, kind == "real-x")
        model, objective = predictor, PredictorObjective(black_box, masks, multi_label=multi_label)
    else:
        predictor.requires_grad_(False)
        weights = SelectorWeights(area=0.2, smoothness=1e-3, exponent=0.3, temperature=1.0, hard=False)
        model = selector
        objective = SelectorObjective(black_box, predictor, weights, multi_label=multi_label)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    (batch,) = moved(standin, 1, size)
    with standin.reads() as reads:
        loss, _ = objective(model, batch.images, batch.targets)
        loss.backward()
        optimizer.step()
    assert reads == []
    assert devices(*model.state_dict().values(), *remembered(optimizer)) == {"standin"}


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("match", [False, True])
def test_distillation(tmp_path: Path, standin: StandIn, match: bool, multi_label: bool) -> None:
    student = network().to(standin.device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    (tmp_path / "teacher").touch()
    config = DistillConfig(
        teacher=str(tmp_path / "teacher"), distill="logit", match="swa" if match else "none"
    )
    matcher = AttributionMatcher("swa", (("layer3", "layer3"),)) if match else None
    task = TaskObjective(build_loss(LossConfig(multi_label=multi_label)))
    objective = DistillationObjective(config, task, teacher, matcher, multi_label)
    (batch,) = moved(standin, 1)
    targets = nn.functional.one_hot(batch.targets, CLASSES).float() if multi_label else batch.targets
    with standin.reads() as reads:
        loss, _ = objective(student, batch.images, targets)
        loss.backward()
    assert reads == []


def test_single_weights(tmp_path: Path, standin: StandIn) -> None:
    """Steps that hold weights at zero read nothing; the reads of a round do not grow with the number of layers."""
    pruning = UnstructuredPruning(UnstructuredConfig(unstructured_pruning=0.2, rounds=2), repair="none")
    trainer = build_trainer(
        workspace=tmp_path,
        distributed=Distributed(device=standin.device),
        callbacks=(pruning,),
        training_only=True,
    )
    pruning.on_fit_start(trainer)
    with standin.reads() as reads:
        pruning.on_epoch_start(trainer)
    assert len(reads) <= ROUND
    batches = moved(standin, size=8)
    trainer.train_step(batches)
    with standin.reads() as reads:
        trainer.train_step(batches)
    assert reads == []
    assert devices(*pruning.masks.values(), *remembered(trainer.state.optimizer)) == {"standin"}
