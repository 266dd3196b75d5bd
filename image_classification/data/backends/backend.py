"""Registry of backends: the values of `--data-backend`, their requirements, and the choice of `auto`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch

from image_classification.config import check_choice
from image_classification.data.loader import Loader
from image_classification.package_files import import_files_of

AUTO = "auto"

Factory = TypeVar("Factory", bound=Callable[..., Loader])


@dataclasses.dataclass(frozen=True)
class Backend:
    """One entry of the registry.

    Attributes:
        name: Its name in `data_backend`.
        make: Creates a loader from `(manifest, planner, stage, options)`, like `PlannedLoader`. A backend that
            needs no data set is called with the arguments of `SyntheticLoader` instead.
        problem: Returns why it cannot work on a device, with the remedy in the same line, or None.
        preference: How much `auto` prefers it on a device; 0 means only on request.
        aliases: Other spellings of the name.
        needs_dataset: Whether it reads images; otherwise it generates them.
    """

    name: str
    make: Callable[..., Loader]
    problem: Callable[[torch.device], str | None]
    preference: Callable[[torch.device], int]
    aliases: tuple[str, ...] = ()
    needs_dataset: bool = True


#: Package whose modules register their backends on import.
_PACKAGE = __name__.rpartition(".")[0]
_BACKENDS: dict[str, Backend] = {}


def register_backend(
    name: str,
    *,
    problem: Callable[[torch.device], str | None] = lambda device: None,
    preference: Callable[[torch.device], int] = lambda device: 0,
    aliases: tuple[str, ...] = (),
    needs_dataset: bool = True,
) -> Callable[[Factory], Factory]:
    """Decorator that registers a loader class, or a function that creates a loader.

    A function may do its imports when it is called, so that only the chosen backend is loaded.

    Args:
        name: Value of `--data-backend`.
        problem: Returns why it cannot work on a device, or None.
        preference: How much `auto` prefers it on a device.
        aliases: Other spellings of the name.
        needs_dataset: Whether it reads images; otherwise it generates them.

    Raises:
        ValueError: The name, or an alias, is taken.
    """

    def enter(make: Factory) -> Factory:
        backend = Backend(name, make, problem, preference, aliases, needs_dataset)
        for spelling in (name, *aliases):
            if spelling == AUTO or spelling in _BACKENDS:
                raise ValueError(f"there already is a backend called {spelling!r}")
            _BACKENDS[spelling] = backend
        return make

    return enter


def backend_names() -> tuple[str, ...]:
    """Return all values of `data_backend`: "auto", names and aliases."""
    import_files_of(_PACKAGE)
    return (AUTO, *_BACKENDS)


def find_backend(name: str) -> Backend:
    """Return the backend with a name or alias.

    Raises:
        SettingError: There is no such backend; the nearest name is suggested.
    """
    import_files_of(_PACKAGE)
    check_choice("data_backend", name, _BACKENDS)
    return _BACKENDS[name]


def choose_backend(name: str, device: torch.device) -> Backend:
    """Return the backend with a name; for "auto" the most preferred one that works on the device.

    Raises:
        SettingError: There is no backend of that name.
    """
    if name != AUTO:
        return find_backend(name)
    import_files_of(_PACKAGE)
    working = [backend for backend in _BACKENDS.values() if backend.problem(device) is None]
    return max(working, key=lambda backend: backend.preference(device))
