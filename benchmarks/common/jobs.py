"""Trainings of `main.py` and verbs of `python -m explainers`, each in a separate process."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT
from image_classification.observe.json_report import read_report

MAIN = str(ROOT / "main.py")


def run_python(*words: str, quiet: bool = False) -> None:
    """Run Python with these words on this repository; if it fails, the benchmark ends.

    Args:
        words: A script, or `-m` and a package, and their arguments.
        quiet: Suppress its output, except for warnings and errors.
    """
    print(f"python {shlex.join(words)}", flush=True)
    output = subprocess.DEVNULL if quiet else None
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # for `-m`, wherever the benchmark was started
    done = subprocess.run([sys.executable, *words], check=False, env=environment, stdout=output)
    if done.returncode != 0:
        raise SystemExit(f"this command ended with exit code {done.returncode}: python {shlex.join(words)}")


def train_once(workspace: Path, *words: str) -> float:
    """Run a training unless it has already finished; an interrupted one is continued.

    Args:
        workspace: Its folder.
        words: `MAIN` and its flags, or `-m explainers` and a verb.

    Returns:
        Seconds that it took, over all invocations.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    note = workspace / "benchmark.json"
    course = {"finished": False, "seconds": 0.0}
    if note.is_file():
        course = json.loads(note.read_text(encoding="utf-8"))
    if not course["finished"]:
        begin = time.perf_counter()
        try:
            run_python(*words, "--workspace", str(workspace), "--resume", "auto", quiet=True)
            course["finished"] = True
        finally:
            course["seconds"] += time.perf_counter() - begin
            note.write_text(json.dumps(course), encoding="utf-8")
    return float(course["seconds"])


def log_rows(report: Path, *, epochs: bool = False) -> list[dict[str, float]]:
    """Return the figures of a training's report in the order written; with `epochs` only those of whole epochs."""
    entries = [entry for entry in read_report(report) if entry.get("type") == "LOG"]
    if epochs:
        entries = [entry for entry in entries if len(entry["step"]) == 1]
    return [entry["data"] for entry in entries]
