"""The page "From the papers' commands to ours": every cell of the column "ours" is parsed, and run in miniature.

Commands run in this process by the functions that the command line calls; those with `multiproc.py` in processes of
their own. A cell of flags alone is run with the command that it belongs to.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.commands import ROOT
from support.jobs import iterations
from support.miniatures import Miniatures, NamesOnly
from support.recipes import recipe_of
from support.small_commands import SmallCommand, small

from image_classification.models import read_safely

PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
#: Cell of flags alone → the beginning of the command that they go with, and values where the cell has none.
FLAGS = {
    "the same names: `--lamda`, `--smoothness-loss-coeff`, `--temperature`": (
        "python -m explainers train-selector ",
        "--lamda 0.3 --smoothness-loss-coeff 0.002 --temperature 0.7",
    ),
    "`--stochastic --drop-percent 0.3`": (
        "python main.py DATA --arch vgg16_bn_voc_x8 --multi-label --teacher ",
        "--stochastic --drop-percent 0.3",
    ),
}


def cells() -> list[str]:
    """The column "ours" of all tables of the page."""
    rows = [
        re.split(r" *(?<!\\)\| *", line.strip("| ")) for line in PAGE.splitlines() if line.startswith("|")
    ]
    return [row[-1] for row in rows if not row[-1].startswith("ours") and set(row[-1]) != {"-"}]


def commands() -> list[str]:
    """Every cell as a command."""
    found = {cell: re.fullmatch(r"(?:[^`]*: )?`(python [^`]+)`", cell) for cell in cells()}
    whole = {cell: match[1] for cell, match in found.items() if match is not None}
    others = {
        cell: next(command for command in whole.values() if command.startswith(start)) + f" {flags}"
        for cell, (start, flags) in FLAGS.items()
    }
    return [(whole | others)[cell] for cell in cells()]


def name_of(command: str) -> str:
    return re.sub(r"\W+", "_", command.removeprefix("python "))[:90]


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> Miniatures:
    return Miniatures(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_the_page_has_commands() -> None:
    assert len(cells()) == len(commands()) >= 21
    assert {command.split()[3] for command in commands() if " -m explainers " in command} == {
        "train-predictor",
        "train-selector",
        "visualize",
        "localize",
        "train-casm",
        "score-casm",
        "eval-casm",
        "plot-casm",
    }


@pytest.mark.parametrize("command", commands(), ids=name_of)
def test_every_word_is_understood(command: str, tmp_path: Path) -> None:
    """By the parser of the job that would run it; where a recipe is named, its settings arrive."""
    made = small(command, NamesOnly(tmp_path), tmp_path / "run")
    configs = made.parse()
    recipe = recipe_of(command.split())
    if recipe:
        assert configs.model.arch == recipe["arch"]
        assert configs.train.epochs == recipe["epochs"]
    if made.given("--lamda"):
        weights = configs.explainer.weights(224)
        assert (weights.area, weights.smoothness, weights.temperature) == (0.3, 0.002, 0.7)
    if made.given("--stochastic"):
        assert (configs.distill.stochastic, configs.distill.drop_percent) == (True, 0.3)


def commands_to_run() -> list[str]:
    """Commands without a recipe, and the first with one; test_recipes_run.py runs every recipe."""
    with_recipe = [command for command in commands() if recipe_of(command.split())]
    return [command for command in commands() if command not in with_recipe[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("command", commands_to_run(), ids=name_of)
def test_it_runs(
    command: str,
    miniatures: Miniatures,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(miniatures.folder / "cache"))
    workspace.mkdir()
    monkeypatch.chdir(workspace)
    made = small(command, miniatures, workspace)
    if made.launched:
        status, output = made.run_apart(miniatures.folder / "cache")
    else:
        status = made.run_here()
        captured = capsys.readouterr()
        output = captured.out + captured.err
    assert status == 0, f"{made.words}\n{output[-3000:]}"
    if made.given("--evaluate"):
        assert "val.map" in output if made.given("--multi-label") else "val.top1" in output
    elif made.program == "main.py" or made.program.startswith("train-"):
        assert_trained(made)
    else:
        assert_looked(made, output)


def assert_trained(command: SmallCommand) -> None:
    """Two iterations, and every flag of the command that changes what is trained has left its mark."""
    (report,) = command.workspace.rglob("report.json")
    assert len(iterations(report)) == 2
    (path,) = command.workspace.rglob("checkpoint.pth.tar")
    saved = read_safely(path)
    marks = saved.get("callbacks", {})
    assert ("distill" in marks) == command.given("--teacher")
    assert ("unstructured" in marks) == command.given("--unstructured-pruning")
    assert ("learned_pruning" in marks) == command.given("--pruning-method")
    for verb, mark in (("train-predictor", "predictor"), ("train-selector", "selector")):
        assert (mark in marks) == (command.program == verb)
    assert ("casm_training" in saved) == (command.program == "train-casm")
    if command.given("--iterative-pruning"):
        assert marks["pruning"]["completed"] >= 1
    if command.given("--unstructured-pruning"):
        weights = torch.cat(
            [value.flatten() for name, value in saved["state_dict"].items() if value.dim() > 1]
        )
        assert (weights == 0).double().mean() == pytest.approx(0.2, abs=0.01)


def assert_looked(command: SmallCommand, output: str) -> None:
    """Figures in a table, or pages of images."""
    words = {
        "localize": ("(?:gcam|gradcam)", "auc"),
        "score-casm": ("f1a", "om", "centre"),
        "eval-casm": ("inpainted", "model_best"),
    }
    for word in words.get(command.program, ()):
        assert re.search(rf"\b{word}\b", output), f"{word} is not in\n{output}"
    pages = {"visualize": "masks.png", "plot-casm": "plots/page-*.png"}
    if command.program in pages:
        assert list(command.workspace.glob(pages[command.program]))
