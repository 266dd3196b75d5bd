"""Fixtures for the tests of attribution methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from image_classification.models import create_model
from tests.support.explained import Tiny, make_images, randomise

Randomised = Callable[..., nn.Module]


@pytest.fixture
def randomised() -> Randomised:
    """Builds a network by name with random weights and calibrated batch norms."""

    def build(arch: str, size: int, *, num_classes: int = 10, seed: int = 0, **options: object) -> nn.Module:
        torch.manual_seed(seed)
        model = create_model(arch, num_classes=num_classes, **options)  # type: ignore[arg-type]
        return randomise(model, make_images(8, size, seed + 1), seed)

    return build


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data sets of these tests are drawn, once for all of them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small_cache(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are kept apart from the user's own."""
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(small_data))


@pytest.fixture
def tiny() -> nn.Module:
    """`Tiny` in float64 with lively weights and batch norms."""
    torch.manual_seed(3)
    model = Tiny()
    model.bn1.running_mean.normal_()
    model.bn1.running_var.uniform_(0.5, 2)
    model.bn1.weight.data.uniform_(-1.5, 1.5)
    model.bn1.bias.data.normal_()
    return model.double().eval()
