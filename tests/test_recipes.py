"""Every recipe in configs/ is read by the real parser and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import ROOT

from image_classification.cli import parse_config
from image_classification.models import arch_info
from main import SECTIONS

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_has_its_header(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    # Some recipes need a file that only their command names; any that exists will do for the parser.
    teacher = ["--teacher", str(path)] if any("--teacher" in line for line in header) else []
    configs = parse_config(SECTIONS, ["/data", "--config", str(path), *teacher])
    assert arch_info(configs["model"].arch).image_size >= 32
    assert any(line.startswith("# Command:") and f"configs/{path.name}" in line for line in header)
    assert any(line.startswith("# Expected:") for line in header)
    assert path.stem == "shapes_resnet20" or any(line.startswith("# Paper:") for line in header)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 5
