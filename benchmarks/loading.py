"""Images per CPU-second of our loaders against a plain torch DataLoader with Pillow and torchvision.

    python benchmarks/loading.py DIR [--prepared DIR256] [--output FILE.json]

DIR holds pictures, in folders or not. Every side makes batches of normalised float32 with the training augmentation
(random-resized crop to 224, flip, antialiased). The baseline is what one writes without a library: a torch
DataLoader with worker processes, Pillow, and torchvision's v2 transforms. CPU time is that of the process and its
children over one epoch, the start of workers and pipeline included; the sides take turns, so that a busy machine
hurts all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from image_classification.data.build import DataConfig, Placement, make_loader
from image_classification.data.dataset import IMAGENET_PRESET
from image_classification.data.imagefile import is_picture, read_header
from image_classification.data.manifest import Manifest
from image_classification.data.plan import Planner, RandomResizedCrop
from image_classification.data.targets import TargetTable

VERSIONS_OF = ("torch", "torchvision", "pillow", "numpy", "nvidia-dali-cuda120")


class PlainPictures(Dataset[tuple[Tensor, int]]):
    """The baseline's data set: one picture an item."""

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
        with Image.open(self.files[index]) as picture:
            return self.transform(picture.convert("RGB")), 0


def baseline(files: list[Path], args: argparse.Namespace) -> Iterator[int]:
    """Batch sizes of one epoch of the plain DataLoader."""
    loader = DataLoader(PlainPictures(files), args.batch_size, shuffle=True, num_workers=args.workers)
    for images, _ in loader:
        yield len(images)


def manifest_of(files: list[Path]) -> Manifest:
    """A manifest of loose files."""
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


def ours(manifest: Manifest, backend: str, args: argparse.Namespace) -> Iterator[int]:
    """Batch sizes of one epoch of one of our backends.

    A training loader would already decode for the next epoch when this one ends, so the plan is one that ends.
    """
    config = DataConfig(data_backend=backend, workers=args.workers, batch_size=args.batch_size)
    size = (IMAGENET_PRESET.image_size, IMAGENET_PRESET.image_size)
    planner = Planner(
        manifest.heights, manifest.widths, RandomResizedCrop(size), batch_size=args.batch_size, shuffle=True
    )
    stage = Placement(device=torch.device("cpu")).stage(IMAGENET_PRESET)
    with make_loader(backend, manifest, planner, stage, config) as loader:
        for batch in loader:
            yield len(batch)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(epoch: Callable[[], Iterator[int]]) -> dict[str, float]:
    """Images per CPU-second and per second of one epoch, start and end of workers included."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    num_images = sum(epoch())
    return {
        "per_cpu_second": num_images / (cpu_seconds() - cpu),
        "per_second": num_images / (time.perf_counter() - wall),
    }


def summarise(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def hardware() -> dict[str, str | int | None]:
    """What it ran on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "num_cpus": os.cpu_count(), "gpu": gpu}


def find(folder: Path, num: int) -> list[Path]:
    """The pictures of a folder, repeated until there are `num`."""
    files = sorted(path for path in folder.rglob("*") if is_picture(path.name))
    if not files:
        raise SystemExit(f"{folder} holds no pictures")
    return [files[i % len(files)] for i in range(max(num, len(files)))]


def sides_of(args: argparse.Namespace) -> dict[str, Callable[[], Iterator[int]]]:
    """Everything that is measured, by name."""
    sides: dict[str, Callable[[], Iterator[int]]] = {}
    for prefix, folder in (("", args.data), ("prepared: ", args.prepared)):
        if folder is not None:
            files = find(folder, args.num_images)
            manifest = manifest_of(files)
            sides[f"{prefix}torch DataLoader, PIL, torchvision v2"] = lambda files=files: baseline(
                files, args
            )
            for backend in args.backends:
                sides[f"{prefix}{backend}"] = lambda m=manifest, b=backend: ours(m, b, args)
    return sides


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of JPEGs")
    parser.add_argument(
        "--prepared", type=Path, help="the same pictures after `image_classification prepare`"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--num-images", type=int, default=1200, help="least pictures an epoch, by repetition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--backends", nargs="+", default=["dali-cpu", "pytorch"])
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)  # the consumer; workers have one each anyhow
    sides = sides_of(args)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, epoch in sides.items():
            runs[name].append(measure(epoch))
    reference = next(iter(runs))
    print(f"{'':52s}{'images per CPU-second':>28s}{'÷ plain':>18s}{'images/s':>10s}")
    results = {}
    for name, values in runs.items():
        per_cpu = [value["per_cpu_second"] for value in values]
        ratios = [a / b["per_cpu_second"] for a, b in zip(per_cpu, runs[reference], strict=True)]
        cpu, ratio = summarise(per_cpu), summarise(ratios)
        wall = summarise([value["per_second"] for value in values])
        results[name] = {"per_cpu_second": cpu, "ratio": ratio, "per_second": wall}
        spread = f"{cpu['median']:.0f} ({cpu['low']:.0f}–{cpu['high']:.0f})"
        relative = f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
        print(f"{name:52s}{spread:>28s}{relative:>18s}{wall['median']:10.0f}")
    if args.output is not None:
        report = {
            "benchmark": "loading",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "versions": {name: _version(name) for name in VERSIONS_OF}
            | {"python": platform.python_version()},
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
            ).stdout.strip(),
            "n": args.repeats,
            "settings": {name: getattr(args, name) for name in ("num_images", "workers", "batch_size")},
            "results": results,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
