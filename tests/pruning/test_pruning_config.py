"""Flags of pruning: each has an effect, and one that cannot apply is refused."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import MemoryLoader, build_trainer, toy_data
from torch import nn

from image_classification.config import ConfigError, flag_fields, told
from image_classification.models import create_model
from pruning.criteria.by_name import CriterionSettings, make_criterion
from pruning.engine.channel_graph import ChannelGraph
from pruning.pruner import Pruner
from pruning.repair.local_repair import LocalRepair
from pruning.search import GlobalSearch, GreedySearch, UniformSearch
from pruning.search.loss_change import Batches, LossChange
from pruning.training.pruning_config import PruningConfig
from pruning.training.scored import PruningCallback

ITERATIVE: dict[str, Any] = {"iterative_pruning": True}


def other_than_default(field: str) -> Any:
    """A value of a flag's type that its default is not."""
    default, kind = getattr(PruningConfig(), field), typing.get_type_hints(PruningConfig)[field]
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != default)
    if default is None:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
        return {int: 3, float: 0.3, str: "uniform"}.get(kind, "uniform")
    known = {"discriminant": "magnitude", "simple": "hyper", "inner": "all"}
    return (
        known[default]
        if isinstance(default, str)
        else {bool: not default, int: 3, float: 0.3, list: ["x=0.5"]}[type(default)]
    )


@pytest.mark.parametrize("field", [field.name for field, _ in flag_fields(PruningConfig)])
def test_every_flag_without_pruning_is_refused(field: str) -> None:
    if field in ("iterative_pruning", "one_shot_pruning", "pruning_method"):
        return
    with pytest.raises(ConfigError) as caught:
        PruningConfig(**{field: other_than_default(field)})
    assert field.replace("_", "-") in told(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterative_pruning": True, "one_shot_pruning": 0.5}, "--one-shot-pruning"),
        ({"one_shot_pruning": 1.5}, "--one-shot-pruning 1.5"),
        ({"one_shot_pruning": 0.5, "budget": ["macs=0.3"]}, "leave --budget out"),
        ({**ITERATIVE, "pruning_step": 0}, "--pruning-step"),
        ({**ITERATIVE, "pruning_start": -1}, "--pruning-start"),
        ({**ITERATIVE, "pruning_warmup": 100}, "--pruning-warmup 100"),
        ({**ITERATIVE, "pruning_shortlist": -1}, "--pruning-shortlist"),
        ({**ITERATIVE, "pruning_instalments": 0}, "--pruning-instalments"),
        ({**ITERATIVE, "calibration_batches": 0}, "--calibration-batches"),
        ({**ITERATIVE, "judge_batches": 0}, "--judge-batches"),
        ({**ITERATIVE, "di_ridge": 0.0}, "--di-ridge"),
        ({**ITERATIVE, "round_to": 0}, "--round-to"),
        ({**ITERATIVE, "min_width": 0.0}, "--min-width"),
        ({**ITERATIVE, "prune_limit": ["layer1"]}, "--prune-limit layer1: write PATTERN=LEAST"),
        ({**ITERATIVE, "pruning_search": "gready"}, "--pruning-search gready: choose from"),
        ({**ITERATIVE, "budget": ["macs=2"]}, "--budget macs=2"),
        ({**ITERATIVE, "budget": ["foo=0.5"]}, "--budget foo: unknown cost"),
        ({**ITERATIVE, "pruning_delta": 0.0}, "--pruning-delta 0"),
        ({**ITERATIVE, "pruning_delta": -1.0}, "--pruning-delta -1"),
        ({**ITERATIVE, "min_width": float("nan")}, "--min-width nan"),
        ({**ITERATIVE, "min_width": float("inf")}, "--min-width inf"),
    ],
)
def test_unusable_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PruningConfig(**settings)
    assert message in told(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"one_shot_pruning": 0.5, "pruning_step": 20}, "--pruning-step .* --iterative-pruning"),
        ({"one_shot_pruning": 0.5, "pruning_delta": 0.1}, "--pruning-delta .* --iterative-pruning"),
        ({"one_shot_pruning": 0.5, "pruning_shortlist": 1}, "--pruning-shortlist .* --pruning-search greedy"),
        ({**ITERATIVE, "score_normalisation": "sum"}, "--score-normalisation .* --pruning-search global"),
        (
            {"one_shot_pruning": 0.5, "prune_rate": ["a"], "score_normalisation": "sum"},
            "--score-normalisation",
        ),
        ({**ITERATIVE, "pruning_criterion": "taylor", "di_ridge": 0.2}, "--di-ridge"),
        ({**ITERATIVE, "pruning_criterion": "magnitude", "score_features": "pre"}, "--score-features"),
        ({**ITERATIVE, "pruning_criterion": "tailor"}, r"criterion='tailor'.* taylor\?"),
    ],
)  # fmt: skip
def test_flags_of_another_way_to_prune_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**settings)


