"""The documentation does what it says: commands run (small), Python runs as printed, links and recipes exist.

Commands of a page run one after the other, as a reader would type them: what one writes the next one reads.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import yaml
from support.commands import ROOT, SHORT, commands_in, other_lines, run_here, shortened
from support.miniatures import write_imagenet
from support.published_networks import PhotoResNet, prefixed

from image_classification.models import create_model
from pruning.files.saved_network import save_pruned

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
WITH_COMMANDS = [name for name, text in PAGES.items() if commands_in(text)]
#: Pages about networks of other libraries, which may be missing: page → modules.
FOREIGN = {
    "howto/detection.md": ("torchvision",),
    "howto/huggingface.md": ("transformers", "safetensors"),
    "howto/loops.md": ("lightning", "transformers", "accelerate"),
    "howto/monai.md": ("monai",),
    "howto/segmentation.md": ("segmentation_models_pytorch",),
    "howto/yolo.md": ("ultralytics",),
}
WITH_PYTHON = [
    pytest.param(name, marks=[pytest.mark.slow] if name in FOREIGN else [])
    for name, text in PAGES.items()
    if "```python" in text
]
#: Packages whose exported names the reference describes.
PUBLIC = (
    "pruning",
    "pruning.criteria",
    "pruning.search",
    "pruning.costs",
    "explainers",
    "image_classification.models",
)
#: Later flags win over the documents'.
SMALL = ["--calibration-batches", "1", "--pruning-step", "1", "--pruning-delta", "0.25"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and networks that the pages presuppose."""
    root = tmp_path_factory.mktemp("docs")
    write_imagenet(root / "imagenet")
    torch.manual_seed(0)
    torch.save(
        create_model("torchvision/mobilenet_v2", num_classes=4).state_dict(), root / "mobilenet_v2.pth"
    )
    save_pruned(root / "small.pth.tar", create_model("resnet20", num_classes=12))
    save_pruned(root / "resnet18.pth.tar", create_model("resnet18", num_classes=4))
    torch.save({"state_dict": prefixed(module=PhotoResNet(num_classes=4))}, root / "published.pth.tar")
    save_pruned(root / "masked.pth.tar", masked_network())
    return root


def masked_network() -> torch.nn.Module:
    """A network with four dead channels."""
    network = create_model("resnet20", num_classes=12)
    with torch.no_grad():
        for name in ("conv1.weight", "bn1.weight", "bn1.bias"):
            network.get_parameter(f"layer1.0.{name}")[:4] = 0
    return network


def places(page: str, folder: Path, tmp_path: Path) -> dict[str, str]:
    """Word of a page → what stands for it here."""
    own = {
        "howto/latency.md": {
            "runs/pretrain/checkpoint.pth.tar": str(folder / "resnet18.pth.tar"),
            "latency=0.7": "latency=0.99",  # most of what two images of 32 pixels take does not depend on widths
        },
        "howto/export.md": {
            " checkpoint.pth.tar": f" {folder / 'small.pth.tar'}",
            " original.pth.tar": f" {folder / 'small.pth.tar'}",
        },
        "howto/own-model.md": {
            "/data/own": str(folder / "imagenet"),
            " checkpoint.pth.tar": f" {tmp_path / 'run' / 'checkpoint.pth.tar'}",
        },
        "howto/import.md": {
            " published.pth.tar": f" {folder / 'published.pth.tar'}",
            " imported.pth.tar": f" {tmp_path / 'imported.pth.tar'}",
            " masked.pth.tar": f" {folder / 'masked.pth.tar'}",
            " shrunk.pth.tar": f" {tmp_path / 'shrunk.pth.tar'}",
        },
        "howto/compress.md": {
            "/data/images": str(folder / "imagenet"),
            "macs=0.9,0.8,0.7,0.6,0.5": "macs=0.9,0.7",
            "compress ": "compress --no-latency --image-size 32 ",
            "export small.pth.tar": f"export {tmp_path / 'small.pth.tar'}",
            "weights small.pth.tar": f"weights {tmp_path / 'small.pth.tar'}",
        },
        "howto/benchmark-machine.md": {
            "--gpus 1 2 4 8 --backends synthetic dali-gpu dali-cpu pytorch": "--gpus 1 --device cpu",
            "--precision tf32 amp bf16 --batch-size 256": "--arch resnet20 --image-size 32 -b 2 --iterations 8",
            "throughput.json": str(tmp_path / "throughput.json"),
        },
        "howto/train.md": {
            "/data/imagenet/train parts": f"{folder / 'imagenet' / 'train'} {tmp_path / 'parts'}"
        },
        "methods/attribution.md": {" checkpoint.pth.tar": f" {folder / 'small.pth.tar'}"},
        "methods/discriminant.md": {" checkpoint.pth.tar": f" {folder / 'small.pth.tar'}"},
        "methods/preserve.md": {
            " checkpoint.pth.tar": f" {folder / 'small.pth.tar'}",
            " pruned.pth.tar": f" {folder / 'small.pth.tar'}",
            "moved.json --gallery ": f"{tmp_path / 'moved.json'} --gallery {tmp_path}/",
            "--json ": "--num-images 4 --batch-size 4 --json ",
        },
    }
    return own.get(page, {}) | {
        "/data/imagenet": str(folder / "imagenet"),
        "mobilenet_v2.pth ": f"{folder / 'mobilenet_v2.pth'} ",
        "--output ": f"--output {tmp_path}/",
        " shapes": " shapes:train=160,val=24",
        "runs/": f"{tmp_path}/runs/",
    }


