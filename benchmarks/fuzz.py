"""Fuzzing of command lines and recipes of every verb: each is run or refused in one line, never with a traceback.

    python benchmarks/fuzz.py [--seconds N] [--seed S] [--verb NAME …] [--output FILE]

A case puts a word such as `nan`, 10³⁰, a zero byte or a shell's empty variable after a flag or in place of an argument
of a random verb. Verbs with a few arguments are then run, on a network and images of 32 pixels; for jobs that train or
explain, only the command line is parsed, which is where their flags are checked. Every fourth case is a recipe: one of
`RECIPES`, or a valid one with random characters inserted, removed or doubled.

A case is a fault if it ends with anything but an exit code of 0, 1 or 2, if the error of a 2 is not one line, or if it
takes longer than two minutes. A table of verbs is printed: cases, refused cases, faults. The exit code is 1 if there is
a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
from common.report import BenchmarkParser, write_json
from PIL import Image

from explainers.__main__ import VERBS as EXPLAIN_VERBS
from image_classification.verbs import run_verb, verb_of
from pruning.__main__ import ALL_VERBS

WORDS = (
    *("", " ", "-1", "0", "1", "2", "0.5", "1e30", "1e400", "1e-300", "nan", "inf", "-inf", "0x10", "1_000"),
    *(
        "1000000",
        "123456789012",
        "9" * 17,
        "9" * 30,
        "9" * 5000,
        "auto",
        "true",
        "null",
        "cpu",
        "cuda:99",
        "meta",
    ),
    *(
        "~",
        "~nosuchuser",
        "..",
        "/dev/null",
        "a=b",
        "macs=0.5",
        "macs=",
        "macs=nan",
        "=",
        "%s",
        "[",
        "layer1*",
    ),
    *("\x00", "\ud800", "ä", "'", "a" * 3000, "[1, 2]", "{a: 1}", "-", "--", "--lr", "*", "os:system"),
    *(
        "!!python/name:os.system",
        "resnet20",
        "timm/none",
        "shapes:train=x",
        "{network}",
        "{images}",
        "{page}",
    ),
)
RECIPES = (
    *("[" * 3000, "{" * 3000, "a: " * 200, "!!int abc", "epochs: !!int abc", "epochs: !!float x"),
    *("epochs: 2020-01-01", "arch: 2020-01-01", "2020-01-01: 1", "epochs: .inf", "epochs: .nan", "lr: .inf"),
    *("? [a, b]\n: 1", "? {a: b}\n: 1", "1: 2", "null: 1", "true: 1", "~", "", "---\n---\n", "a: 1\na: 2"),
    *("\t", "%", "&a *a", "epochs: !!timestamp 2020-01-01", "epochs: !!binary aGk=", "epochs: !!set {a}"),
    *("epochs: !!bool x", "a: !!python/object/apply:os.system [ls]", "epochs: 1e3", "epochs: '3'"),
    *("epochs: [3]", "epochs: {a: 3}", "epochs:", "epochs: ''", "mean: 3", "mean: [a, b, c]", "plugin: 7"),
    *("budget: macs=0.5", "budget: {macs: 0.5}", "budget: [[macs]]", "plugin: {a: b}", "plugin: [os.path]"),
    *("epochs: " + "9" * 5000, "x" * 200_000 + ": 1", "<<: {epochs: 3}"),
    "a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nepochs: [*c, *c]",
)
GOOD_RECIPE = (
    "arch: resnet20\nepochs: 3\nlr: 0.1\nbudget: [macs=0.5]\nmean: [0.1, 0.2, 0.3]\nmixup: 0.2\nworkers: 2\n"
)
_SIZE = 32
_LONGEST = 120  # seconds per case
_LINE = 6000  # characters per error
_NAMES = {**ALL_VERBS, **{f"explain {name}": entry for name, entry in EXPLAIN_VERBS.items()}}

#: Valid command lines of verbs with a few arguments, in a folder of their own.
LINES = {
    "groups": "resnet20 --image-size 32",
    "score": "{network} {images} --data-backend pytorch --calibration-batches 1 -b 2",
    "compress": "{network} {images} --output out/small.pth.tar -n 4 --num-judged 2 --no-latency",
    "sensitivity": "{network} {images} --output out/s.json -n 4 --removed 0.5 --repair none",
    "report": "{run} --output out/report.html --num-images 1 --batch-sizes 1 --num-batches 1",
    "export": "{network} --output out/x.pt --format state-dict -n 3",
    "upload": "{network} owner/name --folder out/up",
    "compare": "{network} {network} --json out/c.json",
    "import": "{network} out/i.pth.tar",
    "shrink": "{network} out/s.pth.tar --no-latency",
    "verify": "{images} --workers 0 --quiet",
    "prepare": "{images} out/prepared --workers 0 --quiet --short-side 16",
    "split": "{images}/train out/split",
    "benchmark": "--arch resnet20 --batch-sizes 1 --num-batches 1 --image-size 32",
    "explain classify": "{images}/train/a/0.png --checkpoint {network}",
}
#: Verbs that legitimately take long or start processes: compiled networks, and throughput's trainings.
_NOT_RUN = {"compile"}
#: Jobs that train or explain, of which only the command line is parsed: a valid command line for each.
READ_ALONE = {
    "train": "{images}",
    "prune": "{images} --budget macs=0.5",
    "evaluate": "{images} --pretrained-weights {network}",
    "explain attribute": "{images} --checkpoint {network} --method gradcam",
    "explain localize": "{images} --checkpoint {network} --method gradcam",
    "explain compare": "{network} {network} {images}",
    "explain train-predictor": "{images}",
    "explain train-selector": "{images} --predictor {network}",
    "explain evaluate-selector": "{images} --selector {network}",
    "explain visualize": "{images} --selector {network}",
    "explain train-casm": "{images} --casms-path out",
    "explain score-casm": "{images} --casms-path {images}",
    "explain eval-casm": "{images} --casms-path {images}",
    "explain plot-casm": "{images} --casm-path {network} --plots-path out",
}


@dataclasses.dataclass
class Tally:
    """Results of a verb's cases.

    Attributes:
        verb: Its name.
        cases, refused: Number of cases, and how many of them ended with exit code 2.
        faults: The command line and what is wrong with its result.
    """

    verb: str
    cases: int = 0
    refused: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)


class TooLongError(BaseException):
    """A case takes too long. A BaseException, so that code on the way cannot mistake it for one of its errors."""


def outcome(verb: str, words: Sequence[str]) -> tuple[int | None, str]:
    """Run a command line in this process, or only parse it.

    Returns:
        The exit code, and what is wrong with the result, or "".
    """
    table = EXPLAIN_VERBS if verb.startswith("explain ") else ALL_VERBS
    name = verb.removeprefix("explain ")
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with time_limit(_LONGEST):
                if verb in LINES:
                    code = run_verb(table, [name, *words], prog="lucidprune", description="")
                else:
                    verb_of(table[name][0]).parse(words, "lucidprune", "")
                    code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except TooLongError:
            return None, f"longer than {_LONGEST} s"
        except Exception as error:
            return None, "".join(traceback.format_exception(error))
    if code not in (0, 1, 2):
        return code, f"exit code {code}"
    lines = [line for line in err.getvalue().splitlines() if "error:" in line]
    if code == 2 and (len(lines) != 1 or len(lines[0]) > _LINE):
        return code, f"an error of {len(lines)} lines and {sum(map(len, lines))} characters"
    return code, ""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TooLongError` inside the block after this many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def with_a_word(parser: argparse.ArgumentParser, line: Sequence[str], chooser: random.Random) -> list[str]:
    """Return a command line with a word of `WORDS` after one of its verb's flags, or in place of an argument."""
    actions = [
        action
        for action in parser._actions
        if action.dest not in {"help", "plugin", "config"} | _NOT_RUN and action.nargs != 0
    ]
    action, word = chooser.choice(actions), chooser.choice(WORDS)
    if not action.option_strings:
        places = [other for other in parser._actions if not other.option_strings]
        return [*line[: places.index(action)], word, *line[places.index(action) + 1 :]]
    flag = next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])
    kept = without(line, action)
    count = action.nargs if isinstance(action.nargs, int) else 1
    return (
        [*kept, f"{flag}={word}"] if count == 1 and chooser.random() < 0.7 else [*kept, flag, *[word] * count]
    )


