"""What the library logs, as users of a command line read it: flags in place of the names of arguments."""

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
    """Inside, warnings that no other handler takes are printed with flags in place of `arguments`.

    Args:
        flags: Gives argument → flag of the command at hand; see `config.told`.
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
