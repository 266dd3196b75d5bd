"""Trust in users' code that builds networks: it must be named on a command line, in a recipe or in Python.

`models/own_code.py` runs the code. This module does not import torch, because command lines are parsed before anything
else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_trusted: set[str] = set()


def is_own_code(arch: str) -> bool:
    """Whether a name has the form `package.module:Callable`."""
    return _NAME.fullmatch(arch) is not None


def trust(words: Iterable[str], modules: Iterable[str] = ()) -> None:
    """Record names given by the user: such networks may be built, even if only a file names them.

    Args:
        words: Names, also as `--flag=NAME`; others are ignored.
        modules: Modules whose networks are all trusted.
    """
    _trusted.update(name for word in words if is_own_code(name := word.rpartition("=")[2]))
    _trusted.update(modules)


def is_trusted(arch: str) -> bool:
    """Whether the user has named this network, or its module."""
    return arch in _trusted or arch.partition(":")[0] in _trusted
