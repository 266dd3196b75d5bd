"""Refusal of flags that would otherwise be silently ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from image_classification.config import check

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def refuse_unused(config: DataclassInstance, names: Iterable[str], needed: str) -> None:
    """Check that flags keep their defaults.

    Args:
        config: The configuration section.
        names: Fields that have no effect given the other flags.
        needed: The flag they require.

    Raises:
        ConfigError: Such a flag is given; the message names the first.
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
