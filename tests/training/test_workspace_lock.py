"""One job per workspace: the second is refused with the first one's name; what dead jobs leave is nobody's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.commands import ROOT

from image_classification import workspace_lock
from image_classification.config import ConfigError
from image_classification.workspace_lock import FILENAME, WorkspaceLock

HOLD = """
import sys, time
from pathlib import Path
from image_classification.workspace_lock import WorkspaceLock
lock = WorkspaceLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def held_elsewhere(workspace: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLD, str(workspace)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def write_foreign(workspace: Path, **changes: object) -> Path:
    """The lock file of a job on another machine."""
    path = workspace / FILENAME
    owner = {"pid": 7, "host": "node12", "boot": "b", "began": "1", "time": "2026-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(owner | changes))
    return path


def test_a_second_job_is_refused_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    process = held_elsewhere(tmp_path)
    host = socket.gethostname()
    with pytest.raises(ConfigError, match=rf"workspace=.*process {process.pid} on {host}, since 20"):
        WorkspaceLock(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / FILENAME).exists()
    lock = WorkspaceLock(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        WorkspaceLock(tmp_path / "." / "")
    child = os.fork()
    if child == 0:
        os._exit(0)  # a data worker that ends takes no lock with it
    os.waitpid(child, 0)
    lock.release()
    lock.release()
    assert not (tmp_path / FILENAME).exists()
    WorkspaceLock(tmp_path).release()


def test_another_machine_is_believed_as_long_as_it_shows_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace_lock, "STALE_AFTER", 0.5)
    path = write_foreign(tmp_path)
    begin = time.monotonic()
    WorkspaceLock(tmp_path).release()
    assert 0.3 < time.monotonic() - begin < 5
    path = write_foreign(tmp_path)
    os.utime(path, (1, 1))
    monkeypatch.setattr(workspace_lock, "STALE_AFTER", 30.0)
    begin = time.monotonic()
    WorkspaceLock(tmp_path).release()
    assert time.monotonic() - begin < 5, "too old to wait for"
    path = write_foreign(tmp_path)
    beat = threading.Timer(0.2, lambda: os.utime(path))
    beat.start()
    with pytest.raises(ConfigError, match="process 7 on node12, since 2026-01-01"):
        WorkspaceLock(tmp_path)
    beat.join()


def test_without_locks_of_the_file_system_the_process_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace_lock, "fcntl", None)
    path = tmp_path / FILENAME
    lock = WorkspaceLock(tmp_path)
    here = json.loads(path.read_text())
    lock.release()
    path.write_text(json.dumps(here))
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        WorkspaceLock(tmp_path)
    path.write_text(json.dumps(here | {"began": "another process of this number"}))
    WorkspaceLock(tmp_path).release()


def test_a_workspace_that_is_removed_takes_the_lock_with_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = WorkspaceLock(tmp_path / "run")
    (tmp_path / "run" / FILENAME).unlink()
    (tmp_path / "run").rmdir()
    (tmp_path / "run").mkdir()
    lock.release()
    WorkspaceLock(tmp_path / "run").release()
