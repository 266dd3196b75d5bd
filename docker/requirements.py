"""Print what `pyproject.toml` requires beyond NVIDIA's PyTorch image, one requirement per line.

Derived, so that there is one list of dependencies. DALI is among them where the image lacks it, in the build for its
CUDA. With `--provided` the names that an image may bring.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

#: DALI's build for each generation of CUDA.
DALI = {"12": "nvidia-dali-cuda120", "13": "nvidia-dali-cuda130"}
PROVIDED = ("torch", "torchvision", *DALI.values())
EXTRAS = ("report", "timm")


def requirements(pyproject: Path, dali: str | None = None) -> list[str]:
    """The project's dependencies and those of `EXTRAS`, without the packages that the image provides.

    Args:
        pyproject: Says what is needed.
        dali: The build of DALI that the image lacks.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    everything = [*project["dependencies"], f"{project['name']}[{','.join(EXTRAS)}]"]
    found: list[str] = []
    if dali is not None:
        optional = [line for lines in project["optional-dependencies"].values() for line in lines]
        found.append(next(line for line in optional if name_of(line) == dali))
    while everything:
        line = everything.pop(0)
        if name_of(line) == project["name"]:  # an extra that includes others of ours: "lucidprune[train]"
            for extra in line.partition("[")[2].rstrip("]").split(","):
                everything += project["optional-dependencies"][extra]
        elif name_of(line) not in PROVIDED:
            found.append(line)
    return found


def missing_dali() -> str | None:
    """The build of DALI for this machine's PyTorch, unless there is one already."""
    try:
        if importlib.util.find_spec("nvidia.dali") is not None:
            return None
    except ModuleNotFoundError:  # there is no `nvidia` at all
        pass
    import torch

    return DALI.get((torch.version.cuda or "12").partition(".")[0], DALI["12"])


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
        else requirements(Path(__file__).parents[1] / "pyproject.toml", missing_dali())
    )
    print("\n".join(lines))
