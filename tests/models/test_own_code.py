"""Networks of a user's own by name, on the command line and in files: built only where the user has named them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.commands import ROOT

from image_classification.checkpoint import save_atomically
from image_classification.models import (
    ModelError,
    arch_info,
    create_model,
    identity_of,
    model_for_weights,
    read_safely,
)
from image_classification.trusted_code import trust
from pruning import load_pruned, prune, save_pruned

CODE = """
from torch import nn
print("imported")

class Net(nn.Sequential):
    image_size = 16

    def __init__(self, num_classes=4, width=8):
        super().__init__(
            nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
        )

def fixed():
    return Net(5)

def no_network():
    return 3

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"users_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_it_is_built_with_what_it_takes(module: str) -> None:
    model = create_model(f"{module}:Net", num_classes=7, width=6)
    assert (model[0].out_channels, model[-1].out_features) == (6, 7)
    assert identity_of(model).arch == f"{module}:Net"
    assert create_model(f"{module}:fixed", num_classes=9)[-1].out_features == 5
    assert arch_info(f"{module}:Net").image_size == 16


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("Nothing", {}, "Nothing"),
        ("number", {}, r"\bint\b"),
        ("no_network", {}, r"nn\.Module"),
        ("Net", {"depth": 3}, "depth"),
    ],
)
def test_what_cannot_be_built_is_told(module: str, name: str, options: dict[str, int], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        create_model(f"{module}:{name}", **options)
    with pytest.raises(ModelError, match="'nowhere_at_all'"):
        create_model("nowhere_at_all:Net")


def test_a_file_alone_runs_no_code(module: str, tmp_path: Path) -> None:
    model = create_model(f"{module}:Net", num_classes=4)
    prune(model, torch.randn(2, 3, 16, 16), budget=0.6)
    save_pruned("small.pth", model)
    images = torch.randn(3, 3, 16, 16)
    wanted = model.eval()(images)

    other = f"{module}_of_another"  # which nobody has named
    (tmp_path / f"{other}.py").write_text(CODE)
    payload = read_safely("small.pth")
    payload["structure"]["arch"] = f"{other}:Net"
    save_atomically(payload, tmp_path / "small.pth")
    with pytest.raises(ModelError, match=f"--plugin {other}"):
        load_pruned("small.pth")
    with pytest.raises(ModelError, match=f"--plugin {other}"):
        model_for_weights(None, "small.pth")
    assert other not in sys.modules
    trust([f"--arch={other}:Net"])
    torch.testing.assert_close(load_pruned("small.pth").eval()(images), wanted)


@pytest.mark.slow
def test_training_and_pruning_by_name(module: str, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)

    data = "shapes:train=96,val=24,seed=3"
    trained = run(
        str(ROOT / "main.py"), data, "--arch", f"{module}:Net", "--epochs", "1", "--one-shot-pruning", "0.4",
        "--workspace", "run", "--batch-size", "16", "--workers", "0",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-2000:]
    refused = run("-m", "pruning", "export", "run/checkpoint.pth.tar", "--format", "state-dict")
    assert refused.returncode == 2
    assert f"--plugin {module}" in refused.stderr
    assert "imported" not in refused.stdout
    named = run(
        "-m", "pruning", "export", "run/checkpoint.pth.tar", "--format", "torch-export", "--plugin", module
    )
    assert named.returncode == 0, named.stderr[-2000:]
