"""Configuration as keyword-only dataclasses that stand beside the code they configure.

A field made with `flag` carries its command-line spelling, help text and choices, so that the dataclass is the
only place where an option is described: the parser (`cli.py`), the YAML reader and the saved, resolved
configuration are all derived from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the flag, the value and the way out."""


@dataclasses.dataclass(frozen=True)
class FlagSpec:
    """How a dataclass field appears on the command line."""

    names: tuple[str, ...]
    help: str
    choices: tuple[Any, ...] | None = None
    nargs: str | int | None = None
    metavar: str | None = None
    const: Any = None
    parse: Callable[[str], Any] | None = None
    repeatable: bool = False


def flag(
    default: Any,
    *names: str,
    help: str,
    choices: Sequence[Any] | None = None,
    nargs: str | int | None = None,
    metavar: str | None = None,
    const: Any = None,
    parse: Callable[[str], Any] | None = None,
    repeatable: bool = False,
) -> Any:
    """Declare a dataclass field with its command-line flag.

    Args:
        default: Default value; a list is copied for every instance.
        names: Spellings (`"--lr"`, `"-b"`). Several long spellings are aliases. A name without a leading dash
            makes a positional argument. Boolean fields are switches; a field that defaults to True gets a
            `--no-…` spelling beside it.
        help: One sentence for `--help`; units where there are any.
        choices: Accepted values, checked for flags and YAML alike.
        nargs, metavar, const: As in `argparse.add_argument`.
        parse: Converts one command-line word; derived from the field's type when not given.
        repeatable: The flag may be given several times; the field is a list.
    """
    spec = FlagSpec(
        tuple(names),
        help,
        None if choices is None else tuple(choices),
        nargs,
        metavar,
        const,
        parse,
        repeatable,
    )
    metadata = {"flag": spec}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag_fields(config_class: type) -> list[tuple[dataclasses.Field[Any], FlagSpec]]:
    """The fields of a configuration class that have a command-line flag, in order of declaration."""
    return [
        (field, field.metadata["flag"])
        for field in dataclasses.fields(config_class)
        if "flag" in field.metadata
    ]


def check(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds. The message names the flag and the fix."""
    if not condition:
        raise ConfigError(message)
