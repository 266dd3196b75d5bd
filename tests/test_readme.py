"""Every command of the README is run, shortened (`support.commands`), and its Python is executed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import ROOT, commands_in, run, run_here, shortened

from image_classification.models import create_model
from pruning import load_pruned
from pruning.files.saved_network import save_pruned

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [*commands_in(README, "lucidprune"), *commands_in(README)]
SNIPPET, LOOP = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for the paths of the README."""
    root = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    save_pruned(root / "small.pth.tar", create_model("resnet20", num_classes=12))
    return {
        "train shapes ": "train shapes:train=160,val=24 ",
        "prune shapes ": "prune shapes:train=160,val=24 ",
        "runs/first/train/checkpoint.pth.tar": str(root / "small.pth.tar"),
        "cache": str(root / "cache"),
    }


def test_the_readme_is_short_and_has_two_commands() -> None:
    assert len(README.splitlines()) <= 112
    assert [command.split()[:2] for command in COMMANDS] == [["lucidprune", "train"], ["lucidprune", "prune"]]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=("train", "prune"))
def test_command(command: str, places: dict[str, str], tmp_path: Path) -> None:
    replaced = {old: new for old, new in places.items() if old != "cache"}
    words = shortened(command, replaced, tmp_path / "run")
    if command == COMMANDS[0]:  # once in a process of its own, as a reader starts it
        program = "import sys; from pruning.__main__ import lucidprune; sys.exit(lucidprune(sys.argv[1:]))"
        result = run([sys.executable, "-c", program, *words[1:]], cache=Path(places["cache"]), timeout=600)
    else:
        words += ["--pruning-step", "1", "--pruning-delta", "0.25", "--calibration-batches", "1"]
        result = run_here(words, Path(places["cache"]))
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    for name in {first or second for first, second in targets}:
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def test_the_snippet_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On networks of torchvision, of timm and of one's own; the saved one is the first of them."""
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(SNIPPET, "README.md", "exec"), names)
    assert len(names["networks"]) == 3
    images = torch.randn(2, 3, 64, 64)
    first = names["networks"][0].eval()
    torch.testing.assert_close(names["same"].eval()(images), first(images))


def test_the_loop_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it saves is the network that it leaves."""
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
    exec(compile(LOOP, "README.md", "exec"), names)
    loaded = load_pruned("pruned.pth.tar").eval()
    torch.testing.assert_close(loaded(images), model.eval()(images))
    assert sum(p.numel() for p in model.parameters()) < 272_474
