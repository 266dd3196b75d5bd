"""Published files of all five programs on the whole path: import, evaluate, explain, shrink, export.

Small members of each program's family with masked channels; what is expected is computed by the networks of
`support/published_networks.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.published_networks import (
    IspSelector,
    PhotoResNet,
    SaliencyDecoder,
    SmallResNet,
    VocVgg,
    prefixed,
    randomise,
)
from torch import Tensor, nn

import main
from explainers.__main__ import main as explain
from explainers.aem import load_selector
from explainers.casm import load_casm
from image_classification.data.single_image import pixels_of
from image_classification.models import input_of, model_for_weights
from pruning.__main__ import main as prune
from pruning.files.importing.imported import arch_of

CLASSES = 4
WORDS = ["--data-backend", "pytorch", "--workers", "0", "--device", "cpu", "-b", "2"]
Made = tuple[dict[str, Any], nn.Module]


def photo_resnet(num_classes: int | None = CLASSES) -> PhotoResNet:
    return PhotoResNet((2, 2, 2, 2), bottleneck=False, num_classes=num_classes)


def di() -> Made:
    theirs = randomise(photo_resnet(), 1)
    return {"state_dict": prefixed(module=theirs), "epoch": 1, "arch": "resnet18"}, theirs


def swa() -> Made:
    theirs = randomise(VocVgg((8, 8, 16, 16, 32, 32, 32, 64, 64, 64, 64, 64, 64), CLASSES), 2)
    return {"state_dict": prefixed(module=theirs), "best_mAP": np.float64(0.5)}, theirs


def casm() -> Made:
    theirs, decoder = randomise(photo_resnet(), 3), randomise(SaliencyDecoder((64, 128, 256, 512)), 4)
    theirs.decoder = [decoder]
    parts = {"state_dict_classifier": theirs.state_dict(), "state_dict_decoder": decoder.state_dict()}
    return {**parts, "epoch": 1}, theirs


def isp_cifar() -> Made:
    theirs = randomise(SmallResNet(3, num_classes=CLASSES), 5)
    select = IspSelector("resnet", SmallResNet(3, num_classes=None), (16, 32, 64), CLASSES, 32)
    return {"model": with_selector(theirs, randomise(select, 6), "resnet")}, theirs


def isp_imagenet() -> Made:
    theirs = randomise(photo_resnet(), 7)
    select = IspSelector("encoder", photo_resnet(None), (64, 128, 256, 512), CLASSES, 56)
    return {"model": with_selector(theirs, randomise(select, 8), "encoder")}, theirs


def with_selector(theirs: nn.Module, select: IspSelector, encoder: str) -> dict[str, Tensor]:
    """A file with a black box and a selector that reads it."""
    own = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    getattr(select, encoder).load_state_dict(own)
    theirs.selector = [select]
    return prefixed(selector=select, bb_model__model=theirs)


FORMATS: dict[str, Callable[[], Made]] = {
    "di": di,
    "swa": swa,
    "casm": casm,
    "isp-cifar": isp_cifar,
    "isp-imagenet": isp_imagenet,
}


def mask_channels(theirs: nn.Module) -> None:
    """Two channels of an inner layer become zero, as a mask leaves them."""
    with torch.no_grad():
        if isinstance(theirs, VocVgg):
            conv, norm = theirs.features[3], theirs.features[4]
        else:
            conv, norm = theirs.layer1[0].conv1, theirs.layer1[0].bn1
        for tensor in (conv.weight, norm.weight, norm.bias):
            tensor[1:3] = 0
        if conv.bias is not None:
            conv.bias[1:3] = 0


def write_images(root: Path, side: int) -> list[Path]:
    """Class folders, two images in all in each split."""
    generator = np.random.default_rng(0)
    paths = []
    for split in ("train", "val"):
        for index in range(CLASSES):
            path = root / split / f"c{index}" / "a.png"
            path.parent.mkdir(parents=True)
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            paths += [path] if split == "val" else []
    return paths


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "isp-cifar" else [pytest.mark.slow]) for name in FORMATS]
)
@torch.no_grad()
def test_the_whole_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    theirs = save_masked(name)
    paths = write_images(tmp_path / "data", 32 if name == "isp-cifar" else 240)
    ours = tmp_path / "ours.pth.tar"

    assert prune(["import", "theirs.pth", str(ours)]) == 0
    model = model_for_weights(None, ours).eval()
    images = input_of(model)
    assert images is not None
    batch = torch.stack([pixels_of(path, images) for path in paths])
    expected = theirs(batch)
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-4)
    check_companions(name, ours, theirs, batch)

    check_evaluated(ours, arch_of(model), expected)
    check_classified(ours, paths, expected)

    size = min(batch.shape[-1], 64)
    words = f"shrink {ours} small.pth.tar --no-latency --example-size {size} --json s.json"
    assert prune(words.split()) == 0
    assert json.loads(Path("s.json").read_text())["removed_channels"] >= 2
    small = model_for_weights(None, "small.pth.tar").eval()
    torch.testing.assert_close(small(batch), expected, rtol=1e-3, atol=1e-3)
    assert input_of(small) == images

    assert prune(["export", "small.pth.tar", "--format", "state-dict", "--output", "small.pt"]) == 0
    exported = torch.load("small.pt", weights_only=True)
    state = exported.get("state_dict", exported)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in small.state_dict().items()}


def save_masked(name: str) -> nn.Module:
    """Write a published file with masked channels to theirs.pth; the network in it."""
    content, theirs = FORMATS[name]()
    mask_channels(theirs)
    if name.startswith("isp"):
        kind = "resnet" if name == "isp-cifar" else "encoder"
        content = {"model": with_selector(theirs, theirs.selector[0], kind)}
    torch.save(content, "theirs.pth")
    return theirs


def check_evaluated(ours: Path, arch: str, expected: Tensor) -> None:
    """`--evaluate` finds the loss of the published network's logits."""
    words = f"data --evaluate --pretrained-weights {ours} --arch {arch} --workspace run --raport-file r.json"
    assert main.main([*words.split(), *WORDS]) == 0
    loss = F.cross_entropy(expected, torch.arange(CLASSES))
    assert logged(Path("run/r.json"), "val.loss") == pytest.approx(float(loss), rel=2e-2)


