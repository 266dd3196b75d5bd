"""The generated set: exact ground truth, no information in the background, reproducible files."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classification.data.dataset import Dataset
from image_classification.data.layouts import open_dataset
from image_classification.data.shapes import stored as shapes_files
from image_classification.data.shapes.generated import (
    ShapesSpec,
    generate,
    is_shapes,
    open_shapes,
    parse_spec,
)
from image_classification.data.shapes.render import (
    CLASS_NAMES,
    CLASSES,
    OUTLINES,
    TEXTURES,
    compose,
    draw_background,
    labels_of,
    place_objects,
    render,
    streams,
)


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_object_pixels_are_the_mask_before_any_background(label: int) -> None:
    """One object before two backgrounds, its own and that of another class's image: what stays is the mask."""
    own = render(0, "train", label, (label,))
    size = own.image.shape[:2]
    other = np.zeros_like(own.image)
    stranger = draw_background(streams(1, "val", label + 1).background)
    rows, columns = min(size[0], stranger.shape[0]), min(size[1], stranger.shape[1])
    other[:rows, :columns] = stranger[:rows, :columns]

    layers = place_objects(streams(0, "train", label).objects, size, (label,))
    repainted, mask = compose(other, layers)
    background = draw_background(streams(0, "train", label).background)
    on_object = own.mask == label + 1

    assert (mask == own.mask).all()
    assert set(np.unique(own.mask)) == {0, label + 1}
    assert (repainted[on_object] == own.image[on_object]).all()
    assert (repainted[~on_object] == other[~on_object]).all()
    assert (own.image[~on_object] == background[~on_object]).all()
    ys, xs = np.nonzero(on_object)
    assert own.boxes.tolist() == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]


def test_background_knows_nothing_of_the_class() -> None:
    """The same image number with each class has the same size and background, pixel for pixel."""
    images = [render(7, "train", 5, (label,)) for label in range(len(CLASSES))]
    assert len({image.image.shape for image in images}) == 1
    outside = np.logical_and.reduce([image.mask == 0 for image in images])
    assert outside.mean() > 0.05
    for image in images[1:]:
        assert (image.image[outside] == images[0].image[outside]).all()
        assert image.quality == images[0].quality


def test_neither_outline_nor_texture_is_enough() -> None:
    assert len(CLASSES) == len(set(CLASSES)) >= 10
    for part in range(2):
        values = [pair[part] for pair in CLASSES]
        assert min(values.count(value) for value in set(values)) >= 2
    assert {texture for texture, _ in CLASSES} == set(TEXTURES)
    assert {outline for _, outline in CLASSES} == set(OUTLINES)
    assert list(CLASS_NAMES) == sorted(CLASS_NAMES)


def test_star_against_its_polygon() -> None:
    """The folded half-plane is the ten-cornered polygon, by the even-odd rule."""
    corners = []
    for corner in range(10):
        radius, angle = (1.0, 0.45)[corner % 2], corner * math.pi / 5
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    points = np.random.default_rng(0).uniform(-1.1, 1.1, (4000, 2))
    inside = OUTLINES["star"](points[:, 0], points[:, 1])
    for (x, y), found in zip(points, inside, strict=True):
        crossings = 0
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            crossings += (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0)
        assert found == bool(crossings % 2)


@pytest.mark.parametrize("outline", sorted(OUTLINES))
def test_outlines_stay_within_the_radius(outline: str) -> None:
    """So an object is never cut by the border of its layer."""
    angles = np.linspace(0, 2 * np.pi, 721)
    assert not OUTLINES[outline](1.03 * np.cos(angles), 1.03 * np.sin(angles)).any()


def test_files_match_the_ground_truth(small_shapes: Dataset) -> None:
    for manifest in (small_shapes.train, small_shapes.val):
        targets = manifest.targets
        assert targets.boxes is not None
        assert targets.mask_paths is not None
        for sample in range(0, len(manifest), 5):
            with Image.open(manifest.path(sample)) as image:
                assert image.format == "JPEG"
                assert image.size == (manifest.widths[sample], manifest.heights[sample])
                pixels = np.asarray(image).astype(int)
            label = int(targets.labels[sample])
            assert manifest.path(sample).parent.name == CLASS_NAMES[label]
            assert labels_of(3, manifest.split, sample, False) == (label,)
            drawn = render(3, manifest.split, sample, (label,))
            assert (np.asarray(Image.open(manifest.root / targets.mask_paths[sample])) == drawn.mask).all()
            assert targets.boxes[sample].tolist() == drawn.boxes.tolist()
            assert np.abs(pixels - drawn.image).mean() < 12  # JPEG
        assert np.bincount(targets.labels).max() - np.bincount(targets.labels).min() == 0


