"""A job goes on with fewer or more ranks, also where they see other disks: rank 0 decides, and sends what they lack."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import ROOT
from support.jobs import figures, finished, main_words

from image_classification.models import read_safely

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

SETTINGS = {
    "epochs": 2,
    "data_backend": "pytorch",
    "lr": 0.01,
    "optimizer_batch_size": 16,
    "checkpoint_interval": 1,
    "pruning_step": 3,
    "pruning_delta": 0.1,
    "budget": "macs=0.6",
    "pruning_criterion": "magnitude",
    "pruning_search": "uniform",
    "repair": "none",
}
DATA = "shapes:train=140,val=41"
WORKSPACE = Path("run")


class Ranks:
    """The ranks of a job, each in a folder of its own, as on machines that share no disk.

    Args:
        folder: Rank 0's is `node_0` in it.
        world_size: Number of ranks, which share the 16 images of an optimizer step.
        batch_size: Images of a pass of each; of what is missing it takes more passes.
        environment: Variables on top of the present ones.
    """

    def __init__(self, folder: Path, world_size: int, batch_size: int, **environment: str) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        group = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        group |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"} | environment
        switches = ["--iterative-pruning", "--resume", "auto"]
        self.report = folder / "node_0" / WORKSPACE / "experiment_raport.json"
        self.checkpoint = folder / "node_0" / WORKSPACE / "checkpoint.pth.tar"
        self.processes = []
        for rank in range(world_size):
            node = folder / f"node_{rank}"
            node.mkdir(parents=True, exist_ok=True)
            command = main_words(DATA, WORKSPACE, *switches, batch_size=batch_size, **SETTINGS)
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(ROOT / "main.py"), *command],
                    cwd=node,
                    env=os.environ | group | {"RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def kill_after(self, iteration: int) -> None:
        """SIGKILL to all, once a checkpoint of that iteration or a later one is there."""
        while not self.checkpoint.is_file() or read_safely(self.checkpoint)["iteration"] < iteration:
            assert all(process.poll() is None for process in self.processes), self.output()
            time.sleep(0.05)
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        self.output()

    def output(self) -> str:
        """What all have printed, once they have ended."""
        return "\n".join(process.communicate(timeout=500)[0] for process in self.processes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"LUCIDPRUNE_CACHE": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(ROOT)}


def losses(report: Path) -> dict[tuple[int, int], float]:
    """Loss by (epoch, step); of a step that was done twice the last time."""
    return dict(figures(report, "train.loss"))


@pytest.mark.parametrize(("sizes", "batch_size"), [((2, 1, 2), 8), ((8, 4, 2), 2)])
def test_shrunk_and_grown_job_trains_on_the_same_images(
    tmp_path: Path, cache: dict[str, str], sizes: tuple[int, int, int], batch_size: int
) -> None:
    """Killed with some ranks, gone on by fewer, killed, gone on by two of which one has no checkpoint.

    Losses are those of a job that one process ran to the end: the same images in the same order, the same channels.
    """
    words = main_words(DATA, tmp_path / "whole", "--iterative-pruning", batch_size=batch_size, **SETTINGS)
    finished(["main.py", *words], tmp_path / "whole", **cache)
    expected = losses(tmp_path / "whole" / "experiment_raport.json")
    for world_size, iteration in zip(sizes, (3, 7), strict=False):
        job = Ranks(tmp_path, world_size, batch_size, **cache)
        job.kill_after(iteration)
    before = read_safely(job.checkpoint)
    job = Ranks(tmp_path, sizes[-1], batch_size, **cache)
    said = job.output()
    assert [process.returncode for process in job.processes] == [0, 0], said
    assert "not the same, or not there, for rank(s) 1: rank 0 sends it" in said
    assert not (tmp_path / "node_1" / WORKSPACE / "checkpoint.pth.tar").exists()
    got = losses(job.report)
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, rel=5e-3)
    after = read_safely(job.checkpoint)
    assert before["iteration"] < after["iteration"]
    assert before["config"]["calibration_size"] == after["config"]["calibration_size"] > 0
