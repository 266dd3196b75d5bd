"""How a run was started: command, hardware and versions, one JSON object per start in `invocations.jsonl`.

`config.yaml` says what a run is; this says who asked for it and on what it ran. A resumed run adds a line, so that the
file tells its whole history.
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
        workspace: Folder of the run; it exists.
        device: Where rank 0 computes.
        world_size: Number of processes.
        append: Whether the run continues an earlier one; otherwise what an earlier run left is replaced.
        argv: Program and its words; `sys.argv` when None.
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
    """What was typed to start this process, as a shell takes it.

    Args:
        argv: Program and its words; `sys.argv` when None.
    """
    program, *words = sys.argv if argv is None else argv
    if Path(program).name == "__main__.py":
        return shlex.join(["python", "-m", Path(program).parent.name, *words])
    if Path(program).suffix == ".py":
        return shlex.join(["python", program, *words])
    return shlex.join([Path(program).name, *words])


def read_invocations(workspace: Path) -> list[Plain]:
    """All starts of a run, oldest first; none where the file is missing. A torn line is left out."""
    path = workspace / FILENAME
    return read_report(path) if path.is_file() else []
