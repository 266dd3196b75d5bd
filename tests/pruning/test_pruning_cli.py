"""`python -m pruning groups` and `score`: tables for people, JSON for programs, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.commands import status_of

from image_classification.models import create_model
from pruning.__main__ import main
from pruning.criteria.sample_losses import losses_of
from pruning.files.saved_network import save_pruned
from pruning.verbs import score_channels as command


def test_groups_lists_members_widths_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "groups.json"
    assert main(["groups", "resnet18", "--image-size", "32", "--round-to", "8", "--json", str(report)]) == 0
    assert "channel groups can be pruned" in capsys.readouterr().out
    rows = {row["group"]: row for row in json.loads(report.read_text())["groups"]}
    assert rows["conv1"]["width"] == 64
    assert rows["conv1"]["least_width"] == 8
    assert {"conv1", "bn1", "layer1.0.conv1", "layer1.1.conv2"} <= set(rows["conv1"]["modules"])
    assert not rows["fc"]["prunable"]
    assert "output" in rows["fc"]["reason"]


def test_groups_says_what_limits_leave(tmp_path: Path) -> None:
    report = tmp_path / "groups.json"
    words = ["groups", "resnet20", "--image-size", "32", "--json", str(report)]
    assert main([*words, "--prune-limit", "layer1.*=0.5", "--prune-limit", "layer3.0.conv1=20"]) == 0
    rows = {row["group"]: row for row in json.loads(report.read_text())["groups"]}
    least = {
        name: rows[name]["least_width"] for name in ("layer1.0.conv1", "layer3.0.conv1", "layer3.1.conv1")
    }
    assert least == {"layer1.0.conv1": 8, "layer3.0.conv1": 20, "layer3.1.conv1": 7}
    assert main([*words, "--prune-limit", "nonsense=0.5"]) != 0


def test_groups_of_a_pruned_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "narrow.pth.tar"
    save_pruned(path, create_model("resnet20", num_classes=10, widths={"layer2.1.conv1": 20}))
    assert main(["groups", "resnet20", "--checkpoint", str(path), "--json", str(tmp_path / "g.json")]) == 0
    rows = {row["group"]: row for row in json.loads((tmp_path / "g.json").read_text())["groups"]}
    assert rows["layer2.1.conv1"]["width"] == 20


def test_groups_of_a_network_of_another_image_size(tmp_path: Path) -> None:
    """A transformer's positions are those of the images that it was built for."""
    path = tmp_path / "small.pth.tar"
    save_pruned(path, create_model("timm/vit_tiny_patch16_224", num_classes=10, image_size=64))
    report = tmp_path / "g.json"
    assert (
        main(["groups", "timm/vit_tiny_patch16_224", "--checkpoint", str(path), "--json", str(report)]) == 0
    )
    assert any(row["prunable"] for row in json.loads(report.read_text())["groups"])


def test_ignored_modules_are_named(tmp_path: Path) -> None:
    report = tmp_path / "groups.json"
    assert main(["groups", "resnet20", "--prune-ignore", "layer1.0.conv1", "--json", str(report)]) == 0
    rows = {row["group"]: row for row in json.loads(report.read_text())["groups"]}
    assert not rows["layer1.0.conv1"]["prunable"]
    assert rows["layer1.0.conv1"]["reason"]


def test_score_writes_table_plot_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    checkpoint = tmp_path / "net.pth.tar"
    save_pruned(checkpoint, create_model("resnet20", num_classes=12))
    words = ["score", str(checkpoint), "shapes:train=48,val=12", "--criterion", "discriminant", "magnitude"]
    words += [
        "--batch-size",
        "8",
        "--calibration-batches",
        "2",
        "--data-backend",
        "pytorch",
        "--image-size",
        "24",
    ]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert "discriminant scores per channel group" in capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(scores) == {"discriminant", "magnitude"}
    assert len(scores["discriminant"]["layer2.1.conv1"]) == 32
    assert min(scores["discriminant"]["layer2.1.conv1"]) >= 0
    with Image.open(tmp_path / "out" / "scores.png") as image:
        assert min(image.size) > 300


def test_score_of_images_with_several_labels_takes_their_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    save_pruned(tmp_path / "net.pth.tar", create_model("resnet20", num_classes=12))
    words = ["score", str(tmp_path / "net.pth.tar"), "shapes-multi:train=48,val=12", "--criterion", "taylor"]
    words += [
        "--data-backend",
        "pytorch",
        "--batch-size",
        "8",
        "--calibration-batches",
        "2",
        "--image-size",
        "24",
    ]
    found = {}
    for multi_label in (True, False):
        asked = []
        monkeypatch.setattr(
            command,
            "losses_of",
            lambda given, asked=asked, now=multi_label: asked.append(given) or losses_of(now),
        )
        assert main([*words, "--output", str(tmp_path / str(multi_label))]) == 0
        assert asked == [True]
        found[multi_label] = json.loads((tmp_path / str(multi_label) / "scores.json").read_text())["taylor"]
    assert found[True] != found[False]


def test_score_by_the_explanation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    save_pruned(tmp_path / "net.pth.tar", create_model("resnet20", num_classes=12))
    words = [
        "score",
        str(tmp_path / "net.pth.tar"),
        "shapes:train=48,val=12",
        "--saliency-explanation",
        "gradcam",
    ]
    words += ["--criterion", "saliency", "magnitude+saliency", "magnitude", "--data-backend", "pytorch"]
    words += ["--batch-size", "8", "--calibration-batches", "2", "--image-size", "24"]
    found = {}
    for weight in ("0.25", "0.5"):
        out = tmp_path / weight
        assert main([*words, "--saliency-weight", weight, "--output", str(out)]) == 0
        found[weight] = json.loads((out / "scores.json").read_text())
    scores = found["0.25"]
    assert set(scores) == {"saliency", "magnitude+saliency", "magnitude"}
    for group, both in scores["magnitude+saliency"].items():
        first, second = (torch.tensor(scores[name][group]) for name in ("magnitude", "saliency"))
        expected = 0.75 * first / first.norm() + 0.25 * second / second.norm()
        torch.testing.assert_close(torch.tensor(both), expected, rtol=1e-4, atol=1e-6)
    assert found["0.5"]["magnitude+saliency"] != scores["magnitude+saliency"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["groups", "resnet21"], "ARCH resnet21"),
        (["score", "absent.pth", "shapes:train=48,val=12"], "absent.pth does not exist"),
        (["score", "absent.pth", "nowhere"], "absent.pth does not exist"),
        (["score", "x", "shapes", "--criterion", "discriminat"], "did you mean discriminant"),
        (["score", "x", "shapes", "-b", "1"], "--batch-size 1"),
        (["score", "x", "shapes", "--calibration-batches", "0"], "--calibration-batches: '0'"),
        (["score", "x", "shapes", "--criterion", "saliency"], "--selector is missing"),
        (
            ["score", "x", "shapes", "--saliency-explanation", "gradcam"],
            "no effect without --criterion saliency",
        ),
        (["score", "x", "shapes", "--saliency-weight", "0.3"], "--saliency-weight has no effect"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(main, words) == 2
    assert message in capsys.readouterr().err
