"""Localisation figures against examples worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from explainers.measures.localization import (
    EMPTY,
    Rectangle,
    as_saliency,
    box_figures,
    boxes_to_mask,
    energy_inside,
    object_rectangle,
    pixel_auc,
    pointing_hit,
    saliency_threshold,
)
from explainers.measures.perturbation import curve_area, deletion_curve, insertion_curve, saliency_metric


def grid(rows: list[str]) -> np.ndarray:
    """Digits as ninths."""
    return np.array([[int(c) for c in row] for row in rows]) / 9


def test_pointing_takes_the_first_of_several_highest_pixels() -> None:
    heatmap = grid(["0900", "0009", "0000"])
    mask = np.zeros((3, 4), bool)
    mask[1, 3] = True
    assert not pointing_hit(heatmap, mask)
    mask[0, 1] = True
    assert pointing_hit(heatmap, mask)
    assert not pointing_hit(np.zeros((3, 4)), ~np.ones((3, 4), bool))


def test_pointing_tolerance_is_a_disk() -> None:
    heatmap, mask = np.zeros((40, 40)), np.zeros((40, 40), bool)
    heatmap[0, 0], mask[9, 12] = 1, True  # distance 15 exactly
    assert not pointing_hit(heatmap, mask, 14)
    assert pointing_hit(heatmap, mask, 15)
    assert not pointing_hit(heatmap, mask)
    assert not pointing_hit(heatmap, np.zeros((40, 40), bool), 15)


def test_auc_counts_ties_half_and_needs_both_kinds_of_pixels() -> None:
    mask = np.array([[True, True, False, False]])
    assert pixel_auc(np.array([[0.9, 0.8, 0.1, 0.2]]), mask) == 1
    assert pixel_auc(np.array([[0.9, 0.1, 0.2, 0.0]]), mask) == 0.75
    assert pixel_auc(np.array([[0.5, 0.5, 0.5, 0.5]]), mask) == 0.5
    assert pixel_auc(np.array([[1e-9, -1e-8, 5e-9, -1e-8]]), mask) == 0.375  # values of relevance
    assert math.isnan(pixel_auc(np.ones((2, 2)), np.zeros((2, 2), bool)))
    assert math.isnan(pixel_auc(np.ones((2, 2)), np.ones((2, 2), bool)))


def test_energy_is_the_positive_part_inside() -> None:
    mask = np.array([[True, True, False]])
    assert energy_inside(np.array([[3.0, -5.0, 1.0]]), mask) == 0.75
    assert math.isnan(energy_inside(np.array([[0.0, -5.0, -1.0]]), mask))
    assert energy_inside(np.array([[3.0, 1.0, 1.0]]), ~np.ones((1, 3), bool)) == 0


def test_threshold_is_the_quantile_of_the_masks_own_mean() -> None:
    # n = 5, mean 0.4: k = 1 + ⌊4·0.6 + 0.5⌋ = 3, the third smallest
    assert saliency_threshold(np.array([[0.1, 0.9, 0.3, 0.0, 0.7]])) == pytest.approx(0.3)
    assert saliency_threshold(np.zeros((3, 3))) == 1e-6
    assert saliency_threshold(np.ones((3, 3))) == 1 - 1e-6
    assert saliency_threshold(np.full((4, 4), 0.5)) == 0.5


def test_rectangle_is_the_tight_box_of_the_largest_connected_part() -> None:
    saliency = grid(["99000", "90000", "00099", "00990", "00900"])
    assert object_rectangle(saliency) == Rectangle(2, 2, 5, 5)
    # parts that only touch at a corner are two; of equal ones the first counts
    assert object_rectangle(grid(["9000", "0900", "0000", "0000"])) == Rectangle(0, 0, 1, 1)
    assert object_rectangle(np.full((4, 4), 0.5)) == EMPTY  # nothing is strictly greater
    assert object_rectangle(np.zeros((4, 4))) == EMPTY
    assert object_rectangle(np.ones((4, 4))) == Rectangle(0, 0, 4, 4)


def test_box_figures_of_a_perfect_map() -> None:
    saliency = np.zeros((8, 8))
    saliency[2:5, 1:7] = 1
    figures = box_figures(saliency, np.array([[1.0, 2.0, 7.0, 5.0]]))
    assert figures.located
    assert figures.best_iou == 1
    assert figures.f1 == pytest.approx(1, abs=1e-5)


def test_box_figures_by_hand() -> None:
    saliency = np.zeros((4, 4))
    saliency[0, 0], saliency[0, 1], saliency[3, 3] = 1.0, 1.0, 0.5
    # mean 2.5/16: k = 1 + ⌊15·0.84375 + 0.5⌋ = 14, threshold the 14th smallest of 13 zeros, 0.5, 1, 1
    assert saliency_threshold(saliency) == 0.5
    assert object_rectangle(saliency) == Rectangle(0, 0, 2, 1)
    boxes = np.array([[0.0, 0.0, 2.9, 1.2], [3.0, 3.0, 6.0, 6.0]])  # the second reaches beyond: area 9, not 1
    figures = box_figures(saliency, boxes)
    precision, recall = 2 / (2.5 + 1e-6), 2 / 2
    first = 2 * precision * recall / (precision + recall + 1e-6)
    precision, recall = 0.5 / (2.5 + 1e-6), 0.5 / 9
    second = 2 * precision * recall / (precision + recall + 1e-6)
    assert figures.f1 == pytest.approx(first)
    assert figures.f1_mean == pytest.approx((first + second) / 2)
    assert figures.best_iou == 1  # truncated to 2 × 1, as the rectangle
    assert figures.located


def test_boxes_outside_of_the_crop_or_without_area_score_nothing() -> None:
    saliency = np.ones((4, 4))
    for box in ([-9.0, -9.0, -1.0, -1.0], [4.0, 0.0, 8.0, 4.0], [1.2, 1.1, 1.9, 3.0]):
        figures = box_figures(saliency, np.array([box]))
        assert (figures.f1, figures.f1_mean, figures.located, figures.best_iou) == (0, 0, False, 0)
    with pytest.raises(ValueError, match="boxes"):
        box_figures(saliency, np.zeros((0, 4)))


def test_an_empty_mask_scores_zero() -> None:
    figures = box_figures(np.zeros((4, 4)), np.array([[0.0, 0.0, 2.0, 2.0]]))
    assert figures.f1 == 0
    assert not figures.located


def test_half_overlap_is_not_enough() -> None:
    saliency = np.zeros((4, 4))
    saliency[:2] = 1
    assert not box_figures(saliency, np.array([[0.0, 0.0, 4.0, 4.0]])).located  # IoU 0.5 exactly


def test_saliency_of_a_heatmap() -> None:
    np.testing.assert_allclose(as_saliency(np.array([[-1.0, 2.0, 4.0]])), [[0, 0.5, 1]])
    np.testing.assert_allclose(as_saliency(np.array([[-1.0, 0.0]])), [[0, 0]])


def test_masks_from_boxes_take_pixel_centres() -> None:
    mask = boxes_to_mask(np.array([[0.6, 0.0, 2.4, 1.0], [3.0, 2.0, 9.0, 9.0]]), (3, 4))
    np.testing.assert_array_equal(mask, [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])


def predict_by_first_pixel(images: Tensor) -> Tensor:
    """Class 1 as likely as the first pixel is bright."""
    first = images[:, 0, 0, 0]
    return torch.stack([torch.zeros_like(first), first], dim=1)


def test_deletion_and_insertion_by_hand() -> None:
    images = torch.zeros(1, 3, 2, 2)
    images[0, :, 0, 0] = 2.0
    targets = torch.tensor([1])
    maps = torch.tensor([[[0.0, 3.0], [2.0, 1.0]]])  # the bright pixel goes last
    p = 1 / (1 + math.exp(-2))
    deletion = deletion_curve(predict_by_first_pixel, images, targets, maps, steps=4)
    torch.testing.assert_close(deletion, torch.tensor([[p, p, p, p, 0.5]]))
    assert float(curve_area(deletion)) == pytest.approx((3 * p + (p + 0.5) / 2) / 4)
    maps = 3 - maps  # and now first
    deletion = deletion_curve(predict_by_first_pixel, images, targets, maps, steps=4)
    torch.testing.assert_close(deletion, torch.tensor([[p, 0.5, 0.5, 0.5, 0.5]]))
    insertion = insertion_curve(predict_by_first_pixel, images, targets, maps, steps=2)
    assert insertion[0, 0] < p  # blurred
    torch.testing.assert_close(insertion[0, 1:], torch.tensor([p, p]))


def test_saliency_metric_by_hand() -> None:
    def predict(images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(mean), mean], dim=1)

    images = torch.zeros(3, 3, 10, 10)
    images[:, :, 2:4, 5:10] = 3.0
    rectangles = [Rectangle(5, 2, 10, 4), Rectangle(5, 2, 7, 4), EMPTY]
    found = saliency_metric(predict, images, torch.ones(3, dtype=torch.int64), rectangles)
    p, p_whole = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-0.3))
    expected = [math.log(0.1) - math.log(p), math.log(0.05) - math.log(p), 0 - math.log(p_whole)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
