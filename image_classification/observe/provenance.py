"""Provenance of a run: command, hardware and versions, one JSON object per start in `invocations.jsonl`.

`config.yaml` describes the run; this file records how it was started and on what it ran. A resumed run adds a line, so
that the file contains the whole history.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from image_classification.observe.environment import describe_environment
from image_classification.observe.json_report import read_report
from image_classification.plain_data import Plain

FILENAME = "invocations.jsonl"


def record_invocation(
    workspace: Path, device: torch.device, world_size: int, *, append: bool, argv: Sequence[str] | None = None
) -> None:
    """Add this start of a run to its workspace.

    Args:
        workspace: Existing folder of the run.
        device: Device of rank 0.
        world_size: Number of processes.
        append: Whether the run continues an earlier one; otherwise an earlier run's record is replaced.
        argv: Program and its arguments; `sys.argv` if None.
    """
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(argv),
        "num_processes": world_size,
        "environment": describe_environment(device),
    }
    with (workspace / FILENAME).open("a" if append else "w", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def command_line(argv: Sequence[str] | None = None) -> str:
    """Return the command that started this process, quoted for a shell.

    Args:
        argv: Program and its arguments; `sys.argv` if None.
    """
    program, *words = sys.argv if argv is None else argv
    if Path(program).name == "__main__.py":
        return shlex.join(["python", "-m", Path(program).parent.name, *words])
    if Path(program).suffix == ".py":
        return shlex.join(["python", program, *words])
    return shlex.join([Path(program).name, *words])


def read_invocations(workspace: Path) -> list[Plain]:
    """Read all starts of a run, oldest first; none if the file is missing. A torn line is left out."""
    path = workspace / FILENAME
    return read_report(path) if path.is_file() else []
