"""Real jobs from a small command: start, wait, kill, and compare their results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.commands import ROOT

from image_classification.models import read_safely
from image_classification.observe.json_report import read_report

#: Flags of a small, deterministic training on a CPU; images of 32 pixels. `main_words` adds others.
SMALL = {
    "--arch": "resnet20",
    "--device": "cpu",
    "--image-size": "32",
    "--workers": "1",
    "--print-freq": "1",
    "--lr": "0.02",
}


def main_words(data: str, workspace: Path, *switches: str, **flags: object) -> list[str]:
    """Return the arguments of `main.py`: data, the small settings, and flags (underscores for dashes)."""
    settings = SMALL | {"--workspace": str(workspace)}
    settings |= {"--" + name.replace("_", "-"): str(value) for name, value in flags.items()}
    return [data, *(word for flag in settings.items() for word in flag), *switches]


def launcher_words(logs: Path, *flags: str, ranks: int = 2) -> list[str]:
    """Return the words that start several ranks, to put before `main.py`."""
    return ["multiproc.py", "--nproc_per_node", str(ranks), "--log-dir", str(logs), *flags, "main.py"]


class Process:
    """A job in its own session, with its output in files, ended no later than the test.

    Args:
        words: Script and arguments, run by this Python from the repository's root.
        folder: Folder for the output.
        environment: Additional environment variables.
    """

    def __init__(self, words: list[str], folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.out_path, self.err_path = folder / "stdout.txt", folder / "stderr.txt"
        with self.out_path.open("ab") as out, self.err_path.open("ab") as err:
            self.popen = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                stdout=out,
                stderr=err,
                start_new_session=True,
                # A shell's background job, as tests may be, inherits that Ctrl-C is ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.popen.poll() is None:
            self.kill()

    @property
    def err(self) -> str:
        return self.err_path.read_text(errors="replace")

    @property
    def out(self) -> str:
        return self.out_path.read_text(errors="replace")

    def wait(self, timeout: float = 240) -> int:
        """Wait for the job and return its exit code."""
        return self.popen.wait(timeout=timeout)

    def until(self, condition: Callable[[], Any], timeout: float = 120) -> None:
        """Wait for a condition; fail if the job ends first or takes too long."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.popen.poll() is None, (
                f"ended with {self.popen.returncode} too early:\n{self.out}{self.err}"
            )
            assert time.monotonic() < end, f"waited {timeout} s in vain:\n{self.out}{self.err}"
            time.sleep(0.01)

    def kill(self) -> None:
        """Send SIGKILL to the job and everything that it started, like a machine being switched off."""
        os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


def finished(words: list[str], folder: Path, timeout: float = 240, **environment: str) -> Process:
    """Run a job to its end; it must succeed."""
    with Process(words, folder, **environment) as process:
        code = process.wait(timeout)
    assert code == 0, f"exit code {code}:\n{process.out}\n{process.err}"
    return process


def iterations(report: Path) -> list[tuple[int, int]]:
    """Return (epoch, step) of the logging steps in a report so far."""
    return [step for step, _ in figures(report, "train.loss")] if report.is_file() else []


def figures(report: Path, key: str) -> list[tuple[tuple[int, int], float]]:
    """Return ((epoch, step), value) of a key logged within epochs, in the order of the report."""
    return [
        (tuple(entry["step"]), entry["data"][key])
        for entry in read_report(report)
        if entry["type"] == "LOG" and len(entry["step"]) == 2 and key in entry["data"]
    ]


def validation(report: Path, key: str) -> list[float]:
    """Return the values of a key at the ends of epochs."""
    return [
        entry["data"][key]
        for entry in read_report(report)
        if entry["type"] == "LOG" and len(entry["step"]) < 2 and key in entry["data"]
    ]


def checkpoint(workspace: Path, name: str = "checkpoint.pth.tar") -> dict[str, Any]:
    """Load a run's checkpoint, which must be intact."""
    return read_safely(workspace / name)


def assert_same_training(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Assert that two checkpoints hold the same network, optimizer, averages and position, bit for bit."""
    for key in ("epoch", "iteration", "best_prec1", "structure", "lr_factor", "world_size"):
        assert first[key] == second[key], key
    expected, got = flattened(first), flattened(second)
    assert expected.keys() == got.keys()
    different = [name for name, value in expected.items() if not torch.equal(value, got[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, first {different[:3]}"


def flattened(payload: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint that training depends on, by name."""
    tensors = {f"model.{name}": value for name, value in payload["state_dict"].items()}
    tensors |= {f"ema.{name}": value for name, value in (payload["ema"] or {}).items()}
    for index, entry in payload["optimizer"]["state"].items():
        tensors |= {f"optimizer.{index}.{key}": v for key, v in entry.items() if isinstance(v, torch.Tensor)}
    return tensors
