"""Targets by sample id; boxes and masks against slow per-pixel references."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_classification.data.targets import TargetTable, crop_mask, read_mask


def slow_crop(mask: np.ndarray, window: tuple[float, ...], flip: bool, size: tuple[int, int]) -> np.ndarray:
    """Pixel by pixel: mirror the output column, map its centre into the image, take the pixel that holds it."""
    top, left, height, width = window
    result = np.zeros(size, np.uint8)
    for row in range(size[0]):
        for column in range(size[1]):
            source_column = size[1] - 1 - column if flip else column
            y = math.floor(top + (row + 0.5) * (height / size[0]))
            x = math.floor(left + (source_column + 0.5) * (width / size[1]))
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]:
                result[row, column] = mask[y, x]
    return result


window_values = st.tuples(st.floats(-12, 12), st.floats(-12, 12), st.floats(1, 30), st.floats(1, 30))


@settings(max_examples=60, deadline=None)
@given(window_values, st.booleans(), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_crop_mask_equals_slow_reference(
    window: tuple[float, ...], flip: bool, rows: int, columns: int, seed: int
) -> None:
    mask = np.random.default_rng(seed).integers(0, 256, (11, 14), dtype=np.uint8)
    expected = slow_crop(mask, window, flip, (rows, columns))
    assert (crop_mask(mask, np.array(window), flip, (rows, columns)) == expected).all()


def test_crop_mask_follows_the_images_own_resize() -> None:
    """Pillow's nearest-neighbour resize uses the same half-pixel centres."""
    mask = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)
    resized = Image.fromarray(mask).resize((20, 16), Image.Resampling.NEAREST, box=(5, 3, 45, 35))
    assert (crop_mask(mask, np.array([3, 5, 32, 40]), False, (16, 20)) == np.asarray(resized)).all()


def table_with_boxes() -> TargetTable:
    return TargetTable(
        labels=np.array([1, 0, 2]),
        boxes=(
            np.array([[2, 3, 10, 9], [0, 0, 4, 4]], np.float32),
            np.zeros((0, 4), np.float32),
            np.array([[5, 1, 6, 8]], np.float32),
        ),
        box_classes=(np.array([1, 2]), np.zeros(0, np.int64), np.array([0])),
    )


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_follow_the_mask_of_the_same_rectangle(flip: bool) -> None:
    """A rectangle drawn as a mask and the same rectangle as a box end up in the same place."""
    mask = np.zeros((40, 60), np.uint8)
    mask[8:24, 12:36] = 1
    table = TargetTable(np.array([0]), (np.array([[12, 8, 36, 24]], np.float32),), (np.array([0]),))
    window = np.array([[4.0, 8.0, 32.0, 48.0]])
    boxes, _ = table.boxes_in([0], window, np.array([flip]), (64, 96))[0]
    cropped = crop_mask(mask, window[0], flip, (64, 96))
    rows, columns = np.nonzero(cropped)
    assert boxes[0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_boxes_clipped_and_unclipped() -> None:
    table = table_with_boxes()
    windows = np.array([[4.0, 4.0, 4.0, 4.0]] * 3)
    flips = np.array([False, False, True])
    raw = table.boxes_in([0, 1, 2], windows, flips, (8, 8))
    cut = table.boxes_in([0, 1, 2], windows, flips, (8, 8), clip=True)
    assert raw[0][0].tolist() == [[-4, -2, 12, 10], [-8, -8, 0, 0]]
    assert cut[0][0].tolist() == [[0, 0, 8, 8], [0, 0, 0, 0]]
    assert raw[0][1].tolist() == [1, 2]
    assert raw[1][0].shape == (0, 4)
    assert raw[2][0].tolist() == [[4, -6, 6, 8]]  # x from 2 to 4 before the flip
    assert cut[2][0].tolist() == [[4, 0, 6, 8]]


def test_masks_of_a_batch(tmp_path: Path) -> None:
    mask = np.random.default_rng(1).integers(0, 3, (10, 12), dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "a.png")
    palette = Image.fromarray(mask).convert("P")
    palette.putdata(mask.ravel().tolist())
    palette.putpalette([200, 10, 10, 0, 255, 0, 0, 0, 255])  # colours unlike the indices
    palette.save(tmp_path / "b.png")
    table = TargetTable(np.array([0, 0, 0]), mask_paths=("a.png", "b.png", ""))
    windows = np.array([[0.0, 0.0, 10.0, 12.0]] * 3)
    batch = table.masks_in(tmp_path, np.array([1, 0, 2]), windows, np.array([False, True, False]), (10, 12))
    assert batch.dtype == torch.uint8
    assert (batch[0].numpy() == mask).all()
    assert (batch[1].numpy() == mask[:, ::-1]).all()
    assert (batch[2] == 255).all()


def test_bad_masks_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    (tmp_path / "junk.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"colour\.png.*RGB"):
        read_mask(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"junk\.png"):
        read_mask(tmp_path / "junk.png")
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        read_mask(tmp_path / "absent.png")


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    table = TargetTable(np.array([0, 1]))
    windows, flips = np.ones((1, 4)), np.array([False])
    with pytest.raises(ValueError, match="boxes"):
        table.boxes_in([0], windows, flips, (4, 4))
    with pytest.raises(ValueError, match="masks"):
        table.masks_in(tmp_path, [0], windows, flips, (4, 4))


def test_lookup_of_each_kind() -> None:
    assert TargetTable(np.array([3, 1, 2])).lookup([2, 0]).tolist() == [2, 3]
    soft = TargetTable(np.array([[0.25, 0.75], [1, 0]], np.float32))
    assert soft.lookup(np.array([0])).tolist() == [[0.25, 0.75]]
    with pytest.raises(ValueError, match="soft"):
        soft.as_multi_label(2)
    hot = TargetTable(np.array([1, 0])).as_multi_label(3)
    assert hot.multi_label
    assert hot.lookup([0, 1]).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_lookup_is_a_copy() -> None:
    table = TargetTable(np.array([3, 1]))
    table.lookup([0, 1]).zero_()
    assert table.labels.tolist() == [3, 1]


def test_arrays_round_trip_and_subset() -> None:
    table = table_with_boxes()
    again = TargetTable.from_arrays(table.to_arrays())
    assert again.boxes is not None
    assert table.boxes is not None
    assert all((a == b).all() and a.shape == b.shape for a, b in zip(again.boxes, table.boxes, strict=True))
    part = table.subset([2, 0])
    assert part.labels.tolist() == [2, 1]
    assert part.boxes is not None
    assert part.boxes[0].tolist() == [[5, 1, 6, 8]]
    nothing = TargetTable.from_arrays(table.subset([]).to_arrays())
    assert len(nothing) == 0
    assert nothing.boxes == ()


@pytest.mark.parametrize(
    "arguments",
    [
        {"labels": np.array([0.5, 1.0])},
        {"labels": np.array([0, 1]), "multi_label": True},
        {"labels": np.array([0, 1]), "mask_paths": ("a.png",)},
        {"labels": np.array([0]), "boxes": (np.zeros((1, 4), np.float32),)},
        {"labels": np.array([0]), "boxes": (np.zeros((2, 4), np.float32),), "box_classes": (np.array([0]),)},
    ],
)
def test_inconsistent_columns_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"labels|boxes|rows|multi"):
        TargetTable(**arguments)
