"""`python -m pruning compare`: figures of two networks, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from image_classification.models import create_model, model_for_weights
from pruning.__main__ import main
from pruning.files.saved_network import save_pruned
from pruning.verbs.images import open_validation


@pytest.fixture
def networks(tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    paths = [tmp_path / "whole.pth.tar", tmp_path / "narrow.pth.tar"]
    save_pruned(paths[0], create_model("resnet20", num_classes=12))
    save_pruned(paths[1], create_model("resnet20", num_classes=12, widths={"layer2.1.conv1": 20}))
    return [str(path) for path in paths]


def test_costs_and_widths(networks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "compare.json"
    assert main(["compare", *networks, "--image-size", "32", "--json", str(report)]) == 0
    plain = json.loads(report.read_text())
    # layer2.1 at 16×16: 32 → 32 → 32 channels, 3×3; twelve channels fewer in the middle
    saved = 2 * 16 * 16 * 9 * 32 * 12
    assert plain["costs"][0]["macs"] - plain["costs"][1]["macs"] == saved
    assert plain["costs"][0]["params"] - plain["costs"][1]["params"] == 2 * 9 * 32 * 12 + 2 * 12
    changed = [row for row in plain["widths"] if len(set(row["widths"])) > 1]
    assert changed == [{"layer": "layer2.1.conv1", "kind": "Conv2d", "widths": [32, 20]}]
    out = capsys.readouterr().out
    assert "1 of 20 layers have other widths" in out
    assert plain["accuracy"] is None


def test_accuracy_is_measured_on_data(
    networks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    report = tmp_path / "compare.json"
    words = [
        "compare",
        *networks,
        "--data",
        "shapes:train=24,val=24",
        "--device",
        "cpu",
        "--json",
        str(report),
    ]
    assert main(words) == 0
    figures = json.loads(report.read_text())["accuracy"]
    assert len(figures) == 2
    assert all(0 <= entry["top1"] <= entry["top5"] <= 100 for entry in figures)
    assert "top1, %" in capsys.readouterr().out


def test_many_networks_and_which_are_ahead(
    networks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that says the same with more MACs is not ahead."""
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    report, plot = tmp_path / "compare.json", tmp_path / "plot.png"
    words = ["compare", *networks, networks[0], "--data", "shapes:train=24,val=24", "--device", "cpu"]
    accuracies = iter([{"top1": 50.0}, {"top1": 50.0}, {"top1": 60.0}])
    monkeypatch.setattr("pruning.verbs.compare_networks.accuracy_of", lambda *_: next(accuracies))
    assert main([*words, "--json", str(report), "--plot", str(plot)]) == 0
    plain = json.loads(report.read_text())
    assert plain["ahead"] == [1, 2]
    assert [row["widths"] for row in plain["widths"] if row["layer"] == "layer2.1.conv1"] == [[32, 20, 32]]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "2, 3" in capsys.readouterr().out
    for slip in (["--plot", str(plot)], ["--plot", "points.xyz", "--data", "shapes:train=24,val=24"]):
        assert main(["compare", *networks, *slip]) == 2
        assert f"--plot {slip[1]}" in capsys.readouterr().err


def test_errors_are_one_line(networks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.pth.tar"
    save_pruned(other, create_model("resnet32", num_classes=12))
    assert main(["compare", networks[0], str(other)]) == 2
    assert "different architectures" in capsys.readouterr().err
    assert main(["compare", networks[0], str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err
    ten = tmp_path / "ten.pth.tar"
    save_pruned(ten, create_model("resnet20", num_classes=10))
    assert main(["compare", str(ten), str(ten), "--data", "shapes:train=24,val=24"]) == 2
    assert "12 classes, the network 10" in capsys.readouterr().err


def test_images_are_those_of_the_run(
    networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's checkpoint says how its images were normalised, and how large they were."""
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    content = torch.load(networks[1], weights_only=True)
    content["config"] = {"image_size": 40, "resize": 44, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    path = tmp_path / "run.pth.tar"
    torch.save(content, path)
    model = model_for_weights(None, path)
    images = open_validation("shapes:train=24,val=24", model, path, None, torch.device("cpu"))
    preset = images.preset
    assert (preset.image_size, preset.resize, preset.mean) == (40, 44, (0.1, 0.2, 0.3))
    asked = open_validation("shapes:train=24,val=24", model, path, 64, torch.device("cpu")).preset
    assert (asked.image_size, asked.mean) == (64, (0.1, 0.2, 0.3))
