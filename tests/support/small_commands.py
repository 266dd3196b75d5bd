"""A documented command as a miniature run: the same words, other data and files, and flags that shorten the job.

Later flags win over those of the command and of its recipe. Everything that selects code is kept: program, verb,
architecture, recipe, criteria, methods.
"""

from __future__ import annotations

import dataclasses
import importlib
import shlex
import sys
from pathlib import Path
from typing import Any

from support.commands import ROOT, SHORT, run
from support.miniatures import SIZE, Miniatures
from support.recipes import recipe_of

import main as main_job
from explainers.__main__ import VERBS
from explainers.__main__ import main as explainers_main
from image_classification.cli import parse_config

#: Flags of verbs that only read images.
_READING = {"--batch-size": "4", "--image-size": str(SIZE), "--workers": "1", "--device": "cpu"}
_HELD_OUT = {"--calibration-size": "8"}
_TRAINING = SHORT | {"--print-freq": "1", "--raport-file": "report.json", "--gpu-affinity": "none"}
#: Flags whose value is a trained file.
_FILES = ("--pretrained-weights", "--teacher", "--selector", "--predictor", "--checkpoint", "--casm-path")


@dataclasses.dataclass(frozen=True)
class SmallCommand:
    """A command in miniature.

    Attributes:
        program: "main.py", or a verb of `python -m explainers`.
        words: Arguments of the program.
        launched: Whether the command begins with `multiproc.py`.
        workspace: Output folder.
    """

    program: str
    words: list[str]
    launched: bool
    workspace: Path

    def run_here(self) -> int:
        """Run in this process, by the function that the command line calls, and return the exit code."""
        if self.program == "main.py":
            return main_job.main(self.words)
        return explainers_main([self.program, *self.words])

    def run_apart(self, cache: Path, processes: int = 1) -> tuple[int, str]:
        """Run in separate processes, through `multiproc.py` if the command does; return exit code and output."""
        launcher = ["multiproc.py", "--nproc_per_node", str(processes)] if self.launched else []
        program = ["main.py"] if self.program == "main.py" else ["-m", "explainers", self.program]
        result = run([sys.executable, *launcher, *program, *self.words], cache=cache, timeout=600)
        return result.returncode, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"

    def parse(self) -> Any:
        """Parse the configuration, with the parser of the job that would run it."""
        if self.program == "main.py":
            return parse_config(main_job.MainConfig, self.words)
        return importlib.import_module(VERBS[self.program][0]).VERB.parse(self.words, "", "")

    def given(self, flag: str) -> bool:
        """Whether a flag is among the words."""
        return flag in self.words


def small(command: str, miniatures: Miniatures, workspace: Path) -> SmallCommand:
    """Convert a documented command to a miniature one.

    Args:
        command: One line: `python [multiproc.py …] main.py DATA …`, or `… -m explainers VERB DATA …`.
        miniatures: Source of data and files.
        workspace: Output folder of the run.
    """
    words = shlex.split(command)
    if "-m" in words:
        start = words.index("explainers") + 1
    else:
        start = next(place for place, word in enumerate(words) if word.endswith("main.py"))
    program = words[start].removeprefix("./")
    launched = any(word.endswith("multiproc.py") for word in words[:start])
    words = _with_miniatures(program, words[start + 1 :], miniatures, workspace)
    short = _short_flags(program, words, workspace)
    return SmallCommand(
        program, words + [word for flag in short.items() for word in flag], launched, workspace
    )


def _setting(words: list[str], name: str) -> Any:
    """Return a flag's value, else the recipe's; None if neither has one."""
    if f"--{name}" in words:
        place = words.index(f"--{name}") + 1
        return words[place] if place < len(words) and not words[place].startswith("--") else True
    return recipe_of(words).get(name)


def _with_miniatures(program: str, words: list[str], miniatures: Miniatures, workspace: Path) -> list[str]:
    """Replace data, files and folders."""
    kind = _kind(program, words)
    arch = _setting(words, "arch") or ("vgg16_bn_voc_x8" if kind == "voc" else "resnet50")
    words = [miniatures.data(kind), *words[1:]]
    if "--config" in words:
        place = words.index("--config") + 1
        words[place] = str(ROOT / words[place])
    for flag in _FILES:
        if flag in words:
            words[words.index(flag) + 1] = str(_file(flag, words, arch, kind, miniatures))
    folders = {
        "--annotation-path": miniatures.boxes,
        "--resnets-path": lambda: miniatures.folder_of_classifiers(arch, kind),
        "--log-path": lambda: workspace / "log",
        "--plots-path": lambda: workspace / "plots",
        "--casms-path": lambda: (
            workspace
            if "--reproduce" in words or "--config" in words
            else (miniatures.casm(arch, kind).parent)
        ),
    }
    for flag, make in folders.items():
        if flag in words:
            words[words.index(flag) + 1] = str(make())
    return words


def _kind(program: str, words: list[str]) -> str:
    """Return the miniature data set that suits a command."""
    if words[0] == "shapes" or "cifar" in words[0]:
        return words[0].rpartition("/")[2]
    return "voc" if _setting(words, "multi-label") or program == "localize" else "imagenet"


def _file(flag: str, words: list[str], arch: str, kind: str, miniatures: Miniatures) -> Path:
    """Return the replacement for a flag's file."""
    if flag == "--pretrained-weights" and "--new-head" in words:
        return miniatures.published_weights(arch)
    if flag == "--teacher":
        return miniatures.classifier(arch.partition("_x")[0], kind)
    makers = {
        "--selector": miniatures.selector,
        "--predictor": miniatures.predictor,
        "--casm-path": miniatures.casm,
    }
    return makers.get(flag, miniatures.classifier)(arch, kind)


def _short_flags(program: str, words: list[str], workspace: Path) -> dict[str, str]:
    """Return flags that shorten the run, for the program and for the features that the words enable."""
    backend = str(_setting(words, "data-backend") or "pytorch")
    flags = {"--data-backend": "pytorch" if backend.startswith("dali") else backend}
    if program == "train-casm":
        own = {"--optimizer-batch-size", "--workspace"}
        return flags | {name: value for name, value in _TRAINING.items() if name not in own}
    if program != "main.py" and not program.startswith("train-"):
        return flags | _READING
    flags |= _TRAINING | {"--workspace": str(workspace)}
    if program != "main.py":
        return flags | _HELD_OUT | {"--evaluation-interval": "2"}
    if _setting(words, "iterative-pruning"):
        return flags | {"--pruning-step": "1", "--pruning-delta": "0.25", "--calibration-batches": "1"}
    if _setting(words, "one-shot-pruning"):
        return flags | {"--calibration-batches": "1"}
    if _setting(words, "pruning-method") == "learned":
        return flags | _HELD_OUT | {"--gate-epochs": "1"}
    return flags
