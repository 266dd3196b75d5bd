"""Every recipe runs for two iterations: the command of its header, with few small images, on the CPU.

The entry points are those of the command line, called in this process; `multiproc.py` has tests of its own.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.jobs import iterations
from support.miniatures import Miniatures
from support.recipes import explainer_recipes, header, main_recipes, settings
from support.small_commands import SmallCommand, small

from image_classification.models import read_safely

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> Miniatures:
    return Miniatures(tmp_path_factory.mktemp("recipes"))


Run = Callable[[Path], tuple[SmallCommand, Path]]


@pytest.fixture
def run_recipe(
    miniatures: Miniatures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Run]:
    """Runs the command of a recipe's header; the command in miniature and the folder that it wrote."""
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(miniatures.folder / "cache"))

    def run(path: Path) -> tuple[SmallCommand, Path]:
        command = small(header(path)["Command"], miniatures, tmp_path / "run")
        status = command.run_here()
        assert status == 0, f"{command.words}\n{capsys.readouterr().err[-2000:]}"
        (written,) = (tmp_path / "run").rglob("config.yaml")
        return command, written.parent

    yield run
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # a selector's checkpoints are hundreds of megabytes


def assert_recipe_was_in_force(path: Path, command: SmallCommand, workspace: Path) -> None:
    """What the run says of itself is what the recipe says, wherever no flag of the miniature changes it."""
    ran = settings(workspace / "config.yaml")
    expected = {key: value for key, value in settings(path).items() if not command.given(f"--{key}")}
    assert len(expected) >= 2
    assert {key: ran[key] for key in expected} == expected
    assert len(iterations(workspace / "report.json")) == 2


@pytest.mark.parametrize("path", main_recipes(), ids=lambda path: path.stem)
def test_recipe_of_the_main_job(path: Path, run_recipe: Run) -> None:
    command, workspace = run_recipe(path)
    assert_recipe_was_in_force(path, command, workspace)
    recipe, saved = settings(path), read_safely(workspace / "checkpoint.pth.tar")
    assert saved["arch"] == recipe["arch"]
    callbacks = saved["callbacks"]
    if recipe.get("iterative-pruning"):
        assert callbacks["pruning"]["completed"] >= 1
    if "one-shot-pruning" in recipe:
        assert saved["state_dict"]["features.0.weight"].shape[0] == math.floor(0.7 * 64)
    if "pruning-method" in recipe:
        assert callbacks["learned_pruning"]["done"]
        share = callbacks["learned_pruning"]["record"]["share"]["macs"]
        assert share <= float(recipe["budget"][0].removeprefix("macs=")) + 1e-6
    if "unstructured-pruning" in recipe:
        assert callbacks["unstructured"]["completed"] == 1
    assert ("distill" in callbacks) == command.given("--teacher")


@pytest.mark.parametrize("path", explainer_recipes(), ids=lambda path: path.stem)
def test_recipe_of_an_explainer(path: Path, run_recipe: Run) -> None:
    command, workspace = run_recipe(path)
    assert_recipe_was_in_force(path, command, workspace)
    saved, kind = read_safely(workspace / "checkpoint.pth.tar"), path.stem.rpartition("_")[2]
    if "casm" in path.stem:
        assert kind.upper() == workspace.name
        assert "casm_training" in saved
    else:
        assert saved["callbacks"][kind]["arch"] == settings(path)["arch"]