def test_pruning_is_not_left_out_silently_by_evaluation() -> None:
    PruningConfig().check_evaluation(True)
    PruningConfig(**ITERATIVE).check_evaluation(False)
    with pytest.raises(ConfigError, match="--evaluate"):
        PruningConfig(**ITERATIVE).check_evaluation(True)


def test_defaults_that_depend() -> None:
    assert PruningConfig(**ITERATIVE).budget_words() == ["macs=0.5"]
    assert PruningConfig(**ITERATIVE).search_name() == "greedy"
    assert PruningConfig(one_shot_pruning=0.3).budget_words() == ["macs=0.7"]
    assert PruningConfig(one_shot_pruning=0.3).search_name() == "sensitivity"
    assert PruningConfig(**ITERATIVE, pruning_search="uniform").search_name() == "uniform"


def test_criterion_settings_reach_it() -> None:
    settings = CriterionSettings(features="pre", ridge=0.5, precision="float32")
    criterion = make_criterion("discriminant", settings)
    assert (criterion.features, criterion.ridge, criterion.precision) == ("pre", 0.5, "float32")
    make_criterion("magnitude", settings)  # has none of these
    with pytest.raises(ConfigError, match=r"criterion='tailor'.* taylor\?"):
        make_criterion("tailor")


def attached(tmp_path: Path, **settings: Any) -> Pruner:
    """The pruner that the callback builds from flags."""
    images, targets = toy_data(16)
    config = PruningConfig(**{**ITERATIVE, "budget": ["macs=0.7"], "pruning_step": 3, **settings})
    callback = PruningCallback(config, MemoryLoader(images, targets, 4, False), image_size=8)
    trainer = build_trainer(
        workspace=tmp_path, callbacks=(callback,), epochs=15
    )  # long enough for all rewrites
    callback.on_fit_start(trainer)
    return callback.pruner


def test_every_flag_reaches_the_pruner(tmp_path: Path) -> None:
    plain = attached(tmp_path)
    assert isinstance(plain.search, GreedySearch)
    assert plain.search.shortlist == 4
    other = attached(
        tmp_path, pruning_delta=0.1, pruning_start=2, pruning_shortlist=7, pruning_instalments=2, calibration_batches=3,
        judge_batches=1,
        round_to=4, min_width=0.5, prune_ignore=["layer1.0.conv1"], prune_limit=["layer2.*=0.75"], budget=["macs=0.8"],
        pruning_criterion="taylor",
    )  # fmt: skip
    assert other.num_rewrites == 2
    assert not other.due(4)
    assert other.due(5)
    assert (other.search.shortlist, other.search.instalments) == (7, 2)
    assert (other.settings.max_batches, other.settings.judge_batches) == (3, 1)
    assert other.criterion.name == "taylor"
    graph = other.graph
    assert "layer1.0.conv1" in graph.frozen
    assert graph.allowed_widths("layer2.1.conv1") == [24, 28, 32]
    assert graph.allowed_widths("layer3.1.conv1")[0] == 32
    assert isinstance(attached(tmp_path, pruning_search="uniform").search, UniformSearch)
    ranked = attached(tmp_path, pruning_search="global", score_normalisation="sum").search
    assert isinstance(ranked, GlobalSearch)
    assert ranked.normalisation == "sum"
    assert attached(tmp_path, score_features="pre", di_ridge=0.2).criterion.ridge == 0.2


def test_judging_by_fewer_batches_reads_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []

    class Counting(LossChange):
        def __init__(self, model: nn.Module, graph: ChannelGraph, batches: Batches, **settings: Any) -> None:
            judged.append(sum(len(images) for images, _ in batches))
            super().__init__(model, graph, batches, **settings)

    monkeypatch.setattr("pruning.search.choosing.LossChange", Counting)
    for judge_batches in (1, 2):
        judged.clear()
        pruner = attached(tmp_path, judge_batches=judge_batches)
        pruner.step([(torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,)))] * 8)
        assert set(judged) == {4 * judge_batches}


