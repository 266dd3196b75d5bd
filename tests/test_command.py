"""`lucidprune`: every verb under one command, its defaults, and recipes by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.commands import ROOT, status_of

from explainers.__main__ import VERBS as EXPLAIN
from image_classification.__main__ import VERBS as DATA
from image_classification.cli import parse_config
from image_classification.data.data_config import DataConfig
from image_classification.data.layouts import open_dataset
from image_classification.data.split import split
from image_classification.recipes import recipes
from pruning.__main__ import ALL_VERBS, VERBS, lucidprune
from pruning.training.main_job import EVALUATE, PRUNE, TRAIN, MainConfig


def test_help_lists_everything_without_torch() -> None:
    assert {*DATA, *VERBS} < ALL_VERBS.keys()
    code = (
        "import sys; from pruning.__main__ import lucidprune; "
        "print(lucidprune(sys.argv[1:]), 'torch' in sys.modules)"
    )
    for words, verbs in (([], ALL_VERBS), (["explain"], EXPLAIN)):
        command = [sys.executable, "-c", code, *words, "--help"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        assert shown[-1] == "0 False"
        assert verbs.keys() <= {line.split()[0] for line in shown if line.startswith("  ")}


def test_an_unknown_verb_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert lucidprune(["explain", "atribute"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "lucidprune explain: error: unknown verb 'atribute'; did you mean attribute?"
    assert len(shown) == 2


@pytest.mark.parametrize(
    ("words", "iterative"),
    [
        (["shapes"], True),
        (["shapes", "--budget", "macs=0.4"], True),
        (["shapes", "--one-shot-pruning", "0.4"], False),
        (["shapes", "--unstructured-pruning", "0.4"], False),
        (["--config", "imagenet_resnet50_isp"], False),
    ],
)
def test_prune_is_iterative_unless_told_otherwise(words: list[str], iterative: bool) -> None:
    configs = PRUNE.parse(words, "lucidprune prune", "")
    assert configs.pruning.iterative_pruning == iterative
    assert configs.pruning.active or configs.unstructured.active


def test_train_and_evaluate() -> None:
    assert not TRAIN.parse(["shapes"], "", "").train.evaluate
    assert EVALUATE.parse(["shapes"], "", "").train.evaluate


def test_recipes_go_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    named = parse_config(MainConfig, ["--config", "imagenet_resnet50_prune"])
    assert named == parse_config(MainConfig, ["--config", str(ROOT / "configs/imagenet_resnet50_prune.yaml")])
    assert "explainers/imagenet_casm_l" in recipes()
    with pytest.raises(SystemExit):
        parse_config(MainConfig, ["--config", "imagenet_resnet5_prune"])
    assert "did you mean imagenet_resnet50_prune" in capsys.readouterr().err


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Class folders of 20 and 5 images."""
    for name, count in (("cat", 20), ("dog", 5)):
        for number in range(count):
            path = tmp_path / "images" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("copy", [False, True])
def test_class_folders_are_split(folders: Path, tmp_path: Path, copy: bool) -> None:
    report = split(folders, tmp_path / "parts", share=0.2, copy=copy)
    assert (report.num_train, report.num_val) == ({"cat": 16, "dog": 4}, {"cat": 4, "dog": 1})
    dataset = open_dataset(DataConfig(data=str(tmp_path / "parts")).data)
    assert (len(dataset.train), len(dataset.val), dataset.num_classes) == (20, 5, 2)
    found = sorted((tmp_path / "parts").rglob("*.png"))
    assert all(path.is_symlink() != copy for path in found)
    originals = sorted(path.read_bytes() for path in folders.rglob("*.png"))
    assert sorted(path.read_bytes() for path in found) == originals


def test_the_same_images_are_held_out_when_others_come(folders: Path, tmp_path: Path) -> None:
    split(folders, tmp_path / "first", share=0.2)
    Image.new("RGB", (8, 8)).save(folders / "dog" / "new.png")
    split(folders, tmp_path / "second", share=0.2)
    held_out = [
        {path.name for path in (tmp_path / part / "val/dog").iterdir()} for part in ("first", "second")
    ]
    assert held_out[0] == held_out[1] or held_out[1] - held_out[0] == {"new.png"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere", "out"], "there is no directory nowhere"),
        (["{images}", "{images}/out"], "lies within"),
        (["{images}", "{images}"], "that is DIRECTORY"),
        (["{images}", "out", "--share", "1"], "--share 1.0"),
        (["{images}/cat", "out"], "no class folders"),
    ],
)
def test_what_cannot_be_split_is_refused(
    folders: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(lucidprune, ["split", *(word.format(images=folders) for word in words)]) == 2
    assert told in capsys.readouterr().err
