"""Per-layer rates: the published cut of VGG-16, and what cannot be cut so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import MemoryLoader, build_trainer, toy_data
from torch import nn

from image_classification.config import ConfigError, told
from image_classification.models import create_model, read_safely
from pruning.engine.constraints import Constraints
from pruning.pruner import Pruner
from pruning.search.rates import RateSearch, parse_rates
from pruning.training.pruning_config import PruningConfig
from pruning.training.scored import PruningCallback

# VGG-16: the first and the last six convolutions, as in Park et al.; 3 in [47] is 34 and 37.
PUBLISHED = ["features.0", "features.2[47]", "features.3[047]", "features.40"]


def config(**settings: Any) -> PruningConfig:
    return PruningConfig(**{"one_shot_pruning": 0.3, "pruning_criterion": "magnitude", **settings})


def test_published_rates_of_vgg16_take_the_smallest_filters() -> None:
    torch.manual_seed(0)
    model = create_model("vgg16_bn_cifar_x8", num_classes=4)
    before = {
        name: module.weight.detach().abs().flatten(1).sum(1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    pruner = Pruner(
        model,
        torch.randn(2, 3, 32, 32),
        criterion="magnitude",
        budget=None,
        delta=1.0,
        search=config(prune_rate=PUBLISHED).search(),
    )
    record = pruner.step([])
    names = list(before)
    cut = {names[0], *names[-6:]}
    assert set(record.widths) == cut
    for name, (width, left) in record.widths.items():
        assert left == int(0.7 * width), name  # as published: 44 of 64, 358 of 512
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    kept = first.weight.detach().abs().flatten(1).sum(1)
    assert sorted(kept.tolist()) == sorted(before[names[0]].tolist())[-len(kept) :]
    assert pruner.done
    assert pruner.course.budget.shares["macs"] == pytest.approx(
        record.costs["macs"][1] / record.costs["macs"][2]
    )


def test_own_shares_rounding_and_the_last_match_holds() -> None:
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=4)
    settings = config(prune_rate=["layer?.*.conv1=0.25", "layer3.*.conv1"], round_to=8)
    pruner = Pruner(
        model,
        torch.randn(2, 3, 32, 32),
        criterion="magnitude",
        budget=None,
        delta=1.0,
        search=settings.search(),
        constraints=settings.constraints(),
    )
    widths = pruner.step([]).widths
    assert widths["layer2.0.conv1"] == [32, 24]
    assert widths["layer3.0.conv1"] == [64, 48]  # 44 is between 40 and 48
    assert "layer1.0.conv1" not in widths  # 12 is as near to 16 as to 8: the larger


def test_in_training_and_resumed(tmp_path: Path) -> None:
    images, targets = toy_data(16)

    def callback() -> PruningCallback:
        loader = MemoryLoader(images, targets, 8, False)
        return PruningCallback(
            config(prune_rate=["layer3.*=0.5"], calibration_batches=1), loader, image_size=8
        )

    first = callback()
    trainer = build_trainer(workspace=tmp_path, callbacks=(first,), epochs=1)
    trainer.fit()
    assert first.pruner is not None
    assert first.pruner.done
    payload = read_safely(tmp_path / "checkpoint.pth.tar")
    again = callback()
    resumed = build_trainer(
        workspace=tmp_path / "again", callbacks=(again,), epochs=2, model=trainer.state.model
    )
    resumed.restore(payload)
    resumed.fit()
    assert again.pruner is not None
    assert again.pruner.completed == 1
    assert again.pruner.costs.current("macs") == first.pruner.costs.current("macs")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"one_shot_pruning": None, "pruning_criterion": "discriminant"},
            "--prune-rate has no effect without",
        ),
        ({"pruning_search": "global"}, "--pruning-search global and --prune-rate exclude each other"),
        ({"prune_rate": ["layer1=1.5"]}, "--prune-rate layer1=1.5: write PATTERN"),
        ({"prune_rate": ["layer1=x"]}, "--prune-rate layer1=x: write PATTERN"),
        ({"prune_rate": ["a", "a=0.2"]}, "--prune-rate a: is given twice"),
    ],
)
def test_flags_that_cannot_apply(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**{"prune_rate": ["layer1.*"], **settings})
    assert message in told(caught.value)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (["layr1.*"], r"rates='layr1\.\*'"),
        (["layer1.0.conv1=0.95"], r"rates='0\.95': .* layer1\.0\.conv1"),
        (["layer1.0.conv1=0.01"], "layer1.0.conv1=0.01'"),  # 15 of 16 are rounded to 16
    ],
)
def test_rates_that_do_not_fit_the_network(rates: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pruner(
            create_model("resnet20", num_classes=4),
            torch.randn(2, 3, 32, 32),
            criterion="magnitude",
            budget=None,
            delta=1.0,
            search=RateSearch(parse_rates(rates, 0.3)),
            constraints=Constraints(round_to=8),
        )
