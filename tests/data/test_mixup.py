"""Mixup and CutMix: the distribution of λ, pixels and targets against a slow reference, invariance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from image_classification.data.mixup import Mixup, beta_quantile
from image_classification.data.plan import BatchPlan

CLOSED_FORMS = {
    1.0: lambda x: x,
    0.5: lambda x: 2 / np.pi * np.arcsin(np.sqrt(x)),
    2.0: lambda x: 3 * x**2 - 2 * x**3,
}


def plan_of(sample_ids, epoch=0, size=(12, 10)):
    num = len(sample_ids)
    ids = np.array(sample_ids, dtype=np.int64)
    return BatchPlan(epoch, 0, ids, np.zeros((num, 4)), np.zeros(num, bool), size, True)


def batch_of(num, seed=0, num_classes=5):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((num, 3, 12, 10), generator=generator)
    return images, torch.randint(num_classes, (num,), generator=generator)


@pytest.mark.parametrize("alpha", sorted(CLOSED_FORMS))
def test_quantiles_against_closed_forms(alpha):
    probabilities = np.linspace(0.001, 0.999, 400)
    assert CLOSED_FORMS[alpha](beta_quantile(alpha, probabilities)) == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4, 4.0, 16.0])
def test_moments_of_lambda(alpha):
    values = beta_quantile(alpha, (np.arange(100_000) + 0.5) / 100_000)
    assert values.mean() == pytest.approx(0.5, abs=1e-6)
    assert values.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-3)
    assert values.min() >= 0
    assert values.max() <= 1


def slow_mix(images, targets, weights, boxes, num_classes):
    """One pair and one pixel at a time, in float64."""
    pixels, soft = images.double().clone(), torch.zeros(len(images), num_classes, dtype=torch.float64)
    for i in range(len(images)):
        j = i + 1 if i % 2 == 0 else i - 1
        if j >= len(images):
            j = i
        soft[i, targets[i]] += weights[i]
        soft[i, targets[j]] += 1 - weights[i]
        top, left, bottom, right = boxes[i]
        if bottom > top and right > left:
            pixels[i, :, top:bottom, left:right] = images[j, :, top:bottom, left:right].double()
        else:
            pixels[i] = weights[i] * images[i].double() + (1 - weights[i]) * images[j].double()
    return pixels, soft


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.4, 1.0)])
@pytest.mark.parametrize("num", [16, 7, 1, 0])
def test_pixels_and_targets(mixup, cutmix, num):
    images, targets = batch_of(num)
    plan = plan_of(range(num))
    mixer = Mixup(mixup, cutmix, num_classes=5, seed=3)
    mixed, soft = mixer(images, targets, plan)
    weights, boxes = mixer.weights(plan)
    pixels, expected = slow_mix(images, targets, weights, boxes, 5)
    assert torch.allclose(mixed.double(), pixels, atol=1e-6)
    assert torch.allclose(soft.double(), expected, atol=1e-6)
    assert torch.allclose(soft.sum(1), torch.ones(num))
    if num % 2:
        assert torch.equal(mixed[-1], images[-1])


def test_a_box_covers_its_share():
    mixer = Mixup(0.0, 1.0, num_classes=5, seed=0)
    weights, boxes = mixer.weights(plan_of(range(400), size=(20, 30)))
    top, left, bottom, right = boxes.T
    assert weights == pytest.approx(1 - (bottom - top) * (right - left) / 600)
    assert weights.min() < 0.3
    assert weights.max() > 0.9
    assert boxes.min() >= 0
    assert bottom.max() <= 20
    assert right.max() <= 30


def test_both_take_turns():
    _, boxes = Mixup(0.2, 1.0, num_classes=5, seed=0).weights(plan_of(range(2000)))
    assert 0.4 < (boxes[::2, 2] > 0).mean() < 0.6


def test_ranks_and_accumulation_mix_alike_and_epochs_differ():
    images, targets = batch_of(8)
    mixer = Mixup(0.2, 1.0, num_classes=5, seed=3)
    ids = [5, 1, 7, 2, 30, 6, 8, 9]
    whole = mixer(images, targets, plan_of(ids))
    halves = [mixer(images[i : i + 4], targets[i : i + 4], plan_of(ids[i : i + 4])) for i in (0, 4)]
    for k in range(2):
        assert torch.equal(whole[k], torch.cat([half[k] for half in halves]))
    assert not torch.equal(whole[0], mixer(images, targets, plan_of(ids, epoch=1))[0])


def test_multi_hot_and_soft_targets():
    images, _ = batch_of(4)
    hot = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    mixer = Mixup(0.4, 0.0, num_classes=3, seed=1)
    _, soft = mixer(images, hot, plan_of(range(4)))
    weights = torch.from_numpy(mixer.weights(plan_of(range(4)))[0]).float()[:, None]
    assert torch.allclose(soft, weights * hot + (1 - weights) * hot[[1, 0, 3, 2]])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.0, 0.0), (-1.0, 2.0)])
def test_impossible_settings(mixup, cutmix):
    with pytest.raises(ValueError, match="mixup="):
        Mixup(mixup, cutmix, num_classes=5, seed=0)
