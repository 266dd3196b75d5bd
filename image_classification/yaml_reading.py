"""Reading of YAML from users' files and flags: only plain values, or a single error.

Aliases are not supported, since with them a few lines can expand to gigabytes, nor are types that JSON lacks: a date
stays text.
"""

from __future__ import annotations

from pathlib import Path

from image_classification.config import ConfigError
from image_classification.extras import optional_import
from image_classification.plain_data import PlainValue
from image_classification.small_files import read_text

with optional_import():
    import yaml

_LARGEST = 1 << 20
_DEEPEST = 16
_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases, dates, sets and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read here: write the value out")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_PlainLoader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _TYPES
}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> PlainValue:
    """Parse a text to a plain value.

    Raises:
        ConfigError: The text is not YAML of plain values. The message is one line.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(reason) from None


def read_yaml_mapping(path: Path, what: str) -> dict[object, PlainValue]:
    """Read the mapping in a file; an empty file is an empty mapping.

    Args:
        path: The file.
        what: Name of the file in messages, such as its flag.

    Raises:
        ConfigError: The file does not exist, cannot be read, or holds no mapping of plain values.
    """
    text = read_text(path, f"{what}:", _LARGEST)
    try:
        content = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{what}: {path} is not readable YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{what}: {path} must hold a mapping from option names to values")
    return content
