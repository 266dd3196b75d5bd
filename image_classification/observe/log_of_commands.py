"""Library log messages for command-line users: flags instead of argument names."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping

from image_classification.config import with_flags


class _WithFlags(logging.Formatter):
    def __init__(self, flags: Callable[[], Mapping[str, str]]) -> None:
        super().__init__()
        self._flags = flags

    def format(self, record: logging.LogRecord) -> str:
        return with_flags(super().format(record), self._flags())


@contextlib.contextmanager
def log_names_flags(flags: Callable[[], Mapping[str, str]] = dict) -> Iterator[None]:
    """Print warnings that no other handler takes with flags in place of `arguments`, inside the block.

    Args:
        flags: Returns argument → flag of the current command; see `config.told`.
    """
    handler = logging.lastResort
    if handler is None:
        yield
        return
    before = handler.formatter
    handler.setFormatter(_WithFlags(flags))
    try:
        yield
    finally:
        handler.setFormatter(before)
