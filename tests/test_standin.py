"""The checks on a stand-in accelerator, in a process of their own: PyTorch cannot forget a device that it has met."""

from __future__ import annotations

import sys

import pytest
from support.commands import ROOT, run


@pytest.mark.parametrize("checks", ["standin_checks.py", "standin_trainings.py"])
def test_no_mixing_of_devices_and_few_reads_by_the_host(checks: str) -> None:
    path = ROOT / "tests" / "support" / checks
    done = run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(path)], timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:]