def words_of(command: str, page: str, folder: Path, tmp_path: Path) -> list[str]:
    """A page's command at a small size, in the workspace that it names."""
    command = command.replace("--output runs/", "--output ").replace("/runs/tutorial/pruned", "/pruned")
    own_workspace = "--workspace" in command
    words = shortened(command, places(page, folder, tmp_path), tmp_path / "run")
    if own_workspace and "--workspace" in words:
        last = len(words) - 1 - words[::-1].index("--workspace")
        del words[last : last + 2]
    if page == "howto/imagenet.md" and "--config" in words:
        words += ["--data-backend", "pytorch"]  # the recipes decode on GPUs
    if any("main.py" in word for word in words) and (
        "--iterative-pruning" in words or "prune.yaml" in command
    ):
        words += SMALL
    return words


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if page != "howto/report.md"])
def test_commands_run_in_order(
    page: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page == "howto/own-model.md":  # its commands take the class that it shows
        (code,) = re.findall(r"```python\n(.*?)\n\nmodel, images =", PAGES[page], re.DOTALL)[:1]
        (tmp_path / "my_net.py").write_text(code.replace("48, 5", "48, 4"))
        monkeypatch.syspath_prepend(str(tmp_path))
    for command in commands_in(PAGES[page]):
        words = words_of(command, page, folder, tmp_path)
        result = run_here(words, folder / "cache")
        assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    if page == "tutorial.md":  # the page on the report shows the tutorial's last command with another folder
        assert (tmp_path / "runs" / "tutorial" / "report.html").is_file()
        assert "python -m pruning report runs/demo" in commands_in(PAGES["howto/report.md"])


def stand_in(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_job_of_the_slurm_page_runs(folder: Path, tmp_path: Path) -> None:
    """On a cluster of this machine alone: stand-ins for Slurm's own commands, everything else real."""
    (line,) = other_lines(PAGES["howto/slurm.md"])
    name, option, _, script, *words = shlex.split(line)
    assert (name, option) == ("sbatch", "--nodes")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    stand_in(bin_folder / "python", f'exec {sys.executable} "$@"')
    stand_in(bin_folder / "srun", 'test "$1" = --kill-on-bad-exit=0 && shift 2 && exec "$@"')
    stand_in(bin_folder / "scontrol", "echo localhost")
    words = [str(folder / "imagenet") if word == "/data/imagenet" else word for word in words]
    words += [word for flag in SHORT.items() for word in flag] + ["--data-backend", "pytorch", *SMALL]
    environment = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "WORKSPACE": str(tmp_path / "run"),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "OMP_NUM_THREADS": "1",
        "LUCIDPRUNE_CACHE": str(folder / "cache"),
    }
    result = subprocess.run(
        ["bash", script, *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert (tmp_path / "run" / "checkpoint.pth.tar").is_file()


#: Beginning of a shell line that is no Python program → the test that runs it.
ELSEWHERE = {
    "pip install": "test_library_alone.py::test_the_wheel_in_a_fresh_environment",
    "lucidprune": "test_readme.py::test_command",
    "make demo": "test_demo.py::test_the_demo_ends_with_a_report",
    "sbatch": "test_docs.py::test_the_job_of_the_slurm_page_runs",
}
#: … → why none does.
NOT_RUN = {
    "eval": "the start of a shell; test_completion.py asks as the shell does from then on",
    "register-python-argcomplete": "likewise",
    "trtexec": "needs NVIDIA's TensorRT and a GPU",
}


def test_every_shell_line_is_run_by_a_test() -> None:
    """Those with `python` by `test_commands_run_in_order` and `test_readme.py`; all others are listed here."""
    pages = PAGES | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    lines = [line for text in pages.values() for line in other_lines(text)]
    known = [*ELSEWHERE, *NOT_RUN]
    assert [line for line in lines if not line.startswith(tuple(known))] == []
    assert [start for start in known if not any(line.startswith(start) for line in lines)] == []
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        assert re.search(rf"^(def|class) {name}\b", (ROOT / "tests" / file).read_text(), re.MULTILINE), place


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs_as_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in FOREIGN.get(page, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        exec(compile(block, page, "exec"), names)


def test_every_page_is_in_the_navigation_and_the_other_way_round() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(pages(yaml.safe_load(text)["nav"])) == sorted(PAGES)


def test_recipes_and_make_targets_that_are_named_exist() -> None:
    text = "\n".join(PAGES.values())
    for path in set(re.findall(r"\b(?:configs|docker|benchmarks)/[\w./-]*\w", text)):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_relative_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            assert ((DOCS / page).parent / link).resolve().is_file(), f"{page}: {link}"


def test_enough_is_documented() -> None:
    assert len(WITH_COMMANDS) >= 9


def test_where_is_what_names_files_that_are_there() -> None:
    """Every answer of the newcomer's questions names at most two files besides a page, and they exist."""
    text = PAGES["where-is-what.md"]
    rows = [row for row in text.splitlines() if row.startswith("| ") and "?" in row.split("|")[1]]
    assert len(rows) >= 12
    for row in rows:
        answer = row.split("|")[2]
        files = re.findall(r"`([\w/.]+\.(?:py|j2))`", answer)
        assert all((ROOT / file).is_file() for file in files), row
        assert 1 <= len(files) + len(re.findall(r"\]\(howto/", answer)) <= 2, row


def test_the_reference_has_every_public_name() -> None:
    """What the packages export, each by its module or by itself."""
    shown = set(re.findall(r"^::: ([\w.]+)$", "\n".join(PAGES.values()), re.MULTILINE))
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            home = getattr(value, "__module__", None)
            if isinstance(value, type | FunctionType):
                assert {home, f"{home}.{name}"} & shown, f"{package}.{name} of {home}"
