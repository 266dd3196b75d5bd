"""`python -m image_classification.write_flags TABLE…` writes the lists of flags: `make flags`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from image_classification.file_writing import write_text
from image_classification.flag_lists import PACKAGES, list_of, list_path
from image_classification.verbs import AnyVerb, verb_of


def lists(tables: Sequence[str]) -> dict[Path, str]:
    """Return the file of each package → its content.

    Args:
        tables: Tables of verbs, such as "pruning.__main__:ALL_VERBS". Verbs without their own parser are left out, and
            so are entries that lead to another table.
    """
    verbs: dict[str, AnyVerb] = {}
    for word in tables:
        module, _, name = word.partition(":")
        for place, _ in getattr(importlib.import_module(module), name).values():
            if not place.endswith(".__main__"):
                verbs[place] = verb_of(place)
    parsers = {place: verb.parser() for place, verb in sorted(verbs.items()) if verb.parser is not None}
    found = {}
    for package in PACKAGES:
        content = list_of({place: made for place, made in parsers.items() if place.startswith(f"{package}.")})
        found[list_path(package)] = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return found


def main(tables: Sequence[str]) -> int:
    """Write the files."""
    for path, text in lists(tables).items():
        write_text(path, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
