"""Exported files compute what the network computes, for any number of images, and load as documented."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from image_classification.config import ConfigError, SettingError
from image_classification.models import class_names_of, create_model, model_for_weights, remember_class_names
from image_classification.models.factory import remember_input
from image_classification.network_input import NetworkInput
from pruning import Constraints, prune
from pruning.__main__ import main
from pruning.engine.proof.rehearsal import condition
from pruning.files import exporting as module
from pruning.files.exporting import (
    TOLERANCE,
    ExportError,
    ExportSettings,
    export_network,
    openvino_difference,
)
from pruning.files.saved_network import load_pruned, save_pruned

#: One of each family: residual, VGG, inverted residual, concatenation, depthwise with LayerNorm.
FAMILIES = (
    "resnet20",
    "vgg16_bn_x8",
    "torchvision/mobilenet_v2",
    "torchvision/squeezenet1_1",
    "timm/convnext_atto",
)


def pruned(arch: str, size: int = 32) -> tuple[nn.Module, torch.Tensor]:
    """A network at half its MACs with telling statistics, and images."""
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
    small: tuple[nn.Module, torch.Tensor], tmp_path: Path
) -> None:
    model, images = small
    with pytest.raises(ExportError, match="state-dict"):
        export_network(model, tmp_path / "network.pt", "state-dict", images, ExportSettings(tolerance=-1.0))
    assert not (tmp_path / "network.pt").exists()


def test_errors(
    small: tuple[nn.Module, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = small
    with pytest.raises(ConfigError, match="format='tflite'"):
        export_network(model, tmp_path / "x", "tflite", images)
    with pytest.raises(ConfigError, match=r"\.pt2"):
        export_network(model, tmp_path / "x.pth", "torch-export", images)
    with pytest.raises(ConfigError, match=r"\b2 images\b.*\b3\b"):
        export_network(model, tmp_path / "x.pt", "state-dict", images[:2])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'lucidprune\[export\]'"):
        export_network(model, tmp_path / "x.onnx", "onnx", images)


def test_a_saved_network_exports_the_same(small: tuple[nn.Module, torch.Tensor], tmp_path: Path) -> None:
    model, _ = small
    save_pruned(tmp_path / "network.pth.tar", model)
    words = ["export", str(tmp_path / "network.pth.tar"), "--format", "torch-export", "--num-images", "4"]
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
    assert main(["export", str(tmp_path / "network.pth.tar"), "--num-images", "4"]) == 0
    noted = "not a multiple of 8" in capsys.readouterr().out
    assert noted == (round_to == 1)


@pytest.mark.slow
def test_int8_beside_float(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The INT8 file says what the float file says, of both networks, and its figures are those that were measured."""
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    images = torch.randn(16, 3, 48, 48)
    original = create_model("resnet20", num_classes=12)
    condition(original, (images,))
    smaller = copy.deepcopy(original)
    prune(smaller, images[:2], budget=0.5)
    for name, model in (("original", original), ("pruned", smaller)):
        save_pruned(tmp_path / f"{name}.pth.tar", model)
    command = [
        *("export", str(tmp_path / "pruned.pth.tar"), "--data", "shapes:train=64,val=24,seed=3", "--int8"),
        *(
            "--calibration-images",
            "32",
            "--num-images",
            "4",
            "--original",
            str(tmp_path / "original.pth.tar"),
        ),
    ]
    assert main(command) == 0
    assert "pruned.int8.onnx" in capsys.readouterr().out
    report = json.loads((tmp_path / "pruned.int8.json").read_text())
    rows = {row["network"]: row for row in report["rows"]}
    assert list(rows) == [
        "pruned.pth.tar",
        "pruned.pth.tar, INT8",
        "original: original.pth.tar",
        "original: original.pth.tar, INT8",
    ]
    assert (report["calibration_images"], report["judged_images"]) == (32, 24)
    pair = rows["pruned.pth.tar"], rows["pruned.pth.tar, INT8"]
    assert pair[1]["bytes"] < 0.5 * pair[0]["bytes"]
    assert pair[1]["agreement"] > 80
    assert all(time["n"] >= 5 for time in pair[1]["milliseconds"].values())
    sessions = [runtime.InferenceSession(str(tmp_path / f"pruned{end}.onnx")) for end in ("", ".int8")]
    one, two = (session.run(["logits"], {"images": images.numpy()})[0] for session in sessions)
    assert 0 < abs(one - two).max() < 0.2 * abs(one).max()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--int8"], "--int8 needs images: give --data"),
        (["--int8", "--format", "state-dict", "--data", "shapes"], "--int8 is for --format onnx"),
        (["--original", "other.pth.tar"], "--original has no effect without --int8"),
    ],
)
def test_flags_of_int8_that_cannot_apply(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "network.pth.tar", *words]) == 2
    assert told in capsys.readouterr().err


