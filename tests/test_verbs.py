"""`python -m PACKAGE VERB`: what is imported for a verb, and what becomes of errors."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.commands import ROOT

import explainers
import pruning
from image_classification.command_parser import positive
from image_classification.config import ConfigError, SettingError
from image_classification.device_flag import device_named
from image_classification.exit_codes import EXIT_PEER
from image_classification.file_writing import output_path
from image_classification.peers import PeerError
from image_classification.verbs import declared, run_verb

PACKAGES = ["image_classification", "explainers", "pruning"]


@pytest.mark.parametrize("package", PACKAGES)
def test_help_and_slips_are_answered_without_torch(package: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{package}', *sys.argv[1:]]\n"
        f"try: runpy.run_module('{package}', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)\n"
    )
    for word, status in (("--help", 0), ("compaer", 2)):
        shown = subprocess.run([sys.executable, "-c", code, word], cwd=ROOT, capture_output=True, text=True)
        assert shown.stdout.splitlines()[-1] == f"{status} False", shown
    assert f"python -m {package}: error: unknown verb 'compaer'" in shown.stderr


@pytest.mark.parametrize("package", [explainers, pruning])
def test_every_public_name_of_a_package_can_be_had(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="'nothing'"):
        getattr(package, "nothing")  # noqa: B009


def run_failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def run(_: object) -> int:
        raise error

    module = ModuleType("failing_verb")
    module.VERB = declared(lambda parser: None, run)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "failing_verb", module)
    return run_verb({"fail": ("failing_verb", "fails")}, ["fail"], prog="python -m x", description="")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (SettingError("num_horns", -1, "give a number ≥ 0"), 2, "--num-horns -1: give a number ≥ 0"),
        (FileNotFoundError("there is no file x"), 2, "there is no file x"),
        (NotImplementedError("no rule for aten::bmm"), 2, "no rule for aten::bmm"),
        (PeerError("rank 1 failed"), EXIT_PEER, "rank 1 failed"),
    ],
)
def test_an_error_that_can_be_mended_is_one_line(
    error: Exception,
    status: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_failing(error, monkeypatch) == status
    assert capsys.readouterr().err == f"python -m x fail: error: {told}\n"


def run_declared(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and error of a verb with an argument of every kind; its error names two of them."""

    def declare(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("source", type=Path)
        parser.add_argument("--share", type=float, default=float("inf"))
        parser.add_argument("--count", type=positive, default=1)
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--averaged", dest="ema", action="store_true")
        parser.add_argument("--name", default=None)
        parser.add_argument("--json", "-o", type=output_path, default=None)

    def run(arguments: argparse.Namespace) -> int:
        raise ValueError("leave `ema` out, or give a `source` or another `num_classes`")

    module = ModuleType("declared_verb")
    module.VERB = declared(declare, run)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "declared_verb", module)
    try:
        status = run_verb({"do": ("declared_verb", "")}, ["do", *words], prog="x", description="")
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a", "--share", "nan"], "argument --share: 'nan': give a finite number"),
        (["a", "--share=1e400"], "argument --share: '1e400': give a finite number"),
        (["a", "--share=--"], "--share: there is no value behind it"),
        (["a", "--seed", str(1 << 63)], f"argument --seed: '{1 << 63}': it is beyond 64 bits"),
        (["a", "--count", "0"], "argument --count: '0': give a whole number ≥ 1"),
        (["a", "--name="], "argument --name: '': the value is empty"),
        ([""], "argument source: '': the value is empty"),
        (["a", "--name", "a\0b"], "argument --name: 'a\\x00b': it holds a zero byte"),
        (["a", "--name", "\ud800"], "argument --name: '\\ud800': it is no UTF-8 text"),
        (["a", "--json", "./a"], "--json a: that is SOURCE; give another name"),
        (["a", "-o", "file/b.json"], "file/b.json: file is a file: give a path in a folder"),
    ],
)
def test_words_that_nothing_can_mean_are_refused(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of arguments that are declared, in one place for all verbs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    status, line = run_declared(words, monkeypatch, capsys)
    assert status == 2
    assert told in line.replace(f"{tmp_path}/", ""), line


def test_a_message_names_the_verbs_own_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of training stand in where the verb has none."""
    status, line = run_declared(["a"], monkeypatch, capsys)
    assert (status, line) == (
        2,
        "x do: error: leave --averaged out, or give a SOURCE or another --num-classes",
    )


@pytest.mark.parametrize("size", [10**10, 10**17])
def test_numbers_that_no_memory_holds_are_told(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(size, 1000, 1000)
    assert run_failing(caught.value, monkeypatch) == 2
    assert run_failing(MemoryError(), monkeypatch) == 2


@pytest.mark.parametrize("word", ["meta", "xla", "nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_told(word: str) -> None:
    assert device_named("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=f"--device {word}: .*give cpu"):
        device_named(word)


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_failing(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err.split() == ["python", "-m", "x", "fail:", "interrupted"]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_failing(RuntimeError("size mismatch"), monkeypatch)


def test_a_custom_method_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `docs/howto/own-attribution.md` has it."""
    page = (ROOT / "docs" / "howto" / "own-attribution.md").read_text(encoding="utf-8")
    _, source, _ = re.split(r"```(?:python)?\n", page)
    (tmp_path / "smoothgrad.py").write_text(source, encoding="utf-8")
    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    code = (
        "import sys\n"
        "from explainers.__main__ import main\n"
        "words = ['attribute', 'shapes', '--plugin', 'smoothgrad']\n"
        "try: main([*words, '--help'])\n"
        "except SystemExit: pass\n"
        "settings = ['-m', 'smoothgrad', '--smoothgrad-copies', '0']\n"
        "sys.exit(main([*words, '--checkpoint', sys.argv[1], *settings]))\n"
    )
    command = [sys.executable, "-c", code, str(weights)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "--smoothgrad-copies" in done.stdout
    assert "smoothgrad: noisy copies" in " ".join(done.stdout.split())
    assert done.returncode == 2
    assert "--smoothgrad-copies 0: give at least 1" in done.stderr