def without(line: Sequence[str], action: argparse.Action) -> list[str]:
    """Return a command line without a flag and its values."""
    kept: list[str] = []
    behind = False
    for word in line:
        if word.startswith("-"):
            behind = word in action.option_strings
        if not behind:
            kept.append(word)
    return kept


def mutated(text: str, chooser: random.Random) -> str:
    """Insert random characters of YAML into a text, or replace others by them."""
    characters = list(text)
    for _ in range(chooser.randint(1, 4)):
        place = chooser.randrange(len(characters))
        characters[place : place + chooser.randint(0, 2)] = chooser.choice(
            [*"[]{}:,&*!|>-#%@`'\"\n\t?~", "!!int "]
        )
    return "".join(characters)


def a_case(
    verb: str, parser: argparse.ArgumentParser, files: dict[str, str], chooser: random.Random
) -> list[str]:
    """Create a command line of a verb; a recipe is written next to the files that it names."""
    line = {**LINES, **READ_ALONE}[verb].split()
    if verb in READ_ALONE and chooser.random() < 0.25:
        text = chooser.choice(RECIPES) if chooser.random() < 0.3 else mutated(GOOD_RECIPE, chooser)
        recipe = Path(files["images"]).parent / "recipe.yaml"
        recipe.write_text(text)
        return ["--config", str(recipe)]
    words = with_a_word(parser, line, chooser)
    for name, path in files.items():
        words = [word.replace(f"{{{name}}}", path) for word in words]
    return words


