"""Flags and recipes with anything in them: taken, or refused with exit code 2 and one line; never a traceback."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
import yaml

from image_classification.cli import options_of, parse_config
from image_classification.config import ConfigError
from image_classification.yaml_reading import parse_yaml
from main import MainConfig

WORDS = [
    *("", " ", "-1", "0", "1", "1e30", "1e400", "nan", "inf", "-inf", "0x10", "1_000", "9" * 30, "9" * 5000),
    *(
        "auto",
        "true",
        "null",
        "~",
        "~nosuchuser",
        "/",
        ".",
        "..",
        "/dev/null",
        "a=b",
        "macs=0.5",
        "macs=",
        "=",
        "%s",
    ),
    *(
        "\x00",
        "\ud800",
        "ä",
        "'",
        "a" * 3000,
        "[1, 2]",
        "{a: 1}",
        "-",
        "--",
        "--lr",
        "*",
        "!!python/name:os.system",
    ),
]

RECIPES = [
    *(
        "[" * 3000,
        "{" * 3000,
        "a: " * 200,
        "!!int abc",
        "epochs: !!int abc",
        "epochs: !!float x",
        "epochs: !!bool x",
    ),
    *("epochs: 2020-01-01", "arch: 2020-01-01", "2020-01-01: 1", "epochs: .inf", "epochs: .nan", "lr: .inf"),
    *(
        "? [a, b]\n: 1",
        "? {a: b}\n: 1",
        "1: 2",
        "null: 1",
        "true: 1",
        "~",
        "",
        "---\n---\n",
        "a: 1\na: 2",
        "\t",
        "%",
        "&a *a",
    ),
    *(
        "epochs: !!timestamp 2020-01-01",
        "epochs: !!binary aGk=",
        "epochs: !!set {a}",
        "a: !!python/object/apply:os.system [ls]",
    ),
    *(
        "epochs: 1e3",
        "epochs: '3'",
        "epochs: [3]",
        "epochs: {a: 3}",
        "epochs:",
        "epochs: ''",
        "mean: 3",
        "mean: [a, b, c]",
    ),
    *(
        "budget: macs=0.5",
        "budget: {macs: 0.5}",
        "budget: [[macs]]",
        "plugin: 7",
        "plugin: {a: b}",
        "plugin: [os.path]",
    ),
    "epochs: " + "9" * 5000,
    "x" * 200_000 + ": 1",
    "a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nepochs: [*c, *c]",
    "<<: {epochs: 3}",
]


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


def test_recipes_with_anything_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    begin = time.monotonic()
    for text in RECIPES:
        recipe.write_text(text)
        refused(["shapes", "--config", str(recipe)], capsys)
    recipe.write_bytes(b"\xff\xfe\x00epochs: 3")
    assert refused(["shapes", "--config", str(recipe)], capsys)
    recipe.write_text("#" * (2 << 20))
    assert "larger than a recipe" in str(refused(["shapes", "--config", str(recipe)], capsys))
    assert time.monotonic() - begin < 60, "a bomb went off"


def test_mutated_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A good recipe with random bytes put in, taken out or doubled."""
    chooser = random.Random(1)
    good = "arch: resnet20\nepochs: 3\nlr: 0.1\nbudget: [macs=0.5]\nmean: [0.1, 0.2, 0.3]\nmixup: 0.2\n"
    recipe = tmp_path / "recipe.yaml"
    for _ in range(60):
        text = list(good)
        for _ in range(chooser.randint(1, 4)):
            place = chooser.randrange(len(text))
            text[place : place + chooser.randint(0, 2)] = chooser.choice(
                [*"[]{}:,&*!|>-#%@`'\"\n\t?~", "!!int "]
            )
        recipe.write_text("".join(text))
        refused(["shapes", "--config", str(recipe)], capsys)


def test_what_yaml_means_here() -> None:
    """Plain values as PyYAML reads them; dates stay text; no alias, no foreign type."""
    text = "a: [1, 2.5, yes, null, 'x', 2020-01-01]\nb: {c: -3}\n"
    expected = yaml.safe_load(text.replace("2020-01-01", "'2020-01-01'"))
    assert parse_yaml(text) == expected
    for hostile in ("&a [*a]", "!!python/name:os.system", "!!timestamp 2020-01-01", "[" * 50, "!!int abc"):
        with pytest.raises(ConfigError):
            parse_yaml(hostile)
