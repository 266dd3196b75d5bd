"""User modules named on the command line, imported before the rest of it is parsed (`--plugin`)."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from image_classification.config import ConfigError
from image_classification.options import shorter
from image_classification.recipe_reading import read_mapping, recipe_path
from image_classification.trusted_code import is_own_code, trust

#: Modules imported by `--plugin`, for the saved configuration.
imported_plugins: list[str] = []


def named_plugins(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the user modules and user-defined networks named on a command line or in its recipes.

    Args:
        words: The command line.

    Raises:
        ConfigError: A recipe cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_plugin_flag(parser)
    parser.add_argument("--config", action="append", default=[])
    named, _ = parser.parse_known_args(words)
    names = list(words)
    for path in named.config:
        recipe = read_mapping(recipe_path(path))
        listed = recipe.get("plugin", [])
        named.plugin += listed if isinstance(listed, list) else [listed]
        names.append(str(recipe.get("arch", "")))
    return named.plugin, [name for word in names if is_own_code(name := word.rpartition("=")[2])]


def import_plugins(words: Sequence[str]) -> None:
    """Import the modules given by `--plugin` before the rest of the command line is parsed.

    A plugin registers objects that flags can then name: a layout, a backend, a criterion, an attribution method.
    User-defined networks on the command line (`package.module:Callable`) may be built from now on.

    Args:
        words: The command line. Recipes given by `--config` may list plugins too, under `plugin`.

    Raises:
        ConfigError: A module does not exist, or its import fails.
    """
    plugins, own = named_plugins(words)
    for name in plugins:
        try:
            importlib.import_module(str(name))
        except Exception as error:  # whatever a user's module raises
            hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
            raise ConfigError(
                f"--plugin {shorter(str(name))}: {type(error).__name__}: {error}{hint}"
            ) from error
        if name not in imported_plugins:
            imported_plugins.append(name)
    trust(own, imported_plugins)


def add_plugin_flag(parser: argparse.ArgumentParser) -> None:
    """Declare `--plugin`, which `import_plugins` reads."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="Python module to import first: it registers layouts, backends, criteria or methods of your own; may be "
        "given several times.",
    )
