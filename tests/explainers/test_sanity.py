"""Maps depend on what a network has learned: they change when its weights are randomised (Adebayo et al. 2018).

Rules that keep positive weights only follow the image itself to a part (Sixt et al. 2020), so their maps stay more
alike than others; what is asked for is that no method ignores the weights.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from explainers import create_method, method_names
from explainers.casm import Casm, save_casm
from image_classification.models import create_model
from tests.support.explained import make_images, randomise

IMAGES = 4
# Methods that look at the network they are asked about.
METHODS = [name for name in method_names() if name not in ("centre", "casm", "selector")]


def likeness(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean rank correlation of maps (B, H, W); 0 where one of them is constant (Grad-CAM may be 0 everywhere)."""
    values = [
        float(spearmanr(one, two).statistic) if np.ptp(one) and np.ptp(two) else 0.0
        for one, two in zip(first.flatten(1).numpy(), second.flatten(1).numpy(), strict=True)
    ]
    return sum(values) / len(values)


def networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network, and itself with other weights."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(randomise(create_model("resnet20", num_classes=6), make_images(8, 32), seed))
    return made[0], made[1]


@pytest.mark.parametrize("name", METHODS)
def test_maps_change_with_the_weights(name: str) -> None:
    images, targets = make_images(IMAGES, 32, seed=4), torch.tensor([0, 1, 2, 3])
    maps = []
    for model in (*networks(), networks()[0]):
        maps.append(create_method(name).prepare(model, images)(images, targets).map)
    assert torch.equal(maps[0], maps[2])
    assert any(np.ptp(each.numpy()) > 0 for each in maps[0])
    assert likeness(maps[0], maps[1]) < 0.9


def test_casm_masks_change_with_the_weights_of_either_part(tmp_path) -> None:
    images, targets = make_images(IMAGES, 32, seed=4), torch.zeros(IMAGES, dtype=torch.int64)
    model, other = networks()
    torch.manual_seed(3)
    casm = Casm.for_classifier(model, 32, width=4).eval()
    changed_classifier = copy.deepcopy(casm)
    changed_classifier.classifier.load_state_dict(other.state_dict())
    changed_decoder = Casm.for_classifier(copy.deepcopy(model), 32, width=4).eval()
    maps = []
    for number, each in enumerate((casm, changed_classifier, changed_decoder)):
        path = tmp_path / f"{number}.pth.tar"
        save_casm(path, each)
        maps.append(create_method("casm", path=str(path)).prepare(model, images)(images, targets).map)
    assert likeness(maps[0], maps[1]) < 0.9
    assert likeness(maps[0], maps[2]) < 0.9
