"""Memory of the process where networks run on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_HELD = """
import resource, sys, torch
{first}
from image_classification.host_memory import freed_memory_kept
def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = held()
tensor = torch.zeros(64, 2**20)
del tensor
print(int(held() - before > 2**27), int(freed_memory_kept()))
"""
_JOB = "from image_classification.joining import *; setup_distributed(DistributedConfig(device='cpu'))"
_VERB = """
from argparse import Namespace
from image_classification.models import create_model
from pruning.verbs.network_and_images import open_network
torch.save(create_model("resnet20").state_dict(), sys.argv[1])
open_network(Namespace(factory=None, arch="resnet20", checkpoint=sys.argv[1], device="cpu"))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="Linux only")
@pytest.mark.parametrize(
    ("first", "environment", "expected"),
    [
        ("", {}, [0, 0]),
        (_JOB, {}, [1, 1]),
        (_VERB, {}, [1, 1]),
        (_JOB, {"MALLOC_TRIM_THRESHOLD_": "131072"}, [0, 0]),
    ],
    ids=["library", "job", "verb", "tuned by the user"],
)
def test_jobs_on_the_cpu_keep_freed_memory(
    first: str, environment: dict[str, str], expected: list[int], tmp_path: Path
) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run(
        [sys.executable, "-c", _HELD.format(first=first), str(tmp_path / "weights.pth")],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [int(word) for word in found.stdout.split()] == expected
