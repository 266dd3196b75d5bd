"""The loop over images: pairs counted as published, NaN maps, baselines, checks of the ground truth, ranks."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from explainers.attribution.method import Attribution
from explainers.measures.evaluate import METRICS, localize
from explainers.measures.ground_truth import annotated
from explainers.verbs.ground_truth_checks import check_ground_truth
from image_classification.config import ConfigError
from image_classification.data.loader import Batch
from image_classification.data.manifest import Manifest
from image_classification.data.targets import TargetTable
from image_classification.distributed import Distributed

SIZE = 6


class FakeLoader:
    """Batches from memory; the second and fourth are empty, as on a rank that has run out of images."""

    def __init__(self, images: Tensor, targets: Tensor, masks: Tensor | None, boxes: list | None) -> None:
        self.images, self.targets, self.masks, self.boxes = images, targets, masks, boxes
        self.num_samples = len(images)

    def __iter__(self) -> Iterator[Batch]:
        for begin, end in ((0, 2), (2, 2), (2, len(self.images)), (0, 0)):
            rows = slice(begin, end)
            yield Batch(
                self.images[rows],
                self.targets[rows],
                torch.arange(begin, end),
                None if self.boxes is None else self.boxes[rows],
                None if self.masks is None else self.masks[rows],
            )


def predict(images: Tensor) -> Tensor:
    """The colour that is brightest."""
    return images.mean((2, 3))


class Bright:
    """The map is the class's own colour; NaN where the image says so."""

    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        rows = torch.arange(len(images))
        empty = torch.zeros(len(images))
        return Attribution(images[rows, targets], True, empty, empty, predict(images))


def four_images() -> tuple[Tensor, Tensor, Tensor]:
    """Images, class indices and masks: hit, miss, wrongly predicted, NaN map."""
    images = torch.zeros(4, 3, SIZE, SIZE)
    masks = torch.zeros(4, SIZE, SIZE, dtype=torch.uint8)
    targets = torch.tensor([0, 1, 2, 0])
    images[0, 0, 1:3, 1:3] = 1.0  # class 0 in its place
    masks[0, 1:3, 1:3] = 1
    images[1, 1, 5, 5] = 1.0  # class 1, elsewhere
    masks[1, 0:2, 0:2] = 2
    images[2, 0, 3, 3] = 1.0  # class 2, but 0 is said
    masks[2, 3, 3] = 3
    images[3, 0] = 1.0
    images[3, 0, 0, 0] = math.nan
    masks[3, 0, 1] = 1
    masks[3, 5, :] = 255  # void counts as background
    return images, targets, masks


def run(loader: FakeLoader, metrics: list[str], *, multi_label: bool = False, max_pairs: int = 8):
    def quiet(images: Tensor) -> Tensor:
        return predict(images.nan_to_num(nan=1.0))

    (row,) = localize(
        "net",
        {"bright": Bright()},
        quiet,
        loader,
        metrics=metrics,
        multi_label=multi_label,
        distributed=Distributed(),
        max_pairs=max_pairs,
    )
    return row


@pytest.mark.parametrize("max_pairs", [1, 3, 100])
def test_pairs_are_counted_as_published(max_pairs: int) -> None:
    images, targets, masks = four_images()
    row = run(FakeLoader(images, targets, masks, None), ["point", "auc", "energy"], max_pairs=max_pairs)
    assert row.counts == {"images": 4, "pairs": 4, "predicted": 3, "nan_maps": 1}
    assert row.figures["point"] == 0.5
    assert row.figures["point_15px"] == 1.0
    assert row.counted == {"point": 2, "point_15px": 2, "auc": 2, "energy": 2}
    # first map perfect; second: one pixel of 32 outside ranked above four inside, the rest ties
    assert row.figures["auc"] == pytest.approx((1 + 31 / 64) / 2)
    assert row.figures["energy"] == 0.5


def test_several_labels_count_every_class_in_the_mask_whose_logit_is_positive() -> None:
    images, _, masks = four_images()
    masks[0, 5, 5] = 2  # class 1 too, logit 0: not predicted
    targets = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]).float()
    row = run(FakeLoader(images, targets, masks, None), ["point"], multi_label=True)
    assert row.counts["pairs"] == 5
    assert (
        row.counts["predicted"] == 3
    )  # class 0 of the first, class 1 of the second, class 0 of the last (NaN map)
    assert row.counts["nan_maps"] == 1


def test_box_figures_are_taken_over_all_images() -> None:
    images, targets, masks = four_images()
    boxes = [
        (
            torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 6.0, 6.0]]),
            torch.tensor([0, 1]),
        ),  # of another class: ignored
        (torch.tensor([[5.0, 5.0, 6.0, 6.0]]), torch.tensor([1])),
        (torch.tensor([[3.0, 3.0, 4.0, 4.0]]), torch.tensor([2])),
        (torch.tensor([[0.0, 0.0, 6.0, 6.0]]), torch.tensor([0])),
    ]
    row = run(FakeLoader(images, targets, masks, boxes), ["boxes"])
    assert row.counted["f1"] == 3  # all but the NaN map
    # the third is not predicted, and its map for class 2 is empty: not located
    assert row.figures["le"] == pytest.approx(1 / 3)
    assert row.figures["om"] == pytest.approx(1 / 3)
    assert row.figures["f1"] == pytest.approx(2 / 3, abs=1e-5)
    assert row.figures["f1a"] == pytest.approx(2 / 3, abs=1e-5)


