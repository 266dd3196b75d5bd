"""Reading the calibration split in the middle of an epoch changes nothing: the whole job, with every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.images import varied_sizes, write_jpegs
from support.jobs import assert_same_training, checkpoint, main_words

from image_classification import job as jobs
from image_classification.callbacks import Callback
from image_classification.cli import parse_config
from image_classification.data.backends import dali
from image_classification.distributed import Distributed
from image_classification.job_config import JobConfig
from image_classification.job_outcome import run_job
from image_classification.trainer import Trainer

needs_dali = pytest.mark.skipif(not dali.is_available(), reason="DALI is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes in ImageNet's layout: 28 images to train on and 4 to validate."""
    root = tmp_path_factory.mktemp("folders")
    for split, num_images in (("train", 14), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            write_jpegs(root / split / name, varied_sizes(num_images))
    return root


class Reader(Callback):
    """Reads calibration batches after some steps: a few, or all."""

    name = "reader"

    def __init__(self, job: jobs.Job) -> None:
        assert job.loaders.calibration is not None
        self.calibration = job.loaders.calibration
        self.num_read = 0

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.iteration % 2:
            for batch in self.calibration:
                self.num_read += len(batch)
                if trainer.state.iteration == 1:
                    break


def train(words: list[str], callbacks: Callable[[jobs.Job], list[Callback]]) -> list[Callback]:
    """What main.py does, with other callbacks."""
    taken: list[Callback] = []

    def body(configs: Mapping[str, Any], distributed: Distributed) -> None:
        job = jobs.prepare(configs, distributed)
        taken.extend(callbacks(job))
        jobs.make_trainer(job, jobs.make_model(job), callbacks=taken).fit()
        job.close()

    assert run_job(parse_config(JobConfig, words, prog="main.py"), body) == 0
    return taken


@pytest.mark.parametrize(
    "backend", ["pytorch", "resident", pytest.param("dali-cpu", marks=needs_dali), "synthetic"]
)
def test_reading_calibration_images_changes_nothing(backend: str, folder: Path, tmp_path: Path) -> None:
    flags = {"data_backend": backend, "batch_size": 4, "epochs": 2, "calibration_size": 8}
    if backend == "synthetic":
        flags["num_classes"] = 2
    switches = ("--prof", "4") if backend == "synthetic" else ()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(main_words(str(folder), tmp_path / "without", *switches, **flags), lambda job: [])
        (reader,) = train(
            main_words(str(folder), tmp_path / "with", *switches, **flags), lambda job: [Reader(job)]
        )
    finally:
        torch.set_num_threads(threads)
    assert isinstance(reader, Reader)
    assert reader.num_read > 8
    assert_same_training(checkpoint(tmp_path / "without"), checkpoint(tmp_path / "with"))
