"""The recipes that come with the package: `--config imagenet_resnet50_prune` finds one without a path.

In a source tree they are in the folder `configs/`; a wheel installs them below `share/lucidprune/configs`.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

_SOURCE = Path(__file__).resolve().parent.parent / "configs"
_INSTALLED = ("share", "lucidprune", "configs")


def recipes() -> dict[str, Path]:
    """Return name, such as `imagenet_resnet50_prune` or `explainers/imagenet_casm_l`, → file."""
    if _SOURCE.is_dir():
        return {_name(path, _SOURCE): path for path in sorted(_SOURCE.rglob("*.yaml"))}
    try:
        files = importlib.metadata.files("lucidprune") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = [Path(str(file.locate())).resolve() for file in files if file.suffix == ".yaml"]
    folders = {path: _folder(path) for path in found}
    return {_name(path, folder): path for path, folder in folders.items() if folder is not None}


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _folder(path: Path) -> Path | None:
    """Return the installed folder of recipes that a file is in."""
    return next((parent for parent in path.parents if parent.parts[-3:] == _INSTALLED), None)
