"""`shapes`, the embedded data set: generated JPEG images of varied size with exact pixel masks and boxes.

It allows every command to run on a fresh machine, and it has ground truth for explanations: only the object determines
the class, and the background is independent of it (see `render.py`). The set is a pure function of its seed; it is
generated once, into the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_classification.cache import build_directory
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.manifest import Manifest
from image_classification.data.progress import progress_bar
from image_classification.data.shapes.render import CLASS_NAMES, labels_of
from image_classification.data.shapes.stored import Job, image_path, mask_path, write_all
from image_classification.data.targets import TargetTable

GENERATOR_VERSION = 1
"""Raised whenever the drawing changes, so that a cached set of an older version is not reused."""

SHAPES_PRESET = Preset(
    image_size=48,
    resize=54,
    mean=(0.507, 0.503, 0.507),
    std=(0.253, 0.224, 0.266),
    augmentation="imagenet",
    crop_scale=(0.6, 1.0),  # a smaller crop often misses the object, and with it the class
    batch_size=64,
)


@dataclass(frozen=True)
class ShapesSpec:
    """A generated set: number of images, seed, and whether images show one to three objects instead of one."""

    num_train: int = 6000
    num_val: int = 1000
    seed: int = 0
    multi_label: bool = False

    def __post_init__(self) -> None:
        if self.num_train < len(CLASS_NAMES) or self.num_val < len(CLASS_NAMES):
            raise ValueError(
                f"shapes needs at least {len(CLASS_NAMES)} images per split, one of each class, "
                f"not train={self.num_train},val={self.num_val}"
            )
        if self.seed < 0:
            raise ValueError(f"the seed of shapes cannot be negative: {self.seed}")

    @property
    def name(self) -> str:
        """The set's name in reports."""
        return "shapes-multi" if self.multi_label else "shapes"


def is_shapes(data: str) -> bool:
    """Whether a data argument means the generated set (a directory of that name is written `./shapes`)."""
    return data.split(":")[0] in ("shapes", "shapes-multi")


def parse_spec(data: str, multi_label: bool = False) -> ShapesSpec:
    """Parse `shapes`, `shapes-multi` or, with custom sizes, `shapes:train=600,val=100,seed=1`.

    Raises:
        ValueError: A setting is unknown, or a value is not a number.
    """
    name, _, settings = data.partition(":")
    fields = {"train": "num_train", "val": "num_val", "seed": "seed"}
    values: dict[str, int] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if key not in fields or not value.isdecimal():
            raise ValueError(
                f"{setting!r} in the data set {data!r} is not understood: give {', '.join(fields)} as whole "
                "numbers, for example shapes:train=600,val=100,seed=1"
            )
        values[fields[key]] = int(value)
    return ShapesSpec(multi_label=multi_label or name == "shapes-multi", **values)


def open_shapes(data: str, *, multi_label: bool = False, cache_dir: Path, progress: bool = True) -> Dataset:
    """Open the generated set, generating it first if it is not in the cache.

    Args:
        data: `shapes` or `shapes-multi`, as `parse_spec` reads them.
        multi_label: Use the multi-label variant also for `shapes`.
        cache_dir: Directory of the cache.
        progress: Show a progress bar while generating.
    """
    spec = parse_spec(data, multi_label)
    name = f"{spec.name}-v{GENERATOR_VERSION}-{spec.num_train}-{spec.num_val}-seed{spec.seed}"
    root = build_directory(
        cache_dir / "shapes" / name, lambda target: generate(spec, target, progress=progress)
    )
    train, val = (Manifest.load(root / f"manifest-{split}.npz", root) for split in ("train", "val"))
    return Dataset(spec.name, train, val, CLASS_NAMES, spec.multi_label, SHAPES_PRESET)


def generate(spec: ShapesSpec, target: Path, *, progress: bool = True) -> None:
    """Draw a set into a directory: images, `masks/` and the manifests of both splits."""
    job = Job(str(target), spec.num_train, spec.num_val, spec.seed, spec.multi_label)
    with progress_bar(f"drawing {spec.name}", spec.num_train + spec.num_val, progress) as advance:
        notes = write_all(job, advance)
    for split, columns in notes.items():
        _manifest(spec, split, target, columns).save(target / f"manifest-{split}.npz")


def _manifest(spec: ShapesSpec, split: str, root: Path, columns: dict[str, np.ndarray]) -> Manifest:
    labels = [labels_of(spec.seed, split, index, spec.multi_label) for index in range(len(columns["sizes"]))]
    paths = [image_path(split, index, row, spec.multi_label) for index, row in enumerate(labels)]
    cuts = np.cumsum(columns["box_counts"])[:-1]
    if spec.multi_label:
        table = np.zeros((len(labels), len(CLASS_NAMES)), np.float32)
        for index, row in enumerate(labels):
            table[index, list(row)] = 1.0
    else:
        table = np.array([row[0] for row in labels], np.int64)
    targets = TargetTable(
        labels=table,
        boxes=tuple(np.split(columns["boxes"], cuts)),
        box_classes=tuple(np.split(columns["box_classes"], cuts)),
        mask_paths=tuple(mask_path(path) for path in paths),
        multi_label=spec.multi_label,
    )
    heights, widths = columns["sizes"].T.copy()
    return Manifest(root, split, tuple(paths), heights, widths, columns["digests"], targets, CLASS_NAMES)