def make_files(folder: Path) -> dict[str, str]:
    """Create a data set, a page, a run and its network, under the names used in `LINES` and `WORDS`."""
    images, page, run = folder / "images", folder / "page.txt", folder / "run"
    pixels = np.random.default_rng(0)
    for number in range(16):
        path = images / ("val" if number % 4 == 3 else "train") / "ab"[number // 8] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (_SIZE, _SIZE, 3), dtype=np.uint8)).save(path)
    page.write_text("nothing")
    words = [
        str(images),
        *f"--workspace {run} --arch resnet20 --image-size {_SIZE} --epochs 1 -b 4 -j 0".split(),
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = run_verb(ALL_VERBS, ["train", *words, "--device", "cpu"], prog="lucidprune", description="")
    assert code == 0, "the training of the network to work on failed"
    network = run / "checkpoint.pth.tar"
    return {"network": str(network), "images": str(images), "page": str(page), "run": str(run)}


@contextlib.contextmanager
def empty_folder(path: Path) -> Iterator[None]:
    """Work in a new folder, for the verbs' outputs."""
    shutil.rmtree(path, ignore_errors=True)
    (path / "deeper").mkdir(parents=True)
    before = Path.cwd()
    os.chdir(path / "deeper")
    try:
        yield
    finally:
        os.chdir(before)


def fuzz(verbs: Sequence[str], seconds: float, most: int, seed: int, folder: Path) -> list[Tally]:
    """Try random cases of verbs, in turn, until time is up or the number of cases per verb is reached.

    Args:
        verbs: Their names.
        seconds, most: Limits of time and of cases per verb.
        seed: Seed of the random choices.
        folder: Empty folder for files.
    """
    chooser, end = random.Random(seed), time.monotonic() + seconds
    files = make_files(folder)
    parsers = {verb: verb_of(_NAMES[verb][0]).parser for verb in verbs}
    tallies = [Tally(verb) for verb in verbs]
    for _ in range(most):
        for tally in tallies:
            if time.monotonic() > end:
                return tallies
            make = parsers[tally.verb]
            assert make is not None, f"{tally.verb} has no parser of ours"
            with empty_folder(folder / "work"):
                words = a_case(tally.verb, make(), files, chooser)
                code, fault = outcome(tally.verb, words)
            tally.cases += 1
            tally.refused += code == 2
            if fault:
                shown = " ".join(word if len(word) < 60 else f"{word[:60]}…" for word in words)
                tally.faults.append(f"{tally.verb} {shown!r}: {fault}")
    return tallies


def main() -> int:
    """Run the fuzzer from the command line."""
    parser = BenchmarkParser(__doc__, cpu_only=True)
    parser.add_argument("--seconds", type=float, default=300, help="how long")
    parser.add_argument(
        "--verb", action="append", choices=sorted([*LINES, *READ_ALONE]), help="this one alone"
    )
    arguments = parser.parse("fuzz.json", {"seconds": 10.0})
    with tempfile.TemporaryDirectory() as temporary:
        verbs = arguments.verb or [*LINES, *READ_ALONE]
        tallies = fuzz(verbs, arguments.seconds, sys.maxsize, arguments.seed, Path(temporary))
    print("| verb | cases | refused | faults |\n|---|---|---|---|")
    for tally in tallies:
        print(f"| {tally.verb} | {tally.cases} | {tally.refused} | {len(tally.faults)} |")
    for fault in [fault for tally in tallies for fault in tally.faults]:
        print(fault.encode("utf-8", "backslashreplace").decode())
    rows = [{**dataclasses.asdict(tally), "faults": len(tally.faults)} for tally in tallies]
    write_json(arguments, 1, {"rows": rows})
    return int(any(tally.faults for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
