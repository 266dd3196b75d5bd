"""A timed first hour with the project: a new environment with the wheel, and commands of the docs on custom images.

    python benchmarks/first_hour.py [--environment DIR] [--output FILE]

The wheel is built from this checkout and installed with all its extras into a new environment (or an existing one:
`--environment`). Then, in an empty folder, only with `lucidprune`: class folders are split into a data set, a network
is trained, pruned to half its MACs, reported and exported in INT8; a network of torchvision is compressed without
training and exported; and the Python code of two pages of the docs is run as printed: a custom network and loop, and
Lightning with a pruned training that is resumed. Each step is a line: what was done, how it ended, seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT
from common.report import BenchmarkParser, print_table, write_json

PAGES = {"a network and a loop of one's own": "own-model.md", "Lightning, resumed": "loops.md"}
_DRAW = """
import pathlib, random
from PIL import Image, ImageDraw
random.seed(0)
for name in ("disc", "box", "bar"):
    folder = pathlib.Path("photos", name)
    folder.mkdir(parents=True)
    for number in range(60):
        image = Image.new("RGB", (48, 48), tuple(random.randrange(90) for _ in range(3)))
        x, y = random.randrange(4, 20), random.randrange(4, 20)
        colour = tuple(random.randrange(150, 256) for _ in range(3))
        draw = ImageDraw.Draw(image)
        if name == "disc":
            draw.ellipse((x, y, x + 24, y + 24), fill=colour)
        else:
            draw.rectangle((x, y, x + 24, y + (24 if name == "box" else 6)), fill=colour)
        image.save(folder / f"{number}.png")
"""
_WEIGHTS = """
import torch, torchvision
torch.manual_seed(0)
torch.save(torchvision.models.mobilenet_v2(num_classes=3).state_dict(), "mobilenet_v2.pth")
"""
#: Step → command; `lucidprune` and `python` are those of the environment.
COMMANDS = {
    "class folders become a data set": "lucidprune split photos parts",
    "train": "lucidprune train parts --arch resnet20 --epochs 5 --workspace runs/mine/train",
    "prune to half the MACs": (
        "lucidprune prune parts --arch resnet20 --epochs 5 --pruning-step 4 --pruning-delta 0.1 --budget macs=0.5 "
        "--workspace runs/mine/prune --pretrained-weights runs/mine/train/checkpoint.pth.tar"
    ),
    "report": "lucidprune report runs/mine",
    "export as ONNX and INT8": (
        "lucidprune export runs/mine/prune/checkpoint.pth.tar --format onnx --int8 --data parts --output mine.onnx"
    ),
    "compress a network of torchvision": (
        "lucidprune compress mobilenet_v2.pth parts --arch torchvision/mobilenet_v2 --image-size 96 --budget macs=0.75 "
        "--output small.pth.tar"
    ),
    "export that": "lucidprune export small.pth.tar --format onnx --image-size 96 --output small.onnx",
}


@dataclasses.dataclass
class Step:
    """A step and its result.

    Attributes:
        name: Description.
        seconds: Wall clock.
        code: Exit status.
        said: Last line of output.
    """

    name: str
    seconds: float
    code: int
    said: str


def timed(name: str, words: list[str], folder: Path) -> Step:
    """Run a command in a folder, without access to this checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"LUCIDPRUNE_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    begin = time.monotonic()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or [""]
    step = Step(name, time.monotonic() - begin, done.returncode, lines[-1][:200])
    print(f"{step.seconds:7.1f} s  code {step.code}  {name}: {step.said}", flush=True)
    return step


def python_of(page: str) -> str:
    """Return the Python code of a how-to page, in order."""
    text = (ROOT / "docs" / "howto" / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def installed(environment: Path, work: Path) -> list[Step]:
    """Build the wheel, create the environment, and install with all extras."""
    steps = [
        timed(
            "build the wheel",
            [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(work), str(ROOT)],
            work,
        ),
        timed("make an environment", [sys.executable, "-m", "venv", str(environment)], work),
    ]
    (wheel,) = work.glob("lucidprune-*.whl")
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    return [*steps, timed("pip install 'lucidprune[all]'", [*pip, f"{wheel}[all]"], work)]


def first_hour(environment: Path, folder: Path) -> list[Step]:
    """Run all steps in an empty folder, even after a failure."""
    programs = environment / "bin"
    python = str(programs / "python")
    timed("(images and weights to start from)", [python, "-c", _DRAW + _WEIGHTS], folder)
    steps = []
    for name, command in COMMANDS.items():
        program, *words = command.split()
        steps.append(timed(name, [str(programs / program), *words], folder))
    for name, page in PAGES.items():
        script = folder / page.replace(".md", ".py").replace("-", "_")
        script.write_text(python_of(page), encoding="utf-8")
        steps.append(timed(f"{name} (docs/howto/{page})", [python, str(script)], folder))
    return steps


def main() -> int:
    """Run, print and write; return 1 if a step failed."""
    parser = BenchmarkParser(__doc__, cpu_only=True)
    parser.add_argument(
        "--environment", type=Path, help="one with the wheel and all its groups, instead of a new one"
    )
    arguments = parser.parse("first_hour.json", quick={})
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "build").mkdir()
        (work / "hour").mkdir()
        environment = arguments.environment
        steps = []
        if environment is None:
            environment = work / "environment"
            steps = installed(environment, work / "build")
        steps += first_hour(environment.absolute(), work / "hour")
    print_table(["step", "s", "code"], [[one.name, f"{one.seconds:.0f}", str(one.code)] for one in steps])
    minutes = sum(one.seconds for one in steps) / 60
    print(f"{minutes:.1f} minutes in all")
    write_json(
        arguments, 1, {"minutes": minutes, "steps": json.loads(json.dumps([vars(one) for one in steps]))}
    )
    return int(any(one.code for one in steps))


if __name__ == "__main__":
    sys.exit(main())
