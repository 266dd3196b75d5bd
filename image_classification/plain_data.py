"""The one name for data that files and states hold: what they mean, only their readers know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Key → number, text, tensor, list of these, or `Plain` again: what JSON, YAML and checkpoints can hold.
Plain = dict[str, Any]
#: The same, where it is only read.
PlainMapping = Mapping[str, Any]
#: One value of it.
PlainValue = Any
