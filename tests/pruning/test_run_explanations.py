"""The explanation of a run: from its file, through gates and rewrites, and refused where it belongs elsewhere."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import MemoryLoader, Recorder, build_trainer, toy_data
from torch import nn

from explainers.aem.masks import MASK_PRESETS
from explainers.aem.saved_selector import save_selector
from explainers.aem.selector import Selector, design_selector
from explainers.casm.model import Casm, save_casm
from explainers.differentiable.gated_features import gated_features
from explainers.differentiable.gradcam_explanation import GradCamExplanation
from explainers.differentiable.remembered import OriginalExplanations
from image_classification.cli import parse_config
from image_classification.config import ConfigError
from image_classification.distributed import Distributed
from image_classification.models import create_model
from main import MainConfig, run
from pruning.training.explanations import build_originals
from pruning.training.learned.learned_pruning import LearnedPruning
from pruning.training.pruning_config import PruningConfig
from pruning.training.scored import PruningCallback

SIZE = 16


def network(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(options.pop("arch", "resnet20"), num_classes=10, **options).eval()


def selector_file(path: Path, model: nn.Module, num_classes: int = 10, image_size: int = SIZE) -> str:
    design = design_selector(
        model,
        torch.randn(2, 3, image_size, image_size),
        kind="rbf",
        geometry=MASK_PRESETS["cifar"].scaled(image_size),
        num_classes=num_classes,
        decoder="light",
    )
    save_selector(path, Selector(design), model)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A selector and a CASM of `network()`."""
    casm = Casm.for_classifier(network(), SIZE, 8)
    save_casm(tmp_path / "casm.pth.tar", casm)
    selector = selector_file(tmp_path / "selector.pth.tar", network())
    return {"selector": selector, "casm": str(tmp_path / "casm.pth.tar")}


@pytest.mark.parametrize("kind", ["selector", "casm"])
def test_building_it_leaves_the_random_state_alone(files: dict[str, str], kind: str) -> None:
    """A resumed run builds it again, after the random state of training was restored."""
    config = PruningConfig(
        **{kind: files[kind]}, one_shot_pruning=0.3, pruning_criterion="discriminant+saliency"
    )
    model = network()
    before = torch.get_rng_state()
    assert build_originals(config, model, image_size=SIZE, num_classes=10, fresh=True) is not None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["selector", "casm"])
@pytest.mark.parametrize(
    "settings",
    [
        {"pruning_method": "learned", "gate_epochs": 2, "gate_groups": "all", "gate_lr": 0.5},
        {"one_shot_pruning": 0.3, "pruning_criterion": "discriminant+saliency"},
        {"one_shot_pruning": 0.3, "pruning_criterion": "magnitude"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_runs_follow_it_to_the_end(
    tmp_path: Path,
    files: dict[str, str],
    kind: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, targets = toy_data(8)
    images = nn.functional.interpolate(images, size=SIZE)
    config = PruningConfig(**{kind: files[kind]}, **settings)
    make = LearnedPruning if config.learned else PruningCallback
    callback = make(config, MemoryLoader(images, targets, 4, False), SIZE)
    trainer = build_trainer(
        workspace=tmp_path / "run", callbacks=(callback,), model=network(), data=(images, targets), epochs=1
    )
    said: list[str] = []
    monkeypatch.setattr(trainer.logger, "message", said.append)
    trainer.fit()
    originals = callback.originals if isinstance(callback, LearnedPruning) else callback.pruner.originals
    assert originals is not None
    assert originals.kept, "channels that it reads have gone"
    assert "explanation of the final network: moved by" in said[-2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"seed": 1}}, "selector=.*weights of resnet20"),
        ({"model": {"arch": "resnet32"}}, "resnet20.* resnet32"),
        ({"num_classes": 7}, "10 classes"),
        ({"image_size": 32}, "`image_size` 16"),
    ],
)
def test_a_selector_of_something_else_is_refused(
    files: dict[str, str], change: dict[str, Any], message: str
) -> None:
    config = PruningConfig(pruning_method="learned", selector=files["selector"])
    given = {"image_size": SIZE, "num_classes": 10} | {k: v for k, v in change.items() if k != "model"}
    with pytest.raises(ConfigError, match=message):
        build_originals(config, network(**change.get("model", {})), fresh=True, **given)


def test_a_casm_of_something_else_is_refused(files: dict[str, str]) -> None:
    config = PruningConfig(pruning_method="learned", casm=files["casm"])
    with pytest.raises(ConfigError, match=r"--casm .*--pretrained-weights"):
        build_originals(config, network(1), image_size=SIZE, num_classes=10, fresh=True)
    with pytest.raises(ConfigError, match=r"--casm .*--image-size 16"):
        build_originals(config, network(), image_size=24, num_classes=10, fresh=True)
    resumed = build_originals(config, network(1), image_size=SIZE, num_classes=10, fresh=False)
    assert resumed is not None, "a run that goes on has other weights by now"


