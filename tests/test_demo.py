"""`make demo` from its first command to its last, at a small size."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support.commands import ROOT, run_here, shortened


def demo_commands(folder: Path) -> list[str]:
    """What `make demo` would run after the installation."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    printed = subprocess.run(
        ["make", "--dry-run", "--old-file", ".venv/.installed", "demo", f"DEMO={folder}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.replace("\\\n", " ")
    return [line for line in printed.splitlines() if line.strip()]


@pytest.mark.slow
def test_the_demo_ends_with_a_report(tmp_path: Path) -> None:
    *commands, last = demo_commands(tmp_path / "demo")
    assert last.startswith("echo")
    assert last.rstrip('"').endswith("demo/report.html")
    assert len(commands) == 6
    for command in commands:
        command = command.replace(".venv/bin/python", "python")
        words = shortened(command, {" shapes": " shapes:train=160,val=24"}, tmp_path)
        if "main.py" in command:
            del words[-2:]  # the demo's own workspace
        if "prune.yaml" in command:
            words += shlex.split("--pruning-step 1 --pruning-delta 0.25 --calibration-batches 1")
        result = run_here(words, tmp_path / "cache")
        assert result.returncode == 0, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert [stage["kind"] for stage in report["stages"]] == ["training", "pruning", "fine-tuning"]
    (missing,) = report["missing"]  # an unpruned network that was trained as long
    assert "--original" in missing
    assert (tmp_path / "demo" / "pruned.onnx").is_file()
    assert list((tmp_path / "demo" / "maps").glob("page-*.png"))
