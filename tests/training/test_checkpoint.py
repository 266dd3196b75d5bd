"""Checkpoints: atomic, rotated, never destroying an older run, and clear errors for files that cannot be continued."""

from __future__ import annotations

import errno
import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.training import MakeTrainer

from image_classification.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    capture_rng,
    restore_rng,
    save_atomically,
)
from image_classification.config import ConfigError
from image_classification.distributed import Distributed
from image_classification.file_writing import atomic_file
from image_classification.models import WeightsError, read_safely
from image_classification.resumable import read_resumable


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def checkpointer(folder: Path, **settings: object) -> Checkpointer:
    return Checkpointer(CheckpointConfig(workspace=folder, **settings), Distributed(), lambda text: None)


def test_gathering_without_a_number_keeps_all(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(epochs=3, checkpoint={"gather_checkpoints": -1}).fit()
    gathered = {name for name in names(tmp_path) if name.startswith("checkpoint-")}
    assert gathered == {f"checkpoint-{epoch}.pth.tar" for epoch in range(3)}
    assert read_safely(tmp_path / "checkpoint-1.pth.tar")["epoch"] == 2


def test_gathering_with_a_number_keeps_the_last(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(epochs=4, checkpoint={"gather_checkpoints": 2}).fit()
    gathered = {name for name in names(tmp_path) if name.startswith("checkpoint-")}
    assert gathered == {"checkpoint-2.pth.tar", "checkpoint-3.pth.tar"}


def test_names_and_switch(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(epochs=1, workspace=tmp_path / "a", checkpoint={"checkpoint_filename": "mine.pth"}).fit()
    assert {"mine.pth", "model_best.pth.tar"} <= names(tmp_path / "a")
    make_trainer(epochs=1, workspace=tmp_path / "b", checkpoint={"checkpoints": False}).fit()
    assert not (tmp_path / "b").exists()


def test_a_fresh_run_keeps_the_files_of_an_older_one(tmp_path: Path) -> None:
    for name in ("checkpoint.pth.tar", "model_best.pth.tar", "checkpoint-7.pth.tar"):
        (tmp_path / name).write_bytes(b"precious")
    said: list[str] = []
    files = names(tmp_path)
    fresh = Checkpointer(CheckpointConfig(workspace=tmp_path), Distributed(), said.append)
    fresh.prepare(None)
    assert names(tmp_path) == files, "a run may still be refused for a wrong flag"
    fresh.claim()
    assert names(tmp_path) == {f"{name}.previous-1" for name in files}
    fresh.claim()
    assert len(said) == 3, "once"
    assert "checkpoint.pth.tar.previous-1" in said[0]
    (tmp_path / "checkpoint.pth.tar").write_bytes(b"again")
    fresh = checkpointer(tmp_path)
    fresh.prepare(None)
    fresh.save({"epoch": 1})  # at the latest
    assert (tmp_path / "checkpoint.pth.tar.previous-2").read_bytes() == b"again"
    (tmp_path / "checkpoint.pth.tar").write_bytes(b"resumed")
    resumed = checkpointer(tmp_path)
    resumed.prepare(tmp_path / "checkpoint.pth.tar")
    resumed.claim()
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == b"resumed"


def test_unwritable_workspace_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="workspace="):
        checkpointer(tmp_path / "file" / "below").prepare(None)


class FullDisk(io.RawIOBase):
    """A file that takes some bytes and then reports a full disk."""

    def __init__(self, room: int) -> None:
        self.room = room

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return len(data)


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    save_atomically({"weights": torch.ones(3)}, path)
    real_open = Path.open

    def open_full(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        return FullDisk(room) if self.name.endswith(".tmp") else real_open(self, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(OSError, match=r"checkpoint\.pth\.tar .*No space left"):
            save_atomically({"weights": torch.zeros(3000)}, path)
    assert torch.equal(read_safely(path)["weights"], torch.ones(3))
    assert names(tmp_path) == {"checkpoint.pth.tar"}


def test_a_crash_while_writing_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="crash"), atomic_file(path) as file:
        file.write(b"half of the n")
        raise RuntimeError("crash")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_rng_round_trip() -> None:
    state = capture_rng()
    drawn = (torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1))
    restore_rng(state)
    again = (torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1))
    assert torch.equal(drawn[0], again[0])
    assert np.array_equal(drawn[1], again[1])
    assert drawn[2:] == again[2:]


def test_resume_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpointer(tmp_path).resume_path() is None
    assert checkpointer(tmp_path, resume="auto").resume_path() is None
    with pytest.raises(ConfigError, match=r"resume='absent.pth'"):
        checkpointer(tmp_path, resume="absent.pth").resume_path()
    own = tmp_path / "checkpoint.pth.tar"
    own.touch()
    assert checkpointer(tmp_path).resume_path() is None
    assert checkpointer(tmp_path, resume="auto").resume_path() == own
    other = tmp_path / "other.pth"
    other.touch()
    assert checkpointer(tmp_path, resume=str(other)).resume_path() == other
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert checkpointer(tmp_path).resume_path() == own
    assert checkpointer(tmp_path, resume=str(other)).resume_path() == own


def test_foreign_and_mismatched_files_are_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "foreign.pth")
    with pytest.raises(ConfigError, match="--pretrained-weights"):
        read_resumable(tmp_path / "foreign.pth", "resnet20")
    make_trainer(epochs=1).fit()
    path = tmp_path / "checkpoint.pth.tar"
    assert read_resumable(path, "resnet20")["epoch"] == 1
    with pytest.raises(ConfigError, match="--arch resnet20"):
        read_resumable(path, "resnet56")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError):
        read_resumable(path, "resnet20")
    path.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(WeightsError):
        read_resumable(path, "resnet20")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gather_checkpoints": -2}, "--gather-checkpoints"),
        ({"checkpoint_interval": -1}, "--checkpoint-interval"),
        ({"checkpoint_filename": "a/b"}, "--checkpoint-filename"),
        ({"checkpoint_filename": ""}, r"--checkpoint-filename: '' .*\.pth"),
        ({"checkpoint_filename": "raport.json"}, r"--checkpoint-filename: 'raport\.json' .*\.pth,"),
        ({"checkpoint_filename": ".pth"}, "--checkpoint-filename"),
        ({"checkpoint_filename": "model_best.pth.tar"}, r"--checkpoint-filename: 'model_best\.pth\.tar'"),
        ({"checkpoint_filename": "checkpoint-3.pth.tar"}, r"--checkpoint-filename: 'checkpoint-3\.pth\.tar'"),
        ({"checkpoints": False, "checkpoint_interval": 5}, "--no-checkpoints"),
        ({"checkpoints": False, "gather_checkpoints": 5}, "--no-checkpoints"),
    ],
)
def test_bad_checkpoint_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckpointConfig(**settings)


def test_a_kill_before_the_latest_is_written_leaves_no_old_gathered_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed after its last file does nothing when it is sent again, so that must come last."""
    keeper = Checkpointer(
        CheckpointConfig(workspace=tmp_path, gather_checkpoints=1), Distributed(), lambda text: None
    )
    keeper.save({"epoch": 1}, end_of_epoch=True)
    keeper.finish()

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("image_classification.checkpoint.copy_file", killed)
    keeper.save({"epoch": 2}, end_of_epoch=True)
    with pytest.raises(KeyboardInterrupt):
        keeper.finish()
    assert {"checkpoint.pth.tar", "checkpoint-1.pth.tar"} <= names(tmp_path)
    assert "checkpoint-0.pth.tar" not in names(tmp_path)
    assert read_safely(tmp_path / "checkpoint.pth.tar")["epoch"] == 1


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EROFS, "mount its file system for writing"),
        (errno.EACCES, "let this user write there"),
        (errno.EPERM, "let this user write there"),
    ],
)
def test_what_cannot_be_written_is_told_with_what_helps(number: int, remedy: str, tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=rf"file .*: {remedy} or "),
        atomic_file(tmp_path / "file"),
    ):
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())
