"""TAB behind `lucidprune`, asked as a shell asks: the line in variables, the answer on file descriptor 8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ROOT

pytest.importorskip("argcomplete")


def offered(line: str, folder: Path) -> list[str]:
    code = "from pruning.__main__ import lucidprune; lucidprune()"
    answer = folder / "answer"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False, capture_output=True)
    return [word.strip() for word in answer.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("lucidprune ", {"train", "prune", "explain", "launch"}),
        ("lucidprune explain ", {"localize", "compare"}),
        ("lucidprune train --optimi", {"--optimizer", "--optimizer-batch-size"}),
        ("lucidprune train --optimizer s", {"sgd"}),
        ("lucidprune explain localize --method gr", {"gradcam"}),
        ("lucidprune train --config imagenet_resnet50_pru", {"imagenet_resnet50_prune"}),
    ],
)
def test_verbs_flags_and_choices_are_offered(line: str, among: set[str], tmp_path: Path) -> None:
    words = offered(line, tmp_path)
    assert among <= set(words)
    assert not [word for word in words if word.startswith("--") and "_" in word]
