"""Flags and recipes with anything in them: taken, or refused with exit code 2 and one line; never a traceback."""

from __future__ import annotations

import itertools
import random
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from benchmarks import fuzz
from benchmarks.fuzz import GOOD_RECIPE, LINES, READ_ALONE, RECIPES, WORDS, mutated
from image_classification.cli import parse_config
from image_classification.config import ConfigError
from image_classification.options import options_of
from image_classification.verbs import declared
from image_classification.yaml_reading import parse_yaml
from main import MainConfig
from pruning.__main__ import ALL_VERBS


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """The message with which a command line is refused, None where it is taken."""
    capsys.readouterr()
    try:
        parse_config(MainConfig, argv, prog="main.py")
    except SystemExit as stop:
        err = capsys.readouterr().err
        if stop.code != 2:
            raise AssertionError(argv) from stop
        (line,) = [line for line in err.splitlines() if "error:" in line]
        assert len(line) < 6000, f"{len(line)} characters"
        return line
    return None


def test_flags_with_anything_behind_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Each flag three words; the slow test tries them all."""
    names = [
        option.spellings()[0] for option in options_of(MainConfig) if option.spellings()[0].startswith("-")
    ]
    assert len(names) > 100
    chooser = random.Random(0)
    taken = 0
    for name, word in itertools.product(names, WORDS):
        if chooser.random() < 3 / len(WORDS):
            taken += refused(["shapes", f"{name}={word}"], capsys) is None
    assert taken, "none at all"


@pytest.mark.slow
def test_all_flags_with_all_words(capsys: pytest.CaptureFixture[str]) -> None:
    for option, word in itertools.product(options_of(MainConfig), WORDS):
        refused(["shapes", f"{option.spellings()[0]}={word}"], capsys)


def test_every_verb_is_fuzzed() -> None:
    """But those that start processes of others: the launcher, and the bench that trains through it."""
    explained = {f"explain {name}" for name in fuzz.EXPLAIN_VERBS}
    assert {*LINES, *READ_ALONE} == {*ALL_VERBS, *explained} - {"explain", "launch", "throughput"}


@pytest.mark.slow
def test_every_verb_with_anything_behind_its_flags(tmp_path: Path) -> None:
    tallies = fuzz.fuzz([*LINES, *READ_ALONE], seconds=200, most=3, seed=0, folder=tmp_path)
    assert [fault for tally in tallies for fault in tally.faults] == []
    assert sum(tally.cases for tally in tallies) > len(tallies)


def test_good_command_lines_are_taken(tmp_path: Path) -> None:
    """Those of jobs; what the others would do takes longer. Otherwise a word would be refused for what lies beside."""
    files = {name: str(tmp_path / name) for name in ("network", "images", "page", "run")}
    (tmp_path / "images").mkdir()
    (tmp_path / "network").touch()
    for verb, line in READ_ALONE.items():
        words = [word.format_map(files) for word in line.split()]
        assert fuzz.outcome(verb, words) == (0, ""), verb


def test_a_fault_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {"raise": "TypeError: at the end", "code": "exit code 7", "silent": "an error of 0 lines"}

    def run(arguments: object) -> int:
        if arguments.how == "raise":  # type: ignore[attr-defined]
            raise TypeError("at the end")
        return 7 if arguments.how == "code" else 2  # type: ignore[attr-defined]

    module = ModuleType("faulty_verb")
    module.VERB = declared(lambda parser: parser.add_argument("how"), run)  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "faulty_verb", module)
    monkeypatch.setitem(fuzz.ALL_VERBS, "verify", ("faulty_verb", ""))  # type: ignore[arg-type]
    for how, fault in ends.items():
        assert fault in fuzz.outcome("verify", [how])[1]


def test_recipes_with_anything_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    begin = time.monotonic()
    for text in RECIPES:
        recipe.write_text(text)
        refused(["shapes", "--config", str(recipe)], capsys)
    assert time.monotonic() - begin < 60, "a bomb went off"


def test_mutated_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A good recipe with random bytes put in, taken out or doubled."""
    chooser = random.Random(1)
    recipe = tmp_path / "recipe.yaml"
    for _ in range(60):
        recipe.write_text(mutated(GOOD_RECIPE, chooser))
        refused(["shapes", "--config", str(recipe)], capsys)


def test_what_yaml_means_here() -> None:
    """Plain values as PyYAML reads them; dates stay text; no alias, no foreign type."""
    text = "a: [1, 2.5, yes, null, 'x', 2020-01-01]\nb: {c: -3}\n"
    expected = yaml.safe_load(text.replace("2020-01-01", "'2020-01-01'"))
    assert parse_yaml(text) == expected
    for hostile in ("&a [*a]", "!!python/name:os.system", "!!timestamp 2020-01-01", "[" * 50, "!!int abc"):
        with pytest.raises(ConfigError):
            parse_yaml(hostile)