def test_images_that_judge_a_repaired_cut_are_not_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fitted to few images suits them, and would make every cut of a wide layer look harmless."""
    fitted: list[torch.Tensor] = []
    judged: list[torch.Tensor] = []

    class Fitting(LocalRepair):
        def __init__(self, model: nn.Module, graph: ChannelGraph, batches: Batches, **settings: Any) -> None:
            fitted.extend(image for images, _ in batches for image in images)
            super().__init__(model, graph, batches, **settings)

    class Judging(LossChange):
        def __init__(self, model: nn.Module, graph: ChannelGraph, batches: Batches, **settings: Any) -> None:
            judged.extend(image for images, _ in batches for image in images)
            super().__init__(model, graph, batches, **settings)

    monkeypatch.setattr("pruning.search.choosing.LossChange", Judging)
    monkeypatch.setattr("pruning.search.choosing.LocalRepair", Fitting)
    pruner = attached(tmp_path)
    pruner.step([(torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))) for _ in range(3)])
    assert len(fitted) == 18
    assert len(judged) == 2 * 6, "before and after the cut"
    assert not any(torch.equal(one, other) for one in fitted for other in judged)


def test_dry_run_changes_nothing_and_ends_at_the_budget(tmp_path: Path) -> None:
    pruner = attached(tmp_path, pruning_delta=0.1)
    images, targets = toy_data(16)
    before = {name: value.clone() for name, value in pruner.model.state_dict().items()}
    rows = pruner.dry_run([(images[:8], targets[:8]), (images[8:], targets[8:])])
    assert [row["rewrite"] for row in rows] == [1, 2, 3]
    assert [row["iteration"] for row in rows] == [3, 6, 9]
    assert rows[-1]["costs"]["macs"] <= 0.7 * (1 + 1e-6)
    assert rows[0]["costs"]["macs"] > rows[-1]["costs"]["macs"]
    assert all(torch.equal(before[name], value) for name, value in pruner.model.state_dict().items())
    assert pruner.completed == 0


def test_explain_says_what_is_coupled_and_why_frozen(tmp_path: Path) -> None:
    pruner = attached(tmp_path)
    text = pruner.explain("layer1.1.conv2")
    assert "coupled modules" in text
    assert "conv1" in text
    assert "cannot be pruned" in pruner.explain("fc")
    with pytest.raises(ValueError, match=r"'layer9'.*python -m pruning groups"):
        pruner.explain("layer9")


def test_the_record_is_plain_data(tmp_path: Path) -> None:
    import json

    pruner = attached(tmp_path)
    images, targets = toy_data(16)
    record = pruner.step([(images, targets)], iteration=3)
    assert json.loads(json.dumps(dataclasses.asdict(record)))["rewrite"] == 1
    assert "rewrite 1" in record.describe()


def test_the_state_goes_through_a_file_and_refuses_another_network(tmp_path: Path) -> None:
    pruner = attached(tmp_path)
    images, targets = toy_data(16)
    pruner.step([(images, targets)], iteration=3)
    torch.save(pruner.state_dict(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    again = Pruner(pruner.model, images[:2], budget={"macs": 0.7}, step=3, state=state)
    assert again.completed == 1
    assert again.history == pruner.history
    assert again.graph.signature() == pruner.graph.signature()
    assert again.costs.baseline("macs") == pruner.costs.baseline("macs")
    with pytest.raises(ValueError, match=r"conv1\.weight'"):
        Pruner(create_model("resnet20", num_classes=10), images[:2], budget={"macs": 0.7}, state=state)


def test_rewrites_are_counted_by_epochs_as_published() -> None:
    assert PruningConfig(iterative_pruning=True, pruning_step=50).interval(1251) == 50
    assert PruningConfig(iterative_pruning=True, rewrites_per_epoch=2).interval(1251) == 625
    assert PruningConfig(iterative_pruning=True, rewrites_per_epoch=9).interval(4) == 1
    with pytest.raises(ConfigError, match="--rewrites-per-epoch"):
        PruningConfig(iterative_pruning=True, pruning_step=60, rewrites_per_epoch=2)
    with pytest.raises(ConfigError, match="--rewrites-per-epoch"):
        PruningConfig(rewrites_per_epoch=2)
