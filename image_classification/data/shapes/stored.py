"""Writing of the images of `shapes` to disk by several processes.

Drawing consists of many small NumPy calls, which threads cannot parallelise, and a `multiprocessing` pool would import
the caller's main module (with torch in it) once per worker. So each worker is this module run as a program, `python -m
image_classification.data.shapes.stored JOB`, which needs only NumPy and Pillow; it draws every n-th image and reports
on stdout.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from image_classification.data.imagefile import read_header
from image_classification.data.shapes.render import CLASS_NAMES, labels_of, render
from image_classification.data.workers import num_cores

_MAX_WORKERS = 8
ALONE_BELOW = 400  # number of images below which one process is faster than starting others
_REPORT_EVERY = 20


@dataclass(frozen=True)
class Job:
    """The share of one worker.

    Attributes:
        directory: Output directory.
        num_train, num_val: Number of images per split.
        seed: Seed of the whole set.
        multi_label: One to three objects per image instead of one.
        worker, num_workers: This worker draws the images `worker`, `worker + num_workers`, …
    """

    directory: str
    num_train: int
    num_val: int
    seed: int
    multi_label: bool
    worker: int = 0
    num_workers: int = 1

    def images(self) -> Iterator[tuple[str, int]]:
        """Split and index of each image of this worker."""
        for split, count in (("train", self.num_train), ("val", self.num_val)):
            for index in range(self.worker, count, self.num_workers):
                yield split, index

    def part(self, split: str, worker: int) -> Path:
        """Return the file with a worker's notes on its images of a split."""
        return Path(self.directory) / f"part-{split}-{worker}.npz"


def image_path(split: str, index: int, labels: tuple[int, ...], multi_label: bool) -> str:
    """Return the path of an image relative to the set's directory; single-label images are in class folders."""
    folder = split if multi_label else f"{split}/{CLASS_NAMES[labels[0]]}"
    return f"{folder}/{index:06d}.jpg"


def mask_path(path: str) -> str:
    """Return the path of the mask of an image."""
    return f"masks/{path.removesuffix('.jpg')}.png"


def write_all(job: Job, advance: Callable[[int], None]) -> dict[str, dict[str, np.ndarray]]:
    """Draw and write all images and masks, with as many processes as pay off.

    Args:
        job: The whole set, as the share of a single worker.
        advance: Called with the number of finished images.

    Returns:
        For each split, in order of the images' index: `sizes` (N, 2), `digests` (N,), `box_counts` (N,), and the
        rows `boxes` (K, 4) and `box_classes` (K,).

    Raises:
        RuntimeError: A worker failed; the message has its output.
    """
    _make_folders(job)
    num_workers = min(num_cores(), _MAX_WORKERS)
    if job.num_train + job.num_val < ALONE_BELOW or num_workers == 1:
        num_workers = 1
        run_worker(job, advance)
    else:
        _run_processes(job, num_workers, advance)
    return {split: _merge(job, split, num_workers) for split in ("train", "val")}


def run_worker(job: Job, advance: Callable[[int], None]) -> None:
    """Draw and write one worker's share."""
    root = Path(job.directory)
    notes: dict[str, list[tuple[int, int, int, int, np.ndarray, np.ndarray]]] = {"train": [], "val": []}
    unreported = 0
    for split, index in job.images():
        labels = labels_of(job.seed, split, index, job.multi_label)
        image = render(job.seed, split, index, labels)
        path = image_path(split, index, labels, job.multi_label)
        Image.fromarray(image.image).save(root / path, quality=image.quality)
        Image.fromarray(image.mask).save(root / mask_path(path), compress_level=3)
        header = read_header(root / path)
        notes[split].append((index, *header[:3], image.boxes, image.labels))
        unreported += 1
        if unreported == _REPORT_EVERY:
            advance(unreported)
            unreported = 0
    advance(unreported)
    for split, rows in notes.items():
        _save_part(job.part(split, job.worker), rows)


def _save_part(path: Path, rows: list[tuple[int, int, int, int, np.ndarray, np.ndarray]]) -> None:
    np.savez(
        path,
        indices=np.array([row[0] for row in rows], np.int64),
        sizes=np.array([row[1:3] for row in rows], np.int32).reshape(-1, 2),
        digests=np.array([row[3] for row in rows], np.uint64),
        box_counts=np.array([len(row[4]) for row in rows], np.int64),
        boxes=np.concatenate([np.zeros((0, 4), np.float32), *(row[4] for row in rows)]),
        box_classes=np.concatenate([np.zeros(0, np.int64), *(row[5] for row in rows)]),
    )


def _merge(job: Job, split: str, num_workers: int) -> dict[str, np.ndarray]:
    """Join the workers' notes in order of the images, and remove their files."""
    parts = []
    for worker in range(num_workers):
        with np.load(job.part(split, worker), allow_pickle=False) as archive:
            parts.append({name: archive[name] for name in archive.files})
        job.part(split, worker).unlink()
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined["indices"])
    box_order = np.argsort(np.repeat(joined["indices"], joined["box_counts"]), kind="stable")
    by_box = {name: joined[name][box_order] for name in ("boxes", "box_classes")}
    return {name: joined[name][order] for name in ("sizes", "digests", "box_counts")} | by_box


def _make_folders(job: Job) -> None:
    for split in ("train", "val"):
        for name in ("",) if job.multi_label else CLASS_NAMES:
            for above in ("", "masks"):
                (Path(job.directory) / above / split / name).mkdir(parents=True, exist_ok=True)


def _run_processes(job: Job, num_workers: int, advance: Callable[[int], None]) -> None:
    package_parent = str(Path(__file__).resolve().parents[3])
    paths = [package_parent, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "image_classification.data.shapes.stored"]
    processes = []
    for worker in range(num_workers):
        share = dataclasses.replace(job, worker=worker, num_workers=num_workers)
        command = [*program, json.dumps(dataclasses.asdict(share))]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        processes.append(process)
    lock = threading.Lock()

    def follow(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with lock:
                advance(int(line))

    followers = [threading.Thread(target=follow, args=(process,), daemon=True) for process in processes]
    try:
        for follower in followers:
            follower.start()
        for process in processes:
            assert process.stderr is not None
            errors = process.stderr.read()  # ends with the process
            if process.wait() != 0:
                raise RuntimeError(f"drawing the shapes images failed:\n{errors.strip()[-2000:]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for follower in followers:
            follower.join()


def _main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    run_worker(job, lambda steps: print(steps, flush=True))


if __name__ == "__main__":
    _main()
