"""Print what `pyproject.toml` requires beyond NVIDIA's PyTorch image, one requirement per line.

Derived, so that there is one list of dependencies. With `--provided` the names that the image brings.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROVIDED = ("torch", "torchvision", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
EXTRAS = ("report", "timm")


def requirements(pyproject: Path) -> list[str]:
    """The project's dependencies and those of `EXTRAS`, without the packages that the image provides."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    everything = [*project["dependencies"], f"{project['name']}[{','.join(EXTRAS)}]"]
    found: list[str] = []
    while everything:
        line = everything.pop(0)
        if name_of(line) == project["name"]:  # an extra that includes others of ours: "lucidprune[train]"
            for extra in line.partition("[")[2].rstrip("]").split(","):
                everything += project["optional-dependencies"][extra]
        elif name_of(line) not in PROVIDED:
            found.append(line)
    return found


def name_of(requirement: str) -> str:
    """The normalised name of a requirement: "Pillow>=10.3" → "pillow"."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise ValueError(f"pyproject.toml has a requirement without a name: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


if __name__ == "__main__":
    lines = (
        PROVIDED
        if "--provided" in sys.argv[1:]
        else requirements(Path(__file__).parents[1] / "pyproject.toml")
    )
    print("\n".join(lines))
