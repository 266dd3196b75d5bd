"""A job's resolved configuration, as plain data and as the recipe saved with a run."""

from __future__ import annotations

from pathlib import Path

from image_classification import plugins
from image_classification.config import flag_fields, sections
from image_classification.extras import optional_import
from image_classification.file_writing import write_text

with optional_import():
    import yaml


def to_plain(config: object) -> dict[str, object]:
    """Return a job's resolved configuration as one flat, JSON-able mapping, which runs save and YAML can read back."""
    plain: dict[str, object] = {"plugin": list(plugins.imported_plugins)} if plugins.imported_plugins else {}
    for name in sections(type(config)):
        section = getattr(config, name)
        for field, _ in flag_fields(type(section)):
            value = getattr(section, field.name)
            if isinstance(value, (list, tuple)):
                plain[field.name] = [_plain_value(item) for item in value]
            else:
                plain[field.name] = _plain_value(value)
    return plain


def _plain_value(value: object) -> object:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def save_yaml(config: object, path: Path) -> None:
    """Write the resolved configuration as a YAML recipe that `--config` reads back."""
    write_text(path, yaml.safe_dump(to_plain(config), sort_keys=True))
