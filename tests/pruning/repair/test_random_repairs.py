"""Repairs of whatever is put together at random: none fails, and none takes the outputs further from the original."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from support.commands import ROOT
from support.equal_to_masked import prepared
from torch import Tensor, nn

from image_classification.config import ConfigError
from pruning import prune
from pruning.engine.examples import output_tensors

sys.path.insert(0, str(ROOT / "tests" / "pruning" / "engine"))
from random_networks import RandomNetwork

_IN_A_ROW = 10


def distance(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        pairs = zip(output_tensors(one.eval()(images)), output_tensors(other.eval()(images)), strict=True)
        return sum(float((a - b).square().sum()) for a, b in pairs)


def gained(seed: int) -> bool | None:
    """Whether a repair gained something on images that it has not seen; None if nothing can be cut."""
    generator = torch.Generator().manual_seed(seed)
    example = torch.randn(2, 3, 6, 6, generator=generator)
    model, (example,) = prepared(RandomNetwork(seed), (example,))
    images, fresh = (torch.randn(n, 3, 10, 10, generator=generator, dtype=torch.float64) for n in (32, 64))
    options: dict[str, Any] = {
        "budget": 0.6,
        "criterion": "magnitude",
        "search": "uniform",
        "calibration": [images],
    }
    cut, repaired = copy.deepcopy(model), copy.deepcopy(model)
    try:
        prune(cut, example, repair="none", **options)
    except ConfigError:
        return None
    record = prune(repaired, example, repair="least-squares", **options)
    assert "(" not in record.repair.partition(":")[2], record.repair  # no problem was met
    before, after = distance(cut, model, fresh), distance(repaired, model, fresh)
    assert after <= 1.02 * before
    return after < 0.98 * before


@pytest.mark.parametrize(
    "start", [0, 10, *(pytest.param(start, marks=pytest.mark.slow) for start in range(20, 100, _IN_A_ROW))]
)
def test_random_networks(start: int) -> None:
    found = []
    for seed in range(start, start + _IN_A_ROW):
        try:
            found.append(gained(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {RandomNetwork(seed).names}") from error
    known = [one for one in found if one is not None]
    assert sum(known) >= 0.8 * len(known)
    assert len(known) >= 0.8 * len(found)