def test_boxes_stand_in_for_masks() -> None:
    images, targets, _ = four_images()
    boxes = [(torch.tensor([[1.0, 1.0, 3.0, 3.0]]), targets[i : i + 1]) for i in range(4)]
    row = run(FakeLoader(images, targets, None, boxes), ["point"])
    assert row.counts["pairs"] == 4
    assert row.figures["point"] == 0.5


def test_figures_that_ask_the_network(randomised) -> None:
    images, targets, masks = four_images()
    row = run(FakeLoader(images, targets, masks, None), ["saliency", "curves"])
    assert row.counted == {"saliency": 2, "deletion": 2, "insertion": 2}
    assert row.figures["deletion"] < row.figures["insertion"]
    assert set(METRICS) >= {"saliency", "curves"}


def test_nothing_predicted_gives_nan_and_counts() -> None:
    images, targets, masks = four_images()
    row = run(FakeLoader(images, (targets + 1) % 3, masks.clamp(max=0), None), ["point", "auc"])
    assert row.counts["pairs"] == 0
    assert math.isnan(row.figures["point"])
    assert row.counted["auc"] == 0


def test_annotations_ignore_void() -> None:
    images, targets, masks = four_images()
    batch = Batch(images, targets, torch.arange(4), None, masks)
    found = list(annotated(batch))
    assert [list(each.masks) for each in found] == [[0], [1], [2], [0]]
    assert found[3].masks[0].sum() == 1
    assert [each.labels for each in found] == [(0,), (1,), (2,), (0,)]


# --- Checks before anything is computed ------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Two images of 8×6 pixels with masks and boxes, of two classes."""
    for index in range(2):
        mask = np.zeros((6, 8), np.uint8)
        mask[1:3, 2:5] = index + 1
        Image.fromarray(mask).save(tmp_path / f"mask{index}.png")
    table = TargetTable(
        np.array([0, 1], np.int64),
        (np.array([[2, 1, 5, 3]], np.float32),) * 2,
        (np.array([0]), np.array([1])),
        ("mask0.png", "mask1.png"),
    )
    size = np.array([6, 6], np.int32), np.array([8, 8], np.int32)
    return Manifest(tmp_path, "val", ("a.png", "b.png"), *size, np.zeros(2, np.uint64), table, ("cat", "dog"))


def changed(manifest: Manifest, **targets: object) -> Manifest:
    return dataclasses.replace(manifest, targets=dataclasses.replace(manifest.targets, **targets))


def test_sound_ground_truth_passes(manifest: Manifest) -> None:
    check_ground_truth(manifest, masks=True, boxes=True)


def test_missing_annotations_are_named(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"b.png"):
        check_ground_truth(changed(manifest, mask_paths=("mask0.png", "")), masks=True, boxes=False)
    with pytest.raises(ConfigError, match=r"mask9.png .*a.png"):
        check_ground_truth(changed(manifest, mask_paths=("mask9.png", "mask1.png")), masks=True, boxes=False)
    with pytest.raises(ConfigError, match="'val'"):
        check_ground_truth(changed(manifest, mask_paths=None), masks=True, boxes=False)
    with pytest.raises(ConfigError, match="--annotation-path"):
        check_ground_truth(changed(manifest, boxes=None, box_classes=None), masks=False, boxes=True)
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    boxes = (manifest.targets.boxes[0], nothing[0])
    with pytest.raises(ConfigError, match=r"b.png"):
        check_ground_truth(
            changed(manifest, boxes=boxes, box_classes=(np.array([0]), nothing[1])), masks=False, boxes=True
        )


def test_masks_of_another_size_or_class_are_named(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"mask0.png .*a.png"):
        check_ground_truth(
            dataclasses.replace(manifest, widths=np.array([9, 8], np.int32)), masks=True, boxes=False
        )
    Image.fromarray(np.full((6, 8), 7, np.uint8)).save(manifest.root / "mask0.png")
    with pytest.raises(ConfigError, match=r"mask0.png .*\b7\b"):
        check_ground_truth(manifest, masks=True, boxes=False)
    Image.fromarray(np.full((6, 8), 2, np.uint8)).save(manifest.root / "mask0.png")
    with pytest.raises(ConfigError, match=r"\bcat\b"):
        check_ground_truth(manifest, masks=True, boxes=False)


def test_figures_of_a_batch_are_made_while_the_next_one_is_explained(monkeypatch) -> None:
    images, targets, masks = four_images()
    met = threading.Barrier(2, timeout=10)  # of the second batch's maps and the first one's figures

    class Watched(Bright):
        num_batches = 0

        def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
            self.num_batches += 1
            if self.num_batches == 2:
                met.wait()
            return super().__call__(images, targets)

    judged: list[object] = []

    def auc(heatmap: object, mask: object) -> float:
        judged.append(heatmap)
        if len(judged) == 1:
            met.wait()
        return 1.0

    monkeypatch.setattr("explainers.measures.evaluate.pixel_auc", auc)
    batch = Batch(images[:1], targets[:1], torch.arange(1), None, masks[:1])
    settings = {"metrics": ["auc"], "multi_label": False, "distributed": Distributed(), "max_pairs": 8}
    (row,) = localize("net", {"bright": Watched()}, predict, [batch, batch], **settings)
    assert row.counted["auc"] == 2


def test_an_error_among_the_figures_is_raised(monkeypatch) -> None:
    images, targets, masks = four_images()
    monkeypatch.setattr("explainers.measures.evaluate.pixel_auc", lambda heatmap, mask: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(FakeLoader(images, targets, masks, None), ["auc"])
