"""The authors' golden files through the commands: what their own classes computed, ours compute.

The files are too large for the repository. LUCIDPRUNE_GOLDEN names the folder that holds them; what the networks in
`support/published_networks.py` compute from these weights was found equal, so that `test_importing.py` says the same on
weights that it draws.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from explainers.aem import MASK_PRESETS, load_selector
from explainers.aem.masks import centres_and_widths, rbf_masks
from explainers.casm.casm_objective import published_figures, published_summary
from image_classification.metrics import figures_over_images
from image_classification.models import model_for_weights
from pruning.__main__ import main

GOLDEN = os.environ.get("LUCIDPRUNE_GOLDEN")
pytestmark = pytest.mark.skipif(
    GOLDEN is None, reason="LUCIDPRUNE_GOLDEN does not name a folder of golden files"
)


def golden(name: str) -> Any:
    return torch.load(Path(str(GOLDEN)) / name, map_location="cpu", weights_only=False)


def imported(name: str, folder: Path) -> Path:
    out = folder / "ours.pth.tar"
    assert main(["import", str(Path(str(GOLDEN)) / name), str(out)]) == 0
    return out


@pytest.mark.parametrize("name", ["isp_cifar_resnet56", "isp_cifar_mobilenetv2"])
@torch.no_grad()
def test_black_boxes(tmp_path: Path, name: str) -> None:
    expected = golden(f"{name}.expected.pt")
    model = model_for_weights(None, imported(f"{name}_blackbox.pth", tmp_path)).eval()
    torch.testing.assert_close(model(expected["x"]), expected["logits"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rbf_selector(tmp_path: Path) -> None:
    expected = golden("isp_cifar_resnet56.expected.pt")
    out = imported("isp_cifar_resnet56_selector_rbf.pth", tmp_path)
    box = model_for_weights(None, out).eval()
    explanation = load_selector(out.with_name("ours-selector.pth.tar"))
    raw = explanation.raw(box, expected["x"], expected["y"])
    torch.testing.assert_close(raw, expected["params"].flatten(1), rtol=1e-4, atol=1e-4)
    mask = explanation.selector.mask(raw, 32)
    torch.testing.assert_close(mask / mask.amax((2, 3), keepdim=True), expected["mask"], rtol=0, atol=1e-4)
    predictor = model_for_weights(None, out.with_name("ours-predictor.pth.tar")).eval()
    torch.testing.assert_close(predictor(expected["x"]), expected["pl"], rtol=1e-5, atol=1e-5)


def test_figures_of_predictions_and_masks() -> None:
    expected = golden("figures.expected.pt")
    figures = figures_over_images(expected["logits"].numpy(), expected["targets"].numpy() > 0.5)
    assert figures["map_images"] == pytest.approx(expected["map_per_image"], abs=1e-4)
    assert figures["f1_images"] == pytest.approx(expected["f1_over_images"], abs=1e-4)
    masks = expected["masks"].float()
    statistics = published_summary(published_figures(masks).sum(0), len(masks))
    wanted = {name: float(value) for name, value in expected["casm_statistics"].items()}
    assert statistics == pytest.approx(wanted, rel=1e-3)  # the published deviation is a difference in float32


def test_masks_lie_where_the_program_draws_them() -> None:
    for name in ("resnet-34", "mobilenetv2"):
        content = golden(f"rbf_mask_224_{name}.pt")
        masks = rbf_masks(*centres_and_widths(content["params"], MASK_PRESETS["imagenet"]), 224)
        shown = (masks / masks.amax((2, 3), keepdim=True)).half()
        torch.testing.assert_close(shown, content["mask"], rtol=0, atol=1e-3)
