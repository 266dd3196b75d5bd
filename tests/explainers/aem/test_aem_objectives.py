"""What predictor and selector minimise, recomputed by hand; who learns and who is only asked; who is kept as best."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from explainers.aem import MASK_PRESETS, Selector
from explainers.aem.mask_quality import FixedRandomMasks, SelectorMasks, judge_masks
from explainers.aem.masks import relaxed_bernoulli
from explainers.aem.objectives import PredictorObjective, RandomMasks, SelectorObjective, SelectorWeights
from explainers.aem.predictor import new_predictor
from explainers.aem.saved_selector import SelectorExplanation
from explainers.aem.selector import design_selector
from explainers.aem.selector_callbacks import Judge, mask_grid
from explainers.aem.selector_losses import area_penalty, imitation_loss, total_variation
from explainers.differentiable.explanation import network_digest
from image_classification.distributed import Distributed
from image_classification.models import create_model
from image_classification.precision import Precision, PrecisionConfig
from tests.support.explained import make_images, randomise

SIZE = 32
CPU = torch.device("cpu")
GEOMETRY = MASK_PRESETS["cifar"]
ALONE = Distributed(rank=0, world_size=1, local_rank=0, device=CPU)


@pytest.fixture
def black_box() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=5, image_size=SIZE)
    return randomise(model, make_images(8, SIZE)).requires_grad_(False)


def make_selector(black_box: nn.Module, kind: str = "rbf") -> Selector:
    torch.manual_seed(1)
    example = torch.zeros(1, 3, SIZE, SIZE)
    return Selector(design_selector(black_box, example, kind=kind, geometry=GEOMETRY, num_classes=5))


@pytest.mark.parametrize("kind", ["rbf", "real-x"])
def test_predictor_loss_is_the_divergence_on_masked_images(black_box: nn.Module, kind: str) -> None:
    images, labels = make_images(4, SIZE), torch.tensor([0, 1, 2, 3])
    masks = RandomMasks(kind, GEOMETRY, (8, 8), 0.1, False)
    predictor = new_predictor(black_box, fresh=False)
    assert network_digest(predictor) == network_digest(black_box)
    assert all(parameter.requires_grad for parameter in predictor.parameters())
    predictor.eval()
    torch.manual_seed(5)
    loss, logits = PredictorObjective(black_box, masks)(predictor, images, labels)
    torch.manual_seed(5)
    drawn = masks(4, CPU)
    expected = predictor(images * drawn)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, imitation_loss(black_box(images), expected).mean())
    loss.backward()
    assert all(parameter.grad is not None for parameter in predictor.parameters())


def test_real_x_predictors_see_cells_that_are_in_or_out() -> None:
    masks = RandomMasks("real-x", GEOMETRY, (8, 8), 0.1, True)(200, CPU)
    assert masks.shape == (200, 1, SIZE, SIZE)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    cells = masks[:, :, ::4, ::4]
    assert torch.equal(masks, cells.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert float(cells.mean()) == pytest.approx(0.5, abs=0.02)


def test_fresh_predictors_start_elsewhere(black_box: nn.Module) -> None:
    assert network_digest(new_predictor(black_box, fresh=True)) != network_digest(black_box)


@pytest.mark.parametrize("kind", ["rbf", "real-x"])
@pytest.mark.parametrize("hard", [False, True])
def test_selector_loss_is_the_formula(black_box: nn.Module, kind: str, hard: bool) -> None:
    images = make_images(4, SIZE)
    predictor, selector = copy.deepcopy(black_box), make_selector(black_box, kind).eval()
    weights = SelectorWeights(area=0.2, smoothness=1e-3, exponent=0.3, temperature=1.0, hard=hard)
    objective = SelectorObjective(black_box, predictor, weights)
    torch.manual_seed(7)
    loss, logits = objective(selector, images, torch.zeros(4, dtype=torch.int64))
    wanted = black_box(images)
    raw = SelectorExplanation(selector).raw(black_box, images, wanted.argmax(1))
    torch.manual_seed(7)
    masks = relaxed_bernoulli(selector.mask(raw, SIZE), 1.0, hard=hard)
    expected = predictor(images * masks)
    torch.testing.assert_close(logits, expected)
    divergence = imitation_loss(wanted, expected).mean()
    area, variation = area_penalty(masks, 0.3), total_variation(masks)
    torch.testing.assert_close(loss, divergence + 0.2 * area + 1e-3 * variation)
    parts = objective.read_parts(ALONE)
    assert parts == pytest.approx(
        {"kl": divergence.item(), "area": area.item(), "tv": variation.item()}, rel=1e-5
    )
    assert objective.read_parts(ALONE) == {}


def test_only_the_selector_learns(black_box: nn.Module) -> None:
    predictor, selector = copy.deepcopy(black_box), make_selector(black_box)
    before = network_digest(black_box), network_digest(predictor)
    objective = SelectorObjective(black_box, predictor, SelectorWeights(0.2, 1e-3, 0.3, 1.0, False))
    loss, _ = objective(selector, make_images(4, SIZE), torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert (network_digest(black_box), network_digest(predictor)) == before
    assert all(parameter.grad is None for model in (black_box, predictor) for parameter in model.parameters())
    moved = [name for name, parameter in selector.named_parameters() if parameter.grad is not None]
    assert len(moved) == len(list(selector.parameters()))
    assert not black_box.layer1._forward_hooks


class Batches:
    """A loader of a few batches, the last one empty as on a rank without images."""

    def __init__(self, images: Tensor, batch_size: int) -> None:
        self.parts = [*images.split(batch_size), images[:0]]

    def set_epoch(self, epoch: int) -> None:
        assert epoch == 0

    def __iter__(self) -> Any:
        return iter([_Batch(part) for part in self.parts])


class _Batch(SimpleNamespace):
    def __init__(self, images: Tensor) -> None:
        super().__init__(images=images, targets=torch.zeros(len(images), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.images)


def test_figures_of_masks_are_exact_means(black_box: nn.Module) -> None:
    torch.manual_seed(3)
    images = make_images(7, SIZE)
    predictor = randomise(create_model("resnet20", num_classes=5), images, seed=4).train()
    selector = make_selector(black_box).eval()
    precision = Precision(PrecisionConfig(), CPU)
    figures = judge_masks(
        SelectorMasks(selector, black_box),
        predictor,
        Batches(images, 3),
        precision=precision,
        distributed=ALONE,
    )
    assert predictor.training
    predictor.eval()
    with torch.no_grad():
        wanted = black_box(images)
        raw = SelectorExplanation(selector).raw(black_box, images, wanted.argmax(1))
        masks = selector.mask(raw, SIZE)
        logits = predictor(images * masks)
    agree = (wanted.argmax(1) == logits.argmax(1)).double().mean().item()
    expected = {
        "kl": imitation_loss(wanted, logits).mean().item(),
        "agreement": 100 * agree,
        "area": 100 * masks.mean().item(),
        "samples": 7,
    }
    assert figures == pytest.approx(expected, rel=1e-4)


def test_random_masks_of_an_evaluation_repeat_and_leave_the_generator_alone(black_box: nn.Module) -> None:
    draw = RandomMasks("rbf", GEOMETRY, (SIZE, SIZE), 0.1, False)
    images, state = make_images(3, SIZE), torch.get_rng_state()
    first = FixedRandomMasks(draw, black_box, 0)
    masks = [first(images)[1], first(images)[1]]
    again = FixedRandomMasks(draw, black_box, 0)
    assert torch.equal(masks[0], again(images)[1])
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], FixedRandomMasks(draw, black_box, 1)(images)[1])
    assert torch.equal(state, torch.get_rng_state())


class FakeTrainer:
    """What a judge asks of a trainer."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(model=nn.Linear(1, 1), iteration=0, epoch=0, best=None)
        self.distributed = ALONE
        self.saved: list[int] = []
        self.logged: list[tuple[str, int]] = []
        self.logger = SimpleNamespace(scalars=lambda prefix, *rest: self.logged.append((prefix, rest[-1])))

    def save(self, *, is_best: bool) -> None:
        assert is_best
        self.saved.append(self.state.iteration)


