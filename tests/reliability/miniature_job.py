"""A training in miniature with rewrites, made to be killed: in a process of its own, at a chosen place."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from support.jobs import checkpoint
from support.training import MemoryLoader, build_trainer, toy_data

from image_classification.models import Structure, build_from_structure
from image_classification.trainer import Trainer
from pruning.training.pruning_config import PruningConfig
from pruning.training.scored import PruningCallback

NAME = "checkpoint.pth.tar"
PLACES = "killed.txt"


def miniature(workspace: Path) -> Trainer:
    """24 iterations with rewrites after 4, 8 and 12, continued from the workspace's checkpoint if it has one."""
    torch.set_num_threads(1)
    config = PruningConfig(
        iterative_pruning=True,
        pruning_step=4,
        pruning_delta=0.1,
        pruning_instalments=1,
        budget=["macs=0.7"],
        calibration_batches=2,
        pruning_warmup=3,
    )
    images, targets = toy_data(16)
    pruning = PruningCallback(config, MemoryLoader(images, targets, 8, False), image_size=8)
    payload = checkpoint(workspace) if (workspace / NAME).is_file() else None
    model = None if payload is None else build_from_structure(Structure.from_plain(payload["structure"]))
    trainer = build_trainer(
        workspace=workspace,
        callbacks=(pruning,),
        model=model,
        epochs=2,
        ema=0.9,
        dropout=True,
        checkpoint={"checkpoint_interval": 1, "gather_checkpoints": 1},
    )
    trainer.checkpointer.prepare(None if payload is None else workspace / NAME)
    if payload is not None:
        trainer.restore(payload)
    return trainer


@dataclasses.dataclass
class Killer:
    """Ends this very process at the `after`-th Python call made within a function, with SIGKILL.

    Args:
        function: Qualified name of the function, such as `Pruner.step`.
        after: Calls within it, over all its runs.
        log: Gets a line with the qualified names of the active functions.
    """

    function: str
    after: int
    log: Path
    depth: dict[int, int] = dataclasses.field(default_factory=dict)  # by thread
    count: int = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return"):
            return
        thread = threading.get_ident()
        if frame.f_code.co_qualname == self.function:
            self.depth[thread] = self.depth.get(thread, 0) + (1 if event == "call" else -1)
        if self.depth.get(thread) and event == "call":
            self.count += 1
            if self.count >= self.after:
                self.kill(frame)

    def kill(self, frame: FrameType | None) -> None:
        names = []
        while frame is not None:
            names.append(frame.f_code.co_qualname)
            frame = frame.f_back
        with self.log.open("a") as file:
            file.write(" ".join(names) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


def watch(profile: Callable[[FrameType, str, Any], None]) -> None:
    """Call `profile` at every call and return from now on, in the threads that write checkpoints too."""
    threading.setprofile(profile)
    sys.setprofile(profile)


def train(workspace: Path, function: str | None = None, after: int = 0) -> None:
    """Train from where the workspace stands to the end, or to the place where `Killer` strikes."""
    trainer = miniature(workspace)
    (workspace / "ready").touch()
    if function is not None:
        watch(Killer(function, after, workspace / PLACES))
    trainer.fit()
    sys.setprofile(None)


def count_calls(workspace: Path, functions: list[str]) -> None:
    """Train to the end, and write how many Python calls are made within each function."""
    counters = [Killer(name, sys.maxsize, workspace / PLACES) for name in functions]

    def count(frame: FrameType, event: str, argument: Any) -> None:
        for counter in counters:
            counter(frame, event, argument)

    trainer = miniature(workspace)
    watch(count)
    trainer.fit()
    sys.setprofile(None)
    text = "\n".join(f"{counter.function} {counter.count}" for counter in counters)
    (workspace / "calls.txt").write_text(text)