@pytest.mark.parametrize("kind", ["selector", "casm", "gradcam"])
def test_another_explanation_on_resume_is_refused(tmp_path: Path, files: dict[str, str], kind: str) -> None:
    """A file may move; what it holds must stay."""

    def built(**settings: Any) -> OriginalExplanations:
        config = PruningConfig(pruning_method="learned", **settings)
        originals = build_originals(config, network(), image_size=SIZE, num_classes=10, fresh=False)
        assert originals is not None
        return originals

    moved = tmp_path / "moved.pth.tar"
    if kind == "gradcam":
        first, same, other = (
            built(saliency_explanation=kind),
            built(saliency_explanation=kind),
            built(casm=files["casm"]),
        )
    else:
        shutil.copy(files[kind], moved)
        another = selector_file(tmp_path / "other.pth.tar", network(1))
        if kind == "casm":
            model = network()
            torch.manual_seed(5)  # of the decoder
            save_casm(Path(another), Casm.for_classifier(model, SIZE, 8))
        first, same, other = (
            built(**{kind: files[kind]}),
            built(**{kind: str(moved)}),
            built(**{kind: another}),
        )
    state = first.state_dict()
    same.load_state_dict(state)
    assert first.source is not None
    assert other.source is not None
    with pytest.raises(ConfigError) as caught:
        other.load_state_dict(state)
    for source in (first.source, other.source):
        assert source.name in str(caught.value)
        assert source.digest[:12] in str(caught.value)
    del state["source"]  # as a checkpoint of an older version
    other.load_state_dict(state)


def test_nothing_is_trained_before_it_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    images, targets = toy_data(8)
    recorder = Recorder()
    config = PruningConfig(iterative_pruning=True, pruning_criterion="saliency", selector=files["selector"])
    callback = PruningCallback(config, MemoryLoader(images, targets, 4, False), image_size=8)
    with pytest.raises(ConfigError, match="`image_size` 16"):
        build_trainer(workspace=tmp_path, callbacks=(callback, recorder), model=network(), epochs=1).fit()
    assert not recorder.losses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"saliency_explanation": "casm"}, "--casm"),
        ({"casm": "x", "saliency_explanation": "gradcam"}, "--casm"),
        ({"casm": "x", "selector": __file__}, "--casm .*--saliency-explanation selector"),
    ],
)
def test_files_that_do_not_fit_the_choice(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruningConfig(pruning_method="learned", **settings)


@pytest.mark.parametrize("kind", ["selector", "casm"])
def test_a_missing_file_is_reported_before_data_are_opened(kind: str, tmp_path: Path) -> None:
    words = ["/no/data", f"--{kind}", str(tmp_path / "none.pth.tar"), "--pruning-method", "learned"]
    configs = parse_config(MainConfig, [*words, "--workspace", str(tmp_path)])
    with pytest.raises(ConfigError, match=f"--{kind} .*none.pth.tar"):
        run(configs, Distributed())


def test_evaluation_does_not_leave_pruning_out_silently(tmp_path: Path) -> None:
    words = ["/no/data", "--one-shot-pruning", "0.3", "--evaluate", "--workspace", str(tmp_path)]
    with pytest.raises(ConfigError, match="--evaluate"):
        run(parse_config(MainConfig, words), Distributed())


class TestGradCamExplanation:
    def test_maps_have_length_one_and_are_differentiable(self) -> None:
        model, images = network(), torch.randn(4, 3, SIZE, SIZE)
        explanation = GradCamExplanation.of(model.train(), images)
        assert model.training
        model.eval()
        classes = model(images).argmax(1)
        with torch.no_grad():
            plain = explanation(model, images, classes)
        lengths = torch.linalg.vector_norm(plain, dim=1)
        assert torch.all((lengths - 1).abs().lt(1e-5) | lengths.eq(0))
        phi = explanation(model, images, classes)
        torch.testing.assert_close(phi, plain)
        (gradient,) = torch.autograd.grad(phi[:, 0].sum(), model.get_parameter("layer1.0.conv1.weight"))
        assert gradient.abs().sum() > 0
        assert explanation.taps == ()
        assert explanation.rewritten({}) is explanation

    def test_no_evidence_is_all_zero(self) -> None:
        model, images = network(), torch.randn(2, 3, SIZE, SIZE)
        with torch.no_grad():
            model.fc.weight.zero_()
        phi = GradCamExplanation("layer3")(model, images, torch.zeros(2, dtype=torch.long))
        assert torch.equal(phi, torch.zeros_like(phi))


def test_gates_reach_what_explanations_read_and_end_with_the_block(files: dict[str, str]) -> None:
    model, images = network(), torch.randn(2, 3, SIZE, SIZE)
    config = PruningConfig(pruning_method="learned", selector=files["selector"])
    originals = build_originals(config, model, image_size=SIZE, num_classes=10, fresh=True)
    assert originals is not None
    classes, seen = torch.zeros(2, dtype=torch.long), []

    def close(tap: str, feature: torch.Tensor) -> torch.Tensor:
        seen.append(tap)
        return feature * 0

    with torch.no_grad():
        plain = originals.present(model, images, classes)
        with gated_features(close):
            closed = originals.present(model, images, classes)
        again = originals.present(model, images, classes)
    assert tuple(seen) == originals.present.taps
    assert torch.equal(plain, again)
    assert not torch.equal(plain, closed)
    assert dataclasses.is_dataclass(originals.present)
