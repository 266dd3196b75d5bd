"""Names of weights that libraries publish, such as `torchvision/resnet50:IMAGENET1K_V2`, told from files."""

from __future__ import annotations

from pathlib import Path

LIBRARIES = ("torchvision", "timm")


def is_published(word: str | Path) -> bool:
    """Whether a word names weights of a library, and no file that is there."""
    library, _, name = str(word).partition("/")
    return library in LIBRARIES and bool(name) and not Path(word).exists()
