"""Whatever is put together at random is cut exactly, twice and under several masks, or refused with a reason.

In both modes, on other images, after a load, and exported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.equal_to_masked import close, cut_equals_zeroed, last_ones, outputs, prepared, some, tenth
from torch import Tensor, nn

from image_classification.models.structure_build import build_from_structure
from image_classification.models.structure_capture import capture_structure
from pruning import trace_groups
from pruning.engine.examples import output_tensors

sys.path.insert(0, str(Path(__file__).parent))
from random_networks import PARTS, RandomNetwork

_IN_A_ROW = 10


def check(seed: int, exported: bool = False) -> tuple[float, int]:
    """Cut one network, twice; return the share of its units that may go, and how many rewrites were refused."""
    model = RandomNetwork(seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 6, 6, generator=generator)
    model, (images,) = prepared(model, (images,))
    graph = trace_groups(model, images)
    assert all(reason for reason in graph.frozen.values())
    free = sum(group.width for group in graph.prunable) / graph.num_units
    larger = torch.randn(3, 3, 10, 10, generator=generator, dtype=torch.float64)
    rewrites = ((some, tenth), (last_ones, some))[seed % 2]
    cut, _, refused = cut_equals_zeroed(
        model, (images,), others=[(larger,)], noisy=model.noisy, rewrites=rewrites, graph=graph
    )
    structure = capture_structure(cut, factory=lambda: RandomNetwork(seed))
    loaded = build_from_structure(structure, factory=lambda: RandomNetwork(seed)).double()
    loaded.load_state_dict(cut.state_dict())
    loaded.eval()
    with torch.no_grad():
        loaded(larger)  # see `prepared`
    assert close(outputs(cut, (larger,), training=False), outputs(loaded, (larger,), training=False))
    if exported:
        program = torch.export.export(Tensors(cut).eval(), (images,)).module()
        torch.manual_seed(0)
        with torch.no_grad():
            assert close(outputs(cut, (images,), training=False), program(images))
    return free, refused


class Tensors(nn.Module):
    """The tensors that a network outputs: `torch.export` does not look into classes of one's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return output_tensors(self.model(x))


def check_all(seeds: range, exported_every: int = 1) -> None:
    free, refused = [], 0
    for seed in seeds:
        try:
            share, count = check(seed, exported=seed % exported_every == 0)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {RandomNetwork(seed).names}") from error
        free.append(share)
        refused += count
    assert sum(free) / len(free) > 0.5, free
    assert refused <= 3


@pytest.mark.parametrize("start", range(0, 200, _IN_A_ROW))
def test_random_networks_are_cut_exactly(start: int) -> None:
    check_all(range(start, start + _IN_A_ROW), exported_every=4)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(200, 500, 50))
def test_more_random_networks_are_cut_exactly(start: int) -> None:
    check_all(range(start, start + 50))


def test_every_part_occurs() -> None:
    names = {name for seed in range(200) for name in RandomNetwork(seed).names}
    assert names == set(PARTS)
