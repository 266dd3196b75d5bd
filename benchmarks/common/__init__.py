"""Code shared by the benchmarks: arguments and results, measuring, networks, training jobs.

Importing it puts the repository on the path, so that the scripts also run where the package is not installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