def test_the_best_by_agreement_on_held_out_images_is_kept() -> None:
    scores = iter([50.0, 60.0, 55.0, 60.0, 61.0])

    def measure(_model: nn.Module, loader: object) -> dict[str, float]:
        return {"agreement": next(scores) if loader == "held out" else 99.0}

    judge = Judge("selector", {"arch": "x"}, measure, "held out", "val", 10, "agreement")  # type: ignore[arg-type]
    trainer: Any = FakeTrainer()
    for iteration in range(1, 46):
        trainer.state.iteration = iteration
        judge.on_step_end(trainer)
    judge.on_epoch_end(trainer)
    # of equals the later one; validation images (99 %) decide nothing
    assert trainer.saved == [10, 20, 40, 45]
    assert trainer.state.best == 61.0
    assert judge.state_dict()["figures"] == {"agreement": 61.0, "iteration": 45.0}
    assert trainer.logged == [*(("held_out", step) for step in (10, 20, 30, 40, 45)), ("val", 45)]
    again = Judge("selector", {"arch": "x"}, measure, "held out", None, 10, "agreement")  # type: ignore[arg-type]
    again.load_state_dict(judge.state_dict())
    assert again.state_dict() == judge.state_dict()


@pytest.mark.parametrize("divergences", [[0.5, 0.3, 0.4], [math.nan, 0.4, math.nan]])
def test_the_best_may_be_the_one_of_least_divergence(divergences: list[float]) -> None:
    """What could not be judged does not stay the best."""
    found = iter(divergences)

    def measure(_model: nn.Module, _loader: object) -> dict[str, float]:
        return {"agreement": 90.0, "kl": next(found)}

    judge = Judge("q", {}, measure, "held out", None, 1, "kl")  # type: ignore[arg-type]
    trainer: Any = FakeTrainer()
    for iteration in range(1, 4):
        trainer.state.iteration = iteration
        judge.on_step_end(trainer)
    assert trainer.saved == [1, 2]
    assert judge.record["figures"]["kl"] == divergences[1]
    assert trainer.state.best == -divergences[1]


