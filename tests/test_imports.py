"""The direction of imports: between the packages, between the wings of each, and what `import pruning` loads.

image_classification ← explainers ← pruning ← main. Within `pruning` the wings stand in the order of `WINGS`: each may
import those before it. No package has a circle.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
import zipfile
from pathlib import Path

import pytest
from support.bare import loaded_by_pruning
from support.commands import ROOT

LAYERS = ["image_classification", "explainers", "pruning", "main"]
FILES = [path for layer in LAYERS[:-1] for path in sorted((ROOT / layer).rglob("*.py"))]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
}

#: Wing of pruning → the wings that it may import.
WINGS: dict[str, set[str]] = {
    "task": set(),
    "engine": {"task"},
    "costs": {"engine", "task"},
    "repair": {"engine", "task"},
    "criteria": {"engine", "repair", "task"},
    "rewrites": {"engine", "costs", "task"},
    "search": {"engine", "costs", "criteria", "repair", "rewrites", "task"},
    "masked": {"engine", "task"},
    "files": {"engine", "costs"},
    "pruner": {"engine", "costs", "criteria", "search", "repair", "files", "rewrites", "task"},
    "training": {"engine", "costs", "criteria", "search", "repair", "files", "rewrites", "task", "pruner"},
    "report": {"engine", "costs", "files", "rewrites", "training"},
}
WINGS["verbs"] = set(WINGS)
WINGS["__main__"] = {"verbs"}
WINGS["__init__"] = set(WINGS) - {"training", "report", "verbs", "__main__"}


def imported(path: Path) -> set[Path]:
    """Files of the packages that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in MODULES else str(node.module) for name in whole}
    return {MODULES[name] for name in names if name in MODULES}


IMPORTED = {path: imported(path) - {path} for path in FILES}


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def room_of(path: Path) -> str:
    """The file or folder directly below the package that holds a file."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def test_packages_import_only_what_stands_below_them() -> None:
    for path, others in IMPORTED.items():
        above = LAYERS[LAYERS.index(package_of(path)) + 1 :]
        assert not {package_of(other) for other in others} & set(above), path
        assert not re.search(r"^\s*(from|import) main\b", path.read_text(encoding="utf-8"), re.M), path


@pytest.mark.parametrize("package", LAYERS[:-1])
def test_no_circle(package: str) -> None:
    """Neither between files, nor between the files and folders at the package's top."""
    rooms: dict[object, set[object]] = {}
    files: dict[object, set[object]] = {}
    for path, others in IMPORTED.items():
        if package_of(path) == package:
            inside = {other for other in others if package_of(other) == package}
            files[path] = set(inside)
            rooms.setdefault(room_of(path), set()).update(
                {room_of(other) for other in inside} - {room_of(path)}
            )
    for graph in (files, rooms):
        done: set[object] = set()
        while len(done) < len(graph):
            free = {node for node in graph if node not in done and graph[node] <= done}
            assert free, f"a circle among {[str(node) for node in graph if node not in done]}"
            done |= free


def test_wings_of_pruning() -> None:
    """At most 15 rooms, the imports that each wing is allowed, and short chains of them."""
    assert len([path for path in (ROOT / "pruning").iterdir() if path.name != "__pycache__"]) <= 15
    rooms: dict[str, set[str]] = {}
    for path, others in IMPORTED.items():
        if package_of(path) == "pruning":
            inside = {room_of(other) for other in others if package_of(other) == "pruning"}
            rooms.setdefault(room_of(path), set()).update(inside - {room_of(path), "__init__"})
    for room, others in rooms.items():
        assert others <= WINGS[room], f"pruning/{room} imports {sorted(others - WINGS[room])}"

    @functools.cache
    def chain(room: str) -> int:
        return 1 + max((chain(other) for other in rooms[room]), default=0)

    assert max(map(chain, rooms)) <= 8


def test_the_library_knows_neither_explainers_nor_data_nor_training() -> None:
    allowed = {
        "config",
        "extras",
        "lazy",
        "models",
        "cache",
        "checkpoint",
        "distributed",
        "file_writing",
        "small_files",
        "observe",
        "plain_data",
        "process_state",
    }
    for path, others in IMPORTED.items():
        if package_of(path) == "pruning" and room_of(path) not in (
            "training",
            "report",
            "verbs",
            "files",
            "__main__",
        ):
            outside = {other for other in others if package_of(other) != "pruning"}
            assert not [other for other in outside if package_of(other) == "explainers"], path
            assert {room_of(other) for other in outside} <= allowed, path


def test_what_importing_the_library_loads() -> None:
    """Beside what `import torch` loads: our own modules, and nothing of torch that takes long.

    `import pruning` is to take at most 1.3 times as long as `import torch`. No clock here: torch._dynamo alone, which
    torchvision brings, doubles the time.
    """
    outside, own = loaded_by_pruning()
    packages = {name.split(".")[0] for name in outside} - set(sys.stdlib_module_names)
    assert packages <= {"torch", "numpy"}
    slow = ("torch._dynamo", "torch._inductor", "torch.export", "torch.onnx", "torch.distributed.tensor")
    assert not [name for name in outside if name.startswith(slow)]
    wings = ("training", "report", "verbs")
    unwanted = ("explainers", "image_classification.data", *(f"pruning.{wing}" for wing in wings))
    assert not [name for name in own if name.startswith(unwanted)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_file_names_are_told_apart() -> None:
    """A basename stands once over the packages, and echoes no module of the standard library."""
    names = [path.name for path in FILES if path.name not in ("__init__.py", "__main__.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert not {name.removesuffix(".py") for name in names} & sys.stdlib_module_names


def test_the_entry_point_stays_small() -> None:
    assert len((ROOT / "main.py").read_text().splitlines()) < 150


def test_names_of_a_zipped_package_are_imported_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        lines = [
            "from image_classification.lazy import lazy_names",
            "__getattr__ = lazy_names(__name__, {'half': 'zipped_package.halves'})",
        ]
        file.writestr("zipped_package/__init__.py", "\n".join(lines))
        file.writestr("zipped_package/halves.py", "half = 0.5")
    monkeypatch.syspath_prepend(archive)
    package = importlib.import_module("zipped_package")
    assert "zipped_package.halves" not in sys.modules
    assert package.half == 0.5
