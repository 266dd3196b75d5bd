"""One small generated data set for all jobs of this folder, drawn once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.commands import ROOT

from image_classification.data.layouts import open_dataset


@pytest.fixture(scope="package", autouse=True)
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of these tests' own, for this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUCIDPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        yield


@pytest.fixture(scope="package")
def shapes(small_cache: None) -> str:
    """200 training and 41 validation images: an odd number, for ranks to share unevenly."""
    name = "shapes:train=200,val=41"
    open_dataset(name, progress=False)
    return name
