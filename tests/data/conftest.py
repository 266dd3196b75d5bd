"""Small data sets on disk, made by the tests themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classification.data.dataset import Dataset
from image_classification.data.layouts import open_dataset

WriteImage = Callable[..., Path]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's own cache."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(directory))
    return directory


@pytest.fixture
def write_image() -> WriteImage:
    """Write a noise image: `write_image(path, width=…, height=…, mode="RGB", seed=0, **save options)`."""

    def write(
        path: Path, *, width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0, **options: object
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path, **options)
        return path

    return write


@pytest.fixture
def class_folders(tmp_path: Path, write_image: WriteImage) -> Path:
    """`train/` and `val/` of classes ant, bee and cat with 4 + 3 + 2 and 1 image each."""
    root = tmp_path / "insects"
    for folder, counts in (("train", (4, 3, 2)), ("val", (1, 1, 1))):
        for name, count in zip(("ant", "bee", "cat"), counts, strict=True):
            for number in range(count):
                write_image(root / folder / name / f"{number}.JPEG", width=20 + number, seed=number)
    return root


@pytest.fixture(scope="session")
def small_shapes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """48 + 24 generated images, one object each."""
    cache = tmp_path_factory.mktemp("shapes")
    return open_dataset("shapes:train=48,val=24,seed=3", cache_dir=cache, progress=False)


@pytest.fixture(scope="session")
def small_shapes_multi(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """36 + 12 generated images, one to three objects each."""
    cache = tmp_path_factory.mktemp("shapes-multi")
    return open_dataset("shapes-multi:train=36,val=12,seed=3", cache_dir=cache, progress=False)
