"""Lazy imports of a package's names, on first use (PEP 562).

`python -m PACKAGE --help` imports the package before its command line is parsed. A package whose `__init__` imports
nothing answers at once, and using one of its names loads only what that name needs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """Return the `__getattr__` of a package.

    Type checkers do not follow it, so the package also imports the same names under `if TYPE_CHECKING:`.

    Args:
        package: `__name__` of its `__init__`.
        modules: Name → module that defines it.
    """

    def get(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
