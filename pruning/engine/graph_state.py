"""The parts of a channel graph as plain data, for a checkpoint, and the comparison of two graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruning.engine.groups import AttributeAxis, Axis, Group, Layer, Place
from pruning.engine.kept_statistics import Statistics

#: Name of a list in a channel graph → type of its elements.
PARTS: dict[str, Any] = {
    "groups": Group,
    "axes": Axis,
    "attributes": AttributeAxis,
    "places": Place,
    "layers": Layer,
    "statistics": Statistics,
}


def row_of(part: Any) -> dict[str, Any]:
    """Return the fields of one part of a graph in a form that a checkpoint can hold."""
    return {field.name: plain(getattr(part, field.name)) for field in dataclasses.fields(part)}


def differ(one: Any, other: Any) -> bool:
    """Whether two parts of graphs differ, ignoring reasons, notes and lines of code."""
    if isinstance(one, Statistics):
        one, other = one.without_line(), other.without_line()
    for name, mine in vars(one).items():
        its = getattr(other, name)
        if name in ("reason", "notes"):
            continue
        if isinstance(mine, np.ndarray) or isinstance(its, np.ndarray):
            if not np.array_equal(mine, its):
                return True
        elif isinstance(mine, tuple) and mine and isinstance(mine[0], np.ndarray):
            if len(mine) != len(its) or not all(map(np.array_equal, mine, its)):
                return True
        elif mine != its:
            return True
    return False


def plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(np.int32))
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def as_arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.numpy().astype(np.int64)
    return tuple(as_arrays(item) for item in value) if isinstance(value, list) else value
