"""Reads small files of users and of earlier runs completely: regular, of limited size, UTF-8, or one clear error.

A path may name anything: a folder, a pipe that waits for a writer, an endless device, terabytes of zeros. Paths are
checked before they are read, so that none of these hangs a job or fills its memory.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path

from image_classification.config import ConfigError
from image_classification.plain_data import PlainValue

_LARGEST = 64 << 20


def problem_of(path: Path) -> str | None:
    """Return why a path is not a file that can be read to its end; None if it is one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            return f"is a link to what cannot be opened ({error.strerror})"
        return (
            "does not exist"
            if isinstance(error, FileNotFoundError)
            else f"cannot be opened ({error.strerror})"
        )
    if stat.S_ISDIR(mode):
        return "is a directory"
    return None if stat.S_ISREG(mode) else "is no regular file, but a pipe or a device"


def read_bytes(path: Path, what: str, largest: int = _LARGEST) -> bytes:
    """Return the content of a file.

    Args:
        path: The file.
        what: Its name in messages, such as its flag.
        largest: Largest allowed size, in bytes.

    Raises:
        ConfigError: The file does not exist, or is larger.
    """
    problem = problem_of(path)
    if problem is None and path.stat().st_size > largest:
        problem = f"is larger than {largest >> 20} MiB, which no such file is"
    if problem is not None:
        raise ConfigError(f"{what} {path} {problem}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read ({error.strerror})") from error


def read_text(path: Path, what: str, largest: int = _LARGEST) -> str:
    """Return the text of a file; see `read_bytes`.

    Raises:
        ConfigError: The file does not exist, is larger, or is not UTF-8 text.
    """
    try:
        return read_bytes(path, what, largest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not UTF-8 text (at byte {error.start})") from error


def read_json(path: Path, what: str, largest: int = _LARGEST) -> PlainValue:
    """Return the value of a JSON file; see `read_bytes`.

    Raises:
        ConfigError: The file does not exist, is larger, or is not JSON of finite numbers.
    """
    text = read_text(path, what, largest)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{what} {path} is not JSON: {error}") from error


def parse_json(text: str | bytes) -> PlainValue:
    """Parse JSON text.

    Raises:
        ValueError: The text is not JSON of finite numbers, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _refuse_constant(word: str) -> PlainValue:
    raise ValueError(f"it holds {word}, which JSON does not have")
