"""The saliency criterion inside training: flags, rewrites that the explanation follows, resumes, reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.explanations import ReadOut
from support.training import MemoryLoader, Recorder, build_trainer, toy_data
from torch import nn

from explainers.differentiable.remembered import OriginalExplanations
from image_classification.config import ConfigError
from image_classification.models import Structure, build_from_structure, create_model, read_safely
from image_classification.trainer import Trainer
from pruning.criteria import Combined, Saliency
from pruning.pruner import Pruner
from pruning.rewrites.pruner_settings import PrunerSettings
from pruning.training.pruning_config import PruningConfig
from pruning.training.scored import PruningCallback

SETTINGS: dict[str, Any] = {
    "iterative_pruning": True,
    "pruning_step": 3,
    "pruning_delta": 0.1,
    "budget": ["macs=0.7"],
    "calibration_batches": 2,
    "pruning_criterion": "saliency",
    "saliency_explanation": "gradcam",
}


@pytest.fixture
def read_out(monkeypatch: pytest.MonkeyPatch) -> ReadOut:
    """In place of a trained selector: an explanation that reads feature maps of all three stages."""
    explanation = ReadOut(("layer1", "layer2", "layer3"), (16, 32, 64))
    monkeypatch.setattr(
        "pruning.training.channel_pruning.build_originals",
        lambda *args, **kw: OriginalExplanations(explanation),
    )
    return explanation


def callback(**settings: Any) -> PruningCallback:
    images, targets = toy_data(16)
    config = PruningConfig(**{**SETTINGS, **settings})
    return PruningCallback(config, MemoryLoader(images, targets, 4, False), image_size=8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet20", num_classes=10)


def trained(workspace: Path, *callbacks: Any, model: nn.Module | None = None, **settings: Any) -> Trainer:
    trainer = build_trainer(
        workspace=workspace, callbacks=callbacks, model=model or network(), epochs=1, **settings
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("criterion", ["saliency", "discriminant+saliency", "magnitude"])
def test_the_explanation_follows_every_rewrite(tmp_path: Path, read_out: ReadOut, criterion: str) -> None:
    pruning = callback(pruning_criterion=criterion)
    trained(tmp_path, pruning)
    pruner = pruning.pruner
    assert pruner is not None
    assert len(pruner.history) == 3
    assert pruner.originals is not None
    for record in pruner.history:
        before, after = record.explanation
        assert before >= 0
        assert after > 0
        assert "explanation moved by" in record.describe()
    modules = dict(pruner.model.named_modules())
    for tap, kept in pruner.originals.kept.items():
        widths = {m.out_channels for name, m in modules.items() if name.startswith(f"{tap}.2.conv2")}
        assert widths == {len(kept)}


def test_killed_and_resumed_ends_alike(tmp_path: Path, read_out: ReadOut) -> None:
    settings = {"pruning_criterion": "discriminant+saliency", "pruning_search": "global"}
    whole = callback(**settings)
    first = trained(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        trained(
            tmp_path / "cut", callback(**settings), Recorder(stop_at=8), checkpoint={"checkpoint_interval": 1}
        )
    payload = read_safely(tmp_path / "cut" / "checkpoint.pth.tar")
    assert payload["iteration"] == 7
    model = build_from_structure(Structure.from_plain(payload["structure"]))
    again = callback(**settings)
    trainer = build_trainer(workspace=tmp_path / "cut", callbacks=(again,), model=model, epochs=1)
    trainer.restore(payload)
    trainer.fit()
    for name, value in first.state.model.state_dict().items():
        assert torch.equal(value, trainer.state.model.state_dict()[name]), name
    assert whole.pruner is not None
    assert again.pruner is not None
    assert again.pruner.history[0].explanation == whole.pruner.history[0].explanation
    assert again.pruner.history[-1].scores == whole.pruner.history[-1].scores
    assert whole.pruner.originals is not None
    assert again.pruner.originals is not None
    assert set(whole.pruner.originals.kept) == set(again.pruner.originals.kept)


def test_following_an_explanation_changes_nothing_else(tmp_path: Path, read_out: ReadOut) -> None:
    """With another criterion it is a report: the same network comes out, bit for bit."""
    followed = trained(tmp_path / "a", callback(pruning_criterion="magnitude"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pruning.training.channel_pruning.build_originals", lambda *args, **kw: None)
        plain = trained(tmp_path / "b", callback(pruning_criterion="magnitude"))
    for name, value in plain.state.model.state_dict().items():
        assert torch.equal(value, followed.state.model.state_dict()[name]), name


def test_resuming_with_an_explanation_that_the_run_did_not_have(tmp_path: Path) -> None:
    trained(tmp_path, callback(pruning_criterion="magnitude", saliency_explanation=None))
    payload = read_safely(tmp_path / "checkpoint.pth.tar")
    again = callback(pruning_criterion="magnitude")
    model = build_from_structure(Structure.from_plain(payload["structure"]))
    trainer = build_trainer(workspace=tmp_path, callbacks=(again,), model=model, epochs=2)
    trainer.restore(payload)
    with pytest.raises(ConfigError, match="explanation"):
        trainer.fit()


def attached(tmp_path: Path, **settings: Any) -> Pruner:
    pruning = callback(**settings)
    pruning.on_fit_start(build_trainer(workspace=tmp_path, callbacks=(pruning,), model=network(), epochs=1))
    assert pruning.pruner is not None
    return pruning.pruner


def test_flags_reach_the_criterion(tmp_path: Path) -> None:
    plain = attached(tmp_path).criterion
    assert isinstance(plain, Saliency)
    assert (plain.max_passes, plain.target) == (4, "original")
    assert type(plain.originals.present).__name__ == "GradCamExplanation"
    other = attached(tmp_path, saliency_passes=2, saliency_target="present").criterion
    assert isinstance(other, Saliency)
    assert (other.max_passes, other.target) == (2, "present")
    both = attached(tmp_path, pruning_criterion="taylor+saliency", saliency_weight=0.2).criterion
    assert isinstance(both, Combined)
    assert (both.first.name, both.second.name, both.weight) == ("taylor", "saliency", 0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"saliency_explanation": None}, "--selector"),
        ({"saliency_explanation": "selector"}, "--selector"),
        ({"selector": "g.pth.tar"}, "--selector .* --saliency-explanation gradcam"),
        ({"saliency_weight": 0.4}, "--saliency-weight"),
        ({"pruning_criterion": "magnitude", "saliency_weight": 0.4}, "--saliency-weight"),
        ({"pruning_criterion": "discriminant+saliency", "saliency_weight": 1.4}, "--saliency-weight 1.4"),
        ({"pruning_criterion": "magnitude", "saliency_passes": 3}, "--saliency-passes"),
        ({"pruning_criterion": "magnitude", "saliency_target": "present"}, "--saliency-target"),
        ({"saliency_passes": 0}, "--saliency-passes 0"),
        ({"gate_lr": 0.1}, "--gate-lr .* --pruning-method learned"),
        ({"gates": "hyper"}, "--gates .* --pruning-method learned"),
    ],
)
def test_unusable_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**{**SETTINGS, **settings})


def test_a_pruner_of_ones_own_loop_remembers_at_its_first_step() -> None:
    images, targets = toy_data(8)
    originals = OriginalExplanations(ReadOut(("layer1", "layer3"), (16, 64)))
    pruner = Pruner(
        network(),
        images[:2],
        criterion=Saliency(originals),
        budget=0.6,
        search="global",
        delta=0.2,
        settings=PrunerSettings(originals=originals),
    )
    assert len(pruner.dry_run([(images, targets)])) == 2
    first = pruner.step([(images, targets)])
    assert first.explanation[0] == pytest.approx(0, abs=1e-10)
    second = pruner.step([(images, targets)])
    assert second.explanation[0] == pytest.approx(first.explanation[1], rel=1e-4)
