"""Configuration as keyword-only dataclasses next to the code they configure.

A field made with `flag` carries its command-line spelling, help text and choices, so that the dataclass is the only
place where an option is described: the parser (`cli.py`), the YAML reader and the saved, resolved configuration are all
derived from it. A job's configuration is a frozen dataclass with a field per section, made with `section`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from image_classification.published_name import is_published

S = TypeVar("S")

#: A field of a dataclass, of whatever type.
AnyField = dataclasses.Field[Any]


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the setting, its value and a remedy."""


class SettingError(ConfigError):
    """A library setting that cannot be used: named by its argument in Python, by its flag on the command line.

    Args:
        setting: Name of the argument, such as "ridge".
        value: The given value.
        problem: What is wrong with it and what to pass instead.
    """

    def __init__(self, setting: str, value: object, problem: str) -> None:
        super().__init__(f"{setting}={value!r}: {problem}")
        self.setting = setting
        self.value = value
        self.problem = problem


#: Argument → flag; filled by `flag`.
_FLAGS: dict[str, str] = {}


def told(error: Exception, flags: Mapping[str, str] | None = None) -> str:
    """Format an error for command-line users, with flags in place of argument names.

    An error may have `offers`, argument → a part of its text, which is left out where the command has no such flag.

    In the text of any error, a name in backquotes (`num_classes`) stands for the argument, and so for its flag.

    Args:
        error: The raised error.
        flags: Argument → flag of the current command; training flags are used for others.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without its number
        text = (
            error.strerror if error.filename is None else f"{_short(str(error.filename))}: {error.strerror}"
        )
    for argument, offer in getattr(error, "offers", {}).items():
        if flags and argument not in flags:
            text = text.replace(offer, "")
    if isinstance(error, SettingError):
        name = {**_FLAGS, **(flags or {})}.get(error.setting, "--" + error.setting.replace("_", "-"))
        text = f"{name} {error.value}: {error.problem}"
    return with_flags(text, flags)


def with_flags(text: str, flags: Mapping[str, str] | None = None) -> str:
    """Replace arguments in backquotes by flags; see `told`."""
    known = {**_FLAGS, **(flags or {})}
    return re.sub(r"`(\w+)`", lambda found: known.get(found[1], found[0]), text)


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def word_problem(value: object) -> str | None:
    """Describe what is wrong with the text of a command-line or YAML value; None if nothing is."""
    if value == "":
        return "the value is empty: give one, or leave it out"
    if isinstance(value, float) and not math.isfinite(value):
        return "give a finite number"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "it is beyond 64 bits"
    if isinstance(value, (str, Path)):
        try:
            if b"\0" in str(value).encode("utf-8"):
                return "it holds a zero byte"
        except UnicodeEncodeError:
            return "it is no UTF-8 text"
    return None


#: Fragments of PyTorch's bare RuntimeErrors for tensors that do not fit into CPU memory.
_NO_ROOM = (
    "can't allocate memory",
    "not enough memory",
    "Storage size calculation overflowed",
    "numel: integer mul",
)


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the host."""
    # Compared by name, since torch is not imported here.
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or isinstance(error, MemoryError) or any(words in str(error) for words in _NO_ROOM)


def is_told(error: Exception) -> bool:
    """Whether an error is one that a user can fix: its message says everything, and a traceback would only hide it.

    A bare `RuntimeError` is how PyTorch reports a bug, and keeps its traceback; subclasses carry a message meant for
    users.
    """
    bugs = (RuntimeError, RecursionError)
    return isinstance(error, (ValueError, OSError, RuntimeError)) and type(error) not in bugs


@dataclasses.dataclass(frozen=True)
class FlagSpec:
    """A dataclass field's appearance on the command line."""

    names: tuple[str, ...]
    help: str
    choices: Sequence[str] | Callable[[], Sequence[str]] | None = None
    nargs: str | int | None = None
    metavar: str | None = None
    const: object = None
    parse: Callable[[str], object] | None = None
    repeatable: bool = False
    reads: bool = False
    may_be_empty: bool = False


