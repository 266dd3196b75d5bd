"""Exported files compute what the network computes, for any number of pictures, and load as documented."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from image_classification.config import ConfigError
from image_classification.models import create_model
from pruning import Constraints, prune
from pruning import export as module
from pruning.__main__ import main
from pruning.export import TOLERANCE, ExportError, export_network
from pruning.rehearsal import condition
from pruning.structure import save_pruned

#: One of each family: residual, VGG, inverted residual, concatenation, depthwise with LayerNorm.
FAMILIES = (
    "resnet20",
    "vgg16_bn_x8",
    "torchvision/mobilenet_v2",
    "torchvision/squeezenet1_1",
    "timm/convnext_atto",
)


def pruned(arch: str, size: int = 32) -> tuple[nn.Module, torch.Tensor]:
    """A network at half its MACs with telling statistics, and pictures."""
    torch.manual_seed(0)
    images = torch.randn(5, 3, size, size)
    model = create_model(arch, num_classes=7)
    condition(model, (images,))
    prune(model, images[:2], budget=0.5)
    return model.eval(), images


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, torch.Tensor]:
    return pruned("resnet20")


@pytest.mark.slow
@pytest.mark.parametrize("arch", FAMILIES)
def test_onnx_gives_the_same_logits(arch: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, images = pruned(arch, 64)
    path = tmp_path / "network.onnx"
    exported = export_network(model, path, "onnx", images)
    assert exported.difference <= TOLERANCE
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for batch in (images, images[:1], images[:4]):
            (logits,) = session.run(["logits"], {"images": batch.numpy()})
            expected = model(batch)
            assert expected.std() > 1e-3, "a network that says the same of everything proves nothing"
            torch.testing.assert_close(torch.from_numpy(logits), expected, atol=TOLERANCE, rtol=0)
    assert not list(tmp_path.glob("*.data")), "the weights belong into the one file"


@pytest.mark.parametrize("format", ["torch-export", "state-dict"])
def test_the_printed_loader_loads(format: str, small: tuple[nn.Module, torch.Tensor], tmp_path: Path) -> None:
    model, images = small
    suffix = {"torch-export": ".pt2", "state-dict": ".pt"}[format]
    exported = export_network(model, tmp_path / f"network{suffix}", format, images)
    names: dict[str, Any] = {"images": images}
    exec(compile(exported.loader, "loader", "exec"), names)
    loaded = names["model"] if format == "torch-export" else names["model"].eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images[:3]), model(images[:3]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ["resnet18", "torchvision/mobilenet_v2"])
def test_a_state_dict_needs_only_torchvision_where_it_has_the_network(arch: str, tmp_path: Path) -> None:
    model, images = pruned(arch)
    exported = export_network(model, tmp_path / "network.pt", "state-dict", images)
    assert "image_classification" not in exported.loader
    assert len([line for line in exported.loader.splitlines() if not line.startswith("    ")]) == 5
    assert exported.difference <= TOLERANCE


def test_the_network_is_not_touched(small: tuple[nn.Module, torch.Tensor], tmp_path: Path) -> None:
    model, images = small
    model.train()
    before = copy.deepcopy(model.state_dict())
    export_network(model, tmp_path / "network.pt", "state-dict", images)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.eval()


def test_a_file_that_computes_something_else_is_refused(
    small: tuple[nn.Module, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = small
    monkeypatch.setattr(module, "_largest_difference", lambda *_: 0.5)
    with pytest.raises(ExportError, match="differ from the network's by"):
        export_network(model, tmp_path / "network.pt", "state-dict", images)
    assert not (tmp_path / "network.pt").exists()


def test_errors(
    small: tuple[nn.Module, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = small
    with pytest.raises(ConfigError, match="--format tflite"):
        export_network(model, tmp_path / "x", "tflite", images)
    with pytest.raises(ConfigError, match=r"\.pt2"):
        export_network(model, tmp_path / "x.pth", "torch-export", images)
    with pytest.raises(ConfigError, match="too few"):
        export_network(model, tmp_path / "x.pt", "state-dict", images[:2])
    plain = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return plain(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"pip install 'lucidprune\[export\]'"):
        export_network(model, tmp_path / "x.onnx", "onnx", images)


def test_a_saved_network_exports_the_same(small: tuple[nn.Module, torch.Tensor], tmp_path: Path) -> None:
    model, _ = small
    save_pruned(tmp_path / "network.pth.tar", model)
    words = ["export", str(tmp_path / "network.pth.tar"), "--format", "torch-export", "--num-pictures", "4"]
    assert main(words) == 0
    assert (tmp_path / "network.pt2").is_file()


@pytest.mark.parametrize("round_to", [1, 8])
def test_widths_that_onnxruntime_is_slow_with_are_named(
    round_to: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=7)
    prune(model, torch.randn(2, 3, 32, 32), budget=0.5, constraints=Constraints(round_to=round_to))
    save_pruned(tmp_path / "network.pth.tar", model)
    assert main(["export", str(tmp_path / "network.pth.tar"), "--num-pictures", "4"]) == 0
    noted = "no multiple of 8" in capsys.readouterr().out
    assert noted == (round_to == 1)


def test_logits_that_are_no_numbers_agree_with_nothing(
    small: tuple[nn.Module, torch.Tensor], tmp_path: Path
) -> None:
    model, images = copy.deepcopy(small[0]), small[1]
    with torch.no_grad():
        model.get_parameter("fc.bias")[0] = torch.nan
    with pytest.raises(ExportError, match="differ from the network's by nan"):
        export_network(model, tmp_path / "network.pt", "state-dict", images)
    assert not (tmp_path / "network.pt").exists()


def test_a_file_with_other_logits_is_removed(
    small: tuple[nn.Module, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(network: nn.Module, path: Path, images: torch.Tensor) -> Any:
        path.touch()
        return (lambda batch: torch.zeros(len(batch), 2)), ""

    monkeypatch.setattr(module, "_write_state_dict", write)
    with pytest.raises(ExportError, match=r"logits of shape \(5, 2\)"):
        export_network(small[0], tmp_path / "network.pt", "state-dict", small[1])
    assert not (tmp_path / "network.pt").exists()
