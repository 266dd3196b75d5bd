"""The recipes of `configs/`: their settings and headers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from support.commands import ROOT

CONFIGS = ROOT / "configs"
#: Fields that every header has after its first line, in this order; `Note` may follow.
FIELDS = ("Paper", "Command", "Expected", "Source")


def settings(path: Path) -> dict[str, Any]:
    """Return the recipe's keys, with dashes, and their values."""
    return {key.replace("_", "-"): value for key, value in yaml.safe_load(path.read_text()).items()}


def header(path: Path) -> dict[str, str]:
    """Return field → its text, with continuation lines joined; `Title` is the first line.

    Raises:
        ValueError: The file does not begin with a comment, or a line of it belongs to no field.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} has no header")
    fields, last = {"Title": lines[0][1:].strip()}, ""
    for line in lines[1:]:
        if match := re.fullmatch(r"# (\w+): +(\S.*)", line):
            last, text = match.groups()
            fields[last] = text
        elif last and line.startswith("#           "):
            fields[last] = f"{fields[last].removesuffix(chr(92)).rstrip()} {line[1:].strip()}"
        else:
            raise ValueError(f"{path}: {line!r} belongs to no field of the header")
    return fields


def recipe_of(words: list[str]) -> dict[str, Any]:
    """Return the settings of the recipe that a command names; none without `--config`."""
    return settings(ROOT / words[words.index("--config") + 1]) if "--config" in words else {}


def main_recipes() -> list[Path]:
    """Return the recipes of `main.py`."""
    return sorted(CONFIGS.glob("*.yaml"))


def explainer_recipes() -> list[Path]:
    """Return the recipes of `python -m explainers`."""
    return sorted((CONFIGS / "explainers").glob("*.yaml"))
