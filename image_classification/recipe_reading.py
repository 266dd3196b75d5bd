"""What `--config` names: the file of a recipe, and what it holds."""

from __future__ import annotations

from pathlib import Path

from image_classification.config import ConfigError, nearest
from image_classification.recipes import recipes
from image_classification.yaml_reading import read_yaml_mapping


def recipe_path(word: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        ConfigError: There is neither; the nearest name is suggested.
    """
    path = Path(word)
    if path.is_file():
        return path
    known = recipes()
    if word not in known:
        raise ConfigError(f"--config: no such file: {word}, nor a recipe of that name{nearest(word, known)}")
    return known[word]


def read_mapping(path: Path) -> dict[object, object]:
    """The content of a recipe, unchecked.

    Raises:
        ConfigError: The file holds no mapping.
    """
    return read_yaml_mapping(path, "--config")
