"""Every recipe of the main job runs for two iterations: small pictures, one process, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.commands import ROOT, SHORT
from support.pictures import write_jpegs

from image_classification.cli import parse_config
from image_classification.models import create_model
from main import SECTIONS, main
from pruning.structure import save_pruned

RECIPES = sorted(
    path
    for path in (ROOT / "configs").glob("*.yaml")
    if "selector" not in path.read_text() and "teacher" not in path.read_text()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipes")
    for split, count in (("train", 30), ("val", 3)):
        for number in range(4):
            place = root / "data" / split / f"n{number:08d}"
            place.mkdir(parents=True)
            write_jpegs(place, [(60 + 7 * (i + number) % 40, 70 + 11 * i % 50) for i in range(count)])
    return root


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_iterations(
    path: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(folder / "cache"))
    words = [str(folder / "data"), "--config", str(path)]
    configs = parse_config(SECTIONS, words)
    if "pretrained-weights" in path.read_text():
        torch.manual_seed(0)
        model = configs["model"]
        save_pruned(
            tmp_path / "start.pth.tar",
            create_model(model.arch, num_classes=4, model_config=model.model_config),
        )
        words += ["--pretrained-weights", str(tmp_path / "start.pth.tar")]
    words += [word for flag in SHORT.items() for word in flag] + ["--data-backend", "pytorch"]
    if configs["pruning"].iterative_pruning:
        words += ["--pruning-step", "1", "--pruning-delta", "0.25", "--calibration-batches", "1"]
    status = main([*words, "--workspace", str(tmp_path / "run")])
    assert status == 0, f"{words}\n{capsys.readouterr().err[-2000:]}"
    assert (tmp_path / "run" / "config.yaml").is_file()
