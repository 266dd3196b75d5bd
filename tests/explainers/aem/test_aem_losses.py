"""Losses of predictor and selector against slow float64 loops."""

from __future__ import annotations

import math

import pytest
import torch

from explainers.aem.selector_losses import area_penalty, imitation_loss, total_variation


def softmax(logits: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def test_imitation_is_the_divergence_per_image() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    expected = []
    for a, b in zip(teacher.tolist(), student.tolist(), strict=True):
        p, q = softmax(a), softmax(b)
        expected.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    torch.testing.assert_close(imitation_loss(teacher, student), torch.tensor(expected, dtype=torch.float64))
    assert imitation_loss(teacher, teacher).abs().max() < 1e-15


def test_imitation_of_several_labels_adds_up_questions() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    expected = []
    for a, b in zip(teacher.tolist(), student.tolist(), strict=True):
        total = 0.0
        for x, y in zip(a, b, strict=True):
            p, q = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(-y))
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        expected.append(total)
    got = imitation_loss(teacher, student, multi_label=True)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_imitation_is_finite_for_certain_half_precision_logits() -> None:
    teacher = torch.tensor([[6e4, -6e4, 0.0]], dtype=torch.float16)
    student = torch.tensor([[-6e4, 6e4, 0.0]], dtype=torch.float16, requires_grad=True)
    for multi_label in (False, True):
        loss = imitation_loss(teacher, student, multi_label=multi_label)
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()


@pytest.mark.parametrize("exponent", [0.3, 0.5, 1.0])
def test_area_is_the_formula_with_a_finite_slope_at_zero(exponent: float) -> None:
    torch.manual_seed(0)
    masks = torch.rand(2, 1, 3, 4, dtype=torch.float64)
    expected = sum((value + 5e-4) ** exponent for value in masks.flatten().tolist()) / masks.numel()
    assert area_penalty(masks, exponent).item() == pytest.approx(expected, rel=1e-12)
    zeros = torch.zeros(1, 1, 2, 2, requires_grad=True)
    area_penalty(zeros, exponent).backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


def slow_variation(masks: torch.Tensor) -> float:
    count, _, height, width = masks.shape
    total = 0.0
    for n in range(count):
        s = masks[n, 0].tolist()
        for v in range(height):
            for u in range(width):
                total += (s[v][u + 1] - s[v][u]) ** 2 if u + 1 < width else 0
                total += (s[v + 1][u] - s[v][u]) ** 2 if v + 1 < height else 0
                total += 0.3 * s[v][u] ** 2 * ((u == 0) + (u == width - 1) + (v == 0) + (v == height - 1))
    return total / (2 * count)


def test_total_variation_is_the_formula() -> None:
    torch.manual_seed(0)
    masks = torch.rand(3, 1, 5, 4, dtype=torch.float64)
    assert total_variation(masks).item() == pytest.approx(slow_variation(masks), rel=1e-12)


def test_total_variation_of_a_constant_mask_is_its_border() -> None:
    assert total_variation(torch.ones(7, 1, 4, 4)).item() == pytest.approx(0.3 * 16 / 2)