def test_images_are_of_varied_size(small_shapes: Dataset) -> None:
    short = np.minimum(small_shapes.train.heights, small_shapes.train.widths)
    assert short.min() >= 72
    assert short.max() <= 200
    assert len(set(short.tolist())) > 20
    assert (small_shapes.train.heights > small_shapes.train.widths).any()
    assert (small_shapes.train.heights < small_shapes.train.widths).any()


def test_multi_label_variant(small_shapes_multi: Dataset) -> None:
    assert small_shapes_multi.multi_label
    assert small_shapes_multi.name == "shapes-multi"
    manifest = small_shapes_multi.train
    targets = manifest.targets
    assert targets.boxes is not None
    assert targets.box_classes is not None
    assert targets.mask_paths is not None
    counts = targets.labels.sum(axis=1)
    assert set(counts.tolist()) == {1, 2, 3}
    for sample in range(len(manifest)):
        classes = targets.box_classes[sample]
        assert sorted(classes) == np.flatnonzero(targets.labels[sample]).tolist()
        mask = np.asarray(Image.open(manifest.root / targets.mask_paths[sample]))
        assert sorted({*np.unique(mask).tolist()} - {0}) == sorted((classes + 1).tolist())
        for label, box in zip(classes, targets.boxes[sample], strict=True):
            rows, columns = np.nonzero(mask == label + 1)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_objects_stay_visible() -> None:
    for index in range(20):
        layers = place_objects(streams(0, "val", index).objects, (90, 120), (3, 7, 11))
        _, mask = compose(np.zeros((90, 120, 3), np.uint8), layers)
        for layer in layers:
            assert (mask == layer.label + 1).sum() >= 0.75 * layer.inside.sum()


def test_same_seed_same_files(tmp_path: Path) -> None:
    spec = ShapesSpec(num_train=24, num_val=12, seed=9)
    for name in ("a", "b"):
        generate(spec, tmp_path / name, progress=False)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.[jp][pn]g"))
    assert len(files) == 72
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    other = open_shapes("shapes:train=24,val=12,seed=10", cache_dir=tmp_path / "cache", progress=False)
    same = open_shapes("shapes:train=24,val=12,seed=9", cache_dir=tmp_path / "cache", progress=False)
    assert other.train.fingerprint != same.train.fingerprint


@pytest.mark.multiprocess
def test_processes_draw_the_same_set_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = open_dataset("shapes-multi:train=30,val=13", cache_dir=tmp_path / "alone", progress=False)
    monkeypatch.setattr(shapes_files, "ALONE_BELOW", 0)
    monkeypatch.setattr(shapes_files, "num_cores", lambda: 2)
    shared = open_dataset("shapes-multi:train=30,val=13", cache_dir=tmp_path / "shared", progress=False)
    assert shared.train.fingerprint == alone.train.fingerprint
    assert shared.val.fingerprint == alone.val.fingerprint
    assert not list(shared.train.root.glob("part-*"))


@pytest.mark.multiprocess
def test_failing_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes_files, "ALONE_BELOW", 0)
    monkeypatch.setattr(shapes_files, "num_cores", lambda: 2)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho the disk is gone >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))  # what workers are started with
    with pytest.raises(RuntimeError, match="the disk is gone"):
        open_dataset("shapes:train=30,val=13", cache_dir=tmp_path, progress=False)
    assert not [path for path in (tmp_path / "shapes").iterdir() if path.is_dir()]


def test_generated_directory_is_a_class_folder_set(small_shapes: Dataset) -> None:
    """What is written can be given to anything that reads class folders."""
    opened = open_dataset(str(small_shapes.train.root), progress=False)
    assert opened.class_names == CLASS_NAMES
    assert set(opened.train.paths) == set(small_shapes.train.paths)


def test_names_and_settings() -> None:
    assert is_shapes("shapes")
    assert is_shapes("shapes-multi:seed=1")
    assert not is_shapes("./shapes")
    assert parse_spec("shapes") == ShapesSpec(6000, 1000, 0, False)
    assert parse_spec("shapes", multi_label=True).multi_label
    assert parse_spec("shapes-multi:train=60,seed=4") == ShapesSpec(60, 1000, 4, True)
    for bad in ("size=3", "train=few", "train", "train=-5"):
        with pytest.raises(ValueError, match=f"'{bad}'"):
            parse_spec(f"shapes:{bad}")
    with pytest.raises(ValueError, match="train=5"):
        parse_spec("shapes:train=5")
