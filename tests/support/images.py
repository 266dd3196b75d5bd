"""Small manifests of generated images, and loaders over them, for the tests of the data backends."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from image_classification.data.build import make_loader
from image_classification.data.data_config import DataConfig
from image_classification.data.device_stage import DeviceStage
from image_classification.data.imagefile import read_header
from image_classification.data.loader import PlannedLoader
from image_classification.data.manifest import Manifest
from image_classification.data.mixup import Mixup
from image_classification.data.plan import Geometry, Planner, RandomResizedCrop
from image_classification.data.targets import TargetTable

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_CLASSES = 4


def smooth_image(height: int, width: int, seed: int) -> Image.Image:
    """Create colour gradients and a few edges: an image that JPEG preserves well."""
    rng = np.random.default_rng(seed)
    grid = rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)).copy()
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(image)


def write_jpegs(root: Path, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Write JPEGs of the given heights and widths and return their names."""
    names = []
    for i, (height, width) in enumerate(sizes):
        names.append(f"{i:04d}.jpg")
        smooth_image(height, width, i).save(root / names[-1], quality=90)
    return names


def manifest_of(root: Path, names: Sequence[str], labels: np.ndarray | None = None) -> Manifest:
    """Scan files into a manifest; class i mod 4 unless labels are given."""
    headers = [read_header(root / name) for name in names]
    if labels is None:
        labels = np.arange(len(names), dtype=np.int64) % NUM_CLASSES
    return Manifest(
        root=root,
        split="train",
        paths=tuple(names),
        heights=np.array([header.height for header in headers], dtype=np.int32),
        widths=np.array([header.width for header in headers], dtype=np.int32),
        digests=np.array([header.digest for header in headers], dtype=np.uint64),
        targets=TargetTable(labels, multi_label=labels.ndim == 2),
        class_names=tuple(f"class{i}" for i in range(NUM_CLASSES)),
    )


def varied_sizes(num: int, seed: int = 0) -> list[tuple[int, int]]:
    """Return heights and widths between 40 and 200 pixels."""
    rng = np.random.default_rng(seed)
    return [(int(height), int(width)) for height, width in rng.integers(40, 200, (num, 2))]


def loader_of(
    manifest: Manifest,
    backend: str,
    geometry: Geometry | None = None,
    *,
    batch_size: int = 4,
    workers: int = 1,
    on_bad_sample: str = "stop",
    prefetch: int = 2,
    mixup: Mixup | None = None,
    **planner_options: Any,
) -> PlannedLoader:
    """Create a loader on the CPU; by default a training loader with random-resized crops of 32 pixels."""
    if geometry is None:
        geometry = RandomResizedCrop((32, 32))
        planner_options = {"training": True, **planner_options}
    planner = Planner(manifest.heights, manifest.widths, geometry, batch_size=batch_size, **planner_options)
    stage = DeviceStage(MEAN, STD, device=torch.device("cpu"))
    config = DataConfig(
        data_backend=backend,
        batch_size=batch_size,
        workers=workers,
        on_bad_sample=on_bad_sample,
        prefetch=prefetch,
    )
    return make_loader(backend, manifest, planner, stage, config, mixup=mixup)


def to_levels(images: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: return (N, 3, H, W) float64 in 0 … 255."""
    mean = torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)
    return (images.double() * std + mean) * 255


def write_png16(path: Path, values: np.ndarray) -> None:
    """Write a 16-bit PNG from (H, W) grey or (H, W, 3) RGB uint16; Pillow cannot write the latter."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
