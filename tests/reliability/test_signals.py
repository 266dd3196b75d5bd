"""Signals and dead ranks: a job saves and says so, or stops with the reason, or starts again and ends the same."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support.jobs import (
    Process,
    assert_same_training,
    checkpoint,
    finished,
    iterations,
    launcher_words,
    main_words,
)

from image_classification.exit_codes import EXIT_SAVED

REPORT = "experiment_raport.json"
FLAGS = {
    "epochs": 2,
    "batch_size": 10,
    "checkpoint_interval": 3,
    "use_ema": 0.9,
    "mixup": 0.2,
    "resume": "auto",
    "data_backend": "resident",
}


def words(shapes: str, workspace: Path, *launcher: str, ranks: int = 2) -> list[str]:
    """20 iterations over 2 ranks, or 40 of one process."""
    start = ["main.py"] if ranks == 1 else launcher_words(workspace / "logs", *launcher, ranks=ranks)
    return [*start, *main_words(shapes, workspace, **FLAGS)]


@pytest.fixture(scope="module")
def whole(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that nobody disturbs."""
    workspace = tmp_path_factory.mktemp("whole")
    finished(words(shapes, workspace), workspace / "screen")
    return workspace


def reached(workspace: Path, step: tuple[int, int]) -> bool:
    return step in iterations(workspace / REPORT)


def rank_process(workspace: Path, rank: int) -> int:
    """Process id of a rank of the job that writes to this workspace."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(workspace).encode() in command and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"rank {rank} does not run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_one_process_saves_and_continues(shapes: str, tmp_path: Path, number: signal.Signals) -> None:
    workspace = tmp_path / "run"
    with Process(words(shapes, workspace, ranks=1), tmp_path / "screen") as process:
        process.until(lambda: reached(workspace, (0, 4)))
        process.popen.send_signal(number)
        assert process.wait() == EXIT_SAVED
    assert f"stopped by {number.name} after iteration" in process.err
    assert "--resume auto continues" in process.err
    assert "Traceback" not in process.err + process.out
    stopped_at = checkpoint(workspace)["iteration"]
    assert stopped_at >= 5
    assert f"after iteration {stopped_at};" in process.err
    if number == signal.SIGTERM:
        finished(words(shapes, workspace, ranks=1), tmp_path / "again")
        undisturbed = tmp_path / "undisturbed"
        finished(words(shapes, undisturbed, ranks=1), tmp_path / "undisturbed_screen")
        assert_same_training(checkpoint(undisturbed), checkpoint(workspace))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_save_and_continue(shapes: str, whole: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "run"
    with Process(words(shapes, workspace), tmp_path / "screen") as process:
        process.until(lambda: reached(workspace, (0, 1)))
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait() == EXIT_SAVED
    assert "Traceback" not in process.err + process.out
    assert 2 <= checkpoint(workspace)["iteration"] < 20
    finished(words(shapes, workspace), tmp_path / "again")
    assert_same_training(checkpoint(whole), checkpoint(workspace))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pytorch", "resident"])
def test_ctrl_c(shapes: str, tmp_path: Path, backend: str) -> None:
    """A terminal sends SIGINT to the process and to its data workers."""
    workspace = tmp_path / "run"
    arguments = main_words(shapes, workspace, **(FLAGS | {"data_backend": backend, "workers": 2}))
    with Process(["main.py", *arguments], tmp_path / "screen") as process:
        process.until(lambda: reached(workspace, (0, 4)))
        os.killpg(process.popen.pid, signal.SIGINT)
        assert process.wait(60) == 130
    assert "interrupted; the last checkpoint is whole, --resume auto continues from it" in process.err
    assert "Traceback" not in process.err + process.out
    assert checkpoint(workspace)["iteration"] >= 3


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
def test_start_up_stops_with_a_word(shapes: str, tmp_path: Path, ranks: int) -> None:
    """There is no checkpoint yet, and none is needed."""
    workspace = tmp_path / "run"
    with Process(words(shapes, workspace, ranks=ranks), tmp_path / "screen") as process:
        process.until((workspace / "config.yaml").is_file)  # written before the network is made
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait() == EXIT_SAVED
    logs = (workspace / "logs").glob(
        "rank_*.log"
    )  # a rank may have noticed first that the other one has gone
    shown = process.out + process.err + "".join(log.read_text() for log in logs)
    assert "stopped by SIGTERM" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_rank_stops_the_job(shapes: str, tmp_path: Path) -> None:
    workspace = tmp_path / "run"
    with Process(words(shapes, workspace), tmp_path / "screen") as process:
        process.until(lambda: reached(workspace, (0, 5)))
        os.kill(rank_process(workspace, 1), signal.SIGKILL)
        begin = time.monotonic()
        assert process.wait() == 128 + signal.SIGKILL
        assert time.monotonic() - begin < 30
    assert "multiproc: rank 1 on" in process.err
    assert "was killed by signal 9 (SIGKILL" in process.err
    assert process.err.splitlines()[-1].startswith("multiproc: rank 1 on")
    assert "another rank ended" in process.out
    assert "Traceback" not in process.out + process.err
    assert checkpoint(workspace)["iteration"] in (3, 6)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_rank_is_started_again(shapes: str, whole: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "run"
    with Process(words(shapes, workspace, "--max-restarts", "1"), tmp_path / "screen") as process:
        process.until(lambda: reached(workspace, (0, 5)))
        os.kill(rank_process(workspace, 1), signal.SIGKILL)
        assert process.wait() == 0, process.out + process.err
    assert "starting all ranks again (restart 1 of 1)" in process.err
    assert f"continuing from {workspace / 'checkpoint.pth.tar'}" in process.out
    assert_same_training(checkpoint(whole), checkpoint(workspace))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_bad_input_among_ranks_is_told_once(tmp_path: Path) -> None:
    workspace = tmp_path / "run"
    with Process(words(str(tmp_path / "absent"), workspace), tmp_path / "screen") as process:
        assert process.wait() == 2
    shown = process.out + process.err
    assert f"error: the data set '{tmp_path / 'absent'}' does not exist" in shown
    assert "Traceback" not in shown
    assert "Traceback" not in (workspace / "logs" / "rank_1.log").read_text()