def test_nan_logits_are_refused(small: tuple[nn.Module, torch.Tensor], tmp_path: Path) -> None:
    model, images = copy.deepcopy(small[0]), small[1]
    with torch.no_grad():
        model.get_parameter("fc.bias")[0] = torch.nan
    with pytest.raises(ExportError, match="nan"):
        export_network(model, tmp_path / "network.pt", "state-dict", images)
    assert not (tmp_path / "network.pt").exists()


def test_a_file_with_other_logits_is_removed(
    small: tuple[nn.Module, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(network: nn.Module, path: Path, images: torch.Tensor, *settings: object) -> Any:
        path.touch()
        return (lambda batch: torch.zeros(len(batch), 2)), ""

    monkeypatch.setitem(module.WRITERS, "state-dict", write)
    with pytest.raises(ExportError, match=r"\(5, 2\)"):
        export_network(small[0], tmp_path / "network.pt", "state-dict", small[1])
    assert not (tmp_path / "network.pt").exists()


class _Branching(nn.Module):
    """Its graph depends on the values of the images, so that `torch.export` cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(images.mean((2, 3)))
        return logits if images.sum() > 0 else -logits


def test_a_network_that_onnx_cannot_hold_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ExportError, match="onnx") as caught:
        export_network(_Branching(), tmp_path / "network.onnx", "onnx", torch.randn(3, 3, 8, 8))
    assert "\x1b" not in str(caught.value), "colours of PyTorch's exporter"


def test_what_is_known_travels_with_every_file(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    names = ("cat", "dog", "eel")
    model = create_model("resnet20", num_classes=3)
    remember_class_names(model, names)
    remember_input(model, NetworkInput(32, 36, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))
    images = torch.randn(3, 3, 32, 32)
    settings = ExportSettings(notes={"license": "apache-2.0"})
    expected = {
        "class_names": json.dumps(names),
        "image_size": "32",
        "resize": "36",
        "mean": "[0.5, 0.4, 0.3]",
        "std": "[0.2, 0.2, 0.1]",
        "geometry": "crop",
        "license": "apache-2.0",
    }
    export_network(model, tmp_path / "net.pt", "state-dict", images, settings)
    saved = torch.load(tmp_path / "net.pt", weights_only=True)
    assert saved["class_names"] == list(names)
    assert saved["metadata"] == expected
    export_network(model, tmp_path / "net.pt2", "torch-export", images, settings)
    extra = {"class_names.json": "", "metadata.json": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra["class_names.json"]) == list(names)
    assert json.loads(extra["metadata.json"]) == expected
    export_network(model, tmp_path / "net.onnx", "onnx", images, settings)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert expected.items() <= session.get_modelmeta().custom_metadata_map.items()
    save_pruned(tmp_path / "net.pth.tar", copy.deepcopy(model))
    assert class_names_of(load_pruned(tmp_path / "net.pth.tar")) == names
    assert class_names_of(model_for_weights(None, tmp_path / "net.pth.tar")) == names


def test_the_opset_is_what_was_asked_for(small: tuple[nn.Module, torch.Tensor], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model, images = small
    export_network(model, tmp_path / "net.onnx", "onnx", images, ExportSettings(opset=18))
    (opset,) = [one.version for one in onnx.load(tmp_path / "net.onnx").opset_import if not one.domain]
    assert opset == 18
    with pytest.raises(SettingError, match="opset=3"):
        export_network(model, tmp_path / "old.onnx", "onnx", images, ExportSettings(opset=3))
    with pytest.raises(SettingError, match="opset"):
        export_network(model, tmp_path / "net.pt", "state-dict", images, ExportSettings(opset=18))
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_openvino_computes_the_same(small: tuple[nn.Module, torch.Tensor], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model, images = small
    exported = export_network(model, tmp_path / "net.onnx", "onnx", images)
    difference = openvino_difference(exported, model, images)
    assert difference is not None
    assert difference <= TOLERANCE
