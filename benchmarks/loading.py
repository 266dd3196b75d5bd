"""Images per second of processor time: LucidPrune's loaders compared with a plain torch DataLoader with Pillow and
torchvision.

    python benchmarks/loading.py DIR [--prepared DIR256] [--backends dali-cpu pytorch] [--workers 2]

DIR holds images, in folders or not. Every side makes batches of normalised float32 with the training augmentation
(random-resized crop to 224, flip, antialiased). The baseline is what one would write without a library: a torch
DataLoader with worker processes, Pillow, and torchvision's v2 transforms. Processor time is that of the process and its
children over one epoch, including the start of workers and pipeline. The sides take turns. The table has images per
CPU-second and their ratio to the baseline, each as median and range, and images per second.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from common.measure import in_turns, ratios, spread
from common.report import BenchmarkParser, print_table, write_json
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from image_classification.data.build import Placement, make_loader
from image_classification.data.data_config import DataConfig
from image_classification.data.dataset import IMAGENET_PRESET
from image_classification.data.imagefile import is_image, read_header
from image_classification.data.manifest import Manifest
from image_classification.data.plan import Planner, RandomResizedCrop
from image_classification.data.targets import TargetTable

Epoch = Callable[[], Iterator[int]]


class PlainImages(Dataset[tuple[Tensor, int]]):
    """The baseline's data set: one image per item."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(IMAGENET_PRESET.image_size, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_PRESET.mean, IMAGENET_PRESET.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB")), 0


def baseline(files: list[Path], arguments: argparse.Namespace) -> Iterator[int]:
    """Yield the batch sizes of one epoch of the plain DataLoader."""
    loader = DataLoader(PlainImages(files), arguments.batch_size, shuffle=True, num_workers=arguments.workers)
    for images, _ in loader:
        yield len(images)


def manifest_of(files: list[Path]) -> Manifest:
    """Build a manifest of loose files."""
    headers = [read_header(file) for file in files]
    return Manifest(
        root=Path("/"),
        split="train",
        paths=tuple(str(file.resolve())[1:] for file in files),
        heights=np.array([header.height for header in headers], np.int32),
        widths=np.array([header.width for header in headers], np.int32),
        digests=np.array([header.digest for header in headers], np.uint64),
        targets=TargetTable(np.zeros(len(files), np.int64)),
        class_names=("any",),
    )


def ours(manifest: Manifest, backend: str, arguments: argparse.Namespace) -> Iterator[int]:
    """Yield the batch sizes of one epoch of a LucidPrune backend.

    A training loader would already decode for the next epoch when this one ends, so the plan is a finite one.
    """
    config = DataConfig(data_backend=backend, workers=arguments.workers, batch_size=arguments.batch_size)
    size = (IMAGENET_PRESET.image_size, IMAGENET_PRESET.image_size)
    crop = RandomResizedCrop(size)
    planner = Planner(manifest.heights, manifest.widths, crop, batch_size=arguments.batch_size, shuffle=True)
    stage = Placement(device=torch.device("cpu")).stage(IMAGENET_PRESET)
    with make_loader(backend, manifest, planner, stage, config) as loader:
        for batch in loader:
            yield len(batch)


def cpu_seconds() -> float:
    """Return the processor time of this process and of its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(epoch: Epoch) -> tuple[float, float]:
    """Return images per CPU-second and per second of one epoch, including start and end of workers."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    num_images = sum(epoch())
    return num_images / (cpu_seconds() - cpu), num_images / (time.perf_counter() - wall)


def find(folder: Path, num: int) -> list[Path]:
    """Return the images of a folder, repeated until there are `num`."""
    files = sorted(path for path in folder.rglob("*") if is_image(path.name))
    if not files:
        raise SystemExit(f"{folder} holds no images")
    return [files[i % len(files)] for i in range(max(num, len(files)))]


def sides_of(arguments: argparse.Namespace) -> dict[str, Epoch]:
    """Return everything to measure, by name; the baseline on the original images comes first."""
    folders = {"": arguments.data}
    if arguments.prepared is not None:
        folders["prepared: "] = arguments.prepared
    sides: dict[str, Epoch] = {}
    for prefix, folder in folders.items():
        files = find(folder, arguments.num_images)
        manifest = manifest_of(files)
        sides[f"{prefix}torch DataLoader, PIL, torchvision v2"] = functools.partial(
            baseline, files, arguments
        )
        for backend in arguments.backends:
            sides[f"{prefix}{backend}"] = functools.partial(ours, manifest, backend, arguments)
    return sides


def parse() -> argparse.Namespace:
    """Parse the command line."""
    # One thread is for the consumer; workers have one each anyway.
    parser = BenchmarkParser(__doc__, repeats=5, threads=1, cpu_only=True)
    parser.add_argument("data", type=Path, help="folder of JPEGs")
    parser.add_argument("--prepared", type=Path, help="the same images after `image_classification prepare`")
    parser.add_argument("--num-images", type=int, default=1200, help="least images an epoch, by repetition")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--backends", nargs="+", default=["dali-cpu", "pytorch"])
    small = {"num_images": 16, "workers": 1, "batch_size": 8, "repeats": 1, "backends": ["pytorch"]}
    return parser.parse("loading.json", quick=small)


def main() -> None:
    """Measure, print and write JSON."""
    arguments = parse()
    figures = in_turns(sides_of(arguments), measure, arguments.repeats, warm_up=0)
    reference = [per_cpu for per_cpu, _ in next(iter(figures.values()))]
    results, rows = {}, []
    for name, found in figures.items():
        per_cpu = [figure for figure, _ in found]
        cpu = spread(per_cpu)
        ratio = spread(ratios(per_cpu, reference))
        wall = spread([figure for _, figure in found])
        results[name] = {"per_cpu_second": cpu, "ratio": ratio, "per_second": wall}
        rows.append(
            [
                name,
                f"{cpu['median']:.0f} ({cpu['min']:.0f}–{cpu['max']:.0f})",
                f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})",
                f"{wall['median']:.0f}",
            ]
        )
    print_table(["side", "images per CPU-second", "÷ plain torch", "images/s"], rows)
    write_json(arguments, arguments.repeats, {"results": results})


if __name__ == "__main__":
    main()
