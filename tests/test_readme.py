"""Every command of the README is run, shortened (`support.commands`), and its Python is executed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import ROOT, commands_in, run, run_here, shortened
from support.images import write_jpegs
from support.published_networks import published

from image_classification.models import create_model
from pruning import load_pruned, prune
from pruning.files.saved_network import save_pruned

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [*commands_in(README, "lucidprune"), *commands_in(README)]
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
#: Those that stand for themselves.
SNIPPETS = [block for block in BLOCKS if block.startswith("import") and "prune(model" in block]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for the paths of the README."""
    root = tmp_path_factory.mktemp("readme")
    for split, count in (("train", 30), ("val", 3)):
        for number in range(4):
            folder = root / "imagenet" / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            write_jpegs(folder, [(60 + 7 * (i + number) % 40, 70 + 11 * i % 50) for i in range(count)])
    torch.manual_seed(0)
    save_pruned(root / "best.pth.tar", create_model("resnet50", num_classes=4))
    network = create_model("resnet20", num_classes=12)
    save_pruned(root / "small.pth.tar", network)
    prune(network, torch.randn(2, 3, 32, 32), budget={"macs": 0.5}, criterion="magnitude")
    save_pruned(root / "pruned.pth.tar", network)
    masked = create_model("resnet20", num_classes=12)
    with torch.no_grad():
        masked.get_parameter("layer1.0.conv1.weight")[:4] = 0
        for name in ("weight", "bias"):
            masked.get_parameter(f"layer1.0.bn1.{name}")[:4] = 0
    save_pruned(root / "masked.pth.tar", masked)
    torch.save({"state_dict": published("di_resnet50")}, root / "published.pth.tar")
    return {
        "import published.pth.tar imported.pth.tar": f"import {root / 'published.pth.tar'} {root / 'imported.pth.tar'}",
        "shrink masked.pth.tar shrunk.pth.tar": f"shrink {root / 'masked.pth.tar'} {root / 'shrunk.pth.tar'}",
        "--checkpoint checkpoint.pth.tar": f"--checkpoint {root / 'small.pth.tar'}",
        "compress checkpoint.pth.tar /data/images": (
            f"compress {root / 'small.pth.tar'} {root / 'imagenet'} --no-latency --image-size 32"
        ),
        "--output small.pth.tar": f"--output {root / 'compressed.pth.tar'}",
        "compare checkpoint.pth.tar pruned.pth.tar": f"compare {root / 'small.pth.tar'} {root / 'pruned.pth.tar'}",
        "export pruned.pth.tar": f"export {root / 'pruned.pth.tar'}",
        "--output pruned.onnx": f"--output {root / 'pruned.onnx'}",
        "--output maps": f"--output {root / 'maps'}",
        "moved.json --gallery moved.png": f"{root / 'moved.json'} --gallery {root / 'moved.png'}",
        "localize shapes": "localize shapes:train=96,val=24",
        "attribute shapes": "attribute shapes:train=96,val=24",
        "--data shapes": "--data shapes:train=96,val=24",
        "pruned.pth.tar shapes": "pruned.pth.tar shapes:train=96,val=24",
        "/data/imagenet/train parts": f"{root / 'imagenet' / 'train'} {root / 'parts'}",
        "/data/imagenet": str(root / "imagenet"),
        "model_best.pth.tar": str(root / "best.pth.tar"),
        "score checkpoint.pth.tar shapes": f"score {root / 'small.pth.tar'} shapes:train=96,val=24",
        "--output scores": f"--output {root / 'scores'}",
        "main.py shapes ": "main.py shapes:train=160,val=24 ",
        "train shapes ": "train shapes:train=160,val=24 ",
        "prune shapes ": "prune shapes:train=160,val=24 ",
        "runs/first/train/checkpoint.pth.tar": str(root / "small.pth.tar"),
        " prepared ": f" {root / 'prepared'} ",
        "--config configs": f"--config {ROOT / 'configs'}",
        "cache": str(root / "cache"),
    }


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 10
    assert [command.split()[:2] for command in COMMANDS[:2]] == [
        ["lucidprune", "train"],
        ["lucidprune", "prune"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.sub(r"\W+", "_", command)[:60])
def test_command(command: str, places: dict[str, str], tmp_path: Path) -> None:
    replaced = {old: new for old, new in places.items() if old != "cache"}
    words = shortened(command, replaced, tmp_path / "run")
    if "--iterative-pruning" in words or words[:2] == ["lucidprune", "prune"]:
        words += ["--pruning-step", "1", "--pruning-delta", "0.25", "--calibration-batches", "1"]
    if "explainers" in words:
        words += ["--num-images", "4", "--batch-size", "4"]
    if "benchmark" in words:
        words += ["--num-batches", "1", "--image-size", "64"]
    if command == COMMANDS[2]:  # once as a reader starts it
        result = run(words, cache=Path(places["cache"]), timeout=600)
    else:
        result = run_here(words, Path(places["cache"]))
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    for name in {first or second for first, second in targets}:
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


@pytest.mark.parametrize("block", SNIPPETS, ids=("torchvision", "timm", "own"))
def test_snippets_run_as_printed(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchvision", "timm"):
        if f"import {module}" in block:
            pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["model"], torch.nn.Module)


def test_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training loop, executed as printed; what it saves is the network that it leaves."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=10)
    images, targets = torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))
    names = {
        "model": model,
        "example_images": images[:2],
        "optimizer": torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
        "loader": [(images, targets)] * 51,
        "criterion": torch.nn.CrossEntropyLoss(),
        "calibration_batches": [(images, targets)],
    }
    for block in BLOCKS:
        if block not in SNIPPETS:
            exec(compile(block, "README.md", "exec"), names)
    loaded = load_pruned("pruned.pth.tar").eval()
    torch.testing.assert_close(loaded(images), model.eval()(images))
    assert sum(p.numel() for p in model.parameters()) < 272_474