def check_classified(ours: Path, paths: list[Path], expected: Tensor) -> None:
    """`classify` finds the published network's probabilities."""
    words = ["classify", *map(str, paths), "--checkpoint", str(ours), "--json", "c.json"]
    assert explain([*words, "--output", "page.png"]) == 0
    for row, logits in zip(json.loads(Path("c.json").read_text()).values(), expected, strict=True):
        chances = {entry["class"]: entry["probability"] for entry in row}
        assert chances == pytest.approx(dict(enumerate(logits.softmax(0).tolist())), abs=1e-4)


def check_companions(name: str, ours: Path, theirs: nn.Module, batch: Tensor) -> None:
    """Saliency mappings and selectors beside the classifier."""
    if name == "casm":
        (decoder,) = theirs.decoder
        torch.testing.assert_close(
            load_casm(ours)(batch)[1], decoder(theirs.scales(batch)), rtol=1e-4, atol=1e-4
        )
    if name.startswith("isp"):
        (select,) = theirs.selector
        labels = torch.arange(CLASSES)
        explanation = load_selector(ours.with_name("ours-selector.pth.tar"))
        raw = explanation.raw(model_for_weights(None, ours).eval(), batch, labels)
        torch.testing.assert_close(raw, select(batch, labels).flatten(1), rtol=1e-3, atol=1e-3)


def logged(path: Path, key: str) -> float:
    lines = [json.loads(line.removeprefix("DLLL ")) for line in path.read_text().splitlines()]
    (value,) = [entry["data"][key] for entry in lines if entry["type"] == "LOG" and key in entry["data"]]
    return value
