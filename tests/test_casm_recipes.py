"""The recipes of the saliency mappings are read by the real parser and are the published settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import ROOT

from explainers.casm.presets import PRESETS
from explainers.casm.train import CasmJobConfig
from image_classification.cli import parse_config

RECIPES = sorted((ROOT / "configs" / "explainers").glob("imagenet_casm_*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_has_its_header(path: Path) -> None:
    configs = parse_config(CasmJobConfig, ["/data", "--casms-path", "casms", "--config", str(path)])
    assert path.stem.rpartition("_")[2].upper() == configs.casm.reproduce
    assert configs.model.arch == "resnet50"
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Command:") and f"configs/explainers/{path.name}" in line for line in header)
    assert any(line.startswith("# Expected:") for line in header)
    assert any(line.startswith("# Paper:") for line in header)


def test_every_published_thinning_has_one() -> None:
    assert len(RECIPES) == len(PRESETS)
