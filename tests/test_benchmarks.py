"""The benchmarks: every script runs with `--quick` wherever it is started, and says what it was measured on."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from support.commands import ROOT, run
from support.miniatures import SHAPES, write_imagenet

from explainers.aem.masks import MASK_PRESETS
from explainers.aem.saved_selector import save_selector
from explainers.aem.selector import Selector, design_selector
from image_classification.models import create_model
from pruning.files.saved_network import save_pruned

SIZE = 48  # of the images of shapes
#: `same_training`, `kill_campaign` and `disasters` compare jobs, `gpu_check` needs a GPU; all have tests of their own.
#: `first_hour` makes an environment, and runs what tests of the wheel and of the docs run.
SCRIPTS = sorted(
    {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    - {"same_training", "kill_campaign", "disasters", "first_hour", "gpu_check"}
)
#: Script → what it needs besides `--quick`; {folder}, {data} and the files are the fixture's.
NEEDS = {
    "casm": "--checkpoint {classifier} --workspace {folder}/casm",
    "explanations": "--checkpoint {classifier}",
    "loading": "{images}",
    "peers": "--workspace {folder}/peers",
    "peers_speed": "--workspace {folder}/peers --plot {folder}/curves.svg",
    "preserve": "--workspace {folder}/preserve",
    "pruning_quality": "{data} --workspace {folder}/quality",
    "repair_quality": "--workspace {folder}/repair_quality",
    "rewrite": "{data}",
    "selector": "{data} --pretrained-weights {classifier} --workspace {folder}/selector",
    "steering": "{data} --pretrained-weights {classifier} --selector {selector} --workspace {folder}/steering",
    "training": "{images}",
}
#: Script → the one whose workspace it reads, which comes earlier in `SCRIPTS`.
AFTER = {"peers_speed": "peers"}
HEAD = ["benchmark", "command", "commit", "n", "settings", "environment"]

Runs = dict[str, "Future[CompletedProcess[str]]"]


def write_networks(folder: Path) -> dict[str, Path]:
    """A classifier of shapes and its selector, which have learned nothing."""
    torch.manual_seed(0)
    files = {name: folder / f"{name}.pth.tar" for name in ("classifier", "selector")}
    model = create_model("resnet20", num_classes=12, image_size=SIZE)
    save_pruned(files["classifier"], model)
    geometry = MASK_PRESETS["cifar"].scaled(SIZE)
    images = torch.zeros(1, 3, SIZE, SIZE)
    design = design_selector(
        model.eval(), images, kind="rbf", geometry=geometry, num_classes=12, decoder="light"
    )
    save_selector(files["selector"], Selector(design), model)
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    """All scripts at work, two at a time; their results are {folder}/NAME.json."""
    places = {
        "folder": folder,
        "images": write_imagenet(folder / "imagenet", num_train=8),
        "data": SHAPES,
        **write_networks(folder),
    }

    started: Runs = {}

    def start(name: str) -> CompletedProcess[str]:
        if name in AFTER:
            started[AFTER[name]].result()
        words = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick"]
        words += ["--output", str(folder / f"{name}.json"), *NEEDS.get(name, "").format(**places).split()]
        return run(words, cache=folder / "cache", timeout=600, cwd=folder)

    with ThreadPoolExecutor(2) as pool:
        for name in SCRIPTS:
            started[name] = pool.submit(start, name)
    return started


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first test waits for all of them
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_quick_run_writes_results_under_the_common_head(name: str, runs: Runs, folder: Path) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert list(report)[: len(HEAD)] == HEAD
    assert len(report) > len(HEAD)
    assert report["benchmark"] == name
    assert report["command"].startswith(f"python benchmarks/{name}.py --quick")
    assert report["n"] >= 1
    assert report["settings"]["quick"] is True
    environment = report["environment"]
    assert {"date", "processor", "num_cores", "num_threads", "load_average", "gpu", "torch"} <= set(
        environment
    )


def test_make_benchmarks_names_scripts_that_need_nothing() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = re.search(r"^BENCHMARKS := (.*)$", makefile, re.MULTILINE)
    assert names is not None
    assert set(names.group(1).split()) <= set(SCRIPTS)
    assert set(names.group(1).split()) & set(NEEDS) <= {"training"}  # its images are optional
