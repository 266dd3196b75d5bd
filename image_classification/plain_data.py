"""Types for plain data in files and states, whose meaning only their readers know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Key → number, text, tensor, list of these, or `Plain` again: anything that JSON, YAML and checkpoints can hold.
Plain = dict[str, Any]
#: The same, read-only.
PlainMapping = Mapping[str, Any]
#: A value in it.
PlainValue = Any
