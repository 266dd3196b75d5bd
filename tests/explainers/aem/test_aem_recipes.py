"""The recipes of amortised explanations are read by the verbs' own parsers and say what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import ROOT

from explainers.aem.masks import MASK_PRESETS
from explainers.aem.selector_config import (
    PredictorConfig,
    PredictorJobConfig,
    SelectorConfig,
    SelectorJobConfig,
)
from image_classification.cli import parse_config
from image_classification.optim import OptimConfig
from image_classification.train_config import TrainConfig

RECIPES = sorted((ROOT / "configs" / "explainers").glob("*_predictor.yaml")) + sorted(
    (ROOT / "configs" / "explainers").glob("*_selector.yaml")
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_has_its_header(path: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth.tar"
    weights.touch()
    words = ["/data", "--config", str(path), "--pretrained-weights", str(weights)]
    if path.stem.endswith("predictor"):
        configs = parse_config(PredictorJobConfig, words)
    else:
        configs = parse_config(SelectorJobConfig, [*words, "--predictor", str(weights)])
    assert configs.train.epochs > 1
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Command:") and f"configs/explainers/{path.name}" in line for line in header)
    assert any(line.startswith("# Expected:") for line in header)
    assert any(line.startswith("# Paper:") for line in header)


def test_there_are_recipes_for_both_sizes() -> None:
    assert len(RECIPES) == 6


def test_defaults_are_the_published_ones(tmp_path: Path) -> None:
    weights = tmp_path / "q.pth.tar"
    weights.touch()
    configs = parse_config(SelectorJobConfig, ["--predictor", str(weights)])
    optim, schedule = configs.optim, configs.schedule
    assert (optim.optimizer, optim.weight_decay, schedule.lr, schedule.lr_schedule) == (
        "adam",
        1e-4,
        1e-4,
        "constant",
    )
    assert configs.train.epochs == 5
    small, large = configs.explainer.weights(32), configs.explainer.weights(224)
    assert (small.area, small.smoothness, small.exponent, small.temperature) == (0.2, 1e-3, 0.3, 1.0)
    assert (large.area, large.smoothness, large.exponent, large.temperature) == (1.0, 1e-4, 0.5, 1.0)
    given = SelectorConfig(predictor=str(weights), lamda=0.7, smoothness_loss_coeff=0.0, alpha=0.9).weights(
        32
    )
    assert (given.area, given.smoothness, given.exponent) == (0.7, 0.0, 0.9)
    predictor = parse_config(PredictorJobConfig, []).explainer
    assert predictor.temperature == 0.1
    assert predictor.geometry(32) == MASK_PRESETS["cifar"]
    assert predictor.geometry(224) == MASK_PRESETS["imagenet"]
    chosen = PredictorConfig(mask_travel=9.0, mask_widths=(3.0, 4.0), initial_width=5.0).geometry(32)
    assert (chosen.travel, chosen.least_width, chosen.most_width, chosen.initial_width) == (9, 3, 4, 5)
    # the main job keeps its own
    assert (TrainConfig().epochs, OptimConfig().optimizer) == (90, "sgd")
