"""Names of weights published by libraries, such as `torchvision/resnet50:IMAGENET1K_V2`, as opposed to files."""

from __future__ import annotations

from pathlib import Path

LIBRARIES = ("torchvision", "timm")


def is_published(word: str | Path) -> bool:
    """Whether a word is the name of a library's weights and not an existing file."""
    library, _, name = str(word).partition("/")
    return library in LIBRARIES and bool(name) and not Path(word).exists()
