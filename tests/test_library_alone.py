"""The library works with torch and NumPy alone; what needs more says which extra to install."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.bare import (
    PROJECT,
    all_but,
    distributions,
    loaded_by_pruning,
    modules_of_distributions,
    run_hidden,
)
from support.commands import ROOT

from image_classification.extras import EXTRA_OF
from image_classification.recipes import recipes

LIBRARY = (ROOT / "tests" / "support" / "library_alone.py").read_text(encoding="utf-8")
ALONE = tuple(PROJECT["dependencies"])

# Imports the modules that are named; prints the errors: what is missing, and the text.
IMPORT_ALL = """
import importlib, json, sys
from image_classification.extras import MissingPackageError
from image_classification.models import create_model
def error_of(function, *arguments):
    try:
        function(*arguments)
    except MissingPackageError as error:
        return [list(error.modules), str(error)]
    except (ImportError, ValueError) as error:
        return [[], str(error)]
errors = {name: error_of(importlib.import_module, name) for name in sys.argv[1:]}
errors |= {arch: error_of(create_model, arch) for arch in ("torchvision/resnet18", "timm/resnet18")}
print(json.dumps({name: error for name, error in errors.items() if error}))
"""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_library_needs_torch_and_numpy() -> None:
    assert [Requirement(line).name for line in ALONE] == ["torch", "numpy"]


def test_a_copy_of_what_pruning_imports_suffices(tmp_path: Path) -> None:
    for name in loaded_by_pruning()[1]:
        source = ROOT / Path(*name.split("."))
        source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    result = run_hidden(all_but(*ALONE), LIBRARY, str(tmp_path), folder=tmp_path)
    files = json.loads(succeeded(result))
    assert len(files) > 50
    assert all(Path(path).is_relative_to(tmp_path) for path in files.values())


def test_a_missing_package_is_named_with_its_extra() -> None:
    """Every module can be imported, or says what to install."""
    packages = ("image_classification", "explainers", "pruning")
    names = [module_name(path) for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    errors = json.loads(succeeded(run_hidden(all_but(*ALONE), IMPORT_ALL, *names)))
    networks = {arch: errors.pop(arch)[1] for arch in ("torchvision/resnet18", "timm/resnet18")}
    assert "pip install 'lucidprune[train]'" in networks["torchvision/resnet18"]
    assert "pip install 'lucidprune[timm]'" in networks["timm/resnet18"]
    assert {"image_classification.data", "explainers.measures", "pruning.report"} <= set(errors)
    for name, (missing, message) in errors.items():
        assert missing, f"{name}: {message}"
        extras = {EXTRA_OF[module] for module in missing}
        assert f"pip install 'lucidprune[{','.join(sorted(extras))}]'" in message


@pytest.mark.parametrize(
    ("extra", "files"),
    [
        ("train,loops", ("*.py", "image_classification/**/*.py", "pruning/**/*.py")),
        ("explain", ("explainers/**/*.py",)),
    ],
)
def test_an_extra_suffices_for_its_packages(extra: str, files: tuple[str, ...]) -> None:
    names = [module_name(path) for pattern in files for path in sorted(ROOT.glob(pattern))]
    succeeded(run_hidden(all_but(f"lucidprune[{extra}]"), f"import {', '.join(names)}"))


@pytest.mark.parametrize(("module", "extra"), sorted(EXTRA_OF.items()))
def test_the_named_extra_brings_the_package(module: str, extra: str) -> None:
    if module not in modules_of_distributions():
        pytest.skip(f"{module} is not installed")
    named = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"][extra]}
    assert modules_of_distributions()[module] & named


def test_each_package_is_named_once() -> None:
    lines = [*PROJECT["dependencies"]]
    for extra in PROJECT["optional-dependencies"].values():
        lines += extra
    names = [Requirement(line).name for line in lines]
    names = [name for name in names if name != PROJECT["name"]]
    assert len(names) == len(set(names))


def test_all_brings_every_package_that_our_code_asks_for() -> None:
    everything = distributions("lucidprune[all]")
    for module in EXTRA_OF:
        assert modules_of_distributions().get(module, everything) & everything, module


def link_packages(site_packages: Path, *requirements: str) -> None:
    """Let an environment see the installed distributions that requirement lines bring, and nothing else."""
    wanted = distributions(*requirements)
    source = Path(sysconfig.get_path("purelib"))
    entries = set()
    for name in wanted:
        files = importlib.metadata.files(name) or []
        entries |= {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}
    for entry in sorted(entries - {"nvidia"}):
        (site_packages / entry).symlink_to(source / entry)
    if "nvidia" in entries:  # a folder that torch's libraries share with DALI
        (site_packages / "nvidia").mkdir()
        for part in (source / "nvidia").iterdir():
            if part.name != "dali":
                (site_packages / "nvidia" / part.name).symlink_to(part)


@pytest.mark.slow
def test_the_wheel_in_a_fresh_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is taken from this environment, since it is gigabytes; nothing is downloaded."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the repository would hide the wheel
    source = tmp_path / "source"  # building leaves folders behind
    for name in ("image_classification", "explainers", "pruning", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("lucidprune-*.whl")

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    link_packages(site_packages, *ALONE)
    install = [*pip, "--python", str(python), "install", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)  # no index: torch and NumPy are all it asks for

    program = tmp_path / "library_alone.py"
    program.write_text(LIBRARY)
    result = subprocess.run([python, program, tmp_path], cwd=tmp_path, capture_output=True, text=True)
    for path in json.loads(succeeded(result)).values():
        assert Path(path).is_relative_to(site_packages)
    shipped = {path.relative_to(ROOT) for path in (ROOT / "pruning" / "report" / "templates").iterdir()}
    packages = ("image_classification", "explainers", "pruning")
    shipped |= {Path("image_classification", "flags", f"{package}.json") for package in packages}
    assert [path for path in shipped if not (site_packages / path).is_file()] == []

    # The command is not taken in by a main.py of the user's, and the recipes come along.
    (tmp_path / "main.py").write_text("raise SystemExit('the main.py of a user')")
    command = environment / "bin" / "lucidprune"
    shown = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert "  compress  " in succeeded(shown)
    told = subprocess.run([command, "train"], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 2
    (line,) = told.stderr.splitlines()
    assert line.endswith("pip install 'lucidprune[train]'")
    listed = "from image_classification.recipes import recipes; print(*recipes())"
    names = subprocess.run([python, "-c", listed], cwd=tmp_path, capture_output=True, text=True)
    assert set(succeeded(names).split()) == set(recipes())
