"""Finds and reads the recipe file given by `--config`."""

from __future__ import annotations

from pathlib import Path

from image_classification.config import ConfigError, nearest
from image_classification.recipes import recipes
from image_classification.yaml_reading import read_yaml_mapping


def recipe_path(word: str) -> Path:
    """Return the file of a recipe: a path, or the name of a recipe included in the package.

    Raises:
        ConfigError: Neither exists; the nearest name is suggested.
    """
    path = Path(word)
    if path.is_file():
        return path
    known = recipes()
    if word not in known:
        raise ConfigError(f"--config: no such file: {word}, nor a recipe of that name{nearest(word, known)}")
    return known[word]


def read_mapping(path: Path) -> dict[object, object]:
    """Return the content of a recipe, unchecked.

    Raises:
        ConfigError: The file holds no mapping.
    """
    return read_yaml_mapping(path, "--config")
