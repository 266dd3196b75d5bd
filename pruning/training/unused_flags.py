"""Flags that would have no effect are refused rather than ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from image_classification.config import check

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def refuse_unused(config: DataclassInstance, names: Iterable[str], needed: str) -> None:
    """Make sure that flags keep their defaults.

    Args:
        config: The section.
        names: Fields of it that mean nothing as the other flags are.
        needed: The flag that they would need.

    Raises:
        ConfigError: Naming the first one that was given.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in names:
        field = fields[name]
        default = field.default_factory() if callable(field.default_factory) else field.default
        spelling = "--" + name.replace("_", "-")
        check(
            getattr(config, name) == default,
            f"{spelling} has no effect without {needed}: add it, or leave {spelling} out",
        )
