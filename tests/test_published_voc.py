"""A published VGG on a VOC devkit of which a part has masks: verbs take the images that it was made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.published_networks import VGG16, VocVgg, prefixed, randomise
from support.voc import write_devkit
from torch import Tensor

import main
from explainers.__main__ import main as explain
from image_classification.data.layouts.voc import CLASS_NAMES
from image_classification.models import input_of, model_for_weights
from pruning.__main__ import main as prune

MEAN, STD = (0.4589, 0.4355, 0.4032), (0.2239, 0.2186, 0.2206)
WORDS = ["--data-backend", "pytorch", "--workers", "0", "--device", "cpu", "-b", "8"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, VocVgg]:
    """A devkit, an imported file, and the network as its program has it."""
    folder = tmp_path_factory.mktemp("published")
    year = write_devkit(folder, num_train=12, num_val=16)
    theirs = randomise(VocVgg(tuple(width // 8 for width in VGG16)), 3)
    torch.save({"state_dict": prefixed(module=theirs), "epoch": 1}, folder / "theirs.pth.tar")
    assert prune(["import", str(folder / "theirs.pth.tar"), str(folder / "ours.pth.tar")]) == 0
    return year, folder / "ours.pth.tar", theirs


def stretched(year: Path, names: list[str]) -> Tensor:
    """Images as the published evaluation makes them: all of each, 227 × 227, with its own mean and deviation."""
    pixels = []
    for name in names:
        image = Image.open(year / "JPEGImages" / f"{name}.jpg").resize((227, 227), Image.Resampling.BILINEAR)
        pixels.append((np.asarray(image, np.float32) / 255 - MEAN) / STD)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()


def listed(year: Path, image_set: str) -> list[str]:
    return (year / "ImageSets" / f"{image_set}.txt").read_text().split()


@torch.no_grad()
def test_localize_reads_the_published_list_and_input(
    published: tuple[Path, Path, VocVgg], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    year, ours, theirs = published
    names = listed(year, "Segmentation/val")
    assert 0 < len(names) < len(listed(year, "Main/val")), "some images have no mask"
    predicted = pairs = 0
    for name, row in zip(names, theirs(stretched(year, names)), strict=True):
        mask = np.asarray(Image.open(year / "SegmentationClass" / f"{name}.png"))
        present = [int(value) - 1 for value in np.unique(mask) if value not in (0, 255)]
        pairs += len(present)
        predicted += int((row[present] > 0).sum())
    words = ["localize", str(year), "--checkpoint", str(ours), "--method", "centre", "--metric", "auc"]
    assert explain([*words, *WORDS, "--json", str(tmp_path / "f.json")]) == 0
    assert "ImageSets/Segmentation/val" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert row["counts"] == {"images": len(names), "pairs": pairs, "predicted": predicted, "nan_maps": 0}
    assert {"point", "auc"} <= set(row["figures"])


@torch.no_grad()
def test_evaluation_gives_the_published_logits_figures(
    published: tuple[Path, Path, VocVgg], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.metrics import average_precision_score

    year, ours, theirs = published
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    words = ["--arch", "vgg16_bn_voc_x8", "--multi-label", "--evaluate", "--pretrained-weights", str(ours)]
    words += ["--workspace", str(tmp_path / "run"), "--raport-file", "r.json", "--figures", "published"]
    assert main.main([str(year), *words, *WORDS, "--difficult"]) == 0
    (figures,) = [data for data in _logged(tmp_path / "run" / "r.json") if "val.map_images" in data]
    names = listed(year, "Main/val")
    precisions = []
    for name, logits in zip(names, theirs(stretched(year, names)), strict=True):
        annotation = (year / "Annotations" / f"{name}.xml").read_text()
        labels = np.array([f"<name>{kind}</name>" in annotation for kind in CLASS_NAMES])
        precisions.append(average_precision_score(labels, logits))
    assert figures["val.map_images"] == pytest.approx(100 * np.mean(precisions), abs=0.5)
    assert "val.map" not in figures


def test_the_input_travels_through_cutting(published: tuple[Path, Path, VocVgg], tmp_path: Path) -> None:
    _, ours, _ = published
    images = input_of(model_for_weights(None, ours))
    assert images is not None
    assert (images.image_size, images.mean, images.std, images.geometry) == (227, MEAN, STD, "whole")
    assert prune(["shrink", str(ours), str(tmp_path / "small.pth.tar"), "--example-size", "64"]) == 0
    assert input_of(model_for_weights(None, tmp_path / "small.pth.tar")) == images


def _logged(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line.removeprefix("DLLL ")) for line in path.read_text().splitlines()]
    return [entry["data"] for entry in lines if entry["type"] == "LOG"]
