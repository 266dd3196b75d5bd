"""Runs documented commands at a small size: the words of the document, plus flags that shorten the job."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Appended to every training or evaluation command. Later flags win over those of the document.
SHORT = {
    "--prof": "2",
    "--run-epochs": "1",
    "--batch-size": "4",
    "--optimizer-batch-size": "8",
    "--image-size": "32",
    "--workers": "1",
    "--device": "cpu",
}
#: Verbs that train.
TRAINING = (["lucidprune", "train"], ["lucidprune", "prune"])


def commands_in(text: str, start: str = "python") -> list[str]:
    """Return the commands of a document's fenced blocks that begin with a word, with continuation lines joined.

    Args:
        text: Markdown.
        start: First word; comments after two blanks and a # are left out.
    """
    commands: list[str] = []
    inside = False
    pending = ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            inside, pending = not inside, ""
            continue
        if not inside:
            continue
        line = pending + line.split("  #")[0].strip()
        if line.endswith("\\"):
            pending = line[:-1] + " "
            continue
        pending = ""
        if line.split(" ")[0] == start or " ".join(line.split(" ")[1:2]) == start:
            commands.append(line)
    return commands


def other_lines(text: str) -> list[str]:
    """Return lines of a document's fenced shell blocks (`bash`, `console`) that `commands_in` skips, without
    comments.
    """
    blocks = re.findall(r"^ *```(?:bash|console)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [
        line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()
    ]
    known = {" ".join(command.split()) for command in commands_in(text)}
    return [line for line in lines if line and " ".join(line.split()) not in known]


def shortened(command: str, replaced: Mapping[str, str], workspace: Path) -> list[str]:
    """Return the words of a command with paths replaced and the short settings added.

    Args:
        command: As documented.
        replaced: Word (or part of one) → its replacement: data folders, checkpoints.
        workspace: Output folder of the run.
    """
    for old, new in replaced.items():
        command = command.replace(old, new)
    words = [word for word in shlex.split(command) if not word.startswith("CUDA_VISIBLE_DEVICES=")]
    if "--nproc_per_node" in words:
        words[words.index("--nproc_per_node") + 1] = "2"
    if any(word.endswith("main.py") for word in words) or words[:2] in TRAINING:
        words += [word for flag in (SHORT | {"--workspace": str(workspace)}).items() for word in flag]
    return [sys.executable if word == "python" else word for word in words]


def run(
    words: list[str], cache: Path | None = None, timeout: float = 300, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command, from the repository's root unless `cwd` is given, and return the completed process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if cache is not None:
        environment["LUCIDPRUNE_CACHE"] = str(cache)
    return subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def run_here(words: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """Like `run`, but in this process, by the function that the command line calls, so that nothing is imported again.

    Args:
        words: `PYTHON main.py …`, `PYTHON -m PACKAGE …` or `lucidprune …`, as `shortened` returns them; others are
            passed to `run`.
        cache: The cache folder.
    """
    program = [word.removeprefix("./") for word in words[1:3]]
    front = "main"
    if words[0] == "lucidprune":
        module, front, arguments = "pruning.__main__", "lucidprune", words[1:]
    elif program[0] == "main.py":
        module, arguments = "main", words[2:]
    elif program[0] == "-m":
        module, arguments = f"{program[1]}.__main__", words[3:]
    else:
        return run(words, cache, timeout=600)
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setenv("LUCIDPRUNE_CACHE", str(cache))
        patch.chdir(ROOT)
        # What a run records as its command.
        file = "main.py" if module == "main" else str(importlib.import_module(module).__file__)
        patch.setattr(sys, "argv", [file, *arguments])
        try:
            status = getattr(importlib.import_module(module), front)(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def status_of(program: Callable[[list[str]], int], words: list[str]) -> int:
    """Return the exit status of a command's function, whether it returns or its parser exits."""
    try:
        return program(words)
    except SystemExit as stop:
        return int(stop.code or 0)