def flag(
    default: object,
    *names: str,
    help: str,
    choices: Sequence[str] | Callable[[], Sequence[str]] | None = None,
    nargs: str | int | None = None,
    metavar: str | None = None,
    const: object = None,
    parse: Callable[[str], object] | None = None,
    repeatable: bool = False,
    setting: str | None = None,
    reads: bool = False,
    may_be_empty: bool = False,
) -> Any:
    """Declare a dataclass field with its command-line flag.

    Args:
        default: Default value; a list is copied for every instance.
        names: Spellings (`"--lr"`, `"-b"`). Several long spellings are aliases. A name without a leading dash
            makes a positional argument. Boolean fields are switches; a field that defaults to True also gets a `--no-…`
                spelling.
        help: One sentence for `--help`, with units if there are any.
        choices: Accepted values, checked for flags and YAML alike; not needed if the field's type is a `Literal`. A
            function is called for them when a command line is parsed, so that plugins can add some.
        nargs, metavar, const: As in `argparse.add_argument`.
        parse: Converts one command-line word; derived from the field's type when not given.
        repeatable: The flag may be given several times; the field is a list.
        may_be_empty: Whether an empty word is meaningful; otherwise it is refused, since it is most likely an unset
            shell variable.
        setting: The library's argument that the flag sets, if its name differs (see `SettingError`).
        reads: The flag names a file that every rank reads; all of them read what rank 0 does (`agreement.py`).
    """
    long_names = [name for name in names if name.startswith("--")]
    for name in long_names[:1]:
        _FLAGS[setting or name[2:].replace("-", "_")] = name
    spec = FlagSpec(
        tuple(names),
        help,
        choices,
        nargs,
        metavar,
        const,
        parse,
        repeatable,
        reads,
        may_be_empty,
    )
    metadata = {"flag": spec}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type[S], **defaults: object) -> Any:
    """Declare a field of a job's configuration that holds one section.

    Args:
        kind: The section's dataclass, of fields made with `flag`.
        defaults: This job's defaults, where they differ from the section's own.
    """
    factory = functools.partial(kind, **defaults)
    return dataclasses.field(default_factory=factory, metadata={"section": factory})


def sections(job: type) -> dict[str, functools.partial[Any]]:
    """Return name → constructor of every section of a job's configuration; `.func` is the section's class."""
    return {field.name: field.metadata["section"] for field in dataclasses.fields(job)}


def flag_fields(config_class: type) -> list[tuple[AnyField, FlagSpec]]:
    """Return the fields of a configuration class that have a command-line flag, in order of declaration."""
    return [
        (field, field.metadata["flag"])
        for field in dataclasses.fields(config_class)
        if "flag" in field.metadata
    ]


def check(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds. The message names the flag and the fix."""
    if not condition:
        raise ConfigError(message)


def check_file(path: str | Path, message: str) -> None:
    """Check the file of a flag that `reads`: it must exist on rank 0, and is sent to ranks that lack it.

    The name of published weights is only looked up when they are read.
    """
    is_there = Path(path).is_file() or is_published(path)
    check(int(os.environ.get("RANK", "0")) > 0 or is_there, message)


def check_setting(condition: bool, setting: str, value: object, problem: str) -> None:
    """Raise a `SettingError` unless `condition` holds."""
    if not condition:
        raise SettingError(setting, value, problem)


def check_choice(setting: str, value: str, choices: Iterable[str]) -> None:
    """Raise a `SettingError` unless `value` is one of `choices`; the nearest one is suggested."""
    names = list(choices)
    check_setting(value in names, setting, value, f"choose from {', '.join(names)}{nearest(value, names)}")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean X?` with the closest candidates, or "" if none is close.

    The dashes of flags do not count towards similarity.
    """
    bare = {candidate.lstrip("-"): candidate for candidate in candidates}
    word = name.lstrip("-")
    matches = difflib.get_close_matches(word, list(bare), n=3, cutoff=0.6)
    likeness = [difflib.SequenceMatcher(None, match, word).ratio() for match in matches]
    close = [
        bare[match] for match, ratio in zip(matches, likeness, strict=True) if ratio >= likeness[0] - 0.1
    ]
    return f"; did you mean {' or '.join(close)}?" if close else ""
