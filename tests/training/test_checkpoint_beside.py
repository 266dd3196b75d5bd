"""Checkpoints that are written while the training goes on."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import MakeTrainer, Recorder
from torch import nn

from image_classification import checkpoint
from image_classification.background import Background, snapshot
from image_classification.models import read_safely
from image_classification.trainer import Trainer


class SlowDisk:
    """In place of `save_atomically`: writes when it is let, and counts how many are at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.at_once = self.most = self.num_written = 0
        self.write = checkpoint.save_atomically
        monkeypatch.setattr(checkpoint, "save_atomically", self)

    def __call__(self, payload: dict[str, Any], path: Path) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        assert self.open.wait(60)
        self.write(payload, path)
        self.at_once -= 1
        self.num_written += 1


class Opening(Recorder):
    """Lets the disk write at an iteration, and remembers the weights of the ones before."""

    def __init__(self, disk: SlowDisk, at: int) -> None:
        super().__init__()
        self.disk, self.at, self.weights = disk, at, dict[int, torch.Tensor]()

    def on_step_end(self, trainer: Trainer) -> None:  # type: ignore[override]
        iteration = trainer.state.iteration
        self.weights[iteration] = next(trainer.state.model.parameters()).detach().clone()
        if iteration == self.at:
            assert not self.disk.num_written
            self.disk.open.set()


def test_training_goes_on_while_the_file_is_written(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file holds the weights of its iteration, although the training was at a later one when it was written."""
    disk = SlowDisk(monkeypatch)
    opening = Opening(disk, at=3)
    trainer = make_trainer(epochs=1, checkpoint={"checkpoint_interval": 2}, callbacks=[opening])
    kept: list[dict[str, Any]] = []
    write = disk.write
    disk.write = lambda payload, path: (kept.append(payload), write(payload, path))  # type: ignore[assignment]
    trainer.fit()
    assert [payload["iteration"] for payload in kept][:2] == [2, 4]
    for payload in kept:
        saved = next(iter(payload["state_dict"].values()))
        assert torch.equal(saved, opening.weights[payload["iteration"]])
    assert disk.most == 1
    assert not disk.at_once
    assert read_safely(tmp_path / "checkpoint.pth.tar")["iteration"] == trainer.state.iteration


def test_a_write_that_fails_ends_the_training_within_a_step(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = threading.Event()

    def full(payload: dict[str, Any], path: Path) -> None:
        failing.set()
        raise OSError(errno.ENOSPC, f"cannot write {path}")

    class Waiting(Recorder):
        def on_step_end(self, trainer: Trainer) -> None:  # type: ignore[override]
            steps.append(trainer.state.iteration)
            if trainer.state.iteration == 3:
                assert failing.wait(60)

    steps: list[int] = []
    monkeypatch.setattr(checkpoint, "save_atomically", full)
    trainer = make_trainer(epochs=2, checkpoint={"checkpoint_interval": 2}, callbacks=[Waiting()])
    with pytest.raises(OSError, match=r"checkpoint\.pth\.tar"):
        trainer.fit()
    assert steps[-1] <= 4


def test_a_write_that_fails_at_the_very_end_is_no_success(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(payload: dict[str, Any], path: Path) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(checkpoint, "save_atomically", full)
    with pytest.raises(OSError, match="no room"):
        make_trainer(epochs=1).fit()


@pytest.mark.parametrize("beside", [True, False])
def test_the_time_that_training_stands_still_is_logged(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    """Written beside it, a file that takes a second costs the training a copy of its state only."""
    monkeypatch.setattr(checkpoint, "save_atomically", lambda payload, path: time.sleep(1))
    trainer = make_trainer(epochs=2, training_only=True, checkpoint={"checkpoint_beside": beside})
    logged: list[float] = []

    def log(step: object, data: dict[str, float], iteration: int | None = None) -> None:
        logged.extend(value for key, value in data.items() if key == "train.checkpoint_seconds")

    monkeypatch.setattr(trainer.logger, "log", log)
    trainer.fit()
    (seconds,) = logged  # at the end of the second epoch, of the save at the end of the first
    assert (seconds < 0.9) == beside


def test_a_snapshot_copies_and_keeps_what_is_one() -> None:
    shared = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    tree = {"a": shared, "b": [shared, 3], "c": (shared[0],), "empty": torch.zeros(0)}
    copy = snapshot(tree)
    shared.zero_()
    assert copy["a"].abs().sum() > 0
    assert copy["a"] is copy["b"][0]
    assert copy["a"].is_contiguous(memory_format=torch.channels_last)
    assert copy["c"][0].shape == (3, 2, 2)
    assert copy["b"][1] == 3
    state = nn.BatchNorm2d(2).state_dict()
    assert snapshot(state)._metadata == state._metadata  # versions of modules


def test_a_fork_waits_for_the_work() -> None:
    """A child that forks in the middle would inherit the locks of a thread that it does not have."""
    background, done, begun = Background(), [], threading.Event()

    def work() -> None:
        begun.set()
        threading.Event().wait(0.3)
        done.append(1)

    background.start(work)
    begun.wait()
    child = os.fork()
    if not child:
        os._exit(len(done))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
