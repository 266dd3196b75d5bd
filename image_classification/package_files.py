"""Import of every file of a package, so that each can register its definitions."""

from __future__ import annotations

import functools
import importlib
import pkgutil


@functools.cache
def import_files_of(package: str) -> None:
    """Import the modules directly in a package, in the order of their names; a second call is a no-op."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
