"""Cost of a start before the first image: opening a data set of ImageNet's size, and the order of an epoch.

    python benchmarks/startup.py [--num-images 1281167] [--workspace DIR]

A thousand class folders of hard links to a few JPEGs of 400 bytes are created in `--workspace` (they take no space, and
stay for the next time; the default is a temporary folder). Then the following run, each in a separate process, with
processor seconds and peak memory beyond that of the imports: torchvision's ImageFolder; LucidPrune's first start; and a
later start, on rank 0 and on the other ranks, which read rank 0's result. Finally, the names that a later start looks
up are counted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT
from common.report import BenchmarkParser, print_table, write_json
from PIL import Image

from image_classification.data.layouts import open_dataset
from image_classification.data.manifest import Manifest
from image_classification.data.philox import permutation
from image_classification.data.plan import Planner, RandomResizedCrop

NUM_CLASSES = 1000
TARGETS = {"memory_mb": 400, "rank 0 ÷ ImageFolder": 1.0, "other rank ÷ ImageFolder": 0.1}
SIDES = ("torchvision ImageFolder", "first start", "rank 0, later start", "another rank, later start")


def make_links(root: Path, num_images: int, num_classes: int) -> None:
    """Create `train/<class>/<number>.JPEG` and a validation split of one image per class, all hard links."""
    if (root / "made").is_file() and (root / "made").read_text() == str(num_images):
        return
    sources = []
    (root / "sources").mkdir(parents=True)
    for number in range(max(1, num_images // 30_000)):  # file systems allow some 65,000 links per file
        file = io.BytesIO()
        Image.new("RGB", (40 + number, 32)).save(file, "JPEG", quality=30)
        sources.append(root / "sources" / f"{number}.JPEG")
        sources[-1].write_bytes(file.getvalue())
    for label in range(num_classes):
        for split, count in (("train", len(range(label, num_images, num_classes))), ("val", 1)):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                os.link(sources[number % len(sources)], folder / f"n{label:08d}_{number}.JPEG")
    (root / "made").write_text(str(num_images))
    time.sleep(2.1)  # a directory changed just now is not trusted


def one_side(side: str, root: Path, cache: Path) -> dict[str, float]:
    """Return the processor seconds of opening, and this process's peak memory in MB."""
    from torchvision.datasets import ImageFolder

    before, begin = memory_mb("VmRSS"), time.process_time()
    if side == SIDES[0]:
        num_images = len(ImageFolder(str(root / "train")))
    elif side == SIDES[3]:
        num_images = len(Manifest.load(cache / "train.npz"))
    else:
        dataset = open_dataset(str(root), cache_dir=cache, progress=False)
        num_images = len(dataset.train)
        if side == SIDES[2]:
            dataset.train.save(cache / "train.npz")  # for the other ranks
    seconds = time.process_time() - begin
    return {"cpu_seconds": seconds, "memory_mb": memory_mb("VmHWM") - before, "num_images": num_images}


def memory_mb(name: str) -> float:
    """Return this process's current (VmRSS) or peak (VmHWM) memory in MB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def num_stats(root: Path, cache: Path) -> int:
    """Return how many names a later start looks up (calls of `os.stat`)."""
    calls = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.scandir":
            calls.append(event)

    sys.addaudithook(audit)
    stat = os.stat

    def counted(*arguments: Any, **keywords: Any) -> os.stat_result:
        calls.append("stat")
        return stat(*arguments, **keywords)

    os.stat = counted  # type: ignore[assignment]
    try:
        open_dataset(str(root), cache_dir=cache, progress=False)
    finally:
        os.stat = stat
    return len(calls)


def order_figures(num_images: int) -> dict[str, float]:
    """Return the seconds of an epoch's order, and how often it is computed while two readers cross an epoch's end."""
    computed = []

    def counted(seed: int, epoch: int, num_samples: int) -> np.ndarray:
        computed.append(epoch)
        return permutation(seed, epoch, num_samples)

    import image_classification.data.plan as plan

    sizes = np.full(num_images, 8, np.int32)
    planner = Planner(
        sizes, sizes, RandomResizedCrop((8, 8)), batch_size=max(1, num_images // 64), training=True
    )
    plan.permutation = counted  # type: ignore[assignment]
    begin = time.process_time()
    ahead = planner.positions(0, planner.num_steps - 8)
    consumer = planner.positions(0, planner.num_steps - 8)
    for _ in range(4):
        planner.ids(*next(ahead))
    for _ in range(16):
        planner.ids(*next(ahead))
        planner.ids(*next(consumer))
    seconds = (time.process_time() - begin) / len(computed)
    plan.permutation = permutation
    return {"cpu_seconds_of_one": seconds, "computed_per_epoch": len(computed) / 2}


def measured(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Measure all sides, each in a separate process."""
    make_links(root, arguments.num_images, arguments.num_classes)
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for side in SIDES:
            words = [sys.executable, __file__, "--side", side, str(root), cache]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
            sides[side] = json.loads(done.stdout.splitlines()[-1])
            print(side, sides[side], flush=True)
        stats = num_stats(root, Path(cache))
    return {
        "sides": sides,
        "names_asked_on_a_later_start": stats,
        "order": order_figures(arguments.num_images),
    }


def main() -> None:
    """Measure, print and write."""
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(one_side(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
        return
    parser = BenchmarkParser(__doc__, cpu_only=True)
    parser.add_argument("--num-images", type=int, default=1_281_167)
    parser.add_argument("--num-classes", type=int, default=NUM_CLASSES)
    parser.add_argument("--workspace", type=Path, help="keep the links there")
    arguments = parser.parse("startup.json", {"num_images": 600, "num_classes": 10})
    with tempfile.TemporaryDirectory() as folder:
        content = measured(arguments, arguments.workspace or Path(folder))
    base = content["sides"][SIDES[0]]["cpu_seconds"]
    rows = [
        [name, f"{side['cpu_seconds']:.2f}", f"{side['cpu_seconds'] / base:.2f}", f"{side['memory_mb']:.0f}"]
        for name, side in content["sides"].items()
    ]
    print_table(["side", "CPU-seconds", "÷ ImageFolder", "peak MB"], rows)
    print(f"names asked about on a later start: {content['names_asked_on_a_later_start']:,}")
    print(
        "order of an epoch: {cpu_seconds_of_one:.2f} s, computed {computed_per_epoch:g} × per epoch".format(
            **content["order"]
        )
    )
    write_json(arguments, 1, {**content, "targets": TARGETS})


if __name__ == "__main__":
    main()
