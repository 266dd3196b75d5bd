"""The checks on a stand-in accelerator, in a process of their own: PyTorch cannot forget a device that it has met."""

from __future__ import annotations

import sys

from support.commands import ROOT, run


def test_no_mixing_of_devices_and_few_reads_by_the_host() -> None:
    checks = ROOT / "tests" / "support" / "standin_checks.py"
    done = run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks)], timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:]