def test_an_epoch_that_ends_with_a_judgement_is_judged_once() -> None:
    judge = Judge("q", {}, lambda *_: {"agreement": 1.0}, "held out", None, 5, "agreement")  # type: ignore[arg-type]
    trainer: Any = FakeTrainer()
    trainer.state.iteration = 5
    judge.on_step_end(trainer)
    judge.on_epoch_end(trainer)
    assert trainer.logged == [("held_out", 5)]


def test_grid_of_masks_has_three_columns() -> None:
    images, masks = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    grid = mask_grid(images, masks)
    assert grid.shape == (3, 2 * 10 + 2, 3 * 10 + 2)
    assert grid.min() >= 0
    assert grid.max() <= 1
    torch.testing.assert_close(grid[:, 2:10, 12:20], masks[0].expand(3, 8, 8))


def test_judging_can_be_cut_short(black_box: nn.Module) -> None:
    figures = judge_masks(
        SelectorMasks(make_selector(black_box).eval(), black_box),
        create_model("resnet20", num_classes=5),
        Batches(make_images(7, SIZE), 3),
        precision=Precision(PrecisionConfig(), CPU),
        distributed=ALONE,
        max_batches=1,
    )
    assert figures["samples"] == 3


def test_the_label_can_gate_the_selector(black_box: nn.Module) -> None:
    """As published; by default it is what the network predicts."""
    selector, images = make_selector(black_box).eval(), make_images(4, SIZE)
    labels = torch.tensor([4, 3, 2, 1])
    explanation = SelectorExplanation(selector)
    with torch.no_grad():
        expected = selector.mask(explanation.raw(black_box, images, labels), SIZE)
        predicted = selector.mask(explanation.raw_and_logits(black_box, images)[0], SIZE)
        assert torch.equal(SelectorMasks(selector, black_box, "label")(images, labels)[1], expected)
        assert torch.equal(SelectorMasks(selector, black_box)(images, labels)[1], predicted)
    assert not torch.equal(expected, predicted)
    weights = SelectorWeights(0.2, 1e-3, 0.3, 1.0, False)
    seen: list[Tensor] = []
    selector.embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    SelectorObjective(black_box, black_box, weights, explained="label")(selector, images, labels)
    assert torch.equal(seen[0], labels)
