"""Pruned networks survive the file: by name, by factory, and not from foreign files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from image_classification.models import WeightsError
from image_classification.models.factory import create_model
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.files.saved_network import load_pruned, save_pruned


def cut(model: nn.Module, images: torch.Tensor) -> nn.Module:
    graph = trace_groups(model, images)
    prune_channels(model, graph, {group: range((group.width + 1) // 2) for group in graph.prunable})
    return model.eval()


@pytest.mark.parametrize(
    "arch",
    [
        "resnet20",
        "mobilenet_v2",
        "torchvision/shufflenet_v2_x0_5",
        "torchvision/mnasnet0_5",
        "timm/res2net50_26w_4s",
    ],
)
def test_round_trip_by_name(arch: str, tmp_path: Path) -> None:
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    images = torch.randn(2, 3, 64, 64)
    model = cut(create_model(arch, num_classes=7), images)
    save_pruned(tmp_path / "pruned.pth.tar", model, note="mine")
    loaded = load_pruned(tmp_path / "pruned.pth.tar").eval()
    assert torch.equal(loaded(images), model(images))
    assert torch.load(tmp_path / "pruned.pth.tar", weights_only=True)["note"] == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["pruned.pth.tar"]


def test_own_class_through_a_factory(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)
        )

    images = torch.randn(2, 3, 8, 8)
    model = cut(factory(), images)
    save_pruned(tmp_path / "own.pt", model, factory=factory)
    assert torch.equal(load_pruned(tmp_path / "own.pt", factory).eval()(images), model(images))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        load_pruned(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(WeightsError):
        load_pruned(tmp_path / "text.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign\.pt.*'structure'"):
        load_pruned(tmp_path / "foreign.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pt")
    with pytest.raises(WeightsError):
        load_pruned(tmp_path / "pickled.pt")
    save_pruned(tmp_path / "good.pt", create_model("resnet20", num_classes=10))
    data = bytearray((tmp_path / "good.pt").read_bytes())
    data[len(data) // 2] ^= 1  # torch.load would take the flipped bit for a number
    (tmp_path / "flipped.pt").write_bytes(data)
    with pytest.raises(WeightsError):
        load_pruned(tmp_path / "flipped.pt")
