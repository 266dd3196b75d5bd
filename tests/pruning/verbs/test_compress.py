"""`python -m pruning compress`: a network smaller without training, as command and as function."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from image_classification.models import create_model
from pruning import load_pruned
from pruning.__main__ import main
from pruning.engine.constraints import Constraints
from pruning.files.saved_network import save_pruned
from pruning.repair.repairing import RepairSettings
from pruning.search.sensitivity import SensitivitySearch
from pruning.verbs.compress import parse_budgets
from pruning.verbs.compressing import CompressSettings, compress, sensitivity
from pruning.verbs.measure_sensitivity import rows_of


def twins(groups: int) -> nn.Sequential:
    """A network half of whose hidden channels repeat the others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        first = model[0]
        first.weight[6:], first.bias[6:] = first.weight[:6], first.bias[:6]
    return model


def test_channels_that_repeat_others_cost_nothing() -> None:
    model = twins(1)
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    settings = CompressSettings(
        search=SensitivitySearch((0.5,)),
        constraints=Constraints(ignored=("3",)),
        repair=RepairSettings(ridges=(1e-9,)),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (point,) = compress(model, images, [{"macs": 0.51}], settings)
    assert point.graph.group("0").width == 6
    with torch.no_grad():
        torch.testing.assert_close(point.model(images), model(images), atol=1e-3, rtol=1e-3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_budgets() -> None:
    assert parse_budgets(["macs=0.5,0.75"]) == [{"macs": 0.75}, {"macs": 0.5}]
    assert parse_budgets(["macs=0.5", "params=0.6"]) == [{"macs": 0.5, "params": 0.6}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 images of coloured noise and one that cannot be read."""
    root = tmp_path / "images"
    root.mkdir()
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(root / f"{number:02}.png")
    (root / "broken.png").write_bytes(b"nothing")
    return root


@pytest.fixture
def network(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "network.pth.tar"
    save_pruned(path, create_model("resnet20", num_classes=4))
    return path


def test_a_folder_without_labels_and_a_curve(
    network: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "small.pth.tar"
    words = [
        "compress",
        str(network),
        str(folder),
        "--budget",
        "macs=0.8,0.6",
        "--output",
        str(out),
        "-n",
        "24",
    ]
    assert main([*words, "--device", "cpu", "--no-latency"]) == 0
    plain = json.loads((out.parent / "small.json").read_text())
    assert (plain["num_calibration"], plain["num_judged"]) == (24, 16)
    original, *points = plain["networks"]
    assert original["agreement"] == 1
    assert "top1" not in original
    for row, share in zip(points, (0.8, 0.6), strict=True):
        assert row["name"] == str(out.with_name(f"small-macs{share:g}.pth.tar"))
        assert row["costs"]["macs"][1] <= share * row["costs"]["macs"][0]
        model = load_pruned(row["name"])
        assert sum(parameter.numel() for parameter in model.parameters()) == row["costs"]["params"][1]
        before, after = row["repair"]["distance"]
        assert after <= before
    page = (out.parent / "small.html").read_text()
    assert "<svg" in page
    assert "0.600" in page or "0.59" in page
    assert "broken.png" not in page
    assert "16 others to measure on" in capsys.readouterr().out


def test_class_folders_are_labels(network: Path, folder: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(folder.glob("[0-9]*.png"))):
        place = folder / "abcd"[number % 4]
        place.mkdir(exist_ok=True)
        path.rename(place / path.name)
    (folder / "broken.png").unlink()
    out = tmp_path / "small.pth.tar"
    words = [
        "compress",
        str(network),
        str(folder),
        "--output",
        str(out),
        "--repair",
        "none",
        "--device",
        "cpu",
    ]
    assert main([*words, "--criterion", "magnitude", "--no-latency"]) == 0
    plain = json.loads(out.with_name("small.json").read_text())
    assert all(0 <= row["top1"] <= 1 for row in plain["networks"])
    assert plain["networks"][1]["repair"] is None
    load_pruned(out)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--budget", "macs=0.9,0.5", "params=0.5"], "--budget"),
        (["--budget", "macs=0.0001"], "budget"),
        (["--budget", "speed=0.5"], "speed"),
        (["--num-images", "0"], "--num-images"),
        (["--criterion", "reconstructoin"], "reconstruction"),
        (["--resize", "8"], "--resize"),
        (["--seed", "-1"], "--seed -1"),
        (["--image-size", "123456789012"], "--image-size 123456789012"),
        (["--std", "1", "0", "1"], "--std 1 0 1"),
        (["--mean", "124", "117", "104"], "--mean 124 117 104"),
        (["--device", "nowhere"], "--device nowhere"),
    ],
)
def test_slips_are_told_in_a_line(
    network: Path,
    folder: Path,
    tmp_path: Path,
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "small.pth.tar"
    assert main(["compress", str(network), str(folder), "--output", str(out), "--device", "cpu", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert not out.exists()


def test_a_folder_without_images(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for place in (empty, tmp_path / "nowhere"):
        assert main(["compress", str(network), str(place), "--output", str(tmp_path / "small.pth.tar")]) == 2
        assert str(place) in capsys.readouterr().err


def test_sensitivity_of_what_repeats_and_what_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the first layer repeats the other half; the second layer has nothing to spare."""
    model = twins(1)
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    search = SensitivitySearch((0.75, 0.5, 0.25), limit=math.inf)
    settings = CompressSettings(search=search, repair=RepairSettings(ridges=(1e-9,)))
    graph, curves = sensitivity(model, images, settings)
    rows = {row["group"]: row for row in rows_of(graph, curves, [0.25, 0.5, 0.75])}
    assert list(rows) == ["0", "3"], "the least sensitive one first"
    first, second = rows["0"]["losses"], rows["3"]["losses"]
    assert max(first[:2]) < 0.05 * min(second), "repeated channels cost nothing, others do"
    assert first[2] > 20 * max(first[:2])
    assert graph.group("0").width == 12


def test_the_verb_measures_every_share_and_writes_table_json_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pruned(tmp_path / "net.pth.tar", create_model("resnet20", num_classes=4))
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    output = tmp_path / "sensitivity.json"
    words = ["sensitivity", str(tmp_path / "net.pth.tar"), str(folder), "--image-size", "32", "-n", "8"]
    assert main([*words, "--removed", "0.5", "0.9", "--repair", "none", "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert content["removed"] == [0.5, 0.9]
    assert len(content["groups"]) > 5
    assert all(row["losses"][0] >= 0 for row in content["groups"])
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert content["groups"][0]["group"] in capsys.readouterr().out
    for slip, told in ((["--removed", "1.5"], "--removed 1.5"), (["--min-width", "999"], "no group can")):
        assert main([*words, *slip]) == 2
        assert told in capsys.readouterr().err
