"""The tool that puts jobs through disasters: what it reads from them, and one of them that needs no rights."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import disasters
from image_classification.checkpoint_format import sealed


def test_what_was_kept_is_read(tmp_path: Path) -> None:
    assert disasters.kept(tmp_path) == "none"
    path = tmp_path / "L100" / "checkpoint.pth.tar"
    path.parent.mkdir()
    state = {"iteration": 4, "arch": "resnet20", "state_dict": {"w": torch.ones(2)}}
    torch.save(sealed(state), path)
    assert disasters.kept(tmp_path) == "4"
    path.write_bytes(path.read_bytes()[:-100])
    assert "Error" in disasters.kept(tmp_path), "torn"


def test_what_a_job_said_is_its_error_or_its_last_word(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("epoch 0\nerror: cannot write x\nthe launcher: rank 0 ended\n")
    assert disasters.last_error(log) == "error: cannot write x"
    log.write_text("epoch 0\nthe network to use: y\n\n")
    assert disasters.last_error(log) == "the network to use: y"


def test_a_row_says_what_came_of_it() -> None:
    row = disasters.Row("plain", "full", 2, "error: x", 0, "4", 0, [])
    assert disasters.as_line(row) == "| plain | full | 2 | error: x | 4 | the same |"
    row.differences, row.how = ["state_dict.w"], "immutable"
    assert disasters.as_line(row).startswith("| plain | full (immutable) |")
    assert disasters.as_line(row).endswith("| differs |")
    row.again = 1
    assert disasters.as_line(row).endswith("| ended with 1 |")


def test_a_full_disk_is_full_and_then_has_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system of its own, where this user may mount one."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(disasters.file_system(tmp_path / "disk", own=True))
        except (OSError, disasters.subprocess.CalledProcessError):
            pytest.skip("this user may mount nothing")
        process: Any = None
        undo, how = disasters.fill(process, tmp_path / "disk")
        assert not how
        with pytest.raises(OSError, match="No space"):
            (tmp_path / "disk" / "file").write_bytes(os.urandom(1 << 16))
        undo()
        (tmp_path / "disk" / "file").write_bytes(os.urandom(1 << 16))


@pytest.mark.slow
def test_a_second_job_is_refused_and_the_first_comes_through(tmp_path: Path) -> None:
    row = disasters.hit("plain", "twice", tmp_path, disasters.undisturbed("plain", tmp_path))
    assert (row.code, row.again, row.tracebacks) == (2, 0, 0)
    assert "another job is at work in it" in row.said
    assert row.how == "the first ended with 0"
    assert row.differences == []
