"""kill −9 at any moment, resume: the same final network bit for bit."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reliability.miniature_job import NAME, PLACES, count_calls, train
from support.jobs import Process, assert_same_training, checkpoint, finished, iterations, main_words

from image_classification.data.backends import dali
from image_classification.models import create_model
from pruning.pruner import Pruner

#: Where kills fall: function → how many of ten attempts, and the part of all calls within it, from the first on, that
#: one is drawn of: what happens in every step is killed in one of the next few, so that a resumed run comes to it.
REGIONS = {
    "TaskObjective.__call__": (2, 1 / 8),
    "Chooser.score": (1, 1 / 4),
    "Pruner.step": (2, 1 / 2),
    "ResumableLoop.save": (2, 1 / 4),
    "save_atomically": (2, 1 / 4),  # beside the training
    "Evaluator.__call__": (1, 1 / 2),
}
BACKENDS = [
    pytest.param(
        "dali-cpu", marks=pytest.mark.skipif(not dali.is_available(), reason="DALI is not installed")
    ),
    "pytorch",
    "resident",
]


@pytest.fixture(scope="module")
def processes(small_cache: None) -> Any:
    """Starts processes by forking a server that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reliability.miniature_job"])
    return context


def run(processes: Any, target: Any, *arguments: Any) -> int:
    """Exit code of a child process, negative for the signal that killed it."""
    child = processes.Process(target=target, args=arguments)
    child.start()
    child.join(timeout=600)
    assert child.exitcode is not None, "the training hangs"
    return child.exitcode


@pytest.fixture(scope="module")
def whole(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of the training that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(processes, train, folder) == 0
    payload = checkpoint(folder)
    assert [record["iteration"] for record in payload["callbacks"]["pruning"]["history"]] == [4, 8, 12]
    return payload


def assert_whole(folder: Path, whole: dict[str, Any]) -> None:
    """A run that came to its end after kills left what an uninterrupted one leaves, and nothing else."""
    payload = checkpoint(folder)
    assert_same_training(whole, payload)
    best = checkpoint(folder, "model_best.pth.tar")
    assert best["best_prec1"] == whole["best_prec1"]
    left = {path.name for path in folder.glob("*.tar*")}
    assert left == {NAME, "model_best.pth.tar", "checkpoint-1.pth.tar"}
    # The last attempt cleared away what the killed ones were writing.
    assert not list(folder.glob(".*.tmp"))


def workspaces(tmp_path: Path) -> Iterator[Path]:
    for number in range(1000):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        yield folder


def test_the_miniature_run_repeats_itself(processes: Any, whole: dict[str, Any], tmp_path: Path) -> None:
    assert run(processes, train, tmp_path) == 0
    assert_same_training(whole, checkpoint(tmp_path))


def test_a_resumed_run_has_the_choices_of_the_first(tmp_path: Path) -> None:
    """The trial of the groups may end otherwise on narrower layers: the first verdict is kept in the checkpoint."""
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=10)
    images = torch.randn(2, 3, 8, 8)
    first = Pruner(model, images, criterion="magnitude", search="uniform")
    first.graph.freeze(["layer3.1.conv1"], "failed its trial")
    resumed = Pruner(model, images, criterion="magnitude", search="uniform", state=first.state_dict())
    assert resumed.graph.frozen == first.graph.frozen
    assert resumed.graph.frozen["layer3.1.conv1"] == "failed its trial"


@pytest.mark.slow
def test_kills_within_steps_rewrites_saves_and_validation(
    processes: Any, whole: dict[str, Any], tmp_path: Path
) -> None:
    """20 kills at random Python calls; the same run is killed again and again until it comes through."""
    counted = tmp_path / "counted"
    counted.mkdir()
    assert run(processes, count_calls, counted, list(REGIONS)) == 0
    lines = [line.split() for line in (counted / "calls.txt").read_text().splitlines()]
    calls = {name: int(count) for name, count in lines}
    assert all(calls.values())
    chooser = random.Random(2024)
    deck = [function for function, (share, _) in REGIONS.items() for _ in range(share)]
    chooser.shuffle(deck)
    attempts = itertools.cycle(deck)
    kills = 0
    completed = 0
    folders = workspaces(tmp_path)
    folder = next(folders)
    while kills < 20 or completed < 2:
        function = next(attempts)
        within = round(calls[function] * REGIONS[function][1])
        code = run(processes, train, folder, function, chooser.randint(1, within))
        assert code in (0, -9)
        if code == -9:
            kills += 1
            continue
        completed += 1
        assert_whole(folder, whole)
        folder = next(folders)
    if (folder / NAME).exists():
        assert run(processes, train, folder) == 0
        assert_whole(folder, whole)
    places = "".join(path.read_text() for path in tmp_path.glob(f"run*/{PLACES}")).splitlines()
    assert len(places) >= kills >= 20  # two threads may both come to the place
    for function in REGIONS:
        assert any(function in place.split() for place in places), f"no kill fell into {function}"


@pytest.mark.slow
def test_kills_by_the_clock(processes: Any, whole: dict[str, Any], tmp_path: Path) -> None:
    """8 kills from outside at random times: also within kernels and within the operating system's writes."""
    chooser, kills = random.Random(7), 0
    folders = workspaces(tmp_path)
    folder = next(folders)
    while kills < 8:
        (folder / "ready").unlink(missing_ok=True)
        child = processes.Process(target=train, args=(folder,))
        child.start()
        while not (folder / "ready").exists():
            time.sleep(0.002)
        child.join(chooser.uniform(0.1, 3.0))
        child.kill()
        child.join()
        if child.exitcode == -9:
            kills += 1
            continue
        assert child.exitcode == 0
        assert_whole(folder, whole)
        folder = next(folders)
    assert run(processes, train, folder) == 0
    assert_whole(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_jobs_killed_in_mid_epoch(shapes: str, tmp_path: Path, backend: str) -> None:
    """The command line, the real loaders, augmentation, mixing and rewrites: killed once within the second epoch."""
    flags = {
        "data_backend": backend,
        "batch_size": 16,
        "workers": 2,
        "epochs": 2,
        "mixup": 0.2,
        "use_ema": 0.9,
        "auto_augment": "trivialaugment",
        "checkpoint_interval": 2,
        "resume": "auto",
        "calibration_size": 20,
        "pruning_step": 5,
        "pruning_delta": 0.1,
        "budget": "macs=0.6",
        "calibration_batches": 1,
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished(["main.py", *main_words(shapes, whole, "--iterative-pruning", **flags)], whole)
    words = ["main.py", *main_words(shapes, cut, "--iterative-pruning", **flags)]
    report = cut / "experiment_raport.json"
    stop_at = (1, random.Random(backend).randrange(2, 8))
    with Process(words, tmp_path / "first") as process:
        process.until(lambda: stop_at in iterations(report))
        process.kill()
    before = checkpoint(cut)
    assert 11 < before["iteration"] < 22
    resumed = finished(words, tmp_path / "second")
    assert f"continuing from {cut / NAME}" in resumed.out + resumed.err
    assert_same_training(checkpoint(whole), checkpoint(cut))
    assert (whole / "config.yaml").read_text().replace(str(whole), str(cut)) == (
        cut / "config.yaml"
    ).read_text()
