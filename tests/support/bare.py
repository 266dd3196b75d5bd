"""Environments with missing packages, made from a full one by hiding them from the import system."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.commands import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWN = ("image_classification", "explainers", "pruning", "main", "multiproc")

# Runs first in a child process. The finder of an editable install is removed too, since it would find LucidPrune's
# packages anywhere.
HIDE = """
import json, sys
_modules, _packages = map(set, json.loads(sys.argv.pop(1)))

class _Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        parents = {name.rsplit(".", count)[0] for count in range(name.count(".") + 1)}
        return None if parents & _modules else self.finder.find_spec(name, path, target)

    def find_distributions(self, *arguments):
        found = self.finder.find_distributions(*arguments) if hasattr(self.finder, "find_distributions") else ()
        return (one for one in found if one.metadata["Name"].lower().replace("_", "-") not in _packages)

sys.meta_path[:] = [_Hiding(finder) for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


class Hidden(NamedTuple):
    """Things to hide as if not installed: modules with everything in them, and names of distributions."""

    modules: list[str]
    packages: list[str]


def distributions(*requirements: str) -> set[str]:
    """Return the normalised names of the installed distributions that requirement lines bring, including their
    requirements.

    LucidPrune's extras are read from pyproject.toml: "lucidprune[train]" is its current content, not what was once
    installed.
    """
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            try:
                waiting += _required_by(name, extra)
            except importlib.metadata.PackageNotFoundError:
                continue  # for another platform
            found.add(name)
    return found


def _required_by(name: str, extra: str) -> list[Requirement]:
    if name == PROJECT["name"]:
        lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    else:
        lines = importlib.metadata.requires(name) or []
    wanted = [Requirement(line) for line in lines]
    return [line for line in wanted if line.marker is None or line.marker.evaluate({"extra": extra})]


@functools.cache
def modules_of_distributions() -> dict[str, set[str]]:
    """Return installed top-level module → normalised names of the distributions that bring it."""
    return {
        module: {canonicalize_name(name) for name in names}
        for module, names in importlib.metadata.packages_distributions().items()
    }


def all_but(*requirements: str) -> Hidden:
    """Return everything installed that requirement lines do not bring, except LucidPrune's packages."""
    kept = distributions(*requirements)
    installed = modules_of_distributions()
    modules = {name for name, packages in installed.items() if not packages & kept} - set(OWN)
    packages = set().union(*installed.values()) - kept
    if not any(name.startswith("nvidia-dali") for name in kept):
        modules.add("nvidia.dali")  # `nvidia` itself is a folder that torch's libraries share
    return Hidden(sorted(modules), sorted(packages))


def run_hidden(
    hidden: Hidden, program: str, *arguments: str, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process that does not see some installed packages.

    Args:
        hidden: Things to hide.
        program: Source text; `arguments` are its sys.argv[1:].
        folder: Working directory; LucidPrune's packages are found there.
    """
    command = [sys.executable, "-c", HIDE + program, json.dumps(hidden), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


@functools.cache
def loaded_by_pruning() -> tuple[list[str], list[str]]:
    """Return the modules that the names of `pruning` load after `import torch, numpy`: others' and LucidPrune's own."""
    program = (
        "import json, numpy, sys, torch\nbefore = set(sys.modules)\nfrom pruning import *\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = json.loads(result.stdout)
    own = [name for name in loaded if name.split(".")[0] in OWN]
    return sorted(set(loaded) - set(own)), own
