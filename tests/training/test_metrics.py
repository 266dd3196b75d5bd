"""Prediction figures against arithmetic by hand and scikit-learn; exact over any split of the images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from support.training import MemoryLoader
from torch import nn

from image_classification.distributed import Distributed
from image_classification.evaluation import Evaluator
from image_classification.metrics import ClassificationMetrics, MultiLabelMetrics, TrainingSums, topk_correct
from image_classification.observe.log import LogConfig, Logger
from image_classification.precision import Precision, PrecisionConfig

ALONE = Distributed()


def test_topk_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.0, 0.2], [0.2, 0.3, 0.4]])
    assert topk_correct(logits, torch.tensor([1, 2, 0]), 1) == 1
    assert topk_correct(logits, torch.tensor([1, 2, 0]), 2) == 2
    assert topk_correct(logits, torch.tensor([1, 2, 0]), 5) == 3
    soft = torch.tensor([[0.1, 0.9, 0.0], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0]])
    assert topk_correct(logits, soft, 1) == 2


def test_uneven_batches_count_every_image_once() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(23, 8), torch.randint(0, 8, (23,))
    metrics = ClassificationMetrics()
    for part in torch.arange(23).split([7, 7, 7, 2]):
        metrics.update(logits[part], targets[part])
    figures = metrics.compute(ALONE)
    assert figures["top1"] == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert math.isnan(ClassificationMetrics().compute(ALONE)["top1"])


def test_multi_label_against_scikit_learn() -> None:
    torch.manual_seed(0)
    scores, targets = torch.randn(40, 6), (torch.rand(40, 6) < 0.3).float()
    targets[:, 4] = 0  # a class without a positive image has no average precision
    metrics = MultiLabelMetrics()
    for part in torch.arange(40).split(11):
        metrics.update(scores[part], targets[part])
    figures = metrics.compute(ALONE)
    present = [c for c in range(6) if targets[:, c].any()]
    expected = sum(average_precision_score(targets[:, c], scores[:, c]) for c in present) / len(present)
    assert figures["map"] == pytest.approx(100 * expected)
    assert figures["f1"] == pytest.approx(
        100 * f1_score(targets.numpy(), scores.numpy() > 0, average="micro")
    )
    assert figures["f1_macro"] == pytest.approx(
        100 * f1_score(targets[:, present].numpy(), scores[:, present].numpy() > 0, average="macro")
    )
    assert all(math.isnan(value) for value in MultiLabelMetrics().compute(ALONE).values())


def test_training_sums_window_and_epoch() -> None:
    sums = TrainingSums(torch.device("cpu"))
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    sums.update(torch.tensor(0.5), logits, torch.tensor([0, 0]))
    assert sums.flush(ALONE) == {"train.loss": 0.5, "train.top1": 50.0}
    assert sums.flush(ALONE) == {}
    sums.update(torch.tensor(2.0), logits[:1], torch.tensor([0]))
    assert sums.finish_epoch(ALONE) == pytest.approx(
        {"train.loss": (2 * 0.5 + 2.0) / 3, "train.top1": 100 * 2 / 3}
    )
    assert sums.finish_epoch(ALONE) == {}


def test_no_figure_reaches_the_host_before_it_is_read() -> None:
    """Meta tensors have no data: whatever asks for it raises."""
    sums = TrainingSums(torch.device("meta"))
    loss, logits, targets = torch.zeros(()), torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64)
    for _ in range(3):
        sums.update(loss.to("meta"), logits.to("meta"), targets.to("meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        sums.flush(ALONE)


def evaluator(num_samples: int, batch_size: int) -> tuple[Evaluator, nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    images, targets = torch.randn(num_samples, 3, 4, 4), torch.randint(0, 10, (num_samples,))
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 10))
    precision = Precision(PrecisionConfig(), torch.device("cpu"))
    return (
        Evaluator(MemoryLoader(images, targets, batch_size, False), precision, ALONE),
        model,
        images,
        targets,
    )


def test_evaluation_is_exact_and_leaves_the_network_alone() -> None:
    judge, model, images, targets = evaluator(12, 4)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    figures = judge(model, Logger(LogConfig(raport_file=""), Path(), is_main=False))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    logits = model.eval()(images)
    expected = nn.functional.cross_entropy(logits.double(), targets).item()
    assert figures["val.loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["val.top1"] == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert figures["val.samples"] == 12
    for percent in (50, 95, 99, 100):
        assert figures[f"val.compute_latency_at{percent}"] > 0


def test_the_best_figure_is_map_for_several_labels() -> None:
    judge, *_ = evaluator(4, 2)
    assert judge.headline == "top1"
    judge.multi_label = True
    assert judge.headline == "map"


def test_published_figures_count_over_images() -> None:
    """An image's average precision by hand; F1 of logits from 0.5 on; an image without labels has no precision."""
    logits = torch.tensor([[3.0, 2.0, 0.4, -1.0], [0.5, 0.6, -2.0, -3.0], [1.0, -1.0, -1.0, -1.0]])
    targets = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0.0]])
    metrics = MultiLabelMetrics(published=True)
    metrics.update(logits, targets)
    figures = metrics.compute(Distributed())
    assert list(figures) == ["map_images", "f1_images"]
    assert figures["map_images"] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1 / 2) / 2)
    assert figures["f1_images"] == pytest.approx(100 * (2 * 1 / 4 + 2 * 1 / 3 + 0) / 3)
    both = MultiLabelMetrics()
    both.update(logits, targets)
    assert both.compute(Distributed()).items() >= figures.items()
