"""The lists of flags: what they answer without PyTorch, that they say what verbs say, and when they are not asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ROOT

PACKAGES = ("image_classification", "explainers", "pruning")
#: Verbs whose flags are no list's.
OTHERS = {"launch", "explain"}

ASK_EVERY_VERB = """
import contextlib, io, json, sys
import explainers.__main__, image_classification.__main__, main, pruning.__main__

doors = {
    "image_classification": (image_classification.__main__.main, image_classification.__main__.VERBS),
    "explainers": (explainers.__main__.main, explainers.__main__.VERBS),
    "pruning": (pruning.__main__.main, pruning.__main__.VERBS),
    "lucidprune": (pruning.__main__.lucidprune, pruning.__main__.ALL_VERBS),
}
asked = {"main.py": lambda word: main.main([word])}
for door, (function, verbs) in doors.items():
    for verb in set(verbs) - set(sys.argv[1:]):
        asked[f"{door} {verb}"] = lambda word, function=function, verb=verb: function([verb, word])
answers = {}
for name, ask in asked.items():
    for word in ("--help", "--bogus"):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            try:
                status = ask(word)
            except SystemExit as stop:
                status = stop.code
        answers[f"{name} {word}"] = [status, "torch" in sys.modules, shown.getvalue()]
print(json.dumps(answers))
"""

COMPARE = """
import json, sys
from pathlib import Path
from image_classification.flag_lists import listed_parser
from image_classification.verbs import verb_of
from image_classification.write_flags import lists

wanted = lists(["pruning.__main__:ALL_VERBS", "explainers.__main__:VERBS"])
stale = [str(path) for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
verbs = [verb for path in wanted for verb in json.loads(path.read_text(encoding="utf-8"))["verbs"]]
differing = []
for verb in verbs:
    own = verb_of(verb).parser()
    own.prog, own.description = "prog", "A verb."
    if listed_parser(verb, "prog", "A verb.").format_help() != own.format_help():
        differing.append(verb)
print(json.dumps([stale, differing, len(verbs)]))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as an installation has them: no file is newer than another."""
    folder = tmp_path_factory.mktemp("fresh")
    for name in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main.py", folder)
    for path in folder.rglob("*"):
        os.utime(path)
    return folder


def run(code: str, folder: Path, *words: str) -> str:
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_slips_of_every_verb_take_no_torch(fresh: Path) -> None:
    answers = json.loads(run(ASK_EVERY_VERB, fresh, *OTHERS))
    assert len(answers) > 80
    for name, (status, torch_loaded, shown) in answers.items():
        assert not torch_loaded, name
        if name.endswith("--help"):
            assert status == 0, name
            assert shown.startswith("usage: "), name
        else:
            assert status == 2, name
            assert len(shown.splitlines()) == 2, name
            assert "--rounds" not in shown, name


@pytest.mark.slow
def test_lists_say_what_the_verbs_say(fresh: Path) -> None:
    stale, differing, num_verbs = json.loads(run(COMPARE, fresh))
    assert stale == [], "run make flags"
    assert differing == []
    assert num_verbs > 25


def ask(folder: Path, *words: str) -> tuple[int | str, bool, str]:
    """Status, whether torch was loaded, and what was said."""
    code = (
        "import sys\n"
        "from pruning.__main__ import lucidprune\n"
        "try: status = lucidprune(sys.argv[1:])\n"
        "except SystemExit as stop: status = stop.code\n"
        "print(status, 'torch' in sys.modules, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code, *words]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    status, loaded = done.stderr.splitlines()[-1].split()
    return int(status), loaded == "True", done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "shapes", "--lr", "fast"], "--lr: 'fast' is not usable"),
        (["train", "shapes", "--optimizer", "sdg"], "did you mean sgd?"),
        (["train", "shapes", "--epochz", "3"], "did you mean --epochs?"),
        (["train", "--config", "imagenet_resnet5_prune"], "did you mean imagenet_resnet50_prune"),
        (["compress", "weights.pth"], "required: images, --output"),
        (["explain", "localize", "-m", "gradcm"], "did you mean gradcam?"),
    ],
)
def test_slips_in_values_are_answered_alike(fresh: Path, words: list[str], told: str) -> None:
    status, torch_loaded, shown = ask(fresh, *words)
    assert (status, torch_loaded) == (2, False)
    assert told in shown


def test_a_list_older_than_the_source_is_not_asked(fresh: Path) -> None:
    later = (fresh / "main.py").stat().st_mtime + 3600
    source = fresh / "image_classification" / "optim.py"
    before = source.stat().st_mtime
    os.utime(source, (later, later))
    try:
        status, torch_loaded, _ = ask(fresh, "train", "shapes", "--optimizer", "sdg")
    finally:
        os.utime(source, (before, before))
    assert (status, torch_loaded) == (2, True)


def test_a_plugin_may_bring_flags_that_no_list_knows(fresh: Path) -> None:
    status, torch_loaded, shown = ask(fresh, "train", "shapes", "--plugin", "no_such_module", "--lr", "fast")
    assert (status, torch_loaded) == (2, False)
    assert "--plugin no_such_module: ModuleNotFoundError" in shown
