"""`make gpu-check`, as far as a machine without a GPU can run it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import ROOT, run

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    done = run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--output", str(tmp_path / "x.json")]
    )
    assert done.returncode == gpu_check.EXIT_NO_GPU
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu-check: no GPU: ")
    assert "nvidia-smi" in line
    assert not list(tmp_path.iterdir())


def test_the_same_job_on_two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "DEVICES", ("cpu", "cpu"))
    figures = gpu_check.alike(tmp_path)
    assert len(figures["losses"]["cpu"]) == 20
    assert figures["largest relative difference of the losses"] == 0
    assert figures["same widths after every rewrite"] is True


def test_parts_are_run_shown_and_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write = "import json, sys; json.dump({'x': 1}, open(sys.argv[1], 'w')); print('done')"
    commands = [
        [sys.executable, "-c", write, "{json}"],
        [sys.executable, "-c", "import sys; sys.exit('oh no')"],
    ]
    part: dict[str, Any] = gpu_check.run_part("part", commands, 60, tmp_path)
    first, second = part["results"]
    assert (part["good"], first["figures"], first["said"]) == (False, {"x": 1}, ["done"])
    assert (second["exit_code"], second["said"], second["figures"]) == (1, ["oh no"], None)
    gpu_check.show("part", part)
    assert "part: FAILED" in capsys.readouterr().out
    late = gpu_check.run_part("late", [[sys.executable, "-c", "import time; time.sleep(60)"]], 1, tmp_path)
    assert late["results"][0]["said"][-1] == "ended after 1 s"


def test_every_command_is_one_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "DIR"])
    parts = gpu_check.commands(gpu_check.parse(), tmp_path)
    assert list(parts) == ["tests", "alike", "waits", "throughput", "scoring", "pruned"]
    for command in (words for part in parts.values() for words in part):
        script = Path(command[1])
        assert command[1] == "-m" or script.is_file(), command
    assert len(parts["throughput"]) == 3
